"""Sums -> a nested plain dict of metrics with intervals, ready for JSON, MLflow, tables and figures."""

from typing import Any

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.calibration import calibration_bins, expected_calibration_error
from mmoe_rec.evaluation.metrics import BinaryMetrics, Metrics, metrics_of
from mmoe_rec.evaluation.notes import LEFT_OUT, NEEDS_TWO_USERS, score_note, task_note
from mmoe_rec.evaluation.resampling import Values, replicate, with_interval
from mmoe_rec.evaluation.sums import EvaluationSums, TaskSpec


def summarise(sums: EvaluationSums, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All metrics of a model, each `{"value", "low", "high"}` with a 95% bootstrap interval over users.

    A metric that is undefined has the value None, and a `note` beside it says why; so has one without an
    interval. The expected calibration error never has one: it is a mean of absolute values, which resampling biases
    upward.

    Args:
        sums: of all rows.
        resamples: how often users are redrawn, at least 1; 1,000 make the ends of the interval steady.
        seed: of the draws; the same seed gives the same users, whatever the model.

    Returns:
        `rows`, `users`, `requests`, `resamples`, `seed`, and maybe a `note`; `score` with `ndcg_at_5`, `ndcg_at_10`,
        `mrr` and the requests that these leave out, `requests_of_one_row`, `requests_without_relevant_row` and
        `requests_of_equal_relevance`; and under `tasks`, by name, `kind`, `rows` (observed) and

        for a binary task `positives`, `logloss` (nats), `normalised_entropy`, `auc`, `gauc_user`, `gauc_request`,
        `calibration` (sum of predictions / sum of labels), `ece`, `calibration_bins` (10 of equal mass), and the groups
        GAUC leaves out, `single_class_users` and `single_class_requests`: `count` and `share_of_rows`;

        for a regression task `rmse`, `mae`, `r2`.
    """
    _check_resamples(resamples)
    metrics = metrics_of(sums)
    ranking = sums.tables["ranking"]
    users = len(ranking)
    point = _evaluate(metrics, np.ones((users, 1)))
    replicates = replicate(lambda counts: _evaluate(metrics, counts), users, resamples, seed)
    headline: dict[str, dict[str, Any]] = {name: {} for name in metrics}
    for name, metric in point:
        headline[name][metric] = with_interval(point[name, metric][0], replicates[name, metric], users)

    requests = _total(ranking["requests"])
    score: dict[str, Any] = headline["score"] | {name: _total(ranking[name]) for name in LEFT_OUT}
    score |= _noted(score_note(score, requests, users, float(np.sum(ranking["least_ndcg"]))))
    tasks = {}
    for task in sums.tasks:
        described = _describe(sums, task) | headline[task.name]
        tasks[task.name] = described | _noted(task_note(described, users))
        task_metrics = metrics[task.name]
        if isinstance(task_metrics, BinaryMetrics):
            tasks[task.name] |= _left_out(sums, task, task_metrics) | _calibration(sums, task, resamples, seed)
    summary = {
        "rows": _total(ranking["rows"]),
        "users": users,
        "requests": requests,
        "resamples": resamples,
        "seed": seed,
        "tasks": tasks,
        "score": score,
    }
    return summary | _noted(NEEDS_TWO_USERS if users == 1 else None)


def compare(a: EvaluationSums, b: EvaluationSums, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Differences a - b of two models on the same rows, with intervals from a paired bootstrap over users.

    Both models see the same redrawn users, so what the users have in common cancels: the intervals are narrower than
    those of two summaries side by side.

    Returns:
        Task name, or `score` -> metric -> `{"value", "low", "high"}`, for the tasks that both have. There is no `score`
        where relevance is by other weights in a than in b, as the two rankings had different truths.

    Raises:
        UserError: a and b were not measured on equally many rows of the same users.
    """
    _check_resamples(resamples)
    columns = ["user", "rows", "requests"]
    if not a.tables["ranking"].select(columns).equals(b.tables["ranking"].select(columns)):
        raise UserError(
            f"the sums to compare hold different rows ({_size(a)} and {_size(b)}, by user): a paired comparison needs "
            "both models measured on the same rows"
        )
    metrics_a, metrics_b = metrics_of(a), metrics_of(b)
    weights_a, weights_b = ({task.name: task.weight for task in each.tasks if task.weight} for each in (a, b))
    if weights_a != weights_b:
        del metrics_a["score"]
    users = len(a.tables["ranking"])

    def difference(counts: np.ndarray) -> Values:
        values_a, values_b = _evaluate(metrics_a, counts), _evaluate(metrics_b, counts)
        return {key: values_a[key] - values_b[key] for key in values_a if key in values_b}

    point = difference(np.ones((users, 1)))
    replicates = replicate(difference, users, resamples, seed)
    result: dict[str, Any] = {}
    for name, metric in point:
        interval = with_interval(point[name, metric][0], replicates[name, metric], users)
        result.setdefault(name, {})[metric] = interval
    return result


def flatten(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a summary under names that MLflow accepts, such as `bought.auc`, `bought.auc.low`, `score.mrr`.

    What is None is left out, and so are notes and calibration bins.
    """
    flat: dict[str, float] = {}
    sizes = {name: summary[name] for name in ("rows", "users", "requests")}
    _flatten(sizes | {"score": summary["score"]} | summary["tasks"], "", flat)
    return flat


def _flatten(node: dict[str, Any], prefix: str, flat: dict[str, float]) -> None:
    for name, value in node.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", flat)
        elif isinstance(value, (int, float)):
            flat[prefix.removesuffix(".") if name == "value" else f"{prefix}{name}"] = float(value)


def _evaluate(metrics: dict[str, Metrics], counts: np.ndarray) -> Values:
    return {(name, key): values for name, group in metrics.items() for key, values in group.at(counts).items()}


def _describe(sums: EvaluationSums, task: TaskSpec) -> dict[str, Any]:
    """What was observed of a task."""
    table = sums.tables[f"{task.name}.users"]
    positives = {"positives": _total(table["positives"])} if task.kind == "binary" else {}
    return {"kind": task.kind, "rows": _total(table["rows"])} | positives


def _noted(note: str | None) -> dict[str, str]:
    return {} if note is None else {"note": note}


def _calibration(sums: EvaluationSums, task: TaskSpec, resamples: int, seed: int) -> dict[str, Any]:
    histogram, users = sums.tables[f"{task.name}.histogram"], sums.tables["ranking"]["user"]
    bins = calibration_bins(histogram, users, resamples, seed)
    return {"ece": expected_calibration_error(bins), "calibration_bins": bins}


def _left_out(sums: EvaluationSums, task: TaskSpec, metrics: BinaryMetrics) -> dict[str, Any]:
    """The groups that GAUC leaves out."""
    table = sums.tables[f"{task.name}.users"]
    rows = _total(table["rows"])
    single_class = np.isnan(metrics.user_auc) & (metrics.user_rows > 0)
    return {
        "single_class_users": {
            "count": int(single_class.sum()),
            "share_of_rows": _share(metrics.user_rows[single_class].sum(), rows),
        },
        "single_class_requests": {
            "count": _total(table["single_class_requests"]),
            "share_of_rows": _share(rows - _total(table["request_auc_rows"]), rows),
        },
    }


def _total(column: Any) -> int:
    return int(column.to_numpy().sum())


def _share(part: float, rows: int) -> float | None:
    return float(part / rows) if rows else None


def _size(sums: EvaluationSums) -> str:
    ranking = sums.tables["ranking"]
    return f"{_total(ranking['rows']):,} rows of {len(ranking):,} users"


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
