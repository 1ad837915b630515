"""The served model: a script that MLflow runs to get it (models from code), so that no pickle is written.

A request is `{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}`; each element of
`inputs` gets one ranking. `task_weights`, `top_k`, `gate_top_k`, `mask_experts` and `explain` may stand in an element
or, for all elements, in `params`; the element's own win. MLflow drops unknown keys of `params` before the model sees
them; in an element they are an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, SkipValidation

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.reader import read_requests

ARTIFACT = "model"
Value = bool | int | float | str | None
Explained = dict[str, dict[str, Value | list[Value]]]
Reply = dict[str, str | list[Value] | list[Explained] | dict[str, list[float]] | dict[str, str]]


class BadRequest(MlflowException):
    """HTTP 400 with one sentence. MLflow would put the whole input, which may be megabytes, in front of it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the reply."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class RankingRequest(BaseModel):
    """What MLflow documents and lets through unchecked: `Request` gives errors that don't repeat the whole input."""

    model_config = ConfigDict(extra="allow")

    user: Annotated[dict[str, Value], SkipValidation] = {}
    context: Annotated[dict[str, Value], SkipValidation] = {}
    candidates: Annotated[dict[str, list[Value]], SkipValidation] = {}
    task_weights: Annotated[dict[str, float] | None, SkipValidation] = None
    top_k: Annotated[int | None, SkipValidation] = None
    gate_top_k: Annotated[int | None, SkipValidation] = None
    mask_experts: Annotated[list[int] | None, SkipValidation] = None
    explain: Annotated[bool | None, SkipValidation] = None

    def given(self) -> dict[str, Any]:
        """The keys of the request, known or not."""
        values = {**self.__dict__, **(self.model_extra or {})}
        return {name: values[name] for name in self.model_fields_set}


# MLflow warns that it leaves it to the model to tell numbers from strings, which is intended.
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)


class RankingPythonModel(PythonModel):
    """Ranks the candidates of each request."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the artifact folder, and limits torch to one thread per request in the whole process."""
        import torch

        from mmoe_rec.inference.ranker import Ranker

        # The server runs requests side by side, and threads of one request wait for each other where cores are busy.
        # Two threads on two cores, 500 candidates: a tenth faster when idle, but with one core taken the 95th
        # percentile was six times that of one thread. Very long lists on idle cores lose: a third at 10,000.
        torch.set_num_threads(1)
        self.ranker = Ranker.load(context.artifacts[ARTIFACT])
        self.ranker.serve_faster()

    def predict(
        self, context: Any, model_input: list[RankingRequest], params: dict[str, Any] | None = None
    ) -> list[Reply]:
        """One ranking a request, see `Ranking`; one request may be given without a list.

        Raises BadRequest with the sentence for the caller.
        """
        try:
            answers = self.ranker.rank_many(read_requests([each.given() for each in model_input], params or {}))
        except RuntimeError as error:
            raise MlflowException(str(error), error_code=INTERNAL_ERROR) from error
        for index, answer in enumerate(answers):
            if isinstance(answer, RequestError):
                raise BadRequest(f"inputs[{index}]: {answer}" if len(answers) > 1 else str(answer))
        return [answer.to_dict() for answer in answers if isinstance(answer, Ranking)]


def _of_one_too(predict: Callable[..., list[Reply]]) -> Callable[..., list[Reply]]:
    """MLflow lets no input but a list through its check of type hints; in a notebook one has one request."""

    @wraps(predict)  # and so with the marks by which MLflow knows its own wrapper
    def of_one_too(self: Any, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[Reply]:
        return predict(self, context, [model_input] if isinstance(model_input, Mapping) else model_input, params)

    return of_one_too


RankingPythonModel.predict = _of_one_too(RankingPythonModel.predict)  # type: ignore[method-assign]
mlflow.models.set_model(RankingPythonModel())
