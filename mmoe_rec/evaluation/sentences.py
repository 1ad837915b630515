"""Sentences on an evaluation: verdicts, differences, slices, notes, and suspicious metrics, as a mistake gives them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from typing import Literal

import numpy as np

from mmoe_rec.auc import FEWEST, TOO_GOOD, WHY_TOO_GOOD
from mmoe_rec.evaluation.comparison import (
    HELD_BACK,
    NOT_SHOWN,
    UNDECIDED,
    WORSE,
    Comparison,
    Guard,
    Results,
    Versus,
)
from mmoe_rec.evaluation.intervals import LEVEL, Difference, Interval, is_small_sample, level_after
from mmoe_rec.evaluation.metrics import metrics_of
from mmoe_rec.evaluation.slices import ALL, SliceRecord, sort_worst_first
from mmoe_rec.evaluation.summary import LEFT_OUT, SCORE, GroupSummary, Summary
from mmoe_rec.report.formatting import signed
from mmoe_rec.settings.sections import Evaluation

MOST_SLICES = 3
"""So many of the worst slices are told."""
FURTHEST = 2.0  # predictions over labels, or the other way round, beyond which a warning is given
OFF = 0.05  # expected calibration error, at which half of the rows lie in bins that are shown to be off
_WARNINGS = ("calibration", "in sum", "training")
_SAME_IN_ANY_ORDER = 0.99  # NDCG@10 of the worst order above which NDCG says nothing
_LEFT_OUT = ("{} of one row", "{} without a relevant row", "{} whose rows are equally relevant")


def describe_verdicts(results: Results) -> list[str]:
    """How the first model compares with each other one, or what its metrics are where it is alone."""
    if results.comparison is None:
        return describe_metrics(results.first.summary)
    return describe_comparison(results.comparison, results.first.summary)


def describe_metrics(summary: Summary) -> list[str]:
    """How well each task is predicted, and the score ranks."""
    shown = {name: task.guarded for name, task in summary.tasks.items()} | {SCORE: "ndcg_at_10"}
    values = {name: (metric, summary.groups[name].get(metric)) for name, metric in shown.items()}
    return [f"{name}: {metric} {at.shown()}" for name, (metric, at) in values.items() if at.value is not None]


def describe_comparison(compared: Comparison, summary: Summary) -> list[str]:
    """The verdicts, the tasks that were not judged, and whether few users decide. summary: of the model."""
    return [*(describe_verdict(compared, other, summary) for other in compared.against), *describe_limits(compared)]


def describe_limits(compared: Comparison) -> list[str]:
    """List the tasks that were not judged, and whether few users decide."""
    lines = [
        f"{task} was not judged: {rows:,} rows have its rarer label, and {FEWEST} are needed"
        for task, rows in compared.left_out.items()
    ]
    few = {f"have most rows of {name}": users for name, users in compared.effective_users.items()}
    if compared.objective is not None:
        decide = f"decide on {compared.objective.name}, by their rows, weight, positive labels or influence"
        few[decide] = min(each.objective.effective_users or np.inf for each in compared.against.values())
    wide = "so intervals of differences are wide"
    return lines + [
        f"few users {do}: the effective number of users is {users:.1f}, {wide}"
        for do, users in few.items()
        if is_small_sample(users, compared.units)
    ]


def describe_verdict(compared: Comparison, other: str, summary: Summary) -> str:
    """The verdict beside another model. summary: of the model."""
    versus, objective, both = compared.against[other], compared.objective, f"'{compared.model}' and '{other}'"
    apart, verdict = versus.objective, compared.verdicts[other]
    if verdict.kind == UNDECIDED or objective is None or apart.value is None:
        why = f"no task has labels enough ({FEWEST} rows of either)"
        if objective is not None:
            alone = "has no interval, as one user decides nearly alone, or many redraws leave it undefined"
            why = f"{objective.name} {'is undefined' if apart.value is None else alone}"
            if apart.low is not None:
                why = f"{objective.name} differs by {apart.shown()}, for too few users to show more"
        return f"{both} can't be told apart: {why}"
    what = objective.name
    if verdict.kind == NOT_SHOWN and apart.low == apart.high == 0:
        return f"{both} do not differ{_name_other_differences(versus)}: {what} is the same"
    if verdict.kind == NOT_SHOWN:
        metrics = {summary.tasks[task].guarded for task in compared.judged} - {objective.metric}
        besides = f", if guardrails of {' and '.join(sorted(metrics))} allow it" if metrics else ""
        (gain,) = signed(verdict.detectable or 0.0, sign=False)
        return (
            f"no difference is shown between {both}{once_corrected(apart)}: {what} differs by {apart.shown()}; "
            f"nine of ten evaluations like this one would show a gain of {gain}{besides}{describe_tries(compared)}"
        )
    ends = sorted(abs(each or 0.0) for each in (apart.low, apart.high))
    size, *reach = signed(abs(apart.value), *ends, sign=False)
    which, size = "higher" if apart.value > 0 else "lower", f"{size} ({' to '.join(reach)})"
    if verdict.kind == HELD_BACK:
        failed = "; ".join(describe_guard(each, other, compared.rules) for each in verdict.guards if not each.passed)
        beats = f"although {what} is {which} than that of '{other}' by {size}"
        return f"'{compared.model}' is not called better, {beats}: {failed}{describe_tries(compared)}"
    is_what = "worse" if verdict.kind == WORSE else "better"
    return f"'{compared.model}' is {is_what} than '{other}': {what} is {which} by {size}{describe_tries(compared)}"


def describe_tries(compared: Comparison) -> str:
    """What earlier decisions on the same rows ask of this one; nothing where there were none."""
    if not compared.tried:
        return ""
    before = "1 decision" if compared.tried == 1 else f"{compared.tried:,} decisions"
    level = f"{100 * level_after(compared.tried):.2g}%, not {100 * LEVEL:g}%"
    return f" ({before} on these rows promoted no model before, so the level of this one is {level})"


def describe_guard(guard: Guard, other: str, rules: Evaluation) -> str:
    """What a guardrail found beside another model."""
    limit = f"loss of more than {rules.margin:g} (evaluation.margin)"
    if guard.metric == "slices":
        number, by = sum(guard.looked_at.values()), ", ".join(guard.looked_at)
        if guard.passed:
            return f"of {number} slices by {by} none is shown to have a {limit}"
        told = [f"in {_describe_slice(each)}" for each in guard.losing[:MOST_SLICES]]
        more = f", and in {len(guard.losing) - MOST_SLICES} more" if len(guard.losing) > MOST_SLICES else ""
        return f"{'; '.join(told)}{more}, which is a {limit}, corrected for the {number} slices by {by}"
    if guard.calibrations is not None:
        mine, its = guard.calibrations
        ends = "" if mine.low is None else f" ({mine.low:.2f} to {mine.high:.2f})"
        where = "beyond" if guard.is_outside else "not shown to be beyond"
        return (
            f"the probabilities of {guard.task} are {mine.value:.2f} times what was observed{ends}, which is "
            f"{where} a factor of {rules.calibration:g} (evaluation.calibration); those of '{other}' are "
            f"{its.value:.2f} times"
        )
    apart = guard.difference
    if apart is None or apart.low is None:
        missing = "is undefined" if apart is None or apart.value is None else "has no interval"
        return f"the difference in {guard.metric} of {guard.task} {missing}, so a {limit} can't be ruled out"
    least = f"{Context(prec=2, rounding=ROUND_CEILING).create_decimal_from_float(-apart.low):f}"
    open_ = f"so a {limit} can't be ruled out; the least margin that these rows support is {least}"
    shown = f"which is a {limit}" if guard.is_outside else open_
    end = f"so a {limit} is ruled out" if guard.passed else shown
    return f"the {guard.metric} of {guard.task} changes by {apart.shown()}, {end}"


def _name_other_differences(versus: Versus) -> str:
    """Names other metrics that are shown to differ where what decides is the same."""
    shown = [
        f"{metric} of {'the score' if group == SCORE else group}"
        for group, metrics in versus.groups.items()
        for metric, each in metrics.items()
        if each.is_significant
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    return f" in what decides, though in {', '.join(shown[:2])}{more}" if shown else ""


def once_corrected(apart: Difference) -> str:
    """What explains a difference that is not shown, although 0 is outside of its interval."""
    outside = apart.low is not None and apart.high is not None and (apart.low > 0 or apart.high < 0)
    return ", once corrected for the number of comparisons" if outside else ""


def describe_slices(records: Sequence[SliceRecord]) -> Iterator[str]:
    """The worst slices."""
    worse = [each for each in sort_worst_first(records) if each.is_worse]
    yield from map(_describe_slice, worse[:MOST_SLICES])
    if (more := len(worse) - MOST_SLICES) > 0:
        yield f"{more} more {'is' if more == 1 else 'are'} shown to be worse; the report has all"


def _describe_slice(each: SliceRecord) -> str:
    """A slice beside all rows or another model."""
    beside = "that of all rows" if each.beside == ALL else f"that of '{each.beside}'"
    value, apart = each.value or 0.0, each.apart or 0.0
    which = f"slice {each.by}: {each.slice} ({each.rows:,} rows)"
    return f"{which}: {each.metric} of {each.group} is {value:.3f}, where {beside} is {value - apart:.3f}"


def describe_notes(summaries: Sequence[Summary]) -> list[str]:
    """The notes of summaries of the same rows, each once, with its subject; then what is left out."""
    notes = [note for each in summaries if (note := note_of(each)) is not None]
    for each in summaries:
        notes += [f"{name}: {note}" for name in each.groups if (note := note_of_group(each, name)) is not None]
        counts = dict(zip(_LEFT_OUT, (each.score.counts[name] for name in LEFT_OUT), strict=True))
        if 0 < sum(counts.values()) < each.requests:  # with none left, a note says why
            which = ", ".join(words.format(f"{count:,}") for words, count in counts.items() if count)
            total = f"{sum(counts.values()):,} of {each.requests:,} requests"
            notes.append(f"score: {total} rank nothing and are left out: {which}.")
    return list(dict.fromkeys(notes))


def note_of(summary: Summary) -> str | None:
    """What is to be known of all metrics."""
    if summary.users == 1:
        return "There is one user: intervals need at least two."
    if not summary.each_row_is_a_user:
        return None
    return (
        "Each row is a user of its own, so nothing ranks within users or requests (GAUC, NDCG, MRR), and intervals "
        "redraw rows."
    )


def note_of_group(summary: Summary, name: str) -> str | None:
    """Why metrics of a task, or of the score, are undefined or have no interval: each that is missing has a reason."""
    group = summary.groups[name]
    if name != SCORE and group.counts["rows"] == 0:
        return "No row has an observed label: all metrics are undefined."
    sentences = []
    if name == SCORE:
        if summary.each_row_is_a_user:
            return None
        single, irrelevant, equal = (group.counts[each] for each in LEFT_OUT)
        if single + irrelevant + equal == summary.requests:
            why = "No request has rows that differ in relevance"
            if single == summary.requests:
                why = "Every request has one row, and a list of one ranks nothing"
            elif not equal:
                why = "No request has a relevant row among several"
            return f"{why}: NDCG and MRR are undefined."
        if (group.least_ndcg or 0.0) > _SAME_IN_ANY_ORDER:
            sentences.append(
                "NDCG is nearly 1 in any order, as the relevance of a request's rows differs little compared with its "
                "size: set the score_weight of regressions with large labels, such as times, to 0."
            )
    shown = [each for each in metrics_of(group.kind) if not (summary.each_row_is_a_user and each.ranks_within)]
    if undefined := [each.name for each in shown if group.get(each.name).value is None]:
        rows, positives = group.counts.get("rows", 0), group.counts.get("positives")
        why = "labels do not differ, or not within any user or request"
        if positives in (0, rows):
            why = f"all {rows:,} labels are {int(positives > 0)}"
        sentences.append(f"{', '.join(undefined)} {'is' if len(undefined) == 1 else 'are'} undefined: {why}.")
    return " ".join([*sentences, *_note_intervals(group, summary.users)]) or None


def _note_intervals(group: GroupSummary, users: int) -> Iterator[str]:
    """Says which metrics have no interval; with one user none has."""
    if users < 2:
        return
    few = group.effective_users
    if few is not None:
        yield (
            "Few users have most of the rows, the weight or the positive labels: for some metrics the effective number "
            f"of users is {few:.1f}, so intervals are wide or missing."
        )
    if bare := [name for name, each in group.metrics.items() if each.value is not None and each.low is None]:
        verb = "has" if len(bare) == 1 else "have"
        why = "the same for all users, or undefined in more than 5% of the resamples"
        why = why if few is None else f"{why}, or one user decides nearly alone"
        yield f"{', '.join(bare)} {verb} no interval: {why}."


def describe_cautions(results: Results) -> Iterator[str]:
    """Yield notes on the rows of an evaluation."""
    summaries = results.summaries
    compares_requests = results.comparison is not None and not results.each_row_is_a_user
    if compares_requests and any(each.catalogue is None for each in summaries.values()):
        yield "without candidates it can't be told whether labels belong to the same rows of a request"
    yield from describe_notes(list(summaries.values()))
    if caution := results.facts.get("caution"):
        yield caution


# Suspicious metrics: a mistake gives them rather than a model


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
    outside = [
        each for each in bins if each["low"] is not None and not each["low"] <= each["mean_predicted"] <= each["high"]
    ]
    most_are_outside = sum(each["weight"] for each in outside) >= sum(each["weight"] for each in bins) / 2 > 0
    is_shown = ratio.low is not None and not ratio.low <= 1 <= (ratio.high or 0.0)
    ranking, in_sum = _in_ranking(name, task), ""
    if ratio.value is not None:
        ends = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        in_sum = f"too {'high' if ratio.value > 1 else 'low'}: {ratio.value:.2f} times what was observed{ends}; {mends}"
    if ranking is not None:
        yield ranking
    if _is_far(ratio):
        yield "calibration", f"the probabilities of '{name}' are {in_sum}"
    elif ranking is not None:
        return  # where more is wrong, that is the cause
    elif most_are_outside and (task.details["ece"] or 0.0) >= OFF:
        yield (
            "calibration",
            f"the probabilities of '{name}' are off by {task.details['ece']:.2g} on average (ece); {mends}",
        )
    elif is_shown and not _is_right_in_sum(task):
        yield "in sum", f"the probabilities of '{name}' are {in_sum}"


def _in_ranking(name: str, task: GroupSummary) -> tuple[str, str] | None:
    auc, positives = task.get("auc"), task.counts.get("positives", 0)
    if auc.value is None:
        return None
    if (auc.value if auc.low is None else auc.low) <= 0.5:
        what = ", below .5: it ranks no better" if auc.value < 0.5 else ": it is not shown to rank better"
        why = "; labels or predictions may have been joined to the wrong rows"
        return (
            "chance",
            f"the AUC of '{name}' is {auc.shown(3)}{what} than chance{why if _is_right_in_sum(task) else ''}",
        )
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
