"""The file operations of a rank below one folder: recorded, cut short by SIGKILL, or failed; and a disk's power cut.

They are seen in the functions of `os` that make system calls. Files below the folder are opened by `_pyio`, the double
of `io` in Python, which calls those functions; the C code of `io` would go past them.
"""

import _pyio  # type: ignore[import-not-found]  # as good as io, but not typed
import builtins
import contextlib
import errno
import io
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tests.harness.runs import QUIET, train_hastily, train_plain

WRITES = ("write", "pwrite")
CHANGES = (
    *WRITES,
    "fsync",
    "fdatasync",
    "ftruncate",
    "truncate",
    "rename",
    "replace",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
)
READS = ("read", "stat", "listdir", "scandir")
NOT_YET = ("link", "symlink", "mkfifo", "mknod", "writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate")
"""Calls that change files and that nothing here understands."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE)


@dataclass(frozen=True)
class Operation:
    """One call, on a path relative to the folder."""

    call: str
    path: str
    descriptor: int | None = None
    """Of the file that the call opens or is given."""
    target: str = ""
    """The new name."""
    flags: int = 0
    start: int = 0
    data: bytes = b""
    """The bytes written."""
    length: int = 0
    """The length that the file is cut to."""
    failed: bool = False

    @property
    def changes(self) -> bool:
        """True unless it only reads."""
        writable = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return self.call in CHANGES or (self.call == "open" and bool(self.flags & writable))

    def __str__(self) -> str:
        return f"{self.call} {self.path}"


Perform = Callable[..., Any]
"""Makes the call; for a write, may be given other bytes."""
Handler = Callable[[Operation, Perform], Any]


def watch(folder: Path, handle: Handler) -> None:
    """Let `handle` make the calls of this process that concern `folder`, from now on and for good."""
    for name in ("open", *CHANGES, *READS, *NOT_YET):
        setattr(os, name, _seen(name, getattr(os, name), str(folder), handle))
    c_open = io.open

    def choose(file: Any, *arguments: Any, **options: Any) -> Any:
        below = not isinstance(file, int) and _relative(file, str(folder)) is not None
        return (_pyio.open if below else c_open)(file, *arguments, **options)

    io.open = builtins.open = choose


def _seen(name: str, call: Callable[..., Any], folder: str, handle: Handler) -> Callable[..., Any]:
    def seen(*arguments: Any, **options: Any) -> Any:
        place = arguments[0] if arguments else "."
        path = _relative(place, folder, options.get("dir_fd") or options.get("src_dir_fd"))
        if path is None:
            return call(*arguments, **options)
        assert name not in NOT_YET, f"os.{name} is used on {path}: teach tests/harness/disk.py what it does"
        descriptor = place if isinstance(place, int) else None
        operation = Operation(name, path, descriptor, **_details(name, arguments, options, folder))

        def perform(data: bytes | None = None) -> Any:
            return call(*arguments, **options) if data is None else call(place, data, *arguments[2:])

        return handle(operation, perform)

    return seen


def _details(name: str, arguments: tuple[Any, ...], options: dict[str, Any], folder: str) -> dict[str, Any]:
    if name == "open":
        return {"flags": arguments[1]}
    if name in WRITES:
        start = arguments[2] if name == "pwrite" else os.lseek(arguments[0], 0, os.SEEK_CUR)
        return {"data": bytes(arguments[1]), "start": start}
    if name in ("rename", "replace"):
        target = _relative(arguments[1], folder, options.get("dst_dir_fd"))
        assert target is not None, f"{arguments[0]} leaves the run directory"
        return {"target": target}
    return {"length": arguments[1]} if name in ("truncate", "ftruncate") else {}


def _relative(place: Any, folder: str, base: int | None = None) -> str | None:
    """The path of a file or descriptor relative to `folder`; None if it lies elsewhere."""
    try:
        path = _path_of(place) if isinstance(place, int) else Path(os.fsdecode(place))
        path = (_path_of(base) if base is not None else Path.cwd()) / path
    except OSError:  # closed: the call itself will say so
        return None
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else None


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


# ---- what happens to the operations


@dataclass(frozen=True)
class Record:
    """Keeps a journal of all operations, in a file elsewhere."""

    journal: Path

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        try:
            result = perform()
        except OSError:
            self._note(replace(operation, failed=True))
            raise
        if operation.call == "open":
            operation = replace(operation, descriptor=result)
        elif operation.call in WRITES:
            operation = replace(operation, data=operation.data[:result])
        self._note(operation)
        return result

    def _note(self, operation: Operation) -> None:
        with self.journal.open("ab") as file:
            pickle.dump(operation, file)


def read_journal(journal: Path) -> list[Operation]:
    """The operations that `Record` has kept."""
    operations: list[Operation] = []
    with journal.open("rb") as file, contextlib.suppress(EOFError):
        while True:
            operations.append(pickle.load(file))
    return operations


@dataclass
class Kill:
    """Ends the process at one of its moments: before a change, or in the middle of a write."""

    moment: int

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        if not operation.changes:
            return perform()
        self._pass("before", operation)
        if operation.call in WRITES and self.moment == 1:
            perform(operation.data[: len(operation.data) // 2])
        if operation.call in WRITES:
            self._pass("in the middle of", operation)
        return perform()

    def _pass(self, when: str, operation: Operation) -> None:
        self.moment -= 1
        if self.moment == 0:
            _note(f"killed {when} {operation}")
            os.kill(os.getpid(), signal.SIGKILL)


def count_moments(journal: list[Operation]) -> int:
    """The number of moments at which `Kill` can end a run with this journal."""
    return sum(1 + (operation.call in WRITES) for operation in journal if operation.changes)


@dataclass
class Fail:
    """Fails the operation `number` with `error`, and those after it if `lasting`.

    An error that does not keep anyone from reading becomes EIO where a reading operation is the first to fail. A full
    disk takes half of what the first write gives it, and what needs no more space.
    """

    number: int
    error: int
    lasting: bool
    begun: bool = False

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        self.number -= self.number > 0
        if self.number > 0 or (self.begun and not self.lasting):
            return perform()
        if not operation.changes and self.error in (errno.ENOSPC, errno.EROFS):
            if self.begun:
                return perform()
            self.error = errno.EIO
        if self.begun and self.error == errno.ENOSPC and not needs_space(operation):
            return perform()
        if not self.begun:
            _note(f"{errno.errorcode[self.error]} {'from now on' if self.lasting else 'once'}: {operation}")
        first, self.begun = not self.begun, True
        if first and self.error == errno.ENOSPC and operation.call in WRITES and len(operation.data) > 1:
            return perform(operation.data[: len(operation.data) // 2])
        raise OSError(self.error, os.strerror(self.error), operation.path)


def needs_space(operation: Operation) -> bool:
    """True for what a full disk refuses: new names, and bytes beyond the end of a file."""
    if operation.call in WRITES:
        assert operation.descriptor is not None
        return operation.start + len(operation.data) > os.fstat(operation.descriptor).st_size
    return operation.call == "mkdir" or (operation.call == "open" and bool(operation.flags & os.O_CREAT))


@dataclass
class Refuse:
    """Fails the `calls` on paths that match one of the `patterns` with `error`, each time."""

    error: int
    calls: tuple[str, ...]
    patterns: tuple[str, ...]

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        if operation.call in self.calls and any(fnmatch(operation.path, pattern) for pattern in self.patterns):
            raise OSError(self.error, os.strerror(self.error), operation.path)
        return perform()


@dataclass
class Full:
    """A disk that is full from the operation on that names a file like `pattern` for good."""

    pattern: str
    begun: bool = False

    def __call__(self, operation: Operation, perform: Perform) -> Any:
        if self.begun and needs_space(operation):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)
        result = perform()
        self.begun = self.begun or (operation.call == "replace" and fnmatch(operation.target, self.pattern))
        return result


NOTE = "rehearsal: "


def _note(text: str) -> None:
    print(f"{NOTE}{text}", file=sys.stderr, flush=True)


def train_watched(handle: Handler, defect: Callable[[], None] | None, run_dir: Path, *flags: object) -> None:
    """Train in `run_dir`, and let `handle` make rank 0's calls there; the other ranks may only read.

    `defect` breaks the package first, as a proof that a rehearsal would notice.
    """
    if defect is not None:
        defect()
    watch(run_dir, handle if os.environ["RANK"] == "0" else _only_read)
    train_hastily("--run-dir", run_dir, *QUIET, *flags)


def train_plain_watched(handle: Handler, run_dir: Path, *flags: object) -> None:
    """The same in a process that knows of no launcher."""
    watch(run_dir, handle)
    train_plain("--run-dir", run_dir, *QUIET, *flags)


def _only_read(operation: Operation, perform: Perform) -> Any:
    assert not operation.changes, f"a rank other than 0 wants to {operation}"
    return perform()


# ---- a disk that loses what was not flushed


@dataclass(eq=False)
class File:
    """A file's content, in memory and on the disk."""

    content: bytes = b""
    flushed: bytes = b""


