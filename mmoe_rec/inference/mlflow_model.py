"""The served model: a script that MLflow runs to get it (models from code), so that no pickle is written.

A request is `{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}`; each element of
`inputs` gets one ranking. `task_weights`, `top_k`, `gate_top_k`, `mask_experts` and `explain` may stand in an element
or, for all elements, in `params`; the element's own win. MLflow drops unknown keys of `params` before the model sees
them; in an element they are an error. A data frame has a row for each candidate (`group_rows_by_request`), and so has
the reply.

`predict` takes a request, a list of requests or, as in the model's `example_request.json`, `{"inputs": [...]}`.
"""

import json
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from mmoe_rec.errors import RequestError, quoted
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import (
    flatten_rankings,
    format_request_error,
    group_rows_by_request,
    read_requests,
)
from mmoe_rec.log.request_values import to_python_list

ARTIFACT_KEY = "model"


class BadRequestError(MlflowException):
    """HTTP 400 with one sentence. MLflow would put the whole input, which may be megabytes, in front of it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the reply."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


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
        self.ranker = Ranker.load(context.artifacts[ARTIFACT_KEY])
        self.ranker.apply_matmul_backend()

    # Of this type hint MLflow makes no schema: it would repeat the whole input in its errors, and refuse data frames.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """One ranking a request, see `Ranking`, for a list of requests, or one; a table of predictions for a table.

        Raises BadRequest with the sentence for the caller.
        """
        try:
            if isinstance(model_input, pd.DataFrame) and "candidates" not in model_input:
                columns = [model_input.iloc[:, place] for place in range(model_input.shape[1])]
                elements, rows = group_rows_by_request(
                    self.ranker.reader, [*model_input.columns], columns, params or {}
                )
                replies = self._rank(elements, params or {}, rows)
                return pd.DataFrame(flatten_rankings(replies, rows), model_input.index)
            if isinstance(model_input, pd.DataFrame):
                model_input = model_input.to_dict("records")  # requests, a row each
            if isinstance(model_input, dict) and "inputs" in model_input:  # the body of a call
                if other := next((name for name in model_input if name != "inputs"), None):
                    raise RequestError(f"predict: {quoted(other)} stands beside 'inputs'. Give the argument params.")
                model_input = model_input["inputs"]
            elements = [model_input] if isinstance(model_input, dict) else to_python_list(model_input)
            if not isinstance(elements, list):
                raise RequestError("'inputs' must be a list of requests")
            return self._rank(elements, params or {})
        except RequestError as error:
            raise BadRequestError(str(error)) from None
        except RuntimeError as error:
            raise MlflowException(str(error), error_code=INTERNAL_ERROR) from error

    def _rank(
        self, elements: list[Any], params: dict[str, Any], rows: list[list[int]] | None = None
    ) -> list[dict[str, Any]]:
        answers = self.ranker.rank_many(read_requests(elements, params))
        for index, answer in enumerate(answers):
            if isinstance(answer, RequestError):
                raise RequestError(format_request_error(answer, index, len(answers), rows or ()))
        return [answer.to_dict() for answer in answers if isinstance(answer, Ranking)]


mlflow.models.set_model(RankingPythonModel())
