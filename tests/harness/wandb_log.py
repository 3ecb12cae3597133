"""Reads what a run's offline folders hold, in the format of wandb's own files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEAD = struct.Struct("<IHB")


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines logged in all offline folders of `run_dir`, in the order in which the folders were begun."""
    found = [record.history for record in records(run_dir) if record.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key): json.loads(item.value_json) for item in one.item} for one in found]


def epochs(run_dir: Path) -> list[int]:
    """The epochs among them."""
    return [line["epoch"] for line in history(run_dir)]


def only_folder(run_dir: Path) -> Path:
    """The offline folder, of which there must be one."""
    (folder,) = run_dir.glob("wandb/offline-run-*")
    return folder


def records(run_dir: Path) -> Iterator[Any]:
    """The records in all offline folders of `run_dir`."""
    from wandb.proto import wandb_internal_pb2

    for log in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        for content in whole_records(log.read_bytes()):
            yield wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]


def whole_records(log: bytes) -> Iterator[bytes]:
    """The whole records of a file: LevelDB's log format behind a header of seven bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    position, record = 7, b""
    while position + HEAD.size <= len(log):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < HEAD.size:
            position += left_in_block
            continue
        _, length, kind = HEAD.unpack_from(log, position)
        position += HEAD.size
        if kind not in (1, 2, 3, 4) or position + length > len(log):
            return
        record += log[position : position + length]
        position += length
        if kind in (1, 4):
            yield record
            record = b""
