"""What is suspicious about a model's metrics: results that a mistake gives rather than a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import chi2, norm

from mmoe_rec.auc import FEWEST, TOO_GOOD, WHY_TOO_GOOD, auc_of_counts
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.intervals import Interval
from mmoe_rec.evaluation.summary import SCORE, GroupSummary, Summary

FURTHEST = 2.0  # predictions over labels, or the other way round, beyond which a warning is given
OFF = 0.05  # expected calibration error, at which half of the rows lie in bins that are shown to be off
FEWEST_BINS = 5
PROMISE = 0.1  # how far probabilities that only rank candidates by noise may lie, as an AUC, above what they reach
UNLIKELY = 1e-4  # chance at which probabilities are called too close to what was observed
_WARNINGS = ("calibration", "in sum", "training")


@dataclass(frozen=True)
class Finding:
    """What is suspicious. model: its name; check: what found it; task: that it is about, `score`, or None where it is
    about the rows; message: a sentence."""

    model: str
    check: str
    task: str | None
    message: str

    @property
    def severity(self) -> Literal["warning", "problem"]:
        """`problem` or `warning`."""
        return "warning" if self.check in _WARNINGS else "problem"


def find_all(results: Results) -> list[Finding]:
    """What is suspicious of all models, and of how they have seen the rows before."""
    found = []
    for name, each in results.models.items():
        told = [*(("seen", sentence) for sentence in each.seen), ("training", each.early_end)]
        found += [Finding(name, check, None, f"the model {sentence}") for check, sentence in told if sentence]
        found += find_in_summary(each.summary, name)
    return found


def find_in_summary(summary: Summary, model: str = "") -> list[Finding]:
    """What is suspicious of a model's metrics, task by task."""
    mends = "set training.calibration if it is none, else look for drift with `mmoe-rec inspect`"
    if "predictions" in summary.facts:  # in files, by any system
        mends = "calibrate them on other rows than these"
    found = [
        Finding(model, check, name, message)
        for name, task in summary.tasks.items()
        for check, message in _in_task(name, task, mends)
    ]
    return found + [Finding(model, "score", SCORE, message) for message in _in_score(summary)]


def _in_score(summary: Summary) -> Iterator[str]:
    """Whether it ranks the wrong way round, although a task's predictions do not."""
    ndcg, random = summary.score.get("ndcg_at_10"), summary.score.get("random_ndcg_at_10").value
    tasks = [name for name, task in summary.tasks.items() if (task.get("gauc_request").low or 0.0) > 0.5]
    if random is not None and ndcg.high is not None and ndcg.high < random and tasks:
        yield (
            f"the score ranks the rows of requests worse than chance (NDCG@10 {ndcg.shown(3)}, by chance "
            f"{random:.3f}), and the predictions of {', '.join(tasks)} do not: larger scores have to be better, unlike "
            "those of a rank"
        )


def _in_task(name: str, task: GroupSummary, mends: str) -> Iterator[tuple[str, str]]:
    ratio, bins = task.get("calibration"), task.details.get("calibration_bins") or ()
    ranking = _in_ranking(name, task, bins)
    if ranking is not None:
        yield ranking
    shown = [each for each in bins if each["low"] is not None]
    outside = [each for each in shown if not each["low"] <= each["mean_predicted"] <= each["high"]]
    is_off = sum(each["weight"] for each in outside) >= sum(each["weight"] for each in bins) / 2 > 0
    is_off = is_off and (task.details["ece"] or 0.0) >= OFF and not _is_far(ratio)
    is_shown = not _is_right_in_sum(task) and ratio.low is not None and not ratio.low <= 1 <= (ratio.high or 0.0)
    if ratio.value is not None and (_is_far(ratio) or (is_shown and not is_off and ranking is None)):
        ends = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        too = "high" if ratio.value > 1 else "low"
        yield (
            "calibration" if _is_far(ratio) else "in sum",
            f"the probabilities of '{name}' are too {too}: {ratio.value:.2f} times what was observed{ends}; {mends}",
        )
    if ranking is not None:
        return  # where more is wrong, that is the cause
    one_each = task.counts.get("positives") == task.counts.get("requests")  # rows of a request are not independent
    if _is_too_close(task) and not one_each:
        yield (
            "fitted",
            f"the probabilities of '{name}' are closer to what was observed than chance allows: their calibration was "
            "fitted on these rows",
        )
    if is_off:
        in_sum = "though right in sum" if _is_right_in_sum(task) else "where nothing was observed"
        if ratio.value is not None and not _is_right_in_sum(task):
            in_sum = f"and in sum {ratio.value:.2f} times what was observed"
        yield (
            "calibration",
            f"the probabilities of '{name}' are off by {task.details['ece']:.2g} on average (ece), {in_sum}: "
            f"{_which_way(bins, outside)}; {mends}",
        )


