"""Sums -> a nested plain dict of metrics with intervals, ready for JSON, MLflow, tables and figures."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mmoe_rec.evaluation.intervals import Values, are_few, intervals
from mmoe_rec.evaluation.metrics import CATALOGUE_METRICS, metrics_of
from mmoe_rec.evaluation.metrics.metric import Metric, UserSums
from mmoe_rec.evaluation.notes import EACH_ALONE, LEFT_OUT, NEEDS_TWO_USERS, score_note, task_note
from mmoe_rec.evaluation.sums import ClosedSums, EvaluationSums, MeasuredTask, as_closed

Sums = EvaluationSums | ClosedSums


def summarise(sums: Sums, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All metrics of a model, each `{"value", "low", "high"}` with a 95% bootstrap interval over users.

    A metric that is undefined has the value None, and a `note` beside it says why; so has one without an
    interval.

    Args:
        sums: of all rows.
        resamples: how often users are redrawn, at least 1; 1,000 make the ends of the interval steady.
        seed: of the draws; the same seed gives the same users, whatever the model.

    Returns:
        `rows`, `users`, `requests`, `resamples`, `seed`, and maybe a `note`; `score` with its metrics and the requests
        that these leave out, `requests_of_one_row`, `requests_without_relevant_row` and `requests_of_equal_relevance`;
        where candidates are known, `catalogue` with its metrics, which have no interval;
        and under `tasks`, by name, `kind`, `rows` (observed), a binary task's `positives` and `requests`, and the
        metrics of its kind.
    """
    sums = as_closed(sums)
    groups = sums_by_user(sums)
    ranking = sums.tables["ranking"]
    users, units = sums.users, len(ranking)
    effective = effective_by_metric(groups)
    headline = intervals(lambda counts: evaluate(groups, counts), units, resamples, seed, effective)

    def more(kind: str, name: str) -> dict[str, Any]:
        """What has no interval."""
        found: dict[str, Any] = {}
        for metric in metrics_of(kind):
            if not metric.has_interval:
                value = float(metric.summarise(groups[name].drawn(np.ones((units, 1))))[0])
                found[metric.name] = value if np.isfinite(value) else None
            found |= metric.details(groups[name], resamples, seed)
        return found

    requests = _total(ranking["requests"])
    score: dict[str, Any] = headline["score"] | {name: _total(ranking[name]) for name in LEFT_OUT}
    rest = more("score", "score")
    rows = _total(ranking["rows"])
    alone = rows == users
    few = {
        name: _few([effective[name, metric] for metric, each in found.items() if each["value"] is not None], units)
        for name, found in headline.items()
    }
    least = float(np.sum(ranking["least_ndcg"]))
    if (ranked := _total(ranking["ranked_requests"])) and "random_ndcg" in ranking.column_names:
        score["random_ndcg_at_10"] = float(np.sum(ranking["random_ndcg"])) / ranked
    note = None if alone else score_note(score | rest, requests, users, least, few["score"])
    score |= _noted(note) | rest
    tasks = {}
    for task in sums.tasks:
        described = _describe(sums, task) | headline[task.name]
        rest = more(task.kind, task.name)
        tasks[task.name] = described | _noted(task_note(described | rest, users, alone, few[task.name])) | rest
    summary = {
        "rows": rows,
        "users": users,
        "requests": requests,
        "resamples": resamples,
        "seed": seed,
        "tasks": tasks,
        "score": score,
    }
    if (catalogue := sums.tables.get("catalogue")) is not None:
        values = {metric.name: metric.summarise(catalogue, requests) for metric in CATALOGUE_METRICS}
        summary["catalogue"] = {"candidates": len(catalogue)} | values
    return summary | _noted(NEEDS_TWO_USERS if users == 1 else EACH_ALONE if alone else None)


def flatten(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary under names that MLflow accepts, such as `bought.auc`, `bought.auc.low`, `score.mrr`.

    What is None is left out, and so are notes and calibration bins.
    """
    flat: dict[str, float] = {}
    sizes = {name: summary[name] for name in ("rows", "users", "requests")}
    groups = {name: summary[name] for name in ("score", "catalogue") if name in summary}
    _flatten(sizes | groups | summary["tasks"], "", flat)
    return flat


def _flatten(node: dict[str, Any], prefix: str, flat: dict[str, float]) -> None:
    for name, value in node.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", flat)
        elif isinstance(value, (int, float)):
            flat[prefix.removesuffix(".") if name == "value" else f"{prefix}{name}"] = float(value)


def sums_by_user(sums: Sums, names: Collection[str] | None = None) -> dict[str, UserSums]:
    """Task name -> its sums, and `score` -> those of the fused score, over the users of `sums.tables["ranking"]`, or
    groups of them. names: of those metrics that tables show which are asked for; None:
    all metrics.
    """
    sums = as_closed(sums)

    def asked(kind: str) -> list[Metric[Any]]:
        found = [metric for metric in metrics_of(kind) if names is None or metric.name in names]
        return [metric for metric in found if names is None or metric.is_shown(kind == "score")]

    groups = {task.name: UserSums(asked(task.kind), sums.tables, task.name) for task in sums.tasks}
    return groups | {"score": UserSums(asked("score"), sums.tables, None)}


def effective_by_metric(groups: dict[str, UserSums]) -> dict[tuple[str, str], float]:
    """Task or `score` and metric -> how many users alike would tell as much as those there are, by their sizes."""
    return {(name, metric): found for name, group in groups.items() for metric, found in group.effective_users.items()}


def evaluate(groups: dict[str, UserSums], counts: np.ndarray) -> Values:
    """All metrics that have intervals in R resamples, which draw the users `counts` (U, R) float64 times."""
    return {(name, key): values for name, group in groups.items() for key, values in group.at(counts).items()}


def _describe(sums: ClosedSums, task: MeasuredTask) -> dict[str, Any]:
    """What was observed of a task."""
    table = sums.tables[f"{task.name}.users"]
    counts = ("positives", "requests") if task.kind == "binary" else ()
    return {"kind": task.kind, "rows": _total(table["rows"])} | {name: _total(table[name]) for name in counts}


def _few(effective: Sequence[float], units: int) -> float | None:
    """Of several metrics, how many users alike would tell as much of the one that most rests on few; None where these
    are enough, or all that there are."""
    least = min(effective, default=np.inf)
    return least if are_few(least, units) else None


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


def _total(column: Any) -> int:
    return int(column.to_numpy().sum())
