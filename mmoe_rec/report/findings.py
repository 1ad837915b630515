"""What is suspicious about a model's metrics: results that a mistake gives rather than a model.

Each finding has the `check` that made it, the `task` it is about, and a `message` for people.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy.stats import chi2, norm

from mmoe_rec.auc import FEWEST, TOO_GOOD, WHY_TOO_GOOD
from mmoe_rec.evaluation.comparison import SCORE

FURTHEST = 2.0  # predictions over labels, or the other way round, beyond which a warning is given
OFF = 0.05  # expected calibration error, at which half of the rows lie in bins that are shown to be off
FEWEST_BINS = 5
UNLIKELY = 1e-4  # chance at which probabilities are called too close to what was observed
_NOTHING = {"value": None, "low": None, "high": None}

Finding = dict[str, str]


def findings(summary: Mapping[str, Any]) -> list[Finding]:
    """Of all tasks of a summary (`summary.summarise`), task by task."""
    found: list[Finding] = [
        {"check": check, "task": name, "message": message}
        for name, task in summary["tasks"].items()
        for check, message in _of_task(name, task)
    ]
    return found + [{"check": "score", "task": SCORE, "message": message} for message in _of_score(summary)]


def _of_score(summary: Mapping[str, Any]) -> Iterator[str]:
    """Whether it ranks the wrong way round, although a task's predictions do not."""
    ndcg, random = summary["score"].get("ndcg_at_10", _NOTHING), summary["score"].get("random_ndcg_at_10")
    tasks = [
        name for name, task in summary["tasks"].items() if (task.get("gauc_request", _NOTHING)["low"] or 0.0) > 0.5
    ]
    if random is not None and ndcg["high"] is not None and ndcg["high"] < random and tasks:
        yield (
            f"the score ranks the rows of requests worse than chance (NDCG@10 {_interval(ndcg, 3)}, by chance "
            f"{random:.3f}), and the predictions of {', '.join(tasks)} do not: larger scores have to be better, unlike "
            "those of a rank"
        )


