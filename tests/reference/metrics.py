"""Metrics of predictions and rankings.

A metric of a ranking is its mean over all orders of rows with equal scores, here by trying every one of them.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Row = tuple[object, object, float, float]
"""user, request, prediction or score, label or gain"""
Ranked = Callable[[list[float], int], float | None]


def log_loss(rows: Sequence[Row]) -> float:
    """The mean of -log of the probability that was given to what happened."""
    return float(np.mean([-math.log(p if label == 1 else 1 - p) for _, _, p, label in rows]))


def auc(rows: Sequence[Row]) -> float | None:
    """The share of pairs of a positive and a negative row that the prediction orders rightly; equal ones count half."""
    positive, negative = ([p for _, _, p, label in rows if (label > 0) == wanted] for wanted in (True, False))
    pairs = [(first > second) + 0.5 * (first == second) for first in positive for second in negative]
    return float(np.mean(pairs)) if pairs else None


def ndcg(gains: list[float], cutoff: int) -> float | None:
    """Discounted gain of the first rows, divided by that of the best order."""
    best = _discounted(sorted(gains, reverse=True), cutoff)
    return _discounted(gains, cutoff) / best if best > 0 else None


def reciprocal_rank(gains: list[float], cutoff: int) -> float | None:
    """1 / the rank of the first relevant row."""
    return next((1 / rank for rank, gain in enumerate(gains, 1) if gain > 0), None)


def average_precision(gains: list[float], cutoff: int) -> float | None:
    """The mean over relevant rows of the share of relevant rows down to them."""
    ranks = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
    return float(np.mean([nth / rank for nth, rank in enumerate(ranks, 1)])) if ranks else None


def over_requests(rows: Sequence[Row], metric: Ranked, cutoff: int = 0) -> float | None:
    """The mean of a metric over the requests whose rows differ in relevance."""
    requests: dict[object, list[Row]] = {}
    for row in rows:
        requests.setdefault(row[1], []).append(row)
    values = [
        _expected(request, metric, cutoff) for request in requests.values() if len({gain for *_, gain in request}) > 1
    ]
    return float(np.mean(values)) if values else None


def _expected(request: list[Row], metric: Ranked, cutoff: int) -> float:
    scores = sorted({score for _, _, score, _ in request}, reverse=True)
    runs = [itertools.permutations([gain for _, _, score, gain in request if score == item]) for item in scores]
    orders = itertools.product(*(list(run) for run in runs))
    return float(np.mean([metric([gain for run in order for gain in run], cutoff) for order in orders]))


def _discounted(gains: list[float], cutoff: int) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:cutoff], 1))
