"""Sentences on an evaluation: verdicts, slices, notes, and suspicious metrics, as a mistake gives them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmoe_rec.auc import MIN_RARER_ROWS, SUSPICIOUS_AUC, SUSPICIOUS_AUC_ADVICE
from mmoe_rec.evaluation.comparison import MAX_LISTED_SLICES, Comparison, Results
from mmoe_rec.evaluation.metrics import metrics_for_kind
from mmoe_rec.evaluation.slices import SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import SCORE, UNINFORMATIVE_REQUESTS, GroupSummary, Summary

MAX_PLAUSIBLE_RATIO = 2.0  # predictions over labels, or the other way round, beyond which a warning is given
MAX_PLAUSIBLE_ECE = 0.05  # expected calibration error, at which half of the rows lie in bins that are shown to be off
_SAME_IN_ANY_ORDER = 0.99  # NDCG@10 of a random order above which NDCG says nothing
_LEFT_OUT = ("{} of one row", "{} without a relevant row", "{} whose rows are equally relevant")


def describe_verdicts(results: Results) -> list[str]:
    """How the first model compares with each other one, or what its metrics are where it is alone."""
    if results.comparison is None:
        return describe_metrics(results.first.summary)
    verdicts = [each.message for each in results.comparison.verdicts.values()]
    return [*verdicts, *describe_excluded_tasks(results.comparison)]


def describe_metrics(summary: Summary) -> list[str]:
    """How well each task is predicted, and the score ranks."""
    shown = {name: task.guardrail_metric for name, task in summary.tasks.items()} | {SCORE: "ndcg_at_10"}
    values = {name: (metric, summary.groups[name].get(metric)) for name, metric in shown.items()}
    return [f"{name}: {metric} {at.format()}" for name, (metric, at) in values.items() if at.value is not None]


def describe_excluded_tasks(compared: Comparison) -> list[str]:
    """List the tasks that were not judged."""
    return [
        f"{task} was not judged: {rows:,} rows have its rarer label, and {MIN_RARER_ROWS} are needed"
        for task, rows in compared.excluded_tasks.items()
    ]


def describe_slices(records: Sequence[SliceRecord]) -> Iterator[str]:
    """The worst slices."""
    worse = [each.message for each in sort_worst_first(records) if each.is_worse]
    yield from worse[:MAX_LISTED_SLICES]
    if (more := len(worse) - MAX_LISTED_SLICES) > 0:
        yield f"{more} more {'is' if more == 1 else 'are'} shown to be worse; the report has all"


def describe_cautions(results: Results) -> Iterator[str]:
    """Yield notes on the rows of an evaluation, each once, with its subject."""
    summaries = list(results.summaries.values())
    compares_requests = results.comparison is not None and not results.one_row_per_user
    if compares_requests and any(each.catalog is None for each in summaries):
        yield "without candidates it can't be told whether labels belong to the same rows of a request"
    yield from dict.fromkeys(note for each in summaries for note in describe_notes(each))
    if caution := results.facts.get("caution"):
        yield caution


def describe_notes(summary: Summary) -> Iterator[str]:
    """The notes of a summary, then the requests that are left out."""
    if (note := explain_summary(summary)) is not None:
        yield note
    for name in summary.groups:
        if (note := explain_group(summary, name)) is not None:
            yield f"{name}: {note}"
    counts = dict(zip(_LEFT_OUT, (summary.score.counts[name] for name in UNINFORMATIVE_REQUESTS), strict=True))
    if 0 < sum(counts.values()) < summary.requests:  # with none left, a note says why
        which = ", ".join(words.format(f"{count:,}") for words, count in counts.items() if count)
        total = f"{sum(counts.values()):,} of {summary.requests:,} requests"
        yield f"score: {total} rank nothing and are left out: {which}."


def explain_summary(summary: Summary) -> str | None:
    """What is to be known of all metrics."""
    if summary.users == 1:
        return "There is one user: intervals need at least two."
    if not summary.one_row_per_user:
        return None
    return (
        "Each row is a user of its own, so nothing ranks within users or requests (GAUC, NDCG, MRR), and intervals "
        "redraw rows."
    )


def explain_group(summary: Summary, name: str) -> str | None:
    """Why metrics of a task, or of the score, are undefined or have no interval: each that is missing has a reason."""
    group = summary.groups[name]
    if name != SCORE and group.counts["rows"] == 0:
        return "No row has an observed label: all metrics are undefined."
    sentences = []
    if name == SCORE:
        if summary.one_row_per_user:
            return None
        if sum(group.counts[each] for each in UNINFORMATIVE_REQUESTS) == summary.requests:
            return "No request has rows that differ in relevance: NDCG and MRR are undefined."
        if group.details.get("random_ndcg_at_10", 0.0) > _SAME_IN_ANY_ORDER:
            sentences.append(
                "NDCG is nearly 1 in any order, as the relevance of a request's rows differs little compared with its "
                "size: set the score_weight of regressions with large labels, such as times, to 0."
            )
    shown = [each for each in metrics_for_kind(group.kind) if not (summary.one_row_per_user and each.is_within_group)]
    if undefined := [each.name for each in shown if group.get(each.name).value is None]:
        rows, positives = group.counts.get("rows", 0), group.counts.get("positives")
        why = "labels do not differ, or not within any user or request"
        if positives in (0, rows):
            why = f"all {rows:,} labels are {int(positives > 0)}"
        sentences.append(f"{', '.join(undefined)} {'is' if len(undefined) == 1 else 'are'} undefined: {why}.")
    few = group.effective_users
    if few is not None and summary.users > 1:
        sentences.append(
            "Few users have most of the rows, the weight or the positive labels: the effective number of users is "
            f"{few:.1f}, so intervals are wide or missing."
        )
    bare = [name for name, each in group.metrics.items() if each.value is not None and each.low is None]
    if bare and summary.users > 1:
        why = "the same for all users, or undefined in more than 5% of the resamples, or one user decides nearly alone"
        sentences.append(f"{', '.join(bare)} {'has' if len(bare) == 1 else 'have'} no interval: {why}.")
    return " ".join(sentences) or None


# Suspicious metrics: a mistake gives them rather than a model


@dataclass(frozen=True)
class Finding:
    """Something suspicious. model: its name; check: what found it; task: that it is about, `score`, or None where it is
    about the rows; message: a sentence."""

    model: str
    check: str
    task: str | None
    message: str

    @property
    def severity(self) -> Literal["warning", "problem"]:
        """`problem` or `warning`."""
        return "warning" if self.check in ("calibration", "training") else "problem"


def find_suspicious_results(results: Results) -> list[Finding]:
    """What is suspicious of all models, and of how they have seen the rows before."""
    found = []
    for name, each in results.models.items():
        told = [*(("seen", sentence) for sentence in each.training_overlap), ("training", each.undertraining)]
        found += [Finding(name, check, None, f"the model {sentence}") for check, sentence in told if sentence]
        for task, group in each.summary.tasks.items():
            found += [Finding(name, check, task, message) for check, message in _in_task(task, group)]
        found += [Finding(name, "score", SCORE, message) for message in _in_score(each.summary)]
    return found


def _in_score(summary: Summary) -> Iterator[str]:
    """Whether it ranks the wrong way round, although a task's predictions do not."""
    ndcg, random = summary.score.get("ndcg_at_10"), summary.score.get("random_ndcg_at_10").value
    tasks = [name for name, task in summary.tasks.items() if (task.get("gauc_request").low or 0.0) > 0.5]
    if random is not None and ndcg.high is not None and ndcg.high < random and tasks:
        yield (
            f"the score ranks the rows of requests worse than chance (NDCG@10 {ndcg.format(3)}, by chance "
            f"{random:.3f}), and the predictions of {', '.join(tasks)} do not: larger scores have to be better, unlike "
            "those of a rank"
        )


