"""Requests that can be answered together share one pass: one reading, one encoding, one run of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import Artifact, iso_time
from mmoe_rec.inference.errors import RequestError
from mmoe_rec.inference.experts import ExpertChoice
from mmoe_rec.inference.explaining import Explainer, as_of
from mmoe_rec.inference.freshness import Freshness
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.requests.request import Request, RequestReader, same_columns
from mmoe_rec.inference.requests.weights import fused_weights
from mmoe_rec.inference.scorer import Scored, Scorer
from mmoe_rec.live.logged_requests import Seen
from mmoe_rec.log.given import check_count, check_flag
from mmoe_rec.log.request_rows import RequestRows
from mmoe_rec.model.inputs import RequestInputs
from mmoe_rec.model.score import add_outcomes, scores_from_logs

ROWS_AT_A_TIME = 16_384
"""Rows whose features are made together, at most, unless a single request has more."""


@dataclass(frozen=True)
class _Asked:
    """A request whose options are checked. weights: (T,) float64 of the tasks in the score."""

    number: int
    request: Request
    weights: np.ndarray
    choice: ExpertChoice


@dataclass(frozen=True)
class Passes:
    """Answers requests, as many as possible at a time, by the parts of a loaded ranker.

    version: of the artifact; keeps_seen: whether rankings hold what features saw, and with it all rows of their pass.
    """

    scorer: Scorer
    pipeline: FeaturePipeline
    inputs: RequestInputs
    reader: RequestReader
    freshness: Freshness
    version: str
    keeps_seen: bool = False

    @property
    def _about(self) -> Artifact:
        return self.scorer.about

    def answers(self, requests: Sequence[Request]) -> list[Ranking | RequestError]:
        """One answer a request, in order, which does not depend on the others; see `LoadedRanker.rank_many`."""
        answers: dict[int, Ranking | RequestError] = {}
        alike: dict[Any, list[_Asked]] = {}
        for number, request in enumerate(requests):
            try:
                asked = self._checked(number, request)
                alike.setdefault((asked.choice, same_columns(request)), []).append(asked)
            except RequestError as error:
                answers[number] = error
        for group in alike.values():
            for some in _parts(group):
                answers.update(zip((asked.number for asked in some), self._answered(some), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _checked(self, number: int, request: Request) -> _Asked:
        weights = fused_weights(self._about.tasks, request.task_weights)
        check_count("top_k", request.top_k)
        check_flag("explain", request.explain)
        choice = self.scorer.guarded.choice(request.gate_top_k, request.mask_experts)
        return _Asked(number, request, weights, choice)

    def _answered(self, asked: Sequence[_Asked]) -> Sequence[Ranking | RequestError]:
        try:
            if (rankings := self._passed(asked)) is not None:
                return rankings
        except RequestError as error:
            if len(asked) == 1:
                return [error]
        # Some of them are wrong, or give values of other types than the others: halves find out which.
        half = len(asked) // 2
        return [*self._answered(asked[:half]), *self._answered(asked[half:])]

    def _passed(self, asked: Sequence[_Asked]) -> list[Ranking] | None:
        """The rankings; None where an expert failed, which may be the fault of one request among several."""
        rows = self.reader.rows([each.request for each in asked])
        try:
            inputs = self.pipeline.request_inputs(rows)
        except RequestError:
            raise
        except UserError as error:
            raise RequestError(str(error)) from None
        explain = any(each.request.explain for each in asked)
        scored = self.scorer.score(self.inputs.matrix(*inputs, rows.of), asked[0].choice, explain)
        return None if scored.failed and len(asked) > 1 else self._rankings(asked, rows, inputs, scored)

    def _rankings(
        self, asked: Sequence[_Asked], rows: RequestRows, inputs: tuple[Inputs, Inputs], scored: Scored
    ) -> list[Ranking]:
        weights = np.array([each.weights for each in asked])
        log_scores = (scored.logs * weights[rows.of]).sum(1)
        if not np.isfinite(log_scores).all():
            raise RuntimeError(f"model '{self._about.name}' gives scores that are not finite numbers")
        starts = np.searchsorted(rows.of, np.arange(len(asked) + 1))
        # By request, then by falling score; equal ones keep their order.
        order = np.lexsort((-log_scores, rows.of))
        names = self.pipeline.schema.columns
        ids = rows.column(names.candidate).to_pylist()
        # Of a plain table there are no ids to be known.
        new = rows.unknown(names.candidate) & names.has_candidate
        unknown = np.bincount(rows.of, new, len(asked)).astype(int).tolist()
        unknown_users = (rows.shared.unknown(names.user) & names.has_user).astype(int).tolist()
        best = scored.values[order].astype(np.float64)
        lists = {name: each.tolist() for name, each in add_outcomes(best, self._about.layout).items()}
        scores = scores_from_logs(log_scores[order]).tolist()
        places, positions = order.tolist(), (order - starts[rows.of]).tolist()
        times = rows.shared.times().tolist()
        floors = self.pipeline.memories_read(rows)
        explainer = Explainer(self.pipeline, rows, scored, self.scorer.names) if scored.inside else None
        integer_ids = self.pipeline.key_types.get(names.request or "") == "int64"
        rankings = []
        for number, each in enumerate(asked):
            start, end = int(starts[number]), int(starts[number + 1])
            seen = Seen(rows, inputs, self._about.layout, integer_ids, number, start, end)
            if each.request.top_k is not None:
                end = min(end, start + each.request.top_k)
            rankings.append(
                Ranking(
                    candidates=[ids[place] for place in places[start:end]],
                    scores=scores[start:end],
                    predictions={name: every[start:end] for name, every in lists.items()},
                    order=positions[start:end],
                    request_time=iso_time(times[number]),
                    tables_as_of=self._about.tables_as_of,
                    warnings=[*scored.warnings, *self.freshness.warnings(times[number], floors.values())],
                    model={"name": self._about.name, "version": self.version},
                    explanations=explainer.explanations(places[start:end], as_of(floors, times[number]))
                    if explainer and each.request.explain
                    else None,
                    unknown_ids={"user": unknown_users[number], "candidate": unknown[number]},
                    seen=seen if self.keeps_seen else None,
                )
            )
        return rankings


def _parts(asked: Sequence[_Asked]) -> Iterator[Sequence[_Asked]]:
    """Requests whose candidates fill a pass; one that has more than that is a part of its own."""
    part: list[_Asked] = []
    rows = 0
    for each in asked:
        columns = each.request.candidates
        lists = columns.values() if isinstance(columns, Mapping) else ()
        count = max((len(column) for column in lists if isinstance(column, Sequence)), default=0)
        if part and rows + count > ROWS_AT_A_TIME:
            yield part
            part, rows = [], 0
        part.append(each)
        rows += count
    yield part
