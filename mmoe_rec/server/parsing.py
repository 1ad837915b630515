"""The body of a call -> requests, parsed once; whatever is no such call gets one sentence and status 400.

orjson refuses what JSON does not have (NaN, numbers beyond a double, half of a surrogate pair, UTF-8 that is none) and
nesting beyond 1,024. It lets through a key that is given twice, of which one value would be lost, so keys are counted
here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import orjson

from mmoe_rec.errors import RequestError, quoted, suggest
from mmoe_rec.inference.request import OPTIONS, Request, read_requests
from mmoe_rec.server.limits import Limits, Refused

SHAPE = '{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}'
LONGEST_KEY = 256
COST_OF_EXPLAINING = 10
"""A candidate that is explained counts as so many: with 45 counters, its part of the reply is 35 times as long."""
MOST_IGNORED = 5
_KEY = re.compile(rb'"[ \t\n\r]*:')


@dataclass(frozen=True)
class Call:
    """A call that may be ranked.

    requests: and in the place of one that is wrong, the sentence about it; ignored: a warning for each of the params
    that there are not; candidates: of all requests together, at least.
    """

    requests: list[Request | RequestError]
    ignored: tuple[str, ...]
    candidates: int


def parse_json(body: bytes, limits: Limits) -> Any:
    """The JSON values of a body. Raises Refused where they are none by the standard, too deep, or ambiguous."""
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _wrong(f"the body is not valid JSON: {error}") from None
    keys = _checked(tree, limits)
    # A string that begins with a colon looks like a key, so that more may be found than there are, never fewer.
    if sum(1 for _ in _KEY.finditer(body)) != keys:
        json.loads(body, object_pairs_hook=_without_repeats)
    return tree


def parse(body: bytes, limits: Limits) -> Call:
    """The call in a body. Raises Refused for one of another shape, or beyond the limits."""
    tree = parse_json(body, limits)
    if not isinstance(tree, dict):
        raise _wrong(f"the body must be an object such as {SHAPE}")
    for name in tree:
        if name not in ("inputs", "params"):
            raise _wrong(f"a call has no key {quoted(name)}; {suggest(name, ('inputs', 'params'))}")
    elements = tree.get("inputs")
    if not isinstance(elements, list):
        raise _wrong(f"a call needs the key 'inputs', a list of requests: {SHAPE}")
    if len(elements) > limits.max_elements:
        raise _wrong(
            f"'inputs' has {len(elements):,} elements; this server takes at most {limits.max_elements:,} in a call "
            "(setting `serving.max_elements`)"
        )
    params, ignored = _params(tree)
    costs = [_cost_of(each, params) for each in elements]
    candidates = sum(count * cost for count, cost in costs)
    if candidates > limits.max_total_candidates:
        explained = any(cost > 1 for _, cost in costs)
        hint = f" (with explain, each counts as {COST_OF_EXPLAINING})" if explained else ""
        raise _wrong(
            f"'inputs' has {candidates:,} candidates in all{hint}; this server takes at most "
            f"{limits.max_total_candidates:,} in a call (setting `serving.max_total_candidates`)"
        )
    return Call(read_requests(elements, params), ignored, candidates)


def _params(tree: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The params that there are, and a warning for each of the others, which MLflow drops as well."""
    given = tree.get("params")
    if given is None:
        return {}, ()
    if not isinstance(given, dict):
        raise _wrong("'params' must be an object")
    unknown = islice((name for name in given if name not in OPTIONS), MOST_IGNORED)
    ignored = [
        f"'params' has an unknown key {quoted(name)}, which was ignored; {suggest(name, OPTIONS)}" for name in unknown
    ]
    return {name: value for name, value in given.items() if name in OPTIONS}, tuple(ignored)


def _cost_of(element: Any, params: Mapping[str, Any]) -> tuple[int, int]:
    """How many candidates an element has at least, and what each of them counts."""
    columns, own = (element.get("candidates"), element.get("explain")) if isinstance(element, dict) else ({}, None)
    lists = columns.values() if isinstance(columns, dict) else ()
    count = max((len(values) for values in lists if isinstance(values, list)), default=0)
    return count, COST_OF_EXPLAINING if (params.get("explain") if own is None else own) else 1


def _checked(tree: Any, limits: Limits) -> int:
    """How many keys a tree has in all its objects. Raises Refused for one too deep, or with too long a key."""
    keys, depth, level = 0, 0, [tree] if isinstance(tree, dict | list) else []
    while level:
        depth += 1
        if depth > limits.max_depth:
            raise _wrong(
                f"the body nests lists and objects more than {limits.max_depth} deep (setting `serving.max_depth`)"
            )
        inner: list[Any] = []
        for each in level:
            values: Iterable[Any] = each
            if type(each) is dict:
                keys += len(each)
                if each and max(map(len, each)) > LONGEST_KEY:
                    raise _wrong(f"the body has a key of more than {LONGEST_KEY} characters")
                values = each.values()
            inner += [value for value in values if type(value) is dict or type(value) is list]
        level = inner
    return keys


def _without_repeats(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            raise _wrong(f"the body gives the key {quoted(name)} twice in one object")
        names.add(name)


def _wrong(sentence: str) -> Refused:
    return Refused(400, sentence, "body")
