"""Why a metric is undefined, or has no interval, in words: no number is missing without a reason."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmoe_rec.evaluation.metrics import metrics_of

NEEDS_TWO_USERS = "There is one user: intervals need at least two."
EACH_ALONE = (
    "Each row is a user of its own, so nothing ranks within users or requests (GAUC, NDCG, MRR), and intervals "
    "redraw rows."
)
LEFT_OUT = {
    "requests_of_one_row": "{} of one row",
    "requests_without_relevant_row": "{} without a relevant row",
    "requests_of_equal_relevance": "{} whose rows are equally relevant",
}
SAME_IN_ANY_ORDER = 0.99  # NDCG@10 of the worst order above which NDCG says nothing
_SAME_IN_ANY_ORDER = (
    "NDCG is nearly 1 in any order, as the relevance of a request's rows differs little compared with its size: set "
    "the score_weight of regressions with large labels, such as times, to 0."
)


def are_alone(summary: Mapping[str, Any]) -> bool:
    """Whether each row is a user of its own, as in a plain table."""
    return bool(summary["users"] == summary["rows"])


def task_note(task: Mapping[str, Any], users: int, alone: bool = False, few: float | None = None) -> str | None:
    """Of a task: `kind`, `rows`, a binary one's `positives`, and its metrics as `value`, `low` and `high`.

    alone: whether each row is a user of its own, for which the whole summary has a note; few: how many users alike
    would tell as much of the metric that most rests on few of them, None where these are enough.
    """
    rows = task["rows"]
    if rows == 0:
        return "No row has an observed label: all metrics are undefined."
    return _joined([*_undefined(task["kind"], task, alone), *_without_interval(task, users, few)])


def score_note(
    score: Mapping[str, Any], requests: int, users: int, least: float, few: float | None = None
) -> str | None:
    """Of the score: NDCG and MRR, and the requests that they leave out (`LEFT_OUT`).

    least: the NDCG@10 of the worst order, summed over the requests that are not left out; few: as of `task_note`.
    """
    single, irrelevant, equal = (score[name] for name in LEFT_OUT)
    ranked = requests - single - irrelevant - equal
    if ranked > 0:
        flat = [_SAME_IN_ANY_ORDER] if least / ranked > SAME_IN_ANY_ORDER else []
        return _joined([*flat, *_undefined("score", score), *_without_interval(score, users, few)])
    if single == requests:
        why = "Every request has one row, and a list of one ranks nothing"
    elif not equal:
        why = "No request has a relevant row among several"
    else:
        why = "No request has rows that differ in relevance"
    return f"{why}: NDCG and MRR are undefined."


def told(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """For people: the notes of summaries of the same rows, each once, with its subject; then what is left out."""
    found = [each["note"] for each in summaries if "note" in each]
    for each in summaries:
        groups = {**each["tasks"], "score": each["score"]}
        found += [f"{name}: {group['note']}" for name, group in groups.items() if "note" in group]
        found += _left_out(each)
    return list(dict.fromkeys(found))


def _left_out(summary: Mapping[str, Any]) -> list[str]:
    counts = {name: summary["score"][name] for name in LEFT_OUT}
    total = sum(counts.values())
    if not 0 < total < summary["requests"]:
        return []  # With none left, the note says why.
    which = ", ".join(LEFT_OUT[name].format(f"{count:,}") for name, count in counts.items() if count)
    return [f"score: {total:,} of {summary['requests']:,} requests rank nothing and are left out: {which}."]


def _undefined(kind: str, group: Mapping[str, Any], alone: bool = False) -> list[str]:
    """Each reason once."""
    metrics = [each for each in metrics_of(kind) if not (alone and each.ranks_within)]
    values = [(each, group[each.name]["value"] if each.has_interval else group[each.name]) for each in metrics]
    return list(dict.fromkeys(each.why_undefined(group) for each, value in values if value is None))


def _without_interval(metrics: Mapping[str, Any], users: int, few: float | None) -> list[str]:
    """What is defined, but not in enough of the resamples, or rests on too few users; with one user nothing has an
    interval."""
    intervals = {name: each for name, each in metrics.items() if isinstance(each, dict) and "low" in each}
    bare = [name for name, each in intervals.items() if each["value"] is not None and each["low"] is None]
    if users < 2:
        return []
    found = []
    if few is not None:
        found.append(
            f"Few users have most of the rows, of the weight or of the positive labels: for some metrics all tell as "
            f"much as {few:.1f} users alike, so intervals are wide, or there are none."
        )
    if bare:
        verb, why = "has" if len(bare) == 1 else "have", "undefined in more than 5% of the resamples of users"
        why = why if few is None else f"{why}, or one user decides nearly alone"
        found.append(f"{', '.join(bare)} {verb} no interval: {why}.")
    return found


def _joined(sentences: list[str]) -> str | None:
    return " ".join(sentences) or None
