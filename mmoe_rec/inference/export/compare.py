"""What another form of a model gives for the same candidates: how far its predictions are off, and in which order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmoe_rec.inference.example import EXAMPLE
from mmoe_rec.inference.loaded import LoadedRanker
from mmoe_rec.inference.ranking import Ranking

REQUESTS, CANDIDATES = 50, 200
BEST = 10


@dataclass(frozen=True)
class Agreement:
    """Of R requests with up to N candidates each.

    max_difference: task or outcome -> the largest difference of a prediction; neighbours_in_order: the share of pairs
    of candidates next to each other, in the order by the first form's score, that the other form does not turn round;
    top_10_shared: the mean share of the 10 best that are among the other form's; both are None without such pairs.
    """

    requests: int
    candidates: int
    max_difference: dict[str, float]
    neighbours_in_order: float | None
    top_10_shared: float | None


@dataclass(frozen=True)
class Answers:
    """Of one request's N candidates, in its order: predictions by name, (N,) each, and scores (N,), float64."""

    predictions: Mapping[str, np.ndarray]
    scores: np.ndarray

    @staticmethod
    def of(ranking: Ranking) -> Answers:
        """From a ranking of all candidates."""
        back = np.argsort(ranking.order)
        return Answers(
            {name: np.array(values, np.float64)[back] for name, values in ranking.predictions.items()},
            np.array(ranking.scores)[back],
        )


def drawn_requests(folder: Path, ranker: LoadedRanker, requests: int = REQUESTS) -> Iterator[dict[str, Any]]:
    """Arguments of `Ranker.rank`: users and candidates that the model knows, in the context of its folder's example.

    All are drawn alike, the same ones at every call. Of a model that knows no users or candidates only the example.
    """
    random = np.random.default_rng(0)
    example = json.loads((folder / EXAMPLE).read_text(encoding="utf-8"))
    names = ranker.pipeline.schema.columns
    users, candidates = (
        pq.read_table(folder / "features" / f"latest.{role}.parquet", columns=[key]).column(key).combine_chunks()
        for role, key in (("user", names.user), ("candidate", names.candidate))
    )
    if not len(users) or not len(candidates):  # a plain table's, which knows no ids
        yield example
        return
    for _ in range(requests):
        user = users[int(random.integers(len(users)))].as_py()
        count = min(CANDIDATES, len(candidates), ranker.about.max_candidates)
        shown = candidates.take(random.choice(len(candidates), count, replace=False)).to_pylist()
        yield example | {"user": {names.user: user}, "candidates": {names.candidate: shown}}


def agreement(pairs: Sequence[tuple[Answers, Answers]]) -> Agreement:
    """How the second form answers, beside the first one, for each of at least one request."""
    largest: dict[str, float] = {}
    kept = neighbours = 0
    shared = []
    for one, other in pairs:
        for name, values in one.predictions.items():
            off = float(np.abs(values - other.predictions[name]).max(initial=0.0))
            largest[name] = max(largest.get(name, 0.0), off)
        order = np.argsort(-one.scores, kind="stable")
        before, after = one.scores[order], other.scores[order]
        apart = before[:-1] > before[1:]
        neighbours += int(apart.sum())
        kept += int((apart & (after[:-1] >= after[1:])).sum())
        best = [set(np.argsort(-each.scores, kind="stable")[:BEST].tolist()) for each in (one, other)]
        if best[0]:
            shared.append(len(best[0] & best[1]) / len(best[0]))
    return Agreement(
        len(pairs),
        max(len(one.scores) for one, _ in pairs),
        largest,
        kept / neighbours if neighbours else None,
        float(np.mean(shared)) if shared else None,
    )
