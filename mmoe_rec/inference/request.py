"""`Request`: one candidate list, for one user in one context, with what to make of it; from the wire to rows.

A task's weight in the score is its own weight times its objective's: the own weight is the one given under the task's
name, else the settings' `score_weight`; the objective's is the one given under its name, else 1. So
`{"satisfaction": 0.5}` halves the weight of every satisfaction task, and `{"bought": 2}` sets one task's weight.
A name that is both a task's and an objective's means the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmoe_rec.errors import RequestError, quoted, suggest
from mmoe_rec.log.given import plain, plain_option
from mmoe_rec.model.layout import ModelTask

OPTIONS = ("task_weights", "top_k", "gate_top_k", "mask_experts", "explain")
_WANTED = {"user": "an object", "context": "an object", "candidates": "an object of lists", "top_k": "an integer"}
_WANTED |= {"gate_top_k": "an integer", "mask_experts": "a list of integers", "explain": "true or false"}


class Request(BaseModel):
    """A user, a context and columns of candidates, with options; an unknown key is an error.

    Columns of candidates that are given as arrays, or as a data frame, are lists here; numpy's numbers are Python's.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    user: dict[str, Any]
    context: dict[str, Any] = Field(default_factory=dict)
    candidates: dict[str, Any]  # `RequestReader` says what is wrong with a column
    task_weights: dict[str, Any] | None = None
    top_k: int | None = None
    gate_top_k: int | None = None
    mask_experts: list[Any] | None = None  # checked by the model: pydantic would write down each that is no number
    explain: bool | None = None

    @staticmethod
    def of(element: Any, params: Mapping[str, Any] = {}) -> Request:
        """The request in an element of a call. params: options for all elements, of which an element's own win.

        Raises RequestError for one of another shape.
        """
        if not isinstance(element, Mapping):
            raise RequestError("a request must be an object with the keys user, context and candidates")
        for name in element:  # pydantic would write down every one of them
            if name not in Request.model_fields:
                raise RequestError(
                    f"a request has no key {quoted(str(name))}; {suggest(str(name), Request.model_fields)}"
                )
        given = {name: plain_option(each) if name in OPTIONS else each for name, each in element.items()}
        columns: Any = given.get("candidates")
        if hasattr(columns, "items"):  # a dict, or a data frame
            given["candidates"] = {name: plain(each) for name, each in columns.items()}
        try:
            request = Request.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            if problem["type"] == "missing":
                raise RequestError(f"a request needs the key '{name}'") from None
            raise RequestError(f"'{name}' must be {_WANTED.get(name, 'an object of numbers')}") from None
        for name in OPTIONS:
            if getattr(request, name) is None and params.get(name) is not None:
                setattr(request, name, plain_option(params[name]))
        return request

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """What requests that can be read together have in common: the columns that they give."""
        return tuple(self.user), tuple(self.context), tuple(self.candidates)


def read_requests(elements: Sequence[Any], params: Mapping[str, Any]) -> list[Request | RequestError]:
    """The request in each element of a call, or the sentence about what is wrong with it; params: see `Request.of`."""
    requests: list[Request | RequestError] = []
    for element in elements:
        try:
            requests.append(Request.of(element, params))
        except RequestError as error:
            requests.append(error)
    return requests


def fused_weights(tasks: Sequence[ModelTask], given: Mapping[str, Any] | None) -> np.ndarray:
    """(T,) float64 weights of the tasks in the score.

    Raises RequestError for an unknown name, a weight that is negative or not finite, or weights that leave every task
    out.
    """
    if given is None:
        return np.array([task.score_weight for task in tasks])
    if not isinstance(given, Mapping):
        raise RequestError('task_weights must be an object of numbers, such as {"engagement": 1.0}')
    names = {task.name for task in tasks}
    objectives = {task.objective for task in tasks} - names
    for name, weight in given.items():
        if name not in names | objectives:
            hint = suggest(str(name), [*sorted(names), *sorted(objectives)])
            raise RequestError(f"task_weights names {quoted(name)}, which is no task or objective; {hint}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RequestError(f"task_weights: the weight of '{name}' must be a number, found {quoted(weight)}")
        if not 0 <= weight <= 1e6:  # nor NaN
            raise RequestError(
                f"task_weights: the weight of '{name}' must lie between 0 and 1,000,000, found {quoted(weight)}"
            )
    weights = np.array([float(given.get(task.name, task.score_weight)) for task in tasks])
    weights *= [float(given.get(task.objective, 1)) if task.objective in objectives else 1.0 for task in tasks]
    if given and not weights.any():
        raise RequestError("task_weights leave every task out of the score: at least one weight must be above 0")
    return weights
