"""The store as a meeting place beside the collectives: it still works when the collectives under test do not."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch._C._distributed_c10d import Store

from ddp_circles.job.watch import waiting


class Board:
    """Ranks post values on it; rank 0 reads them all, decides, and posts the answer.

    Values are made of numbers, texts and None, in tuples, lists, dictionaries and the `types`, which are dataclasses
    and named tuples: a reader finds the types that were posted.
    """

    def __init__(self, store: Store, rank: int, world_size: int, types: Iterable[type] = ()) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._types: dict[str, type] = {kind.__name__: kind for kind in types}
        self._page = 0

    def agree(self, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Return, on every rank, what rank 0's `decide` makes of the values of all ranks, in their order.

        Waits for as long as it takes: the alarm sets the limit.
        """
        self._page += 1
        self._post(self._rank, value)
        if self._rank == 0:
            self._post("answer", decide([self._read(rank) for rank in range(self._world_size)]))
            if self._page > 1:  # every rank has read the previous answer before it posted its value
                self._clear("answer", self._page - 1)
        answer = self._read("answer")
        self._clear(self._rank, self._page)
        return answer

    def part(self) -> None:
        """Leave together: rank 0, which may hold the store, goes when all have read its last answer."""
        self.agree(None, lambda _: None)
        self._page += 1
        self._post(self._rank, None)
        for rank in range(self._world_size) if self._rank == 0 else ():
            self._read(rank)

    def _key(self, who: int | str, page: int | None = None) -> str:
        return f"board/{page or self._page}/{who}"

    def _clear(self, who: int | str, page: int) -> None:
        with waiting:  # as in all calls of the store, whose holder may be stuck
            self._store.delete_key(self._key(who, page))

    def _post(self, who: int | str, value: Any) -> None:
        content = json.dumps(self._encode(value))
        with waiting:
            self._store.set(self._key(who), content)

    def _read(self, who: int | str) -> Any:
        key, nap, longest = self._key(who), 0.002, max(0.1, self._world_size / 2000)
        with waiting:
            while not self._store.check([key]):
                time.sleep(nap)
                nap = min(2 * nap, longest)
            content = self._store.get(key)
        return self._decode(json.loads(content))

    def _encode(self, value: Any) -> Any:
        """Turn what has parts into a list of its type's name and the parts."""
        if is_dataclass(value):
            parts: Iterable[Any] = [getattr(value, field.name) for field in fields(value)]
        elif isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, (list, tuple)):
            parts = value
        else:
            return value
        return [type(value).__name__, *map(self._encode, parts)]

    def _decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        name, *parts = value[0], *map(self._decode, value[1:])
        plain: Any = {"list": list, "tuple": tuple, "dict": dict}.get(name)
        return plain(parts) if plain else self._types[name](*parts)
