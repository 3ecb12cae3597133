"""Tell the math libraries to use two threads, then import torch and print how many it uses."""

import os

from ddp_circles.job.ranks import set_thread_variables

set_thread_variables(2)

import torch  # noqa: E402 - as in a program that imports torch late

print(torch.get_num_threads(), *(os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")))
