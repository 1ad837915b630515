"""A call as it arrives: any number of elements, of which each holds a request, and options for all of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmoe_rec.inference.errors import RequestError, quoted
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.requests.request import OPTIONS, Request
from mmoe_rec.log.given import plain_option


class Envelope(BaseModel):
    """A user, a context and columns of candidates, with what to make of them; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: dict[str, Any]
    context: dict[str, Any] = Field(default_factory=dict)
    candidates: dict[str, Any]  # lists, or arrays where it was no JSON: `RequestReader` says what else is wrong
    task_weights: dict[str, Any] | None = None
    top_k: int | None = None
    gate_top_k: int | None = None
    mask_experts: list[Any] | None = None  # checked by the model: pydantic would write down each that is no number
    explain: bool | None = None


class Ranks(Protocol):
    """What answers requests: a loaded ranker."""

    def rank_many(self, requests: Sequence[Request]) -> list[Ranking | RequestError]:
        """One answer a request, in order."""


def ranked(
    ranker: Ranks, elements: Sequence[Mapping[str, Any]], params: Mapping[str, Any]
) -> list[Ranking | RequestError]:
    """One answer an element, in order: a ranking, or the sentence for the caller about what is wrong with it.

    params: options for all elements, of which an element's own win.
    """
    return ranked_calls(ranker, [(elements, params)])[0]


def ranked_calls(
    ranker: Ranks, calls: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]
) -> list[list[Ranking | RequestError]]:
    """The answers of several calls, each with its elements and params as `ranked` takes them, from one pass."""
    opened: list[list[Request | RequestError]] = []
    for elements, params in calls:
        opened.append([])
        for element in elements:
            try:
                opened[-1].append(_opened(element, params))
            except RequestError as error:
                opened[-1].append(error)
    found = iter(ranker.rank_many([each for call in opened for each in call if isinstance(each, Request)]))
    return [[each if isinstance(each, RequestError) else next(found) for each in call] for call in opened]


def _opened(element: Mapping[str, Any], params: Mapping[str, Any]) -> Request:
    """The request in an element. Raises RequestError for one of another shape."""
    # pydantic would write down every one of them.
    unknown = next((name for name in element if name not in Envelope.model_fields), None)
    if unknown is not None:
        raise RequestError(_unknown(str(unknown)))
    given = {name: plain_option(each) if name in OPTIONS else each for name, each in element.items()}
    candidates: Any = given.get("candidates")
    if hasattr(candidates, "items") and not isinstance(candidates, dict):
        given["candidates"] = dict(candidates.items())  # a data frame's columns
    try:
        envelope = Envelope.model_validate(given)
    except ValidationError as error:
        raise RequestError(_explained(error)) from None
    options = {name: _first(getattr(envelope, name), params.get(name)) for name in OPTIONS}
    return Request(envelope.user, envelope.context, envelope.candidates, **options)


def _first(own: Any, common: Any) -> Any:
    """The request's own option, or the one for all requests."""
    return common if own is None else own


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, Envelope.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"valid are {', '.join(Envelope.model_fields)}"
    return f"a request has no key {quoted(name)}; {hint}"


def _explained(error: ValidationError) -> str:
    """One sentence for the first problem."""
    problem = error.errors()[0]
    names = [str(part) for part in problem["loc"]]
    if problem["type"] == "missing":
        return f"a request needs the key '{names[0]}'"
    wanted = {"user": "an object", "context": "an object", "candidates": "an object of lists", "top_k": "an integer"}
    wanted |= {"gate_top_k": "an integer", "mask_experts": "a list of integers", "explain": "true or false"}
    return f"'{names[0]}' must be {wanted.get(names[0], 'an object of numbers')}"
