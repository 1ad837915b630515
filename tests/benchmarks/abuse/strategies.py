"""What to send: valid requests with parts replaced, bodies of any bytes, other headers, methods and pages."""

import json
import random
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.benchmarks.abuse.wire import JSON, Sent

MARKER = "qzjxkvwbqzjxkvwb"
"""Stands in strings and keys; whoever sends a body puts other letters in its place."""

LARGEST = 12 * 2**20
"""Bytes of a body: 8 MiB are taken, and callers of up to 16 MiB get to read why not."""

_INTEGERS = st.one_of(
    st.integers(-3, 10),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**308, 10**400]),
    st.integers(),
)
_TEXTS = st.one_of(
    st.just(MARKER),
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Zl"]), min_size=1, max_size=5),
    st.sampled_from(
        ["NaN", "Infinity", "2018-01-01", "9999-12-31T23:59:59Z", "0001-01-01", "\x00", "null", "1e5", ":"]
    ),
    st.integers(1, 4_000).map(lambda count: MARKER * count),
)
_LEAVES = st.one_of(st.none(), st.booleans(), _INTEGERS, st.floats(), _TEXTS)
_KEYS = st.one_of(_TEXTS, st.sampled_from(["user", "context", "candidates", "inputs", "params", "top_k"]))
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=8
)
_COUNTS = st.one_of(st.integers(0, 20), st.sampled_from([255, 256, 257, 3_000, 9_999, 10_000, 10_001, 30_000]))