def _in_task(name: str, task: GroupSummary) -> Iterator[tuple[str, str]]:
    if ranking := _in_ranking(name, task):
        yield ranking
    ratio, bins = task.get("calibration"), task.details.get("calibration_bins") or ()
    if ratio.value is None:
        return
    ends = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
    is_far = abs(math.log(max(ratio.value, 1e-9))) > math.log(MAX_PLAUSIBLE_RATIO)
    is_shown = ratio.low is None or ratio.high is None or not ratio.low <= 1 <= ratio.high
    outside = [each["low"] is not None and not each["low"] <= each["mean_predicted"] <= each["high"] for each in bins]
    weights = [each["weight"] for each in bins]
    most_are_outside = sum(w for w, out in zip(weights, outside, strict=True) if out) >= sum(weights) / 2 > 0
    mend = "fit their calibration on other rows than these, or look for drift with `mmoe-rec inspect`"
    if is_far and is_shown:
        way = "high" if ratio.value > 1 else "low"
        told = f"too {way}: {ratio.value:.2f} times what was observed{ends}"
        yield "calibration", f"the probabilities of '{name}' are {told}; {mend}"
    elif not ranking and most_are_outside and (task.details["ece"] or 0.0) >= MAX_PLAUSIBLE_ECE:
        told = f"off by {task.details['ece']:.2g} on average (ece)"
        yield "calibration", f"the probabilities of '{name}' are {told}; {mend}"


def _in_ranking(name: str, task: GroupSummary) -> tuple[str, str] | None:
    auc, positives = task.get("auc"), task.counts.get("positives", 0)
    if auc.value is None:
        return None
    if (auc.value if auc.low is None else auc.low) <= 0.5:
        told = "it is not shown to rank better than chance, as after a join of labels or predictions to wrong rows"
        return "chance", f"the AUC of '{name}' is {auc.format(3)}: {told}"
    if min(positives, task.counts["rows"] - positives) < MIN_RARER_ROWS:
        return None  # of few labels nothing can be said
    if auc.value > SUSPICIOUS_AUC:
        return "too good", f"the AUC of '{name}' is {auc.format(4)}, {SUSPICIOUS_AUC_ADVICE}"
    for group in ("request", "user"):
        within = task.get(f"gauc_{group}")
        if within.high is not None and (within.low or 0.0) <= 0.5 and (auc.low or 0.0) > within.high:
            return (
                f"within {group}s",
                f"'{name}' is ranked well over all rows (AUC {auc.format(3)}), but the rows of a {group} no "
                "better than "
                f"by chance (GAUC {within.format(3)}): no feature tells candidates apart, or predictions were "
                "joined to "
                "rows of other requests",
            )
    return None
