"""The body of a call -> requests, parsed once; whatever is no such call gets one sentence and status 400.

orjson refuses what JSON does not have (NaN, numbers beyond a double, half of a surrogate pair, UTF-8 that is none) and
nesting beyond 1,024. It lets through a key that is given twice, of which one value would be lost, so keys are counted
here. An integer beyond 64 bits becomes a float: what refuses it is asked again with the integer itself (`exactly`), so
that the sentence is about what was sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any

import orjson

from mmoe_rec.errors import RequestError, quoted
from mmoe_rec.inference.request import OPTIONS, Request, read_requests
from mmoe_rec.server.limits import Limits, Refused

SHAPE = '{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}'
LONGEST_KEY = 256
COST_OF_EXPLAINING = 10
"""A candidate that is explained counts as so many: with 45 counters, its part of the reply is 35 times as long."""
MOST_IGNORED = 5
_KEY = re.compile(rb'"[ \t\n\r]*:')
_LONG_INTEGER = re.compile(rb"[0-9]{19}")


@dataclass(frozen=True)
class Call:
    """A call that may be ranked.

    requests: and in the place of one that is wrong, the sentence about it; ignored: a warning for each of the params
    that there are not; candidates: of all requests together, at least.
    """

    requests: list[Request | RequestError]
    ignored: tuple[str, ...]
    candidates: int


def parse(body: bytes, limits: Limits) -> Call:
    """The call in a body. Raises Refused for one of another shape, or beyond the limits."""
    return _call(parse_json(body, limits), limits)


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


def exactly(call: Call, body: bytes) -> Call | None:
    """The call with integers of any size as they were sent; None where all fitted into a double already.

    For a call that `parse` took, and that was refused for its values.
    """
    if not _LONG_INTEGER.search(body):
        return None
    tree = json.loads(body)
    return replace(call, requests=_requests(tree["inputs"], _params(tree)[0]))


def _call(tree: Any, limits: Limits) -> Call:
    if not isinstance(tree, dict):
        raise _wrong(f"the body must be an object such as {SHAPE}")
    for name in tree:
        if name not in ("inputs", "params"):
            near = get_close_matches(name, ("inputs", "params"), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "valid are inputs and params"
            raise _wrong(f"a call has no key {quoted(name)}; {hint}")
    elements = tree.get("inputs")
    if not isinstance(elements, list):
        raise _wrong(f"a call needs the key 'inputs', a list of requests: {SHAPE}")
    if len(elements) > limits.max_elements:
        raise _wrong(
            f"'inputs' has {len(elements):,} elements; this server takes at most {limits.max_elements:,} in a call "
            "(setting `serving.max_elements`)"
        )
    params, ignored = _params(tree)
    explain = params.get("explain")
    candidates = sum(_weight(each, explain) * _candidates(each) for each in elements)
    if candidates > limits.max_total_candidates:
        explained = any(_weight(each, explain) > 1 for each in elements)
        hint = f" (with explain, each counts as {COST_OF_EXPLAINING})" if explained else ""
        raise _wrong(
            f"'inputs' has {candidates:,} candidates in all{hint}; this server takes at most "
            f"{limits.max_total_candidates:,} in a call (setting `serving.max_total_candidates`)"
        )
    return Call(_requests(elements, params), ignored, candidates)


def _requests(elements: Sequence[Any], params: Mapping[str, Any]) -> list[Request | RequestError]:
    requests = iter(read_requests([each for each in elements if isinstance(each, dict)], params))
    return [next(requests) if isinstance(each, dict) else _no_object(each) for each in elements]


def _no_object(element: Any) -> RequestError:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return RequestError(
        "a request must be an object with the keys user, context and candidates; found "
        f"{kinds.get(type(element), 'a number')}"
    )


def _params(tree: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The params that there are, and a warning for each of the others, which MLflow drops as well."""
    given = tree.get("params")
    if given is None:
        return {}, ()
    if not isinstance(given, dict):
        raise _wrong("'params' must be an object")
    ignored = []
    for name in islice((each for each in given if each not in OPTIONS), MOST_IGNORED):
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(OPTIONS)}"
        ignored.append(f"'params' has an unknown key {quoted(name)}, which was ignored; {hint}")
    return {name: value for name, value in given.items() if name in OPTIONS}, tuple(ignored)


def _candidates(element: Any) -> int:
    columns = element.get("candidates") if isinstance(element, dict) else None
    if not isinstance(columns, dict):
        return 0
    return max((len(values) for values in columns.values() if isinstance(values, list)), default=0)


def _weight(element: Any, explain: Any) -> int:
    """What each candidate of an element counts. explain: the option for all elements."""
    own = element.get("explain") if isinstance(element, dict) else None
    return COST_OF_EXPLAINING if (explain if own is None else own) else 1


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
