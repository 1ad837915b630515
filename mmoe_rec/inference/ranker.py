"""`Ranker`: a model in memory. A request's rows are encoded, scored by the model, calibrated and put in order.

It runs on the CPU, where the rows are encoded: a request's few hundred rows are no work for a GPU, and the server needs
none. Who scores millions of rows moves the `model` of a ranker to a GPU and gives it batches there. It needs torch
alone: no torchrec, torch.distributed or mlflow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
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
    """A model that is as it was written gives other predictions here: the fault of this machine or its packages."""


@dataclass(frozen=True)
class LiveState:
    """What a ranker knows of what happened. pipeline, reader: that know it; known: up to when, microseconds."""

    pipeline: FeaturePipeline
    reader: RequestReader
    updated_until: int


class _Checked(NamedTuple):
    """A request whose options are checked. number: its place; weights: (T,) float64 of the tasks in the score."""

    number: int
    request: Request
    weights: np.ndarray
    experts: ExpertOptions


class Ranker:
    """A loaded model with its features and calibration. version: of its artifact, as `artifact_version` gives it.

    Threads may rank, score and learn with one ranker. What it knows of events is one object that never changes, which
    each call reads once: so each answer is that of one moment.
    """

    def __init__(self, folder: Path, info: ArtifactInfo, version: str = "") -> None:
        """Opens an artifact folder as it is; `load` also checks it."""
        features = folder / "features"
        pipeline = FeaturePipeline.load(features)
        if pipeline.layout != info.layout.row_layout():
            raise UserError(f"'{folder}' is damaged: its features do not give the inputs that the model was trained on")
        self.info, self.version, self.layout = info, version, info.layout
        self.scorer = Scorer(info, read_model(info, folder), read_calibration(folder))
        self.model, self.calibration = self.scorer.model, self.scorer.calibration
        self.task_names = self.scorer.task_names
        tables = self.model.tables
        assert isinstance(tables, PlainTables)
        with_ids, histories = self.model.trees is not None, self.model.mixture.histories
        self.request_inputs = InputMatrixBuilder(self.layout, tables, with_ids, histories)
        reader = RequestReader(pipeline, features, info.max_candidates)
        self._state = LiveState(pipeline, reader, tables_as_of_us(info))
        self.keep_inputs = False
        """Whether rankings hold what features saw of their request (`Ranking.ranked_request`), and its id, for who logs
        it."""

    @property
    def pipeline(self) -> FeaturePipeline:
        """The features, with what they have learnt up to now."""
        return self._state.pipeline

    @property
    def reader(self) -> RequestReader:
        """What reads requests, with the latest values that are known now."""
        return self._state.reader

    # Loading

    @staticmethod
    def load(folder: str | Path) -> Ranker:
        """Read an artifact folder and check that it is as it was written.

        `mmoe_rec.load_ranker` also takes URIs such as `models:/NAME@ALIAS`, which need MLflow.

        Raises:
            UserError: The folder is incomplete, changed or made by another version.
            PredictionMismatchError: The model gives other predictions here than where it was written.
        """
        if re.match(r"(models|runs):/", str(folder)) and not Path(folder).exists():
            raise UserError(f"'{folder}' is a URI, and Ranker.load takes a folder. Use mmoe_rec.load_ranker.")
        folder = Path(folder)
        try:
            info, version = read_artifact(folder), artifact_version(folder)
            ranker = Ranker(folder, info, version)
            if (artifact_version(folder), read_artifact(folder, verify=False)) != (version, info):
                raise UserError(f"another model took the place of '{folder}' while it was loaded: load it again")
            ranker._check_example(folder)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"the model in '{folder}' can't be loaded ({one_line(error)}): train it again") from error
        return ranker

    def _check_example(self, folder: Path) -> None:
        """Raises OtherScoresError unless the example in a folder gets the scores that stand beside it.

        This also builds the indexes that encoders make at their first use, so that no request waits for them.
        """
        now, before = self.score_example(folder), ExampleScores.read(folder)
        if describe_difference := before.describe_difference(now, self.info.tasks, self.calibration):
            versions = ", ".join(f"{name} {version}" for name, version in before.computed_with.items())
            raise PredictionMismatchError(
                f"the model in '{folder}' gives other predictions here than where it was written: for {EXAMPLE_FILE}, "
                f"{describe_difference}. It was written with {versions}: install these versions, or train again here"
            )

    def score_example(self, folder: Path) -> ExampleScores:
        """What the model gives for the example in an artifact folder."""
        with _products_in_fp32():
            return ExampleScores.of(self.rank(**read_example(folder)), self.info.tasks)

    def apply_serving_settings(self, serving: Mapping[str, Any]) -> None:
        """Serves by these of max_candidates, stale_after_days and products (which `apply_matmul_backend` looks at)."""
        self.info = replace(self.info, **serving)
        self.reader.max_candidates = self.info.max_candidates

    def apply_matmul_backend(self) -> None:
        """Multiply by the library that the setting `serving.matmul_backend` asks for from now on."""
        self.scorer.set_matmul_backend(choose_serving_backend(self.info.matmul_backend))

    # Learning what happened since

    @property
    def tables_as_of_us(self) -> int:
        """The time of the last request that its tables know, microseconds."""
        return tables_as_of_us(self.info)

    def build_state(self, rows: Mapping[str | None, LogRows]) -> LiveState:
        """What `take` takes. rows: of the interaction log (None) and of logs of events, with all of their columns."""
        before, rows = self._state, {source: each for source, each in rows.items() if len(each)}
        pipeline, reader = before.pipeline, copy(before.reader)
        if None in rows:
            reader.users = reader.users.extended(rows[None], "user")
            reader.candidates = reader.candidates.extended(rows[None], "candidate")
        updated_until = max([before.updated_until, *(int(each.times().max()) for each in rows.values())])
        return LiveState(pipeline.with_live(pipeline.live.extended(rows)), reader, updated_until)

    def set_state(self, state: LiveState) -> None:
        """Knows what was prepared last from now on; requests that are under way are answered as before."""
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
        """Ranks the candidates of one request.

        Args:
            user: column -> value; the user's id is required.
            context: column -> value; the request's time is now unless given. Times may be ISO 8601 strings (in UTC,
                unless they have an offset), datetimes of Python, pandas or numpy, and integers in `columns.time_unit`
                where the log has such.
            candidates: column -> list, numpy array, pandas Series or Arrow array of N values, or a pandas DataFrame;
                the candidates' ids are required.
            task_weights: task or objective -> weight, see `mmoe_rec.inference.request_reader.resolve_task_weights`.
            top_k: give only this many best candidates.
            gate_top_k: experts per candidate and gate, instead of the model's own number.
            mask_experts: numbers of experts to score without.
            explain: give `explanations` too, see `Explanation`.

        Raises:
            RequestError: naming the column or option that the caller has to change.
        """
        element: dict[str, Any] = {"user": user, "context": context, "candidates": candidates}
        element |= {"task_weights": task_weights, "top_k": top_k, "explain": explain}
        element |= {"gate_top_k": gate_top_k, "mask_experts": mask_experts}
        (answer,) = self.rank_many([Request.of(element)])
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, requests: Sequence[Request | RequestError]) -> list[Ranking | RequestError]:
        """Ranks the candidates of each request; one that is wrong gets its error, or keeps that which stands there.

        Requests that give the same columns and ask for the same experts share one pass of features and model.
        """
        state = self._state
        answers: dict[int, Ranking | RequestError] = {}
        groups: dict[Any, list[_Checked]] = {}
        for number, request in enumerate(requests):
            try:
                if isinstance(request, RequestError):
                    raise request
                weights, experts = self.check_options(request)
                group = groups.setdefault((experts, request.columns), [])
                group.append(_Checked(number, request, weights, experts))
            except RequestError as error:
                answers[number] = error
        for group in groups.values():
            for part in _parts(group):
                answers.update(zip((each.number for each in part), self._rank(state, part), strict=True))
        return [answers[number] for number in range(len(requests))]

    def check_options(self, request: Request) -> tuple[np.ndarray, ExpertOptions]:
        """(T,) weights of the tasks in the score, and experts, that a request asks for. Raises RequestError for a wrong
        option."""
        weights = resolve_task_weights(self.layout.tasks, request.task_weights)
        return weights, self.scorer.check_expert_options(request.gate_top_k, request.mask_experts)

    def _rank(self, state: LiveState, part: Sequence[_Checked]) -> Sequence[Ranking | RequestError]:
        try:
            rows = state.reader.rows([each.request for each in part])
            inputs = state.pipeline.request_inputs(rows)
            explain = any(each.request.explain for each in part)
            build_matrix = self.request_inputs.build_matrix(*inputs, rows.request_index)
            scored = self.scorer.score(build_matrix, part[0].experts, explain)
            return self._put_in_order(state, part, rows, inputs, scored)
        except UserError as error:
            if len(part) == 1:
                return [error if isinstance(error, RequestError) else RequestError(str(error))]
        # Some of them are wrong, or give values of other types than the others: halves find out which.
        half = len(part) // 2
        return [*self._rank(state, part[:half]), *self._rank(state, part[half:])]

    def _put_in_order(
        self,
        state: LiveState,
        part: Sequence[_Checked],
        rows: RequestRows,
        inputs: tuple[Inputs, Inputs],
        scored: Scored,
    ) -> list[Ranking]:
        pipeline = state.pipeline
        weights = np.array([each.weights for each in part])
        log_scores = (scored.log_predictions * weights[rows.request_index]).sum(1)
        if not np.isfinite(log_scores).all():
            raise RuntimeError(f"model '{self.info.name}' gives scores that are not finite numbers")
        starts = np.searchsorted(rows.request_index, np.arange(len(part) + 1))
        # By request, then by falling score; equal ones keep their order.
        order = np.lexsort((-log_scores, rows.request_index))
        names = pipeline.schema.columns
        ids = rows.column(names.candidate).to_pylist()
        # Of a plain table there are no ids to be known.
        new = rows.unseen(names.candidate) & names.has_candidate
        unknown = np.bincount(rows.request_index, new, len(part)).astype(int).tolist()
        unknown_users = (rows.shared.unseen(names.user) & names.has_user).astype(int).tolist()
        best = scored.predictions[order].astype(np.float64)
        lists = {name: each.tolist() for name, each in add_joint_predictions(best, self.layout).items()}
        logs, scores = log_scores[order].tolist(), scores_from_log_scores(log_scores[order]).tolist()
        places, positions = order.tolist(), (order - starts[rows.request_index]).tolist()
        times = rows.shared.times().tolist()
        doubts = (
            partial(check_request_time, self.info, state.updated_until) if pipeline.point_in_time_encoders else None
        )
        read = pipeline.explain(rows) if scored.gates is not None else None
        name, request_ids = names.request, [None] * len(part)
        if name is not None and rows.shared.has_column(name):
            request_ids = rows.shared.column(name).to_pylist()
        integer_ids = pipeline.key_types.get(name or "") == "int64"
        rankings = []
        for number, each in enumerate(part):
            start, end, moment = int(starts[number]), int(starts[number + 1]), times[number]
            ranked_request = RankedRequest(rows, inputs, self.layout, number, start, end)
            if each.request.top_k is not None:
                end = min(end, start + each.request.top_k)
            request_id = new_request_id(integer_ids) if request_ids[number] is None else request_ids[number]
            explanations = None
            if read is not None and each.request.explain:
                explanations = build_explanations(scored, read, self.task_names, places[start:end])
            rankings.append(
                Ranking(
                    candidates=[ids[place] for place in places[start:end]],
                    scores=scores[start:end],
                    log_scores=logs[start:end],
                    predictions={name: every[start:end] for name, every in lists.items()},
                    order=positions[start:end],
                    request_time=iso_time(moment),
                    tables_as_of=self.info.tables_as_of,
                    warnings=[*scored.warnings, *(doubts(moment) if doubts else ())],
                    model={"name": self.info.name, "version": self.version},
                    explanations=explanations,
                    unknown_ids={"user": unknown_users[number], "candidate": unknown[number]},
                    request_id=request_id if self.keep_inputs else None,
                    ranked_request=ranked_request if self.keep_inputs else None,
                )
            )
        return rankings

    # Scoring rows

    def score(self, rows: Rows, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (N, T) and log scores (N,) float64 of N rows with the log's columns; labels need not be there.

        Predictions are float32, or float64 where a task is a regression, in the order of `names`.
        Counters and histories are as of each row's request, and as of the end of the tables for rows requested earlier.
        weights: (T,) weights of the tasks in the score; None takes the settings' `score_weight`. Raises UserError for a
        column that is missing, or that cannot be read as the features do.
        """
        pipeline, parts = self.pipeline, []
        rows = read_rows(pipeline, rows)
        if weights is None:
            weights = resolve_task_weights(self.info.tasks, None)
        for part in rows.iter_batches(FEATURE_BATCH_ROWS):
            batch = make_batch(pipeline.encode(part), self.layout, torchrec=False)
            with torch.inference_mode():
                inputs = self.model.concat_inputs(batch)[0]
            parts.append(self.scorer.score(inputs))
        scored = Scored.join(parts, len(self.task_names))
        return scored.predictions, scored.log_predictions @ weights

    def score_table(self, rows: Rows) -> pa.Table:
        """What `score` gives, as a table: keys of the rows, `predicted_NAME` of each task and outcome, and `score`."""
        rows = read_rows(self.pipeline, rows)
        return scored_table(rows, *self.score(rows), self.layout)


def _parts(group: Sequence[_Checked]) -> Iterator[Sequence[_Checked]]:
    """Requests whose candidates fill a pass."""
    part: list[_Checked] = []
    rows = 0
    for each in group:
        if part and rows + each.request.candidate_count > FEATURE_BATCH_ROWS:
            yield part
            part, rows = [], 0
        part.append(each)
        rows += each.request.candidate_count
    yield part


@contextmanager
def _products_in_fp32() -> Iterator[None]:
    """Products are fp32, as in the model server: the process may have told torch to round them to bf16 or TF32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
