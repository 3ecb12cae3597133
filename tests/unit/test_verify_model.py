"""The model of the checked training: every parameter takes part, on a scale that the exact sums resolve."""

import pytest
import torch

from ddp_circles.models import loss_sum
from ddp_circles.verify import oracle
from ddp_circles.verify.oracle import Workload


@pytest.mark.parametrize("workload", [oracle.choose_workload(1, on_cuda=False), Workload((256, 256, 256), 8, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_all_gradients_are_far_from_both_ends_of_the_exact_sums(workload: Workload, seed: int) -> None:
    model = oracle.make_model(workload, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    points, classes = oracle.make_points(workload, seed)[0]
    batch = workload.micro_batches * workload.samples
    for inputs, targets in zip(points.split(batch), classes.split(batch), strict=True):
        optimizer.zero_grad()
        (loss_sum(model(inputs), targets) / batch).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sizes = parameter.grad.abs()
            assert 2.0**-16 < sizes.max() < 2.0**6, name
            assert (sizes > 2.0**-40).float().mean() > 0.1, name
