"""What the fork server of `tests.harness.ranks` imports once, so that the ranks need not."""

import filelock  # noqa: F401
import safetensors.torch  # noqa: F401
import tomli_w  # noqa: F401
import tyro  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401
from torch.nn.parallel import DistributedDataParallel  # noqa: F401
