"""A compact table of keys that were seen: sorted arrays, of which small ones are merged into larger ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Known:
    """uint64 keys, each with the day on which it was added, int32, and values in columns of the given dtypes.

    Memory: 12 bytes a key, besides its values. Adding N keys one batch after the other takes O(N log N) in all.
    """

    def __init__(self, **dtypes: type[np.generic]) -> None:
        self._dtypes: dict[str, type[np.generic]] = {"key": np.uint64, "day": np.int32, **dtypes}
        self._levels: list[
            dict[str, np.ndarray]
        ] = []  # each sorted by key, and less than half as long as the one before

    @property
    def columns(self) -> list[str]:
        """Names of the arrays that `to_arrays` gives."""
        return list(self._dtypes)

    def __len__(self) -> int:
        return sum(len(level["key"]) for level in self._levels)

    def find(self, keys: np.ndarray, since: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Whether each of (N,) keys was added on day `since` or later, (N,) bool; and its values, (N,) each."""
        found = np.zeros(len(keys), bool)
        values = {
            name: np.zeros(len(keys), dtype) for name, dtype in self._dtypes.items() if name not in ("key", "day")
        }
        for level in self._levels:
            place = np.minimum(np.searchsorted(level["key"], keys), len(level["key"]) - 1)
            here = (level["key"][place] == keys) & (level["day"][place] >= since)
            if here.any():
                found |= here
                for name, column in values.items():
                    column[here] = level[name][place[here]]
        return found, values

    def add(self, keys: np.ndarray, day: int, since: int, **values: np.ndarray) -> None:
        """Adds distinct keys, none of which `find` finds; forgets those before day `since` where they are merged."""
        if not len(keys):
            return
        order = np.argsort(keys)
        level = {"key": keys[order], "day": np.full(len(keys), day, np.int32)}
        self._levels.append(level | {name: column[order] for name, column in values.items()})
        while len(self._levels) > 1 and len(self._levels[-2]["key"]) < 2 * len(self._levels[-1]["key"]):
            self._merge(since)

    def forget(self, since: int) -> None:
        """Forgets the keys that were added before day `since`."""
        self._levels = [_kept(level, level["day"] >= since) for level in self._levels]
        self._levels = [level for level in self._levels if len(level["key"])]

    def _merge(self, since: int) -> None:
        one, other = self._levels[-2:]
        del self._levels[-2:]
        both = {name: np.concatenate([one[name], other[name]]) for name in self._dtypes}
        # A key that is in both was added again once it counted as forgotten.
        both = _kept(both, both["day"] >= since)
        order = np.argsort(both["key"], kind="stable")
        if len(order):
            self._levels.append({name: column[order] for name, column in both.items()})

    def to_arrays(self, since: int) -> dict[str, np.ndarray]:
        """All keys of day `since` or later, by key, with their days and values."""
        while len(self._levels) > 1:
            self._merge(since)
        self.forget(since)
        if not self._levels:
            return {name: np.empty(0, dtype) for name, dtype in self._dtypes.items()}
        return dict(self._levels[0])

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `to_arrays` gave."""
        level = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._dtypes.items()}
        self._levels = [level] if len(level["key"]) else []


def _kept(level: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return level if mask.all() else {name: column[mask] for name, column in level.items()}
