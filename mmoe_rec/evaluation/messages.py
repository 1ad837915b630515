"""Sentences about an evaluation: verdicts, slices, notes, and suspicious metrics that suggest a mistake."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from mmoe_rec.auc import MIN_RARER_ROWS, SUSPICIOUS_AUC, SUSPICIOUS_AUC_ADVICE
from mmoe_rec.evaluation.comparison import MAX_LISTED_SLICES, Comparison, Results
from mmoe_rec.evaluation.metrics import metrics_for_kind
from mmoe_rec.evaluation.slices import SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import SCORE, UNINFORMATIVE_REQUESTS, GroupSummary, Summary

MAX_PLAUSIBLE_RATIO = 2.0  # warn if predictions / labels or labels / predictions is larger
# Warn about an expected calibration error from here on, if half of the rows are in bins that are significantly off.
MAX_PLAUSIBLE_ECE = 0.05
_SAME_IN_ANY_ORDER = 0.99  # mean NDCG@10 of random orders above which NDCG can't distinguish models
_LEFT_OUT = ("{} of one row", "{} without a relevant row", "{} whose rows are equally relevant")


def describe_verdicts(results: Results) -> list[str]:
    """Return sentences with the verdicts and the excluded tasks, or with the metrics of a single model."""
    if results.comparison is None:
        return describe_metrics(results.first.summary)
    verdicts = [verdict.message for verdict in results.comparison.verdicts.values()]
    return [*verdicts, *describe_excluded_tasks(results.comparison)]


def describe_metrics(summary: Summary) -> list[str]:
    """Return texts such as `bought: auc 0.7`, with AUC or R2 of each task and NDCG@10 of the score."""
    shown = {name: task.guardrail_metric for name, task in summary.tasks.items()} | {SCORE: "ndcg_at_10"}
    values = {name: (metric, summary.groups[name].get(metric)) for name, metric in shown.items()}
    return [f"{name}: {metric} {at.format()}" for name, (metric, at) in values.items() if at.value is not None]


def describe_excluded_tasks(compared: Comparison) -> list[str]:
    """Return a sentence for each task that was not compared because it has too few labels."""
    return [
        f"{task} was not compared: {rows:,} rows have its rarer label, and {MIN_RARER_ROWS} are needed"
        for task, rows in compared.excluded_tasks.items()
    ]


def describe_slices(records: Sequence[SliceRecord]) -> Iterator[str]:
    """Yield sentences about the worst of the significantly worse slices, and one with the number of the others."""
    worse = [record.message for record in sort_worst_first(records) if record.is_worse]
    yield from worse[:MAX_LISTED_SLICES]
    if (more := len(worse) - MAX_LISTED_SLICES) > 0:
        yield f"{more} more {'slice is' if more == 1 else 'slices are'} significantly worse (see the report)"


def describe_cautions(results: Results) -> Iterator[str]:
    """Yield notes on limits of the evaluation. A note that holds for several models is yielded once."""
    summaries = list(results.summaries.values())
    compares_requests = results.comparison is not None and not results.one_row_per_user
    if compares_requests and any(summary.catalog is None for summary in summaries):
        yield "without candidates it can't be checked whether labels belong to the same rows of a request"
    yield from dict.fromkeys(note for summary in summaries for note in describe_notes(summary))
    if caution := results.facts.get("caution"):
        yield caution


def describe_notes(summary: Summary) -> Iterator[str]:
    """Yield notes on missing metrics and intervals, then a sentence on requests that ranking metrics leave out."""
    if (note := explain_summary(summary)) is not None:
        yield note
    for name in summary.groups:
        if (note := explain_group(summary, name)) is not None:
            yield f"{name}: {note}"
    counts = dict(zip(_LEFT_OUT, (summary.score.counts[name] for name in UNINFORMATIVE_REQUESTS), strict=True))
    if 0 < sum(counts.values()) < summary.requests:  # if no request is left, another note explains it
        reasons = ", ".join(words.format(f"{count:,}") for words, count in counts.items() if count)
        total = f"{sum(counts.values()):,} of {summary.requests:,} requests"
        yield f"score: {total} have no ranking to measure and are left out: {reasons}."


def explain_summary(summary: Summary) -> str | None:
    """Return a note if there is a single user, or a single row for each user, which limits all metrics."""
    if summary.users == 1:
        return "There is one user: intervals need at least two."
    if not summary.one_row_per_user:
        return None
    return (
        "Each user has one row, so metrics within users or requests (GAUC, NDCG, MRR) are missing, and intervals "
        "resample rows."
    )


def explain_group(summary: Summary, name: str) -> str | None:
    """Explain why metrics of a task or of the score are undefined or have no interval.

    Args:
        summary: Summary of the model.
        name: Task, or `score`.

    Returns:
        The explanation, None if nothing is missing.
    """
    group = summary.groups[name]
    if name != SCORE and group.counts["rows"] == 0:
        return "No row has an observed label: all metrics are undefined."
    sentences = []
    if name == SCORE:
        if summary.one_row_per_user:
            return None
        if sum(group.counts[count] for count in UNINFORMATIVE_REQUESTS) == summary.requests:
            return "No request has rows that differ in relevance: NDCG and MRR are undefined."
        if group.details.get("random_ndcg_at_10", 0.0) > _SAME_IN_ANY_ORDER:
            sentences.append(
                "NDCG is nearly 1 in any order, as the relevance of a request's rows differs little compared with its "
                "size: set the score_weight of regressions with large labels, such as times, to 0."
            )
    without_value = [metric for metric in metrics_for_kind(group.kind) if group.get(metric.name).value is None]
    if undefined := [m.name for m in without_value if not (summary.one_row_per_user and m.is_within_group)]:
        rows, positives = group.counts.get("rows", 0), group.counts.get("positives")
        reason = "labels are the same in all rows, or within each user or request"
        if positives in (0, rows):
            reason = f"all {rows:,} labels are {int(positives > 0)}"
        sentences.append(f"{', '.join(undefined)} {'is' if len(undefined) == 1 else 'are'} undefined: {reason}.")
    few = group.effective_users
    if few is not None and summary.users > 1:
        sentences.append(
            "Few users have most of the rows, weights or positive labels. The effective number of users is "
            f"{few:.1f}, so intervals are wide or missing."
        )
    bare = [name for name, metric in group.metrics.items() if metric.value is not None and metric.low is None]
    if bare and summary.users > 1:
        reason = "values are the same for all users, undefined in more than 5% of the resamples, or depend on one user"
        sentences.append(f"{', '.join(bare)} {'has' if len(bare) == 1 else 'have'} no interval: {reason}.")
    return " ".join(sentences) or None


# Suspicious metrics, which suggest a mistake rather than a good or bad model


class FindingKind(StrEnum):
    """Check that found something suspicious."""

    SEEN_ROWS = "seen"
    SCORE = "score"
    CALIBRATION = "calibration"
    CHANCE = "chance"
    TOO_GOOD = "too good"
    WITHIN_REQUESTS = "within requests"
    WITHIN_USERS = "within users"


@dataclass(frozen=True)
class Finding:
    """Suspicious result.

    Attributes:
        model: Name of the model.
        check: Check that found the result.
        task: Task, or `score`. None if the finding concerns the training of the model.
        message: Sentence about the finding.
    """

    model: str
    check: FindingKind
    task: str | None
    message: str

    @property
    def severity(self) -> Literal["warning", "problem"]:
        """Whether the finding is a `problem` or a `warning`."""
        return "warning" if self.check is FindingKind.CALIBRATION else "problem"


def find_suspicious_results(results: Results) -> list[Finding]:
    """Find suspicious metrics of all models, and training on the measured rows."""
    findings = []
    for name, model in results.models.items():
        overlaps = [f"the model {sentence}" for sentence in model.training_overlap]
        findings += [Finding(name, FindingKind.SEEN_ROWS, None, message) for message in overlaps]
        for task, group in model.summary.tasks.items():
            findings += [Finding(name, check, task, message) for check, message in _in_task(task, group)]
        findings += [Finding(name, FindingKind.SCORE, SCORE, message) for message in _in_score(model.summary)]
    return findings


def _in_score(summary: Summary) -> Iterator[str]:
    """Yield a sentence if the score ranks worse than chance, although predictions of a task rank better than chance."""
    ndcg, random = summary.score.get("ndcg_at_10"), summary.score.get("random_ndcg_at_10").value
    tasks = [name for name, task in summary.tasks.items() if (task.get("gauc_request").low or 0.0) > 0.5]
    if random is not None and ndcg.high is not None and ndcg.high < random and tasks:
        yield (
            f"the score ranks the rows of requests worse than chance (NDCG@10 {ndcg.format(3)}, by chance "
            f"{random:.3f}), and the predictions of {', '.join(tasks)} do not: larger scores have to be better, unlike "
            "those of a rank"
        )


def _in_task(name: str, task: GroupSummary) -> Iterator[tuple[FindingKind, str]]:
    if ranking := _in_ranking(name, task):
        yield ranking
    ratio, bins = task.get("calibration"), task.details.get("calibration_bins") or ()
    if ratio.value is None:
        return
    ends = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    is_far = abs(math.log(max(ratio.value, 1e-9))) > math.log(MAX_PLAUSIBLE_RATIO)
    is_significant = ratio.low is None or ratio.high is None or not ratio.low <= 1 <= ratio.high
    is_outside = [row["low"] is not None and not row["low"] <= row["mean_predicted"] <= row["high"] for row in bins]
    weights = [row["weight"] for row in bins]
    mostly_outside = sum(w for w, out in zip(weights, is_outside, strict=True) if out) >= sum(weights) / 2 > 0
    advice = "fit their calibration on other rows than these, or look for drift with `mmoe-rec inspect`"
    if is_far and is_significant:
        direction = "high" if ratio.value > 1 else "low"
        size = f"too {direction}: {ratio.value:.2f} times the mean label{ends}"
        yield FindingKind.CALIBRATION, f"the probabilities of '{name}' are {size}; {advice}"
    elif not ranking and mostly_outside and (task.details["ece"] or 0.0) >= MAX_PLAUSIBLE_ECE:
        size = f"off by {task.details['ece']:.2g} on average (ece)"
        yield FindingKind.CALIBRATION, f"the probabilities of '{name}' are {size}; {advice}"


def _in_ranking(name: str, task: GroupSummary) -> tuple[FindingKind, str] | None:
    auc, positives = task.get("auc"), task.counts.get("positives", 0)
    if auc.value is None:
        return None
    if (auc.value if auc.low is None else auc.low) <= 0.5:
        reason = "it is not significantly better than chance, as after a join of labels or predictions to wrong rows"
        return FindingKind.CHANCE, f"the AUC of '{name}' is {auc.format(3)}: {reason}"
    if min(positives, task.counts["rows"] - positives) < MIN_RARER_ROWS:
        return None  # there are too few labels for the checks below
    if auc.value > SUSPICIOUS_AUC:
        return FindingKind.TOO_GOOD, f"the AUC of '{name}' is {auc.format(4)}, {SUSPICIOUS_AUC_ADVICE}"
    for group in ("request", "user"):
        within = task.get(f"gauc_{group}")
        if within.high is not None and (within.low or 0.0) <= 0.5 and (auc.low or 0.0) > within.high:
            return (
                FindingKind(f"within {group}s"),
                f"'{name}' is ranked well over all rows (AUC {auc.format(3)}), but the rows of a {group} no "
                f"better than by chance (GAUC {within.format(3)}): no feature distinguishes candidates, or predictions "
                "were joined to rows of other requests",
            )
    return None