def _of_task(name: str, task: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ranking = list(_ranking(name, task))
    yield from ranking
    yield from _calibration(name, task, is_fine=not ranking)
    # Where more is wrong, that is the cause.
    if not ranking and not _is_far(task.get("calibration", _NOTHING)) and _is_off(task):
        yield (
            "calibration",
            f"the probabilities of '{name}' are off by {task['ece']:.2g} on average (ece), {_in_sum(task)}: "
            f"{_which_way(task)}; training.calibration corrects them, and so may longer training",
        )


def _ranking(name: str, task: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    auc, by_request = task.get("auc", _NOTHING), task.get("gauc_request", _NOTHING)
    at_least = auc["value"] if auc["low"] is None else auc["low"]
    if auc["value"] is not None and at_least <= 0.5:
        what = ", below .5: it ranks no better" if auc["value"] < 0.5 else ": it is not shown to rank better"
        yield "chance", f"the AUC of '{name}' is {_interval(auc, 3)}{what} than chance{_why(task)}"
    elif min(task.get("positives", 0), task["rows"] - task.get("positives", 0)) < FEWEST:
        pass  # of few labels nothing can be said
    elif auc["value"] is not None and auc["value"] > TOO_GOOD:
        yield (
            "too good",
            f"the AUC of '{name}' is {_interval(auc, 4)}, {WHY_TOO_GOOD}",
        )
    elif by_request["low"] is not None and by_request["low"] <= 0.5 and _tells_users_apart(task):
        yield (
            "requests",
            f"'{name}' is ranked well over all rows (AUC {_interval(auc, 3)}), but the rows of a request no better "
            f"than by chance (GAUC {_interval(by_request, 3)}): no feature tells candidates apart, or predictions were "
            "joined to rows of other requests",
        )


def _why(task: Mapping[str, Any]) -> str:
    if task.get("positives", 0) < FEWEST or not _is_right_in_sum(task):
        return ""
    return ", although the probabilities are right in sum, as where labels or predictions were joined to the wrong rows"


def _is_right_in_sum(task: Mapping[str, Any]) -> bool:
    ratio = task.get("calibration", _NOTHING)["value"]
    return ratio is not None and abs(math.log(max(ratio, 1e-9))) <= 0.1


def _tells_users_apart(task: Mapping[str, Any]) -> bool:
    return task["auc"]["low"] is not None and task["auc"]["low"] > task["gauc_request"]["high"]


def _calibration(name: str, task: Mapping[str, Any], is_fine: bool) -> Iterator[tuple[str, str]]:
    ratio = task.get("calibration", _NOTHING)
    if _is_far(ratio):
        interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
        too = "high" if ratio["value"] > 1 else "low"
        yield (
            "calibration",
            f"the probabilities of '{name}' are too {too}: {ratio['value']:.2f} times what was observed{interval}; "
            "training.calibration corrects them, and so may longer training",
        )
    one_each = task.get("positives", 0) == task.get("requests")  # rows of a request are not independent
    deviation = task.get("calibration_deviation")
    if is_fine and deviation is not None and task["positives"] >= FEWEST and not one_each and _too_close(deviation):
        yield (
            "fitted",
            f"the probabilities of '{name}' are closer to what was observed than chance allows: their calibration was "
            "fitted on these rows",
        )


def _is_off(task: Mapping[str, Any]) -> bool:
    """Whether probabilities are far from what was observed in most rows, by bins whose intervals leave no doubt."""
    bins = task.get("calibration_bins") or ()
    total = sum(each["weight"] for each in bins)
    off = sum(each["weight"] for each in bins if _is_outside(each))
    return bool(task.get("ece") is not None and task["ece"] >= OFF and off >= total / 2 > 0)


def _is_outside(each: Mapping[str, Any]) -> bool:
    return each["low"] is not None and not each["low"] <= each["mean_predicted"] <= each["high"]


def _in_sum(task: Mapping[str, Any]) -> str:
    if _is_right_in_sum(task):
        return "though right in sum"
    ratio = task.get("calibration", _NOTHING)["value"]
    return "where nothing was observed" if ratio is None else f"and in sum {ratio:.2f} times what was observed"


def _which_way(task: Mapping[str, Any]) -> str:
    bins = task["calibration_bins"]
    signs = {np.sign(each["mean_predicted"] - each["observed_rate"]) for each in bins if _is_outside(each)}
    if len(signs) == 1:
        return f"too {'high' if signs == {1.0} else 'low'} in all ranges that tell"
    first, last = (bins[place] for place in (0, -1))
    if first["mean_predicted"] > first["observed_rate"] and last["mean_predicted"] < last["observed_rate"]:
        return "they differ too little from each other, as after a short training"
    if first["mean_predicted"] < first["observed_rate"] and last["mean_predicted"] > last["observed_rate"]:
        return "they differ too much from each other, as of a model that knows its training rows too well"
    return "too high in one range and too low in another"


def _too_close(deviation: Mapping[str, float]) -> bool:
    """Whether rates, in bins or in sum, deviate from probabilities by far less than independent rows of these do.

    Rows of one user are alike, and so deviate by more.
    """
    if deviation["bins"] < FEWEST_BINS:
        return False
    small = chi2.cdf(deviation["squares"], deviation["bins"]) < UNLIKELY
    return bool(small or 2 * norm.cdf(deviation["in_sum"]) - 1 < UNLIKELY)


def _interval(metric: Mapping[str, Any], digits: int) -> str:
    found = f"{metric['value']:.{digits}f}"
    return found if metric["low"] is None else f"{found} ({metric['low']:.{digits}f} to {metric['high']:.{digits}f})"


def _is_far(ratio: Mapping[str, float | None]) -> bool:
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if value is None or 1 / FURTHEST <= value <= FURTHEST:
        return False
    return low is None or high is None or not low <= 1 <= high