@dataclass(eq=False)
class Folder:
    """A folder's names, in memory and on the disk, and the changes between the two in their order."""

    names: dict[str, "File | Folder"] = field(default_factory=dict)
    flushed: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def change(self, names: dict[str, "File | Folder | None"]) -> None:
        """Give names to nodes, or take them away where the node is None, all at once."""
        self.pending.append(names)
        _apply(names, self.names)

    def flush(self) -> None:
        """Make the names durable."""
        self.flushed, self.pending = dict(self.names), []


def _apply(change: dict[str, "File | Folder | None"], names: dict[str, "File | Folder"]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


Content = dict[str, bytes | None]
"""The files below a folder, by relative path; None for a folder."""


class Disk:
    """The run directory as the operations leave it, and what a power cut would leave of it.

    A file's content is durable after its fsync, a name after the fsync of its folder, as POSIX has it; the name of the
    run directory itself always is.
    """

    def __init__(self, content: Content) -> None:
        self.root = _make(content)
        self._open: dict[int, File | Folder] = {}

    def apply(self, operation: Operation) -> None:
        """Take in one operation of a journal."""
        if operation.failed or operation.call in READS:
            return
        call, path, descriptor = operation.call, operation.path, operation.descriptor
        node: Any = self._open[descriptor] if descriptor is not None and call != "open" else self._find(path)
        folder, name = self._place(path)
        if call == "open":
            assert descriptor is not None
            if node is None:
                node = File()
                folder.change({name: node})
            elif operation.flags & os.O_TRUNC:
                node.content = b""
            self._open[descriptor] = node
        elif call in WRITES:
            before, end = node.content.ljust(operation.start, b"\0"), operation.start + len(operation.data)
            node.content = before[: operation.start] + operation.data + before[end:]
        elif call in ("truncate", "ftruncate"):
            node.content = node.content[: operation.length].ljust(operation.length, b"\0")
        elif call in ("fsync", "fdatasync"):
            if isinstance(node, Folder):
                node.flush()
            else:
                node.flushed = node.content
        elif call in ("rename", "replace"):
            target, new_name = self._place(operation.target)
            assert target is folder, "no move between folders is known here"
            folder.change({new_name: node, name: None})
        elif call == "mkdir":
            if path != ".":
                folder.change({name: Folder()})
        else:
            assert call in ("unlink", "remove", "rmdir")
            folder.change({name: None})

    def _place(self, path: str) -> tuple[Folder, str]:
        folder = self._find(str(Path(path).parent))
        assert isinstance(folder, Folder)
        return folder, Path(path).name

    def _find(self, path: str) -> "File | Folder | None":
        node: File | Folder | None = self.root
        for name in Path(path).parts:
            node = node.names.get(name) if isinstance(node, Folder) else None
        return node

    def left(self) -> Content:
        """All that was done, flushed or not: the directory that a killed process leaves."""
        return _collect(self.root, lambda folder: folder.names, lambda file: file.content)

    def after_a_power_cut(self, dice: random.Random) -> Iterator[Content]:
        """Directories that a power cut may leave: nothing but what was flushed; all names; a part, at random."""
        yield _collect(self.root, lambda folder: folder.flushed, lambda file: file.flushed)
        yield _collect(self.root, lambda folder: folder.names, lambda file: file.flushed)
        yield _collect(self.root, lambda folder: _some_names(folder, dice), lambda file: _some_bytes(file, dice))


def _make(content: Content) -> Folder:
    """A folder whose content is durable."""
    names: dict[str, File | Folder] = {}
    for name in content:
        if "/" not in name:
            data = content[name]
            below = {
                path.removeprefix(f"{name}/"): value for path, value in content.items() if path.startswith(f"{name}/")
            }
            names[name] = File(data, data) if data is not None else _make(below)
    return Folder(names, dict(names))


def _collect(
    folder: Folder, names: Callable[[Folder], dict[str, File | Folder]], content: Callable[[File], bytes]
) -> Content:
    found: Content = {}
    for name, node in names(folder).items():
        if isinstance(node, File):
            found[name] = content(node)
        else:
            found[name] = None
            found |= {f"{name}/{below}": value for below, value in _collect(node, names, content).items()}
    return found


def _some_names(folder: Folder, dice: random.Random) -> dict[str, File | Folder]:
    """The durable names, and some of the later changes: a disk may write them in any order."""
    names = dict(folder.flushed)
    for change in folder.pending:
        if dice.random() < 0.5:
            _apply(change, names)
    return names


def _some_bytes(file: File, dice: random.Random) -> bytes:
    """The durable content; or the newest; or that up to some byte, and then the durable bytes, zeros or nothing."""
    old, new = file.flushed, file.content
    if old == new:
        return new
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    cut = dice.randint(same, len(new))
    return dice.choice([old, new, *(new[:cut] + rest for rest in (old[cut:], bytes(len(new) - cut), b""))])


def read(folder: Path) -> Content:
    """The content of a true folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def lay_out(content: Content, folder: Path) -> None:
    """Make the folder with this content."""
    folder.mkdir()
    for name, data in sorted(content.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
