"""Rules for every test: nothing from outside reaches in, and nothing that a test starts outlives it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import entry_points
from multiprocessing import forkserver, resource_tracker

import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling, Scheduling

from tests.harness.ranks import LAUNCHER_VARIABLES

STRAY_VARIABLES = (*LAUNCHER_VARIABLES, "RANKS", "GLOO_", "NCCL_", "OMP_NUM_", "MKL_NUM_", "TORCH_DISABLE_", "PET_")
LOOPBACK = {"PET_RDZV_BACKEND": "loopback", "PET_RDZV_ENDPOINT": "localhost"}
"""torchrun's own variables for its options: every torchrun of a single node stays on the loopback."""
SET_BY_IMPORTS = {"PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR"}
"""pytest's own, and those that scikit-learn and torch set when they are imported."""
GRACE_SECONDS = 5.0
"""The time that processes and threads which a test has ended may take to be gone."""
TOGETHER = ("tests/slurm/", "tests/ranks/test_verify")
"""Beginnings of tests that share something that takes long to make, within a file or folder."""
LONGEST = (*TOGETHER, "tests/torchrun/")
MOST_LANES = 5
"""Most lanes: each starts torch twice."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background job: what is started here would too
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in list(os.environ):  # before the fork server starts: its ranks see the environment of that moment
    if _name.startswith(STRAY_VARIABLES):
        del os.environ[_name]
if entry_points(group="torchrun.handlers", name="loopback"):  # else the project is not installed, only found
    os.environ |= LOOPBACK


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--forbid-skips`, under which a test that could not run has failed, `--all`, `--gpu` and `--seed`."""
    parser.addoption("--forbid-skips", action="store_true", help="a skipped test is a failed one")
    parser.addoption("--all", action="store_true", help="run the thorough tests too")
    parser.addoption("--gpu", action="store_true", help="run tests/gpu alone, on CUDA instead of the CPU")
    parser.addoption("--seed", type=int, help="repeat the long rehearsal of disturbances that printed this seed")


def pytest_configure(config: pytest.Config) -> None:
    """Let `--gpu` run tests/gpu if nothing else is named; end where there is no GPU."""
    if not config.getoption("gpu"):
        return
    import torch  # not by the process that only hands tests to lanes

    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--gpu: torch {torch.__version__} sees no CUDA device here")
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = ["tests/gpu"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure under `--forbid-skips`."""
    report = yield
    if item.config.getoption("forbid_skips") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"--forbid-skips: {report.longrepr}"
    return report


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The lanes in which `launch/test.sh` runs tests side by side: two more than cores, for most tests wait.

    None for tests of single files, for output that is not captured and with `--gpu`: a second start of torch would take
    longer, and the lanes would swallow the output, or compete for the device.
    """
    single_files = all(".py" in argument for argument in config.args)
    alone = single_files or config.getoption("capture") == "no" or config.getoption("gpu")
    return 0 if alone else min((os.cpu_count() or 1) + 2, MOST_LANES)


class Lanes(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed
    """Hands out tests one by one, but together those that share the Slurm cluster, or finished verifications."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/slurm/"):
            return "slurm"
        return nodeid.partition("::")[0] if nodeid.startswith(TOGETHER) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Distribute tests over the lanes."""
    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the thorough tests without `--all`, and the long rehearsals unless `-m` speaks of them.

    The tests that take longest come first, lest one lane is left with them.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    left_out = set() if "long" in config.getoption("markexpr") else {"long"}
    if not (config.getoption("all") or config.getoption("gpu")):
        left_out.add("thorough")
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import torch while the first tests run, if any test here will need it."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    found = [value for module in modules for value in vars(module).values() if callable(value)]
    if any(getattr(value, "__module__", "") in ("tests.harness.ranks", "tests.harness.runs") for value in found):
        forkserver.ensure_running()


def _children() -> dict[int, psutil.Process]:
    """Processes that tests have started, by id: running children of pytest and of the fork server."""
    server = getattr(forkserver._forkserver, "_forkserver_pid", None)
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return {
        child.pid: child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in (server, tracker) and _runs_under(child, (os.getpid(), server))
    }


def _runs_under(process: psutil.Process, parents: tuple[int | None, ...]) -> bool:
    try:
        return process.ppid() in parents and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(process: psutil.Process) -> str:
    """Kill `process` and its children; returns its command line."""
    try:
        command = " ".join(process.cmdline())
        for child in process.children(recursive=True):
            child.kill()
        process.kill()
    except psutil.NoSuchProcess:
        return "gone by now"
    return command


def _after_grace(leftovers: Callable[[], list[int] | list[str]]) -> list[int] | list[str]:
    """Return what `leftovers` finds, asking again until it finds nothing or the time is up."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process running, and end that process."""
    before = _children()
    yield
    if _after_grace(lambda: [pid for pid in _children() if pid not in before]):
        ended = [_end(child) for pid, child in _children().items() if pid not in before]
        pytest.fail(f"left running: {ended}")


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread running."""
    before = set(threading.enumerate())
    yield
    left = _after_grace(lambda: [thread.name for thread in threading.enumerate() if thread not in before])
    assert not left, f"threads left running: {left}"


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Fail a test that leaves a process group open, and close it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("a process group was left open")


@pytest.fixture(autouse=True)
def no_variable_left() -> Iterator[None]:
    """Fail a test that changes the environment, and change it back."""
    before = dict(os.environ)
    yield
    after = {name: value for name, value in os.environ.items() if name not in SET_BY_IMPORTS}
    changed = sorted({name for name, _ in (before.items() ^ after.items()) if name not in SET_BY_IMPORTS})
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    assert not changed, f"environment variables left changed: {changed}"
