"""`Ranker` answers requests with a model in memory: it encodes the candidates, scores them, calibrates and sorts.

A ranker runs on the CPU, since a request of a few hundred rows doesn't justify a GPU. This module needs torch, but not
torchrec, torch.distributed or mlflow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import RequestError, UserError, one_line
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import (
    EXAMPLE_FILE,
    ArtifactInfo,
    ExampleScores,
    artifact_version,
    read_artifact,
    read_calibration,
    read_example,
    read_model,
    tables_as_of_us,
)
from mmoe_rec.inference.ranking import (
    RankedRequest,
    Ranking,
    build_explanations,
    check_request_time,
    new_request_id,
    scored_table,
)
from mmoe_rec.inference.request_reader import Request, RequestReader, read_rows, resolve_task_weights
from mmoe_rec.inference.scorer import ExpertOptions, InputMatrixBuilder, Scored, Scorer
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.log.rows import FEATURE_BATCH_ROWS, LogRows, RequestRows
from mmoe_rec.model.matmul import choose_serving_backend
from mmoe_rec.model.score import add_joint_predictions, scores_from_log_scores
from mmoe_rec.model.tables import PlainTables

if TYPE_CHECKING:
    import pandas as pd

    Rows: TypeAlias = LogRows | pa.Table | pd.DataFrame


class PredictionMismatchError(UserError):
    """An unmodified model gives different predictions here than where it was written."""


@dataclass(frozen=True)
class LiveState:
    """Features and request reader after a sequence of live events.

    Attributes:
        pipeline: Features that include the events.
        reader: Request reader with the latest values of users and candidates.
        updated_until: Time of the last included event or logged request, in microseconds.
    """

    pipeline: FeaturePipeline
    reader: RequestReader
    updated_until: int


class _CheckedRequest(NamedTuple):
    """A checked request with its index among the call's requests, its task weights (T,) float64 and expert options."""

    number: int
    request: Request
    weights: np.ndarray
    experts: ExpertOptions


