"""Requests to try a server with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq


class Bodies:
    """Requests drawn from the users and candidates that a model knows."""

    def __init__(self, model: Path) -> None:
        self._example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))
        self._random = np.random.default_rng(0)
        latest = {role: pq.read_table(model / "features" / f"latest.{role}.parquet") for role in ("user", "candidate")}
        self._users, self._candidates = latest["user"], latest["candidate"]
        (self._user,), (self._candidate,) = self._example["user"], self._example["candidates"]

    def elements(self, count: int, elements: int) -> list[dict[str, Any]]:
        """Requests of so many candidates each, as JSON values."""
        return [self._element(count, []) for _ in range(elements)]

    def ids(self, count: int, elements: int = 1) -> bytes:
        """A call with such requests."""
        return self._body(self.elements(count, elements))

    def given(self, count: int) -> bytes:
        """One element whose candidates come with all of their columns."""
        return self._body([self._element(count, [n for n in self._candidates.column_names if n != self._candidate])])

    def _element(self, count: int, columns: list[str]) -> dict[str, Any]:
        user = self._users[self._user][int(self._random.integers(len(self._users)))].as_py()
        rows = self._candidates.take(self._random.integers(0, len(self._candidates), count))
        candidates = {name: rows[name].to_pylist() for name in (self._candidate, *columns)}
        return {"user": {self._user: user}, "context": self._example["context"], "candidates": candidates}

    @staticmethod
    def _body(elements: list[dict[str, Any]]) -> bytes:
        return json.dumps({"inputs": elements}).encode()
