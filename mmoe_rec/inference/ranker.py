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
    EXAMPLE,
    Artifact,
    ExampleScores,
    known_of,
    read_artifact,
    read_calibration,
    read_example,
    read_model,
    version_of,
)
from mmoe_rec.inference.ranking import RankedRequest, Ranking, doubt_time, explain, new_id, scored_table
from mmoe_rec.inference.request_reader import Request, RequestReader, fused_weights, read_rows
from mmoe_rec.inference.scorer import ExpertOptions, RequestInputs, Scored, Scorer
from mmoe_rec.log.given import iso_time
from mmoe_rec.log.rows import ROWS_AT_A_TIME, LogRows, RequestRows
from mmoe_rec.model.products import serving_products
from mmoe_rec.model.score import add_outcomes, scores_from_logs
from mmoe_rec.model.tables import PlainTables

if TYPE_CHECKING:
    import pandas as pd

    Rows: TypeAlias = LogRows | pa.Table | pd.DataFrame


class OtherScoresError(UserError):
    """A model that is as it was written gives other predictions here: the fault of this machine or its packages."""


@dataclass(frozen=True)
class Knowledge:
    """What a ranker knows of what happened. pipeline, reader: that know it; known: up to when, microseconds."""

    pipeline: FeaturePipeline
    reader: RequestReader
    known: int


class _Checked(NamedTuple):
    """A request whose options are checked. number: its place; weights: (T,) float64 of the tasks in the score."""

    number: int
    request: Request
    weights: np.ndarray
    experts: ExpertOptions