def _in_ranking(name: str, task: GroupSummary, bins: Sequence[Mapping[str, float]]) -> tuple[str, str] | None:
    auc, positives = task.get("auc"), task.counts.get("positives", 0)
    if auc.value is None:
        return None
    if (auc.value if auc.low is None else auc.low) <= 0.5:
        what = ", below .5: it ranks no better" if auc.value < 0.5 else ": it is not shown to rank better"
        why = ""
        if positives >= FEWEST and _is_right_in_sum(task):
            weight, mean = (np.array([each[of] for each in bins]) for of in ("weight", "mean_predicted"))
            own = float(auc_of_counts(weight * mean, weight * (1 - mean)))  # were each row positive as often as it says
            own = 0.5 if np.isnan(own) else own  # all are 1, or all are 0
            promise = f"an AUC of {own:.2f} if each were right"
            usual = "as is usual of popularity where negatives were sampled by it"
            why = f"; its probabilities hardly differ ({promise}), {usual}"
            if own - (auc.value if auc.high is None else auc.high) > PROMISE:
                joined = "as where labels or predictions were joined to the wrong rows"
                why = f", although the probabilities are right in sum and differ ({promise}), {joined}"
        return "chance", f"the AUC of '{name}' is {auc.shown(3)}{what} than chance{why}"
    if min(positives, task.counts["rows"] - positives) < FEWEST:
        return None  # of few labels nothing can be said
    if auc.value > TOO_GOOD:
        return "too good", f"the AUC of '{name}' is {auc.shown(4)}, {WHY_TOO_GOOD}"
    for what in ("request", "user"):
        within = task.get(f"gauc_{what}")
        if within.high is not None and (within.low or 0.0) <= 0.5 and (auc.low or 0.0) > within.high:
            return (
                f"within {what}s",
                f"'{name}' is ranked well over all rows (AUC {auc.shown(3)}), but the rows of a {what} "
                f"{'worse' if within.high < 0.5 else 'no better'} than by chance (GAUC {within.shown(3)}): no "
                "feature tells candidates apart, or predictions were joined to rows of other requests",
            )
    return None


def _is_right_in_sum(task: GroupSummary) -> bool:
    ratio = task.get("calibration").value
    return ratio is not None and abs(math.log(max(ratio, 1e-9))) <= 0.1


def _is_far(ratio: Interval) -> bool:
    if ratio.value is None or 1 / FURTHEST <= ratio.value <= FURTHEST:
        return False
    return ratio.low is None or ratio.high is None or not ratio.low <= 1 <= ratio.high


def _which_way(bins: Sequence[Mapping[str, float]], outside: Sequence[Mapping[str, float]]) -> str:
    signs = {np.sign(each["mean_predicted"] - each["observed_rate"]) for each in outside}
    if len(signs) == 1:
        return f"too {'high' if signs == {1.0} else 'low'} in all ranges that tell"
    first, last = (bins[place]["mean_predicted"] - bins[place]["observed_rate"] for place in (0, -1))
    if first > 0 > last:
        return "they differ too little from each other, as after a short training"
    if first < 0 < last:
        return "they differ too much from each other, as of a model that knows its training rows too well"
    return "too high in one range and too low in another"


def _is_too_close(task: GroupSummary) -> bool:
    """True if rates, in bins or in sum, deviate from probabilities by far less than independent rows of these do.

    Rows of one user are alike, and so deviate by more.
    """
    deviation = task.details.get("calibration_deviation")
    if deviation is None or task.counts["positives"] < FEWEST or deviation["bins"] < FEWEST_BINS:
        return False
    small = chi2.cdf(deviation["squares"], deviation["bins"]) < UNLIKELY
    return bool(small or 2 * norm.cdf(deviation["in_sum"]) - 1 < UNLIKELY)
