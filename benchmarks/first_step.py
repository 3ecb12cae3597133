"""Run a module up to the end of its first optimizer step: python -m benchmarks.first_step FILE MODULE [ARGUMENT ...].

Rank 0 writes the time of day to FILE; then the process exits at once, without clean-up.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    """Register the exit, then run the module as `python -m` would."""
    time_file = Path(sys.argv[1])

    def exit_now(*_: Any) -> None:
        if os.environ.get("RANK", "0") == "0":
            time_file.write_text(repr(time.time()), encoding="utf-8")
        os._exit(0)

    register_optimizer_step_post_hook(exit_now)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
