"""What `/openapi.json` says of a call and its reply, with the example of the model that is served."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mmoe_rec.inference.ranking import UNSENT, Ranking
from mmoe_rec.inference.request import Request

ARROW = "application/vnd.apache.arrow.stream"
TEMPLATE = "#/components/schemas/{model}"


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
    """In the place of a ranking with `?partial=true`: what is wrong with the element."""

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

    accepted: int = Field(
        description="rows of the call: the journal holds them all, also those that came before and so do not count "
        "(again); these are found out once rows are learnt, and then counted by the metric "
        "mmoe_rec_events_learnt_total with outcome duplicate, or conflict where labels differ"
    )
    late: int = Field(description="rows that were known before the model's tables were made")
    out_of_order: int = Field(description="rows that are earlier than one before them")
    ignored: int = Field(
        0, description="rows that the model's tables may hold, and that are not learnt; left out for 0"
    )
    position: str = Field(description="of the journal: /invocations?after=POSITION knows these rows")


_STATUSES = {
    400: "the call is wrong",
    401: "the token is missing or wrong",
    408: "the call took too long to arrive",
    413: "the body is too large",
    415: "the body is no JSON",
    431: "the headers are too large",
    500: "the model failed",
    503: "too many calls wait; the header Retry-After says when to come again",
    504: "no answer within the time limit",
}


@cache
def schemas() -> dict[str, Any]:
    """The components that `invocation` refers to."""
    from pydantic.json_schema import models_json_schema

    models: list[tuple[type[BaseModel], str]] = [(each, "validation") for each in (Invocation, Events)]
    models += [(each, "serialization") for each in (Reply, Accepted, Error)]
    _, found = models_json_schema(models, ref_template=TEMPLATE)  # type: ignore[arg-type]
    for name in UNSENT:
        del found["$defs"]["Ranking"]["properties"][name]
    return dict(found["$defs"])


def _content(model: str, **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": TEMPLATE.format(model=model)}, **more}}


def _wrong() -> dict[str, Any]:
    return {str(code): {"description": text, "content": _content("Error")} for code, text in _STATUSES.items()}


def invocation(example: dict[str, Any] | None) -> dict[str, Any]:
    """The operation `POST /invocations`. example: a request that the model can answer."""

    sent = {} if example is None else {"example": {"inputs": [example], "params": {"top_k": 5}}}
    partial = {"name": "partial", "in": "query", "schema": {"type": "boolean", "default": False}}
    partial["description"] = "an element that is wrong gets an error in its place, and the others are ranked"
    after = {"name": "after", "in": "query", "schema": {"type": "string"}}
    after["description"] = "answer once all events up to this position are known, as the reply of /events gives it"
    return {
        "summary": "Ranks the candidates of each element",
        "operationId": "invocations",
        "parameters": [partial, after],
        "requestBody": {"required": True, "content": _content("Invocation", **sent)},
        "responses": {"200": {"description": "a ranking for each element", "content": _content("Reply")}, **_wrong()},
    }


def events() -> dict[str, Any]:
    """The operation `POST /events`."""
    log = {"name": "log", "in": "query", "schema": {"type": "string"}}
    log["description"] = "name of a log of events, for a body that is an Arrow stream"
    arrow = {ARROW: {"schema": {"type": "string", "format": "binary"}}}
    return {
        "summary": "Takes events, all rows of a call or none, once they are on disk",
        "operationId": "events",
        "parameters": [log],
        "requestBody": {"required": True, "content": {**_content("Events"), **arrow}},
        "responses": {
            "200": {"description": "they are on disk", "content": _content("Accepted")},
            **_wrong(),
        },
    }
