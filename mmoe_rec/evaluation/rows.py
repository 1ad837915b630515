"""The rows a metric is computed on: checked once, at the edge, so that the arithmetic after it needs no checks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.errors import UserError


@dataclass(frozen=True)
class MeasuredTask:
    """One predicted behaviour, as the metrics see it.

    Attributes:
        name: letters, digits, `_` and `-`; it becomes a part of metric and file names. `score`, `ranking` and
            `catalogue` are taken.
        kind: `binary` (labels 0 or 1, predictions are probabilities) or `regression` (labels and predictions are real).
        weight: the task's weight in the fused score, and so in the relevance of a row for NDCG and MRR.
    """

    name: str
    kind: Literal["binary", "regression"]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name in ("score", "ranking", "catalogue"):
            raise ValueError(
                f"task name {self.name!r} cannot be used in metric names: expected letters, digits, '_' and '-', "
                "and neither 'score' nor 'ranking' nor 'catalogue'"
            )
        if self.kind not in ("binary", "regression"):
            raise ValueError(f"task {self.name!r} has kind {self.kind!r}; expected 'binary' or 'regression'")
        if not np.isfinite(self.weight):
            raise ValueError(f"task {self.name!r} has weight {self.weight}; expected a finite number")


@dataclass(frozen=True)
class MeasuredRows:
    """N checked rows of U users and Q requests; users and requests are replaced by dense indices.

    Attributes:
        users: (U,) the distinct users, int64 or string.
        user: (N,) int64, index into `users`.
        requests: (Q,) the distinct requests, int64 or string.
        request: (N,) int64 in [0, Q).
        request_user: (Q,) int64, the user of each request.
        predictions: task -> (N,) float32 or float64.
        labels: task -> (N,) float64, NaN where unobserved.
        score: (N,) float64.
        weight: (N,) float64, positive.
        candidates, candidate: as `users` and `user`; None where no candidates were given.
    """

    users: pa.Array
    user: np.ndarray
    requests: pa.Array
    request: np.ndarray
    request_user: np.ndarray
    predictions: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    score: np.ndarray
    weight: np.ndarray
    candidates: pa.Array | None
    candidate: np.ndarray | None


def check_rows(
    tasks: Sequence[MeasuredTask],
    users: Any,
    requests: Any,
    predictions: Mapping[str, Any],
    labels: Mapping[str, Any],
    *,
    score: Any,
    weight: Any = None,
    candidates: Any = None,
) -> MeasuredRows:
    """Check the arguments of `sums.measure` and index users and requests.

    Raises:
        UserError: no row, a missing user, request, prediction or score, ids that are neither integers nor strings, a
            request with rows of two users, a probability outside [0, 1], a binary label other than 0 and 1, an infinite
            label, or a weight that is not a positive number. The message names the column and the first such row.
        ValueError: tasks without distinct names, a task without predictions or labels, a column of another length.
    """
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more tasks with distinct names, found {names}")
    distinct_users, user = _index("users", users)
    rows = len(user)
    if rows == 0:
        raise UserError("there is no row to evaluate; expected at least one")
    distinct_requests, request = _index("requests", requests)
    _same_length("requests", request, rows)
    distinct_candidates, candidate = (None, None) if candidates is None else _index("candidates", candidates)
    if candidate is not None:
        _same_length("candidates", candidate, rows)
    return MeasuredRows(
        users=distinct_users,
        user=user,
        requests=distinct_requests,
        request=request,
        request_user=_user_of_each_request(user, request, distinct_requests),
        predictions={task.name: _predictions(task, predictions, rows) for task in tasks},
        labels={task.name: _labels(task, labels, rows) for task in tasks},
        score=_checked("score", _floats("score", score, rows), lambda x: ~np.isnan(x), "a number"),
        weight=np.ones(rows) if weight is None else _weights(weight, rows),
        candidates=distinct_candidates,
        candidate=candidate,
    )


def plain(ids: Any) -> pa.Array:
    """Ids, NumPy or Arrow, as one array of their own type."""
    array = ids if isinstance(ids, (pa.Array, pa.ChunkedArray)) else pa.array(ids)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _index(name: str, ids: Any) -> tuple[pa.Array, np.ndarray]:
    """The distinct ids, and for each row an index into them."""
    array = plain(ids)
    if pa.types.is_integer(array.type):
        array = array.cast(pa.int64())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.cast(pa.string())
    elif len(array) > 0:
        raise UserError(f"column {name!r} has type {array.type}; expected integers or strings")
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"column {name!r} has {array.null_count} missing values, the first at row {row}")
    encoded = array.dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)


def _user_of_each_request(user: np.ndarray, request: np.ndarray, distinct_requests: pa.Array) -> np.ndarray:
    request_user = np.zeros(len(distinct_requests), dtype=np.int64)
    request_user[request] = user
    strangers = np.flatnonzero(request_user[request] != user)
    if len(strangers):
        row = int(strangers[0])
        raise UserError(
            f"request {distinct_requests[int(request[row])].as_py()!r} has rows of more than one user, row {row} among "
            "them: a request is one list shown to one user, so give each list its own request id"
        )
    return request_user


def _predictions(task: MeasuredTask, predictions: Mapping[str, Any], rows: int) -> np.ndarray:
    name = f"predictions[{task.name!r}]"
    if task.name not in predictions:
        raise ValueError(f"task {task.name!r} has no predictions; found {sorted(predictions)}")
    values = _floats(name, predictions[task.name], rows)
    if task.kind == "binary":
        return _checked(name, values, lambda x: (x >= 0) & (x <= 1), "a probability")
    return _checked(name, values, np.isfinite, "a finite number")


def _labels(task: MeasuredTask, labels: Mapping[str, Any], rows: int) -> np.ndarray:
    name = f"labels[{task.name!r}]"
    if task.name not in labels:
        raise ValueError(f"task {task.name!r} has no labels; found {sorted(labels)}")
    values = _floats(name, labels[task.name], rows).astype(np.float64)
    if task.kind == "binary":
        return _checked(name, values, lambda x: (x == 0) | (x == 1) | np.isnan(x), "0, 1 or NaN (unobserved)")
    return _checked(name, values, lambda x: ~np.isinf(x), "a number or NaN (unobserved)")


def _weights(weight: Any, rows: int) -> np.ndarray:
    values = _floats("weight", weight, rows).astype(np.float64)
    # Products of sums of larger ones would overflow, and of smaller ones vanish.
    return _checked("weight", values, lambda x: (x > 1e-50) & (x < 1e50), "a positive number, 1e-50 to 1e50")


def _floats(name: str, values: Any, rows: int) -> np.ndarray:
    """(N,) float32 stays float32, everything else becomes float64; an Arrow null becomes NaN."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        if not pa.types.is_float32(values.type):
            values = pc.cast(values, pa.float64())
        values = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    array = np.asarray(values)
    if array.dtype != np.float32:
        array = array.astype(np.float64)
    _same_length(name, array, rows)
    return array


def _same_length(name: str, array: np.ndarray, rows: int) -> None:
    if array.shape != (rows,):
        raise ValueError(f"column {name} has shape {array.shape}; expected ({rows},), as many as users")


def _checked(name: str, values: np.ndarray, is_valid: Any, expected: str) -> np.ndarray:
    invalid = np.flatnonzero(~is_valid(values))
    if len(invalid):
        row = int(invalid[0])
        raise UserError(
            f"column {name} has {len(invalid)} bad values, the first at row {row}: {values[row]}; expected {expected}"
        )
    return values
