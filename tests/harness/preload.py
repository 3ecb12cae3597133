"""Imported once by the fork server of `tests.harness.ranks`, so that no rank has to."""

import gc

import torch._dynamo  # noqa: F401 - the optimizers would import it at their first step
from sklearn.datasets import make_circles
from sklearn.model_selection import train_test_split

import ddp_circles.run
import ddp_circles.verify.session  # noqa: F401
import tests.harness.runs  # noqa: F401
from ddp_circles.train import parse_command_line

# Their first calls fill caches, which takes longer than a small training. No operation of torch: that starts threads.
parse_command_line([])
train_test_split(*make_circles(10))
gc.freeze()  # a collection in a rank leaves these objects alone, and the memory pages shared
