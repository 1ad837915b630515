"""What `/openapi.json` says of a call and its reply, with the example of the model that is served."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mmoe_rec.serving.ranking import UNSENT, Ranking
from mmoe_rec.serving.requests.envelope import Envelope

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

    inputs: list[Envelope] = Field(description="requests, each of which gets one ranking")
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

    models = [(Invocation, "validation"), (Reply, "serialization"), (Error, "serialization")]
    _, found = models_json_schema(models, ref_template=TEMPLATE)  # type: ignore[arg-type]
    for name in UNSENT:
        del found["$defs"]["Ranking"]["properties"][name]
    return dict(found["$defs"])


def invocation(example: dict[str, Any] | None) -> dict[str, Any]:
    """The operation `POST /invocations`. example: a request that the model can answer."""

    def content(model: str, **more: Any) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": TEMPLATE.format(model=model)}, **more}}

    sent = {} if example is None else {"example": {"inputs": [example], "params": {"top_k": 5}}}
    wrong = {str(code): {"description": text, "content": content("Error")} for code, text in _STATUSES.items()}
    partial = {"name": "partial", "in": "query", "schema": {"type": "boolean", "default": False}}
    partial["description"] = "an element that is wrong gets an error in its place, and the others are ranked"
    return {
        "summary": "Ranks the candidates of each element",
        "operationId": "invocations",
        "parameters": [partial],
        "requestBody": {"required": True, "content": content("Invocation", **sent)},
        "responses": {"200": {"description": "a ranking for each element", "content": content("Reply")}, **wrong},
    }