class Requests:
    """Strategies for a model."""

    def __init__(self, model: Path) -> None:
        self._example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
        self._columns = {
            part: pq.read_schema(model / "features" / f"latest.{role}.parquet").names
            for part, role in {"user": "user", "candidates": "candidate"}.items()
        }
        self._columns["context"] = [*self._example["context"]]
        (self._id,) = self._example["candidates"]
        calls = st.one_of(
            self._calls(), self._calls(), self._calls(), self._long(), self._wide(), self._many(), _VALUES.map(_text)
        )
        bodies = st.one_of(calls, calls, calls, self._mutated(calls), _odd_bodies()).map(lambda each: each[:LARGEST])
        self.requests = st.one_of(
            *[bodies.map(Sent)] * 4,
            st.builds(Sent, bodies, st.just("POST"), _targets(), _headers()),
            st.builds(Sent, bodies, _methods(), _pages(), _headers()),
        )

    def _part(self, part: str) -> st.SearchStrategy[Any]:
        """The example's part with some columns replaced or added; candidates' ones are lists most of the time."""
        names = st.sampled_from(self._columns[part]) | _KEYS | st.sampled_from([*chain(*self._columns.values())])
        count = len(self._example["candidates"][self._id])
        values = _VALUES
        if part == "candidates":
            values |= st.lists(_LEAVES, min_size=count, max_size=count) | st.lists(_VALUES, max_size=count + 1)
        changes = st.dictionaries(names, values, max_size=3)
        return changes.map(lambda given: {**self._example[part], **given})

    def _elements(self) -> st.SearchStrategy[Any]:
        options = st.dictionaries(
            st.sampled_from(["top_k", "gate_top_k", "mask_experts", "task_weights"]) | _KEYS,
            _VALUES | st.lists(st.integers(-2, 9), max_size=9) | st.dictionaries(self._tasks(), _LEAVES, max_size=3),
            max_size=2,
        )
        parts = st.fixed_dictionaries({}, optional={part: self._part(part) for part in self._columns})
        replaced = st.dictionaries(st.sampled_from(["user", "context", "candidates"]), _VALUES, max_size=1)
        return st.builds(lambda *changes: _merged(self._example, *changes), parts, options, replaced)

    @staticmethod
    def _tasks() -> st.SearchStrategy[str]:
        return st.sampled_from(["bought", "rebought", "engagement", "satisfaction"]) | _TEXTS

    def _calls(self) -> st.SearchStrategy[bytes]:
        params = st.dictionaries(st.sampled_from(["top_k", "gate_top_k", "mask_experts"]) | _KEYS, _VALUES, max_size=3)
        elements = st.lists(self._elements() | self._elements() | _VALUES, max_size=4)
        return st.builds(lambda *parts: _text({"inputs": parts[0], "params": parts[1]}), elements, params | _VALUES)

    def _long(self) -> st.SearchStrategy[bytes]:
        """Many candidates, or many elements, with one that may be wrong among them."""

        def body(count: int, odd: Any, elements: int) -> bytes:
            ids = [self._example["candidates"][self._id][0]] * count
            ids[count // 2 : count // 2 + 1] = [odd]
            return _text({"inputs": [_merged(self._example, {"candidates": {self._id: ids}})] * elements})

        ids = st.integers(0, 10**7) | _LEAVES
        few = st.integers(0, 9)
        return st.builds(body, _COUNTS, ids, st.just(1)) | st.builds(body, few, st.integers(0, 10**7), _COUNTS)

    def _wide(self) -> st.SearchStrategy[bytes]:
        """Thousands of columns of other names."""

        def body(count: int, part: str, known: bool) -> bytes:
            names = {f"{MARKER}{number}": [1] for number in range(count)}
            if part in ("params", "inputs"):
                return _text({"inputs": [self._example], part: names})
            own = self._example[part] if known else {}
            return _text({"inputs": [_merged(self._example, {part: {**own, **names}})]})

        return st.builds(body, _COUNTS, st.sampled_from([*self._columns, "params", "inputs"]), st.booleans())

    def _many(self) -> st.SearchStrategy[bytes]:
        """One huge value."""

        def body(count: int, where: str, value: Any) -> bytes:
            count = min(count, LARGEST // (len(_text(value)) + 4))
            huge: Any = {"text": MARKER * count, "list": [value] * count, "lists": [[value]] * count}
            return _text({"inputs": [_merged(self._example, {where: huge[random.Random(count).choice([*huge])]})]})

        places = ["user", "context", "candidates", "top_k", "mask_experts", "task_weights", "other"]
        return st.builds(body, st.sampled_from([10, 10_000, 60_000]), st.sampled_from(places), _LEAVES)

    def _mutated(self, calls: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
        """Cut off, or with bytes taken out, put in or doubled."""
        ends = st.floats(0, 1)
        good = st.just(_text({"inputs": [self._example], "params": {"top_k": 2, MARKER: 1}}))

        def changed(body: bytes, begin: float, end: float, put: bytes) -> bytes:
            first, last = sorted(int(each * len(body)) for each in (begin, end))
            return body[:first] + put + body[last:]

        junk = st.binary(max_size=8) | st.sampled_from([b"NaN", b"\xff", b'"', b"{", b"]", b"\\ud800", b"1e999", b","])
        cut = st.builds(lambda body, at: body[: int(at * len(body))], good | calls, ends)
        doubled = st.builds(lambda body, at: body[: int(at * len(body))] + body, good, ends)
        near = st.builds(lambda body, at, put: changed(body, at, min(at + 0.01, 1.0), put), good, ends, junk)
        return cut | near | near | doubled | st.builds(changed, good | calls, ends, ends, junk)


def valid(model: Path) -> list[bytes]:
    """Calls of several sizes that are answered."""
    from tests.benchmarks.serving_models import Bodies

    bodies = Bodies(model)
    return [bodies.ids(1), bodies.ids(5), bodies.ids(20), bodies.ids(5, 4), bodies.given(5), bodies.given(30)]


def largest(model: Path) -> list[bytes]:
    """Calls that take as much memory as the limits let them."""
    from tests.benchmarks.serving_models import Bodies

    example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    return [Bodies(model).ids(9_999, 10), _text({"inputs": [example], "params": {"other": [[1]] * 1_600_000}})]


def _merged(example: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(example)
    for each in changes:
        merged |= each
    return merged


def _text(tree: Any) -> bytes:
    """JSON with what Python writes for it: NaN, Infinity and escaped halves of surrogate pairs."""
    return json.dumps(tree).encode()


def _odd_bodies() -> st.SearchStrategy[bytes]:
    depth = st.sampled_from([10, 15, 16, 17, 1_000, 1_023, 1_025, 50_000])
    nested = st.builds(
        lambda deep, opened, closed, ends: opened * deep + (closed * deep if ends else b""),
        depth,
        st.sampled_from([b"[", b'{"inputs":']),
        st.sampled_from([b"]", b"}"]),
        st.booleans(),
    )
    marked = st.binary(max_size=50).map(lambda each: each + MARKER.encode())
    chosen = st.sampled_from([b"", b" ", b"null", b"\xef\xbb\xbf{}", b'{"inputs": [], "inputs": []}'])
    return st.one_of(st.binary(max_size=200), marked, nested, chosen)


def _headers() -> st.SearchStrategy[Mapping[str, str]]:
    kinds = ["application/json", "text/csv", "", "application/json; charset=utf-16", "application/problem+json", "\xff"]
    odd = st.dictionaries(
        st.sampled_from(["Content-Encoding", "Accept", "X-Other", "Cookie", "Expect", "Origin", "Range"]),
        st.sampled_from(["gzip", "identity", "*/*", "a" * 5_000, "bytes=0-1", "\xe9", ""]),
        max_size=3,
    )
    return st.builds(lambda kind, more: {**more, "Content-Type": kind}, st.sampled_from(kinds), odd) | st.just(JSON)


def _methods() -> st.SearchStrategy[str]:
    return st.sampled_from(["POST", "GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PURGE"])


def _targets() -> st.SearchStrategy[str]:
    known = ["partial=true", "partial=1", "partial=no", "partial", "partal=true", "partial=true&partial=true"]
    long = ["x" * 3_000, "partial=" + "1" * 3_000, "%ff=%00"]
    return st.sampled_from([*known, *long]).map("/invocations?{}".format)


def _pages() -> st.SearchStrategy[str]:
    known = ["/invocations", "/health", "/ping", "/version", "/metrics", "/openapi.json", "/docs"]
    none = ["/invocations/", "/version/", "/", "//", "/%00", "/../etc/passwd", "/invocations%2f", "/no?x=y"]
    return st.sampled_from([*known, *none])
