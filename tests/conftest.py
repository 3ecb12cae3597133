"""What holds for every test: nothing from outside reaches in, and nothing that a test starts outlives it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker

import psutil
import pytest

from tests.ranks import LAUNCHER_VARIABLES

STRAY_VARIABLES = (*LAUNCHER_VARIABLES, "LOCAL_", "GLOO_", "OMP_", "MKL_", "OPENBLAS_", "CUBLAS_", "TORCH_DISABLE_SHARE")
SET_BY_IMPORTS = {"PYTEST_CURRENT_TEST", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
"""pytest's own, and those that scikit-learn sets when it is imported."""
GRACE_SECONDS = 5.0
"""How long what a test has ended may take to be gone."""

for _name in list(os.environ):  # before the fork server starts: its ranks see the environment of that moment
    if _name.startswith(STRAY_VARIABLES):
        del os.environ[_name]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--forbid-skips`, under which what could not be tested counts as failed; what needs a GPU may be skipped."""
    parser.addoption("--forbid-skips", action="store_true", help="a skipped test is a failed one, but for tests/gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # pluggy takes what the generator returns as the report
    report: pytest.TestReport = yield  # type: ignore[assignment, misc]
    needs_gpu = item.path.parent.name == "gpu"
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("forbid_skips") and not needs_gpu:
        report.outcome = "failed"
        report.longrepr = f"skipped, which --forbid-skips forbids: {call.excinfo and call.excinfo.value}"
    return report  # type: ignore[return-value]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long rehearsals unless `-m` speaks of them."""
    if "long" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the fork server import torch while the first tests run, if any test here will need it."""
    harness = sys.modules["tests.ranks"]
    names = ("Job", "run_ranks", "train_on")
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if any(getattr(module, name, None) is getattr(harness, name) for module in modules for name in names):
        forkserver.ensure_running()


def _infrastructure() -> set[int | None]:
    """The fork server and the resource tracker, which serve all tests."""
    return {
        getattr(forkserver._forkserver, "_forkserver_pid", None),  # type: ignore[attr-defined]
        getattr(resource_tracker._resource_tracker, "_pid", None),  # type: ignore[attr-defined]
    }


def _children() -> dict[int, psutil.Process]:
    """The running children of pytest and of the fork server: what tests start, by process id."""
    found: list[psutil.Process] = []
    parents = {os.getpid(), getattr(forkserver._forkserver, "_forkserver_pid", None)}  # type: ignore[attr-defined]
    for parent in parents - {None}:
        try:
            found += psutil.Process(parent).children()
        except psutil.NoSuchProcess:
            continue
    return {child.pid: child for child in found if child.pid not in _infrastructure() and _runs(child)}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _settled(leftovers: Callable[[], list[str]]) -> list[str]:
    """What `leftovers` still finds after a while."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process running, and end that process."""
    before = _children()

    def stray() -> dict[int, psutil.Process]:
        return {pid: child for pid, child in _children().items() if pid not in before}

    yield
    left = _settled(lambda: [f"process {pid}" for pid in stray()])
    for child in stray().values():
        left.append(" ".join(child.cmdline()[:12]))
        for process in [*child.children(recursive=True), child]:
            process.send_signal(signal.SIGKILL)
    assert not left, f"left running: {left}"


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread running."""
    before = set(threading.enumerate())
    yield
    left = _settled(lambda: [thread.name for thread in threading.enumerate() if thread not in before])
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
    after = dict(os.environ)
    changed = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and name not in SET_BY_IMPORTS
    )
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    assert not changed, f"environment variables left changed: {changed}"
