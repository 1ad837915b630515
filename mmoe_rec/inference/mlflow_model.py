"""The served MLflow model, as a script that MLflow runs (models from code), so that no pickle is written.

A call is `{"inputs": [{"user": {...}, "context": {...}, "candidates": {...}}], "params": {...}}`. Each element of
`inputs` is a request and gets one ranking. The options `task_weights`, `top_k`, `gate_top_k`, `mask_experts` and
`explain` may be in a request, or in `params` for all requests of the call. Options in the request take precedence.
MLflow drops unknown keys of `params` before the model sees them, but unknown keys in a request are errors.
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
    """HTTP 400 with a one-sentence message. MLflow's own error would repeat the whole input, which may be megabytes."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """Return the body of the reply."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class RankingPythonModel(PythonModel):
    """MLflow model that ranks the candidates of each request."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the artifact folder, and limit torch to one thread per request in the whole process."""
        import torch

        from mmoe_rec.inference.ranker import Ranker

        # The server runs requests concurrently, and on busy cores the threads of one request wait for each other. With
        # 500 candidates on two cores, two threads were 10% faster when idle, but with one core busy the 95th
        # percentile was six times as high as with one thread. On idle cores, 10,000 candidates take a third longer.
        torch.set_num_threads(1)
        self.ranker = Ranker.load(context.artifacts[ARTIFACT_KEY])
        self.ranker.apply_matmul_backend()

    # MLflow derives no schema from this type hint. A schema would repeat the input in errors and refuse data frames.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Rank requests.

        Args:
            context: Not used.
            model_input: A request, a list of requests, `{"inputs": [...]}`, or a data frame with one row per candidate
                (`group_rows_by_request`) or per request.
            params: Options for all requests.

        Returns:
            One ranking per request (`Ranking.to_dict`). For a data frame with one row per candidate, a data frame with
            predictions, score and rank of each row.

        Raises:
            BadRequestError: A request is invalid.
            MlflowException: A prediction is NaN or infinite.
        """
        try:
            params = params or {}
            if isinstance(model_input, pd.DataFrame) and "candidates" not in model_input:
                columns = [model_input.iloc[:, index] for index in range(model_input.shape[1])]
                elements, rows = group_rows_by_request(self.ranker.reader, [*model_input.columns], columns, params)
                replies = self._rank(elements, params, rows)
                return pd.DataFrame(flatten_rankings(replies, rows), model_input.index)
            if isinstance(model_input, pd.DataFrame):
                model_input = model_input.to_dict("records")  # one request per row
            if isinstance(model_input, dict) and "inputs" in model_input:  # body of a call
                if extra_key := next((name for name in model_input if name != "inputs"), None):
                    problem = f"{quoted(extra_key)} is not allowed next to 'inputs'"
                    raise RequestError(f"predict: {problem}. Pass the argument params.")
                model_input = model_input["inputs"]
            elements = [model_input] if isinstance(model_input, dict) else to_python_list(model_input)
            if not isinstance(elements, list):
                raise RequestError("'inputs' must be a list of requests")
            return self._rank(elements, params)
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