class Ranker:
    """A loaded model with its features and calibration.

    Several threads may use one ranker at the same time. All features that change with live events are in one immutable
    `LiveState`. A call reads it once, so its answer never mixes features from before and after an event.

    Attributes:
        version: Version ID of the artifact (`artifact_version`).
        keep_inputs: Whether rankings have `request_id` and `ranked_request`, which request logs need.
    """

    def __init__(self, folder: Path, info: ArtifactInfo, version: str = "") -> None:
        """Open an artifact folder without checking its files. Use `load` to check them.

        Args:
            folder: Artifact folder.
            info: Metadata of the artifact.
            version: Version ID of the artifact.

        Raises:
            UserError: The features don't fit the model.
        """
        features = folder / "features"
        pipeline = FeaturePipeline.load(features)
        if pipeline.layout != info.layout.row_layout():
            raise UserError(
                f"'{folder}' is damaged: its features differ from the model's inputs. Train the model again."
            )
        self.info, self.version, self.layout = info, version, info.layout
        self.scorer = Scorer(info, read_model(info, folder), read_calibration(folder))
        self.model, self.calibration = self.scorer.model, self.scorer.calibration
        self.task_names = self.scorer.task_names
        tables = self.model.tables
        assert isinstance(tables, PlainTables)
        with_ids, histories = self.model.trees is not None, self.model.mixture.histories
        self.input_builder = InputMatrixBuilder(self.layout, tables, with_ids, histories)
        reader = RequestReader(pipeline, features, info.max_candidates)
        self._state = LiveState(pipeline, reader, tables_as_of_us(info))
        self.keep_inputs = False

    @property
    def pipeline(self) -> FeaturePipeline:
        """Features with all live events applied so far."""
        return self._state.pipeline

    @property
    def reader(self) -> RequestReader:
        """Request reader with the latest values seen so far."""
        return self._state.reader

    # Loading

    @staticmethod
    def load(folder: str | Path) -> Ranker:
        """Load the model of an artifact folder, after checking that the files are unmodified.

        `mmoe_rec.load_ranker` also takes URIs such as `models:/NAME@ALIAS`, which need MLflow.

        Raises:
            UserError: The folder is incomplete, modified or made by another version.
            PredictionMismatchError: The model gives different predictions here than where it was written.
        """
        if re.match(r"(models|runs):/", str(folder)) and not Path(folder).exists():
            raise UserError(f"'{folder}' is a URI, and Ranker.load takes a folder. Use mmoe_rec.load_ranker.")
        folder = Path(folder)
        try:
            info, version = read_artifact(folder), artifact_version(folder)
            ranker = Ranker(folder, info, version)
            if (artifact_version(folder), read_artifact(folder, verify=False)) != (version, info):
                raise UserError(f"The model in '{folder}' was replaced while it was loaded. Load it again.")
            ranker._check_example(folder)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"The model in '{folder}' can't be loaded ({one_line(error)}). Train it again.") from error
        return ranker

    def _check_example(self, folder: Path) -> None:
        """Raise an error if the example's predictions aren't the stored ones. Also builds encoders' lazy indexes."""
        actual, expected = self.score_example(folder), ExampleScores.read(folder)
        if difference := expected.describe_difference(actual, self.info.tasks, self.calibration):
            versions = ", ".join(f"{name} {version}" for name, version in expected.computed_with.items())
            raise PredictionMismatchError(
                f"The model in '{folder}' gives different predictions here than where it was written: for "
                f"{EXAMPLE_FILE}, {difference}. It was written with {versions}. Install these versions, or train again "
                "here."
            )

    def score_example(self, folder: Path) -> ExampleScores:
        """Score the example request of an artifact folder."""
        with _fp32_matmul():
            return ExampleScores.of(self.rank(**read_example(folder)), self.info.tasks)

    def apply_serving_settings(self, serving: Mapping[str, Any]) -> None:
        """Replace serving settings of the artifact by name. A new `matmul_backend` needs `apply_matmul_backend`."""
        self.info = replace(self.info, **serving)
        self.reader.max_candidates = self.info.max_candidates

    def apply_matmul_backend(self) -> None:
        """Switch to the library that the setting `serving.matmul_backend` names."""
        self.scorer.set_matmul_backend(choose_serving_backend(self.info.matmul_backend))

    # Live updates

    @property
    def tables_as_of_us(self) -> int:
        """Time of the last request in the model's tables, in microseconds."""
        return tables_as_of_us(self.info)

    def build_state(self, rows: Mapping[str | None, LogRows]) -> LiveState:
        """Return the live state extended by new rows: name of an event log (None: the interaction log) -> its rows."""
        previous, rows = self._state, {source: part for source, part in rows.items() if len(part)}
        pipeline, reader = previous.pipeline, copy(previous.reader)
        if None in rows:
            reader.users = reader.users.extended(rows[None], "user")
            reader.candidates = reader.candidates.extended(rows[None], "candidate")
        updated_until = max([previous.updated_until, *(int(part.times().max()) for part in rows.values())])
        return LiveState(pipeline.with_live(pipeline.live.extended(rows)), reader, updated_until)

    def set_state(self, state: LiveState) -> None:
        """Answer later requests with this live state. Requests in progress keep the previous state."""
        self._state = state

    # Ranking requests

    def rank(
        self,
        user: Mapping[str, Any],
        context: Mapping[str, Any],
        candidates: Mapping[str, Any],
        task_weights: Mapping[str, Any] | None = None,
        top_k: int | None = None,
        gate_top_k: int | None = None,
        mask_experts: Sequence[int] | None = None,
        explain: bool | None = None,
    ) -> Ranking:
        """Rank the candidates of one request.

        Args:
            user: Column -> value. The user's ID is required.
            context: Column -> value. The request's time defaults to now. Times may be ISO 8601 strings (UTC unless they
                have an offset), datetimes of Python, pandas or numpy, and integers in `columns.time_unit` if the log
                has integer times.
            candidates: Column -> list, numpy array, pandas Series or Arrow array of N values, or a pandas DataFrame.
                The candidates' IDs are required.
            task_weights: Task or objective -> weight, see `mmoe_rec.inference.request_reader.resolve_task_weights`.
            top_k: Number of best candidates to return. None returns all.
            gate_top_k: Experts per candidate and gate. None is the model's own number.
            mask_experts: Numbers (from 0) of the experts to score without.
            explain: Whether to return `explanations`, see `Explanation`.

        Raises:
            RequestError: A column or option is wrong. The error names it.
        """
        element: dict[str, Any] = {"user": user, "context": context, "candidates": candidates}
        element |= {"task_weights": task_weights, "top_k": top_k, "explain": explain}
        element |= {"gate_top_k": gate_top_k, "mask_experts": mask_experts}
        (answer,) = self.rank_many([Request.of(element)])
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, requests: Sequence[Request | RequestError]) -> list[Ranking | RequestError]:
        """Rank the candidates of each request. Invalid requests and errors in `requests` are answered with an error.

        Requests with the same columns and expert options are scored together.
        """
        state = self._state
        answers: dict[int, Ranking | RequestError] = {}
        groups: dict[Any, list[_CheckedRequest]] = {}
        for number, request in enumerate(requests):
            try:
                if isinstance(request, RequestError):
                    raise request
                weights = resolve_task_weights(self.layout.tasks, request.task_weights)
                experts = self.scorer.check_expert_options(request.gate_top_k, request.mask_experts)
                group = groups.setdefault((experts, request.columns), [])
                group.append(_CheckedRequest(number, request, weights, experts))
            except RequestError as error:
                answers[number] = error
        for group in groups.values():
            for batch in _split_batches(group):
                answers.update(zip((checked.number for checked in batch), self._rank(state, batch), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _rank(self, state: LiveState, batch: Sequence[_CheckedRequest]) -> Sequence[Ranking | RequestError]:
        try:
            rows = state.reader.rows([checked.request for checked in batch])
            inputs = state.pipeline.request_inputs(rows)
            explain = any(checked.request.explain for checked in batch)
            matrix = self.input_builder.build_matrix(*inputs, rows.request_index)
            scored = self.scorer.score(matrix, batch[0].experts, explain)
            return self._sort_candidates(state, batch, rows, inputs, scored)
        except UserError as error:
            if len(batch) == 1:
                return [error if isinstance(error, RequestError) else RequestError(str(error))]
        # Some requests are invalid, or their values differ in type. Halve the batch to find them.
        half = len(batch) // 2
        return [*self._rank(state, batch[:half]), *self._rank(state, batch[half:])]

    def _sort_candidates(
        self,
        state: LiveState,
        batch: Sequence[_CheckedRequest],
        rows: RequestRows,
        inputs: tuple[Inputs, Inputs],
        scored: Scored,
    ) -> list[Ranking]:
        pipeline = state.pipeline
        weights = np.array([checked.weights for checked in batch])
        log_scores = (scored.log_predictions * weights[rows.request_index]).sum(1)
        if not np.isfinite(log_scores).all():
            raise RuntimeError(f"model '{self.info.name}' gives scores that are not finite numbers")
        starts = np.searchsorted(rows.request_index, np.arange(len(batch) + 1))
        # Sort by request, then by descending score. Equal scores keep their order.
        order = np.lexsort((-log_scores, rows.request_index))
        names = pipeline.schema.columns
        ids = rows.column(names.candidate).to_pylist()
        # Without candidate IDs in the log, the IDs are only numbers, so no ID is unknown.
        is_unknown = rows.unseen(names.candidate) & names.has_candidate
        unknown_candidates = np.bincount(rows.request_index, is_unknown, len(batch)).astype(int).tolist()
        unknown_users = (rows.shared.unseen(names.user) & names.has_user).astype(int).tolist()
        sorted_values = scored.predictions[order].astype(np.float64)
        joint = add_joint_predictions(sorted_values, self.layout)
        predictions = {task: values.tolist() for task, values in joint.items()}
        log_values, scores = log_scores[order].tolist(), scores_from_log_scores(log_scores[order]).tolist()
        sorted_rows, positions = order.tolist(), (order - starts[rows.request_index]).tolist()
        times = rows.shared.times().tolist()
        explain_inputs = pipeline.explain(rows) if scored.gates is not None else None
        id_column, request_ids = names.request, [None] * len(batch)
        if id_column is not None and rows.shared.has_column(id_column):
            request_ids = rows.shared.column(id_column).to_pylist()
        integer_ids = pipeline.key_types.get(id_column or "") == "int64"
        rankings = []
        for index, checked in enumerate(batch):
            start, end, request_time = int(starts[index]), int(starts[index + 1]), times[index]
            ranked_request = RankedRequest(rows, inputs, self.layout, index, start, end)
            if checked.request.top_k is not None:
                end = min(end, start + checked.request.top_k)
            request_id = new_request_id(integer_ids) if request_ids[index] is None else request_ids[index]
            explanations, warnings = None, list(scored.warnings)
            if pipeline.point_in_time_encoders:
                warnings += check_request_time(self.info, state.updated_until, request_time)
            if explain_inputs is not None and checked.request.explain:
                explanations = build_explanations(scored, explain_inputs, self.task_names, sorted_rows[start:end])
            rankings.append(
                Ranking(
                    candidates=[ids[row] for row in sorted_rows[start:end]],
                    scores=scores[start:end],
                    log_scores=log_values[start:end],
                    predictions={task: values[start:end] for task, values in predictions.items()},
                    order=positions[start:end],
                    request_time=iso_time(request_time),
                    tables_as_of=self.info.tables_as_of,
                    warnings=warnings,
                    model={"name": self.info.name, "version": self.version},
                    explanations=explanations,
                    unknown_ids={"user": unknown_users[index], "candidate": unknown_candidates[index]},
                    request_id=request_id if self.keep_inputs else None,
                    ranked_request=ranked_request if self.keep_inputs else None,
                )
            )
        return rankings

    # Scoring rows

    def score(self, rows: Rows, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Score rows of the interaction log. They need no labels.

        Counters and histories are as of each row's request. For a request before the end of the model's tables, they
        are as of the end of the tables, and include events after the request.

        Args:
            rows: N rows with the log's columns.
            weights: Weights of the tasks in the score, (T,). None takes `score_weight` of the settings.

        Returns:
            Predictions in the order of `task_names`, (N, T) float32, or float64 if a task is a regression; and log
            scores, (N,) float64.

        Raises:
            UserError: A column is missing or has the wrong type.
        """
        pipeline, results = self.pipeline, []
        rows = read_rows(pipeline, rows)
        rows = pipeline.compare_candidates(rows)  # Before batches divide requests.
        if weights is None:
            weights = resolve_task_weights(self.info.tasks, None)
        for chunk in rows.iter_batches(FEATURE_BATCH_ROWS):
            batch = make_batch(pipeline.encode(chunk), self.layout, torchrec=False)
            with torch.inference_mode():
                inputs = self.model.concat_inputs(batch)[0]
            results.append(self.scorer.score(inputs))
        scored = Scored.join(results, len(self.task_names))
        return scored.predictions, scored.log_predictions @ weights

    def score_table(self, rows: Rows) -> pa.Table:
        """Score rows (see `score`). Returns keys, `predicted_NAME` for each task and joint outcome, and `score`."""
        rows = read_rows(self.pipeline, rows)
        return scored_table(rows, *self.score(rows), self.layout)


def _split_batches(group: Sequence[_CheckedRequest]) -> Iterator[Sequence[_CheckedRequest]]:
    """Split requests into batches of at most FEATURE_BATCH_ROWS candidates. A larger request is a batch by itself."""
    batch, num_rows = list[_CheckedRequest](), 0
    for checked in group:
        if batch and num_rows + checked.request.candidate_count > FEATURE_BATCH_ROWS:
            yield batch
            batch, num_rows = [], 0
        batch.append(checked)
        num_rows += checked.request.candidate_count
    yield batch


@contextmanager
def _fp32_matmul() -> Iterator[None]:
    """Compute matrix products in fp32, as the model server does, even if the process allows bf16 or TF32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
