"""What `/openapi.json` says of the pages whose bodies the server reads by itself, and of their replies."""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any

from fastapi import FastAPI, Query
from pydantic import BaseModel, ConfigDict, Field

from mmoe_rec.inference.ranking import UNSENT, Ranking
from mmoe_rec.inference.request import Request

ARROW = "application/vnd.apache.arrow.stream"


class Params(BaseModel):
    """Options for all elements of a call, of which an element's own win. Unknown ones are ignored with a warning."""

    task_weights: dict[str, float] | None = Field(None, description="task or objective -> weight in the score")
    top_k: int | None = Field(None, ge=1, description="only so many best candidates")
    gate_top_k: int | None = Field(None, ge=1, description="experts per candidate and gate")
    mask_experts: list[int] | None = Field(None, description="experts to score without")
    explain: bool | None = Field(None, description="what each candidate's predictions come from")


class Invocation(BaseModel):
    """A call."""

    model_config = ConfigDict(extra="forbid")

    inputs: list[Request] = Field(description="requests, each of which gets one ranking")
    params: Params | None = None


class ElementError(BaseModel):
    """What is wrong with an element; with `?partial=true` it stands in the place of the ranking."""

    error: str


class Reply(BaseModel):
    """A ranking for each element, in order."""

    predictions: list[Ranking | ElementError]


class Error(BaseModel):
    """What is wrong, in one sentence."""

    error_code: str
    message: str


class Events(BaseModel):
    """Rows of the interaction log, or of a log of events, with the log's columns."""

    model_config = ConfigDict(extra="forbid")

    events: list[dict[str, Any]] = Field(description="rows: column -> value; labels may be null")
    log: str | None = Field(None, description="name of a log of events; null is the interaction log")


class Accepted(BaseModel):
    """What is on disk now, and will be known to replies at once."""

    accepted: int = Field(description="rows of the call, also those that came before and so do not count again")
    late: int = Field(description="rows that were known before the model's tables were made")
    out_of_order: int = Field(description="rows that are earlier than one before them")
    ignored: int = Field(
        0, description="rows that the model's tables may hold, and that are not learnt; left out for 0"
    )
    position: str = Field(description="of the journal: /invocations?after=POSITION knows these rows")


_WRONG: dict[int | str, dict[str, Any]] = {"default": {"model": Error, "description": "a refusal"}}
_STREAM = {"requestBody": {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}}
_pages = FastAPI()  # describes and never answers: it would look for parameters in each of many calls


@_pages.post("/invocations", operation_id="invocations", response_model=Reply, responses=_WRONG)
def rank(
    call: Invocation,
    partial: Annotated[bool, Query(description="an element that is wrong gets an error in its place")] = False,
    after: Annotated[str | None, Query(description="answer once all events up to this position are known")] = None,
) -> None:
    """Ranks the candidates of each element."""


@_pages.post("/events", operation_id="events", response_model=Accepted, responses=_WRONG, openapi_extra=_STREAM)
def accept(
    call: Events,
    log: Annotated[str | None, Query(description="name of a log of events, for an Arrow stream")] = None,
) -> None:
    """Takes events, all rows of a call or none, once they are on disk."""


def describe(tree: dict[str, Any], example: dict[str, Any] | None, has_events: bool) -> None:
    """Adds these pages to the description of the others.

    example: a request that the model which is served can answer; has_events: whether `/events` takes some.
    """
    described = deepcopy(_pages.openapi())
    schemas, paths = described["components"]["schemas"], described["paths"]
    for name in UNSENT:
        del schemas["Ranking"]["properties"][name]
    if example is not None:
        content = paths["/invocations"]["post"]["requestBody"]["content"]["application/json"]
        content["example"] = {"inputs": [example], "params": {"top_k": 5}}
    if not has_events:
        del paths["/events"]
    tree["paths"] |= paths
    tree.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
