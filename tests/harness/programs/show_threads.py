"""Pin two threads, then print how many torch uses, and what the math libraries are told."""

import os

from ddp_circles.job.world import pin_threads

pin_threads(2)

import torch  # noqa: E402 - as in a program that imports torch late

print(torch.get_num_threads(), *(os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")))
