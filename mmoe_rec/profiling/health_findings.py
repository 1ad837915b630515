"""Findings about the health of a data set.

A finding is a `problem` if training would be wrong or meaningless, and a `warning` otherwise. Problems come first,
then warnings by their `cost`, a rough estimate of the fraction of test predictions that a finding harms:

    cost = fraction of test rows affected x weight of the feature

The weight of a feature is its predictive power: 2 AUC - 1 of the feature alone on validation rows, for the task that it
ranks best. Unknown users and candidates have weight 1, because the model has no data about them. Other unknown IDs have
at least weight `MIN_ID_WEIGHT`, because they lower the AUC that their feature's weight is computed from.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.task_kinds import KINDS

MIN_ID_WEIGHT = 0.3
LEAK_AUC = 0.98
MAX_UNKNOWN_FRACTION = 0.20
DRIFT_PSI, STRONG_DRIFT_PSI = 0.10, 0.25
MIN_COVERAGE = 0.05
MAX_RATE_RATIO = 2.0
# With fewer positive (or negative) rows than this, a high AUC may be chance.
_MIN_CLASS_ROWS = 10
# Two rates differ significantly if they differ by this many standard errors.
_STANDARD_ERRORS = 3.0

Health = Mapping[str, Any]


class Severity(StrEnum):
    """Severity of a finding."""

    PROBLEM = "problem"
    WARNING = "warning"


class Check(StrEnum):
    """The check that produced a finding."""

    FILES = "files"
    USERS = "users"
    RARE = "rare"
    LABELS = "labels"
    RATE = "rate"
    LEAK = "leak"
    CONSTANT = "constant"
    COVERAGE = "coverage"
    UNKNOWN = "unknown"
    DRIFT = "drift"


@dataclass(frozen=True)
class Finding:
    """A suspicious property of a data set.

    Attributes:
        severity: Severity of the finding.
        check: The check that produced it.
        subject: Name of the feature or task, or a topic such as "skipped files".
        message: The finding as a clause.
        cost: Rough fraction of test predictions that the finding harms, from 0 to 1.
    """

    severity: Severity
    check: Check
    subject: str
    message: str
    cost: float = 0.0


def list_findings(health: Health) -> list[Finding]:
    """Return all findings of a health report: first problems, then warnings, each by falling `cost`."""
    overview, splits = health["overview"], health["overview"]["splits"]
    findings = [*_check_files(overview), *_check_labels(splits), *_check_users(overview), *_check_rare_labels(splits)]
    for feature in health["features"]:
        findings += _check_leaks(feature, splits["validation"]["tasks"])
        for check in (_check_constants, _check_coverage, _check_unknown, _check_drift):
            findings += check(feature)
    return sorted(findings, key=lambda finding: (finding.severity, -finding.cost))


def describe_findings(findings: Sequence[Finding]) -> str:
    """Return the number of findings and the most important one, as one clause."""
    counts = Counter(finding.severity for finding in findings)
    numbers = [f"{counts[level]} {level}{'s' * (counts[level] > 1)}" for level in Severity if counts[level]]
    return f"{' and '.join(numbers)} found, first: {findings[0].message}" if numbers else "nothing suspicious found"


def predictive_power(feature: Mapping[str, Any]) -> float:
    """Return how well a feature alone ranks its best task, from 0 (chance) to 1 (perfect)."""
    aucs = [auc for auc in feature["auc"].values() if auc is not None]
    return max(0.0, 2 * max(aucs, default=0.5) - 1)


def worst_drift(feature: Health) -> Mapping[str, Any] | None:
    """Return the input of a feature with the highest PSI, None if no input has a PSI."""
    inputs = [counts for counts in feature["inputs"] if counts["psi"] is not None]
    return max(inputs, key=lambda counts: float(counts["psi"]), default=None)


def _check_files(overview: Health) -> Iterator[Finding]:
    if skipped := overview["skipped"]:
        number = f"{len(skipped)} file{'s' * (len(skipped) > 1)}"
        message = f"{number} of the log could not be used, such as '{skipped[0]['file']}' ({skipped[0]['reason']})"
        yield Finding(Severity.PROBLEM, Check.FILES, "skipped files", message)


def _check_users(overview: Health) -> Iterator[Finding]:
    if fraction := overview["shared_user_fraction"]:
        column = overview["split_column"]
        message = f"{fraction:.1%} of the users of test rows also have training rows, as split by column '{column}'"
        yield Finding(Severity.WARNING, Check.USERS, "users in training and test", message, fraction)


def _check_rare_labels(splits: Health) -> Iterator[Finding]:
    for name, task in splits["test"]["tasks"].items():
        # Validation needs twice the labels: half of the users select a checkpoint, the other half evaluate it.
        for split, needed in (("test", MIN_RARER_ROWS), ("validation", 2 * MIN_RARER_ROWS)):
            observed, rate = (splits[split]["tasks"][name][key] for key in ("observed", "rate"))
            if KINDS[task["kind"]].is_binary and observed and (rarer := round(min(rate, 1 - rate) * observed)) < needed:
                message = f"task '{name}' has {rarer} rows of its rarer label in {split} rows, and {needed} are needed"
                yield Finding(Severity.WARNING, Check.RARE, name, message, 1 - rarer / needed)


def _check_labels(splits: Health) -> Iterator[Finding]:
    for name, task in splits["test"]["tasks"].items():
        labels = {split: counts["tasks"][name] for split, counts in splits.items()}
        for split, counts in labels.items():
            if not counts["observed"]:
                message = f"task '{name}' has no observed label in the {split} split: move the ends of the splits back"
                yield Finding(Severity.PROBLEM, Check.LABELS, name, message)
        pairs = [(a, b) for a, b in combinations(labels, 2) if _rates_differ(labels[a], labels[b], task["kind"])]
        if changed := {split: labels[split]["rate"] for split in labels if split in sum(pairs, ())}:
            rates = ", ".join(f"{rate:.3g} in {split}" for split, rate in changed.items())
            message = f"the rate of '{name}' changes more than {MAX_RATE_RATIO:g} times between splits: {rates}"
            low, high = min(changed.values()), max(changed.values())
            yield Finding(Severity.WARNING, Check.RATE, name, message, 1 - low / high)


def _rates_differ(first: Health, second: Health, kind: str) -> bool:
    """Return whether label rates of splits differ by a factor over `MAX_RATE_RATIO` and, if binary, beyond chance."""
    if not first["observed"] or not second["observed"]:
        return False
    (low, low_rows), (high, high_rows) = sorted((labels["rate"], labels["observed"]) for labels in (first, second))
    if low < 0 or high <= MAX_RATE_RATIO * low:
        return False
    mean = (low * low_rows + high * high_rows) / (low_rows + high_rows)
    error = (mean * (1 - mean) * (1 / low_rows + 1 / high_rows)) ** 0.5 if KINDS[kind].is_binary else 0.0
    return bool(high - low > _STANDARD_ERRORS * error)


def _check_leaks(feature: Health, labels: Health) -> Iterator[Finding]:
    for task, auc in feature["auc"].items():
        if auc is not None and auc > LEAK_AUC and _has_enough_labels(labels[task]):
            columns = ", ".join(map(repr, feature["columns"]))
            message = (
                f"feature '{feature['name']}' (of {columns}) alone predicts task '{task}' with an AUC of {auc:.3f}: "
                "leave it out, unless it is available before the request"
            )
            yield Finding(Severity.PROBLEM, Check.LEAK, feature["name"], message)


def _has_enough_labels(task: Health) -> bool:
    positives = task["observed"] / 2 if not KINDS[task["kind"]].is_binary else (task["rate"] or 0) * task["observed"]
    return bool(min(positives, task["observed"] - positives) >= _MIN_CLASS_ROWS)


def _check_constants(feature: Health) -> Iterator[Finding]:
    if constant := [counts["name"] for counts in feature["inputs"] if counts["constant"]]:
        message = f"feature '{feature['name']}' is the same in all training rows (inputs: {', '.join(constant)})"
        yield Finding(Severity.WARNING, Check.CONSTANT, feature["name"], message)


def _check_coverage(feature: Health) -> Iterator[Finding]:
    coverage = {split: fraction for split, fraction in feature["coverage"].items() if fraction is not None}
    if low := [
        f"{fraction:.1%} of the {split} rows" for split, fraction in coverage.items() if fraction < MIN_COVERAGE
    ]:
        message = f"feature '{feature['name']}' has a value in only {' and '.join(low)}"
        lost = max(0.0, coverage.get("train", 0.0) - coverage.get("test", 1.0))
        cost = lost * predictive_power(feature)
        yield Finding(Severity.WARNING, Check.COVERAGE, feature["name"], message, cost)


def _check_unknown(feature: Health) -> Iterator[Finding]:
    fraction = feature["unknown"]["test"]
    if fraction is not None and fraction > MAX_UNKNOWN_FRACTION:
        message = (
            f"{fraction:.1%} of the IDs of feature '{feature['name']}' in test rows are not in its vocabulary (in "
            f"training {feature['unknown']['train'] or 0:.1%}): lower its min_count, or train on later rows"
        )
        cost = fraction * (1.0 if feature["is_key"] else max(predictive_power(feature), MIN_ID_WEIGHT))
        yield Finding(Severity.WARNING, Check.UNKNOWN, feature["name"], message, cost)


def _check_drift(feature: Health) -> Iterator[Finding]:
    worst = worst_drift(feature)
    if worst is not None and worst["psi"] > STRONG_DRIFT_PSI:
        message = f"feature '{feature['name']}' drifts strongly, PSI {worst['psi']:.2f}: {describe_shift(worst)}"
        if feature["kind"] == "counter":
            message += ". A count over the whole past grows with the log; set `window_days` to limit it"
        # A bin counts as harmed by drift if it is more than twice as frequent in test as in training.
        moved = sum(bin_["test"] - bin_["train"] for bin_ in worst["bins"] if bin_["test"] > 2 * bin_["train"])
        yield Finding(Severity.WARNING, Check.DRIFT, feature["name"], message, moved * predictive_power(feature))


def describe_shift(counts: Mapping[str, Any]) -> str:
    """Describe the bin of an input whose fraction of rows changed most from training to test."""
    shift = max(counts["bins"], key=lambda bin_: abs(bin_["test"] - bin_["train"]))
    special = {"missing": "rows without a value", "unknown": "unknown IDs", "all others": "all less frequent IDs"}
    usual = f"ID '{shift['bin']}'" if counts["table"] else f"values {shift['bin']} (standardized)"
    name = special.get(shift["bin"], usual)
    return f"the fraction of {name} in '{counts['name']}' goes from {shift['train']:.1%} to {shift['test']:.1%}"
