"""A ranker in memory: the request's rows are encoded, scored by the model, calibrated and put in order.

It runs on the CPU, where the rows are encoded: a request's few hundred rows are no work for a GPU, and the server needs
none. Who scores millions of rows moves the `model` of a ranker to a GPU and gives it batches there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.errors import UserError, one_line
from mmoe_rec.features.memories import Live
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import Artifact, iso_time, read_artifact, read_calibration, read_model, version_of
from mmoe_rec.inference.errors import OtherScoresError, RequestError
from mmoe_rec.inference.example import EXAMPLE, ExampleScores
from mmoe_rec.inference.experts import GuardedModel
from mmoe_rec.inference.freshness import Freshness, latest
from mmoe_rec.inference.passes import ROWS_AT_A_TIME, Passes
from mmoe_rec.inference.ranking import Ranking, scored_table
from mmoe_rec.inference.requests.request import Request, RequestReader
from mmoe_rec.inference.requests.weights import fused_weights
from mmoe_rec.inference.rows import as_logged, read_rows
from mmoe_rec.inference.scorer import Scored, Scorer
from mmoe_rec.log.rows import LogRows
from mmoe_rec.model.inputs import RequestInputs
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.products import Products
from mmoe_rec.model.score import Calibration
from mmoe_rec.model.tables import PlainTables

if TYPE_CHECKING:
    import pandas as pd

    Rows: TypeAlias = LogRows | pa.Table | pd.DataFrame


@dataclass(frozen=True)
class Learnt:
    """What a ranker can take. pipeline, reader: that know it; known: time of the latest row, microseconds; before: what
    it was prepared beside."""

    pipeline: FeaturePipeline
    reader: RequestReader
    known: int
    before: Live


class LoadedRanker:
    """A loaded model with its features and calibration. version: of its artifact, as `version_of` gives it.

    Threads may rank, score and learn with one ranker. What it knows of events is one object that never changes, which
    each call reads once: so each answer is that of one moment.
    """

    def __init__(
        self,
        about: Artifact,
        model: RankingModel,
        calibration: Calibration,
        pipeline: FeaturePipeline,
        features: Path,
        version: str,
    ):
        self.about, self.version = about, version
        self.layout = about.layout
        self.model = model.eval()
        self.guarded = GuardedModel(model, [task.name for task in about.tasks])
        self.calibration = calibration
        self.scorer = Scorer(about, self.guarded, calibration)
        self.names = [task.name for task in about.tasks]
        tables = model.tables
        assert isinstance(tables, PlainTables)
        reader = RequestReader(pipeline, features, about.max_candidates)
        inputs = RequestInputs(self.layout, tables)
        self._passes = Passes(self.scorer, pipeline, inputs, reader, Freshness.of(about), version)
        self._learning = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock, which is a process's own."""
        return {name: each for name, each in vars(self).items() if name != "_learning"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the other process."""
        vars(self).update(state)
        self._learning = threading.RLock()

    @property
    def pipeline(self) -> FeaturePipeline:
        """The features, with what they have learnt up to now."""
        return self._passes.pipeline

    @property
    def reader(self) -> RequestReader:
        """What reads requests, with the latest values that are known now."""
        return self._passes.reader

    @staticmethod
    def read(folder: Path) -> LoadedRanker:
        """As `Ranker.load`."""
        try:
            return LoadedRanker._read(folder)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"the model in '{folder}' can't be loaded ({one_line(error)}): train it again, or use the version of "
                "mmoe_rec that wrote it"
            ) from error

    @staticmethod
    def _read(folder: Path) -> LoadedRanker:
        about, version = read_artifact(folder), version_of(folder)
        ranker = LoadedRanker._opened(folder, about, version)
        if (version_of(folder), read_artifact(folder, verify=False)) != (version, about):
            raise UserError(f"another model took the place of the one in '{folder}' while it was loaded: load it again")
        # This also builds the indexes that encoders make at their first use, so that no request waits for them.
        found, expected = ranker.example_scores(folder), ExampleScores.read(folder)
        if told := expected.difference(found, ranker.about.tasks, ranker.calibration):
            others = ", ".join(expected.other_versions(found))
            raise OtherScoresError(
                f"the model in '{folder}' computes something else here than where it was written: for {EXAMPLE}, "
                f"{told} ({others or 'by the same versions of torch, numpy and pyarrow'}); "
                + ("install the versions that it was written with" if others else "use the code that wrote it")
                + ", or train again here"
            )
        return ranker

    @staticmethod
    def unchecked(folder: Path) -> LoadedRanker:
        """From a folder that is being written: no manifest or expected scores are looked at, and it has no version."""
        return LoadedRanker._opened(folder, read_artifact(folder, verify=False), "")

    @staticmethod
    def _opened(folder: Path, about: Artifact, version: str) -> LoadedRanker:
        pipeline = FeaturePipeline.load(folder / "features")
        if pipeline.layout != about.layout.of_rows():
            raise UserError(f"'{folder}' is damaged: its features do not give the inputs that the model was trained on")
        model = read_model(about, folder)
        return LoadedRanker(about, model, read_calibration(folder), pipeline, folder / "features", version)

    def example_scores(self, folder: Path) -> ExampleScores:
        """What the model gives for the example in an artifact folder."""
        example = json.loads((folder / EXAMPLE).read_text(encoding="utf-8"))
        with _products_in_fp32():
            return ExampleScores.of(self.rank(**example), self.about.tasks)

    def take_settings(self, serving: Mapping[str, Any]) -> None:
        """Serves by other settings of section `serving` than those that the model was trained with.

        serving: those that change, of max_candidates, stale_after_days and products (which `serve_faster` looks at).
        """
        self.about = replace(self.about, **serving)
        self.reader.max_candidates = self.about.max_candidates
        self._passes = replace(self._passes, freshness=Freshness.of(self.about))

    @property
    def live_rows(self) -> int:
        """Rows of events that it has learnt beside its tables."""
        return self.pipeline.live.rows

    @property
    def tables_known(self) -> int:
        """The time of the last request that its tables know, microseconds."""
        return Freshness.of(self.about).known

    def learn(self, events: pa.Table | pd.DataFrame, log: str | None = None) -> None:
        """Learns what has happened since: counters, histories and latest values count it in requests from now on.

        Args:
            events: rows with the log's columns, labels among them; attributes of users and candidates that they have
                no column for stay as they are. Nothing looks for rows that come twice.
            log: name of the log of events that they are of; None is the interaction log.

        Requests that other threads rank meanwhile are answered as before, or with all that is learnt.

        Raises:
            UserError: for a row that can't be one of the log, or a column that is missing.
        """
        from mmoe_rec.live.event_rows import RowChecks, known_types

        table = events if isinstance(events, pa.Table) else pa.Table.from_pandas(events, preserve_index=False)
        schema = self.pipeline.schema
        checked = RowChecks(schema, known_types(self.pipeline), max(len(table), 1)).of_table(log, table)
        with self._learning:
            self.take(self.prepared({log: as_logged(self.pipeline.schema, self.reader, log, checked)}))

    def prepared(self, rows: Mapping[str | None, LogRows]) -> Learnt:
        """What `take` takes; one after the other.

        rows: of the interaction log (None) and of logs of events, with all columns of the log.
        """
        passes = self._passes
        pipeline, reader, known = passes.pipeline, passes.reader, passes.freshness.known
        live, users, candidates = pipeline.live, reader.users, reader.candidates
        for source, each in rows.items():
            if not len(each):
                continue
            live = live.extended(pipeline.live_events(source, each), len(each))
            known = max(known, int(each.times().max()))
            if source is None:
                schema, as_of = pipeline.schema, self.tables_known
                users = users.with_changes(users.changes(each, schema, as_of))
                candidates = candidates.with_changes(candidates.changes(each, schema, as_of))
        return Learnt(pipeline.with_live(live), reader.with_latest(users, candidates), known, pipeline.live)

    def take(self, learnt: Learnt) -> None:
        """Knows what was prepared from now on; requests that are under way are answered as before.

        Raises ValueError where something else was taken since it was prepared, which would be forgotten.
        """
        with self._learning:
            passes = self._passes
            if learnt.before is not passes.pipeline.live:
                raise ValueError("something else was learnt since this was prepared: prepare it again")
            freshness = passes.freshness.up_to(learnt.known)
            self._passes = replace(passes, pipeline=learnt.pipeline, reader=learnt.reader, freshness=freshness)

    def keep_seen(self) -> None:
        """From now on rankings hold what features saw of their request (`Ranking.seen`), for who logs it."""
        self._passes = replace(self._passes, keeps_seen=True)

    def serve_faster(self) -> None:
        """Multiplies as `best_products` says from now on."""
        self.scorer.multiply_by(self.best_products())

    def best_products(self) -> Products:
        """What the setting `serving.products` asks for; for `auto`, what is faster on this processor."""
        asked = self.about.products
        if asked == "auto":
            return self.scorer.faster_products(self._passes.inputs.width)
        return "onednn" if asked == "onednn" else "blas"

    @property
    def exact_from(self) -> str | None:
        """ISO time from which on requests are answered as of their own time by all counters and histories; None where
        any time is."""
        exact = latest(each.memory.floor for each in self.pipeline.memory_encoders.values())
        return None if exact is None else iso_time(exact)

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
            task_weights: task or objective -> weight, see `mmoe_rec.inference.requests.weights`.
            top_k: give only this many best candidates.
            gate_top_k: experts per candidate and gate, instead of the model's own number.
            mask_experts: numbers of experts to score without.
            explain: give `explanations` too, see `Explanation`.

        Raises:
            RequestError: naming the column or option that the caller has to change.
        """
        request = Request(user, context, candidates, task_weights, top_k, gate_top_k, mask_experts, explain)
        answer = self.rank_many([request])[0]
        if isinstance(answer, RequestError):
            raise answer
        return answer

    def rank_many(self, requests: Sequence[Request]) -> list[Ranking | RequestError]:
        """Ranks the candidates of each request; one that is wrong gets its error, as `rank` would raise it.

        Requests that give the same columns and ask for the same experts share one pass of features and model.
        """
        return self._passes.answers(requests)

    def score(self, rows: Rows, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (N, T) and log scores (N,) float64 of N rows with the log's columns; labels need not be there.

        Predictions are float32, or float64 where a task is a regression, in the order of `names`.
        Counters and histories are as of each row's request, and as of `exact_from` for rows requested earlier.
        weights: (T,) weights of the tasks in the score; None takes the settings' `score_weight`. Raises UserError for a
        column that is missing, or that cannot be read as the features do.
        """
        pipeline = self.pipeline
        if not isinstance(rows, LogRows):
            rows = read_rows(pipeline, rows)
        if weights is None:
            weights = fused_weights(self.about.tasks, None)
        starts = range(0, len(rows), ROWS_AT_A_TIME)
        parts = [self.scorer.score(self._inputs(pipeline, rows, start)) for start in starts]
        scored = Scored.joined(parts, len(self.names))
        return scored.values, scored.logs @ weights

    def _inputs(self, pipeline: FeaturePipeline, rows: LogRows, start: int) -> Tensor:
        """The model's inputs of at most ROWS_AT_A_TIME rows."""
        if len(rows) > ROWS_AT_A_TIME:
            rows = LogRows(rows.table.slice(start, ROWS_AT_A_TIME), rows.schema)
        batch = make_batch(pipeline.encode(rows), self.layout, torchrec=False)
        with torch.inference_mode():
            return self.model.side_by_side(batch)[0]

    def score_table(self, rows: Rows) -> pa.Table:
        """As `score`, as a table: keys of the rows, `predicted_NAME` of each task and outcome, and `score`."""
        if not isinstance(rows, LogRows):
            rows = read_rows(self.pipeline, rows)
        return scored_table(rows, *self.score(rows), self.layout)


@contextmanager
def _products_in_fp32() -> Iterator[None]:
    """As in the model server: a process may have told torch to round them to bf16 or TF32, where that is faster."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