class Ranker:
    """A loaded model with its features and calibration. version: of its artifact, as `version_of` gives it.

    Threads may rank, score and learn with one ranker. What it knows of events is one object that never changes, which
    each call reads once: so each answer is that of one moment.
    """

    def __init__(self, folder: Path, about: Artifact, version: str = "") -> None:
        """Opens an artifact folder as it is; `load` also checks it."""
        features = folder / "features"
        pipeline = FeaturePipeline.load(features)
        if pipeline.layout != about.layout.of_rows():
            raise UserError(f"'{folder}' is damaged: its features do not give the inputs that the model was trained on")
        self.about, self.version, self.layout = about, version, about.layout
        self.scorer = Scorer(about, read_model(about, folder), read_calibration(folder))
        self.model, self.calibration = self.scorer.model, self.scorer.calibration
        self.names = self.scorer.names
        tables = self.model.tables
        assert isinstance(tables, PlainTables)
        with_ids, histories = self.model.trees is not None, self.model.mixture.histories
        self.request_inputs = RequestInputs(self.layout, tables, with_ids, histories)
        reader = RequestReader(pipeline, features, about.max_candidates)
        self._knowledge = Knowledge(pipeline, reader, known_of(about))
        self.keeps_seen = False
        """Whether rankings hold what features saw of their request (`Ranking.seen`), and its id, for who logs it."""

    @property
    def pipeline(self) -> FeaturePipeline:
        """The features, with what they have learnt up to now."""
        return self._knowledge.pipeline

    @property
    def reader(self) -> RequestReader:
        """What reads requests, with the latest values that are known now."""
        return self._knowledge.reader

    # Loading

    @staticmethod
    def load(folder: str | Path) -> Ranker:
        """Read an artifact folder and check that it is as it was written.

        `mmoe_rec.load_ranker` also takes URIs such as `models:/NAME@ALIAS`, which need MLflow.

        Raises:
            UserError: The folder is incomplete, changed or made by another version.
            OtherScoresError: The model gives other predictions here than where it was written.
        """
        if re.match(r"(models|runs):/", str(folder)) and not Path(folder).exists():
            raise UserError(f"'{folder}' is a URI, and Ranker.load takes a folder. Use mmoe_rec.load_ranker.")
        folder = Path(folder)
        try:
            about, version = read_artifact(folder), version_of(folder)
            ranker = Ranker(folder, about, version)
            if (version_of(folder), read_artifact(folder, verify=False)) != (version, about):
                raise UserError(f"another model took the place of '{folder}' while it was loaded: load it again")
            ranker._check_example(folder)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"the model in '{folder}' can't be loaded ({one_line(error)}): train it again") from error
        return ranker

    def _check_example(self, folder: Path) -> None:
        """Raises OtherScoresError unless the example in a folder gets the scores that stand beside it.

        This also builds the indexes that encoders make at their first use, so that no request waits for them.
        """
        now, before = self.example_scores(folder), ExampleScores.read(folder)
        if difference := before.difference(now, self.about.tasks, self.calibration):
            versions = ", ".join(f"{name} {version}" for name, version in before.computed_with.items())
            raise OtherScoresError(
                f"the model in '{folder}' gives other predictions here than where it was written: for {EXAMPLE}, "
                f"{difference}. It was written with {versions}: install these versions, or train again here"
            )

    def example_scores(self, folder: Path) -> ExampleScores:
        """What the model gives for the example in an artifact folder."""
        with _products_in_fp32():
            return ExampleScores.of(self.rank(**read_example(folder)), self.about.tasks)

    def take_settings(self, serving: Mapping[str, Any]) -> None:
        """Serves by these of max_candidates, stale_after_days and products (which `use_products` looks at)."""
        self.about = replace(self.about, **serving)
        self.reader.max_candidates = self.about.max_candidates

    def use_products(self) -> None:
        """Multiply by the library that the setting `serving.matmul_backend` asks for from now on."""
        self.scorer.multiply_by(serving_products(self.about.products))

    # Learning what happened since

    @property
    def tables_known(self) -> int:
        """The time of the last request that its tables know, microseconds."""
        return known_of(self.about)

    def prepare(self, rows: Mapping[str | None, LogRows]) -> Knowledge:
        """What `take` takes. rows: of the interaction log (None) and of logs of events, with all of their columns."""
        before, rows = self._knowledge, {source: each for source, each in rows.items() if len(each)}
        pipeline, reader = before.pipeline, copy(before.reader)
        if None in rows:
            reader.users = reader.users.extended(rows[None], "user")
            reader.candidates = reader.candidates.extended(rows[None], "candidate")
        known = max([before.known, *(int(each.times().max()) for each in rows.values())])
        return Knowledge(pipeline.with_live(pipeline.live.extended(rows)), reader, known)

    def take(self, knowledge: Knowledge) -> None:
        """Knows what was prepared last from now on; requests that are under way are answered as before."""
        self._knowledge = knowledge

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
            task_weights: task or objective -> weight, see `mmoe_rec.inference.request_reader.fused_weights`.
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
        knowledge = self._knowledge
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
                answers.update(zip((each.number for each in part), self._rank(knowledge, part), strict=True))
        return [answers[number] for number in range(len(requests))]

    def check_options(self, request: Request) -> tuple[np.ndarray, ExpertOptions]:
        """(T,) weights of the tasks in the score, and experts, that a request asks for. Raises RequestError for a wrong
        option."""
        weights = fused_weights(self.layout.tasks, request.task_weights)
        return weights, self.scorer.options(request.gate_top_k, request.mask_experts)

    def _rank(self, knowledge: Knowledge, part: Sequence[_Checked]) -> Sequence[Ranking | RequestError]:
        try:
            rows = knowledge.reader.rows([each.request for each in part])
            inputs = knowledge.pipeline.request_inputs(rows)
            explain = any(each.request.explain for each in part)
            matrix = self.request_inputs.matrix(*inputs, rows.of)
            scored = self.scorer.score(matrix, part[0].experts, explain)
            return self._put_in_order(knowledge, part, rows, inputs, scored)
        except UserError as error:
            if len(part) == 1:
                return [error if isinstance(error, RequestError) else RequestError(str(error))]
        # Some of them are wrong, or give values of other types than the others: halves find out which.
        half = len(part) // 2
        return [*self._rank(knowledge, part[:half]), *self._rank(knowledge, part[half:])]

    def _put_in_order(
        self,
        knowledge: Knowledge,
        part: Sequence[_Checked],
        rows: RequestRows,
        inputs: tuple[Inputs, Inputs],
        scored: Scored,
    ) -> list[Ranking]:
        pipeline = knowledge.pipeline
        weights = np.array([each.weights for each in part])
        log_scores = (scored.logs * weights[rows.of]).sum(1)
        if not np.isfinite(log_scores).all():
            raise RuntimeError(f"model '{self.about.name}' gives scores that are not finite numbers")
        starts = np.searchsorted(rows.of, np.arange(len(part) + 1))
        # By request, then by falling score; equal ones keep their order.
        order = np.lexsort((-log_scores, rows.of))
        names = pipeline.schema.columns
        ids = rows.column(names.candidate).to_pylist()
        # Of a plain table there are no ids to be known.
        new = rows.unknown(names.candidate) & names.has_candidate
        unknown = np.bincount(rows.of, new, len(part)).astype(int).tolist()
        unknown_users = (rows.shared.unknown(names.user) & names.has_user).astype(int).tolist()
        best = scored.values[order].astype(np.float64)
        lists = {name: each.tolist() for name, each in add_outcomes(best, self.layout).items()}
        logs, scores = log_scores[order].tolist(), scores_from_logs(log_scores[order]).tolist()
        places, positions = order.tolist(), (order - starts[rows.of]).tolist()
        times = rows.shared.times().tolist()
        doubts = partial(doubt_time, self.about, knowledge.known) if pipeline.memory_encoders else None
        read = pipeline.explain(rows) if scored.gates is not None else None
        name, request_ids = names.request, [None] * len(part)
        if name is not None and rows.shared.has(name):
            request_ids = rows.shared.column(name).to_pylist()
        integer_ids = pipeline.key_types.get(name or "") == "int64"
        rankings = []
        for number, each in enumerate(part):
            start, end, moment = int(starts[number]), int(starts[number + 1]), times[number]
            seen = RankedRequest(rows, inputs, self.layout, number, start, end)
            if each.request.top_k is not None:
                end = min(end, start + each.request.top_k)
            request_id = new_id(integer_ids) if request_ids[number] is None else request_ids[number]
            explanations = None
            if read is not None and each.request.explain:
                explanations = explain(scored, read, self.names, places[start:end])
            rankings.append(
                Ranking(
                    candidates=[ids[place] for place in places[start:end]],
                    scores=scores[start:end],
                    log_scores=logs[start:end],
                    predictions={name: every[start:end] for name, every in lists.items()},
                    order=positions[start:end],
                    request_time=iso_time(moment),
                    tables_as_of=self.about.tables_as_of,
                    warnings=[*scored.warnings, *(doubts(moment) if doubts else ())],
                    model={"name": self.about.name, "version": self.version},
                    explanations=explanations,
                    unknown_ids={"user": unknown_users[number], "candidate": unknown[number]},
                    request_id=request_id if self.keeps_seen else None,
                    seen=seen if self.keeps_seen else None,
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
            weights = fused_weights(self.about.tasks, None)
        for part in rows.cut(ROWS_AT_A_TIME):
            batch = make_batch(pipeline.encode(part), self.layout, torchrec=False)
            with torch.inference_mode():
                inputs = self.model.side_by_side(batch)[0]
            parts.append(self.scorer.score(inputs))
        scored = Scored.join(parts, len(self.names))
        return scored.values, scored.logs @ weights

    def score_table(self, rows: Rows) -> pa.Table:
        """What `score` gives, as a table: keys of the rows, `predicted_NAME` of each task and outcome, and `score`."""
        rows = read_rows(self.pipeline, rows)
        return scored_table(rows, *self.score(rows), self.layout)


def _parts(group: Sequence[_Checked]) -> Iterator[Sequence[_Checked]]:
    """Requests whose candidates fill a pass."""
    part: list[_Checked] = []
    rows = 0
    for each in group:
        if part and rows + each.request.count > ROWS_AT_A_TIME:
            yield part
            part, rows = [], 0
        part.append(each)
        rows += each.request.count
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
