"""Findings about a data set, in words.

A finding is a `problem` if training would be wrong or meaningless, and a `warning` otherwise. Problems come first, then
the warnings by their cost. The cost estimates the fraction of test predictions that a finding harms, from 0 to 1:

    fraction of the rows affected x weight of the feature in these rows

The weight of a feature is its own ranking power on validation rows: 2 AUC - 1, for the task that it ranks best. An
unknown user or candidate has weight 1, because the model knows nothing of it. Other ids have at least weight
`MIN_ID_WEIGHT`, because unknown ids lower their own AUC. The order says nothing of a model's gain.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
_FEWEST = 10  # rows of a class below which a high AUC may be chance
_ERRORS = 3.0  # how many standard errors rates must differ by

Health = Mapping[str, Any]
Finding = dict[str, Any]


def list_findings(health: Health) -> list[Finding]:
    """Return all findings, problems first, the costliest of each first."""
    features, splits = health["features"], health["overview"]["splits"]
    found = [*_files(health["overview"]), *_labels(splits), *_users(health["overview"]), *_rare(splits)]
    for feature in features:
        found += [*_leaks(feature, splits["validation"]["tasks"]), *_constants(feature), *_coverage(feature)]
        found += [*_unknown(feature), *_drift(feature)]
    return sorted(found, key=lambda each: (str(each["severity"]), -each["cost"]))


def describe_findings(findings: Sequence[Finding]) -> str:
    """Say how many findings there are and which costs most."""
    kinds = Counter(each["severity"] for each in findings)
    told = [f"{kinds[word]} {word}{'s' * (kinds[word] > 1)}" for word in ("problem", "warning") if kinds[word]]
    return f"{' and '.join(told)} found; above all: {findings[0]['message']}" if told else "nothing suspicious found"


def predictive_power(feature: Mapping[str, Any]) -> float:
    """Return how well a feature alone ranks the task that it ranks best. 0 is chance, 1 is perfect."""
    known = [auc for auc in feature["auc"].values() if auc is not None]
    return max(0.0, 2 * max(known, default=0.5) - 1)


def worst_drift(feature: Health) -> Mapping[str, Any] | None:
    """Return the input of a feature that drifts most, None if no drift is known."""
    known = [each for each in feature["inputs"] if each["psi"] is not None]
    return max(known, key=lambda each: float(each["psi"]), default=None)


def _finding(severity: str, check: str, about: str, message: str, cost: float = 0.0) -> Finding:
    return {"severity": severity, "check": check, "about": about, "message": message, "cost": cost}


def _files(overview: Health) -> Iterator[Finding]:
    if skipped := overview["skipped"]:
        number = f"{len(skipped)} file{'s' * (len(skipped) > 1)}"
        message = f"{number} of the log could not be used, such as '{skipped[0]['file']}' ({skipped[0]['reason']})"
        yield _finding("problem", "files", "files left out", message)


def _users(overview: Health) -> Iterator[Finding]:
    if share := overview["shared_user_fraction"]:
        column = overview["split_column"]
        message = f"{share:.1%} of the users of test rows have training rows as well, as column '{column}' splits them"
        yield _finding("warning", "users", "users in training and test", message, share)


def _rare(splits: Health) -> Iterator[Finding]:
    for name, task in splits["test"]["tasks"].items():
        # Half of the validation users select a state, the others judge it.
        for split, needed in (("test", MIN_RARER_ROWS), ("validation", 2 * MIN_RARER_ROWS)):
            observed, rate = (splits[split]["tasks"][name][key] for key in ("observed", "rate"))
            if KINDS[task["kind"]].is_binary and observed and (rarer := round(min(rate, 1 - rate) * observed)) < needed:
                message = f"task '{name}' has {rarer} rows of its rarer label in {split} rows, and {needed} are needed"
                yield _finding("warning", "rare", name, message, 1 - rarer / needed)


def _labels(splits: Health) -> Iterator[Finding]:
    for name, task in splits["test"]["tasks"].items():
        rated = {split: each["tasks"][name] for split, each in splits.items()}
        for split, labels in rated.items():
            if not labels["observed"]:
                message = f"task '{name}' has no observed label in the {split} split: move the ends of the splits back"
                yield _finding("problem", "labels", name, message)
        pairs = [
            (one, other) for one, other in combinations(rated, 2) if _differ(rated[one], rated[other], task["kind"])
        ]
        if changed := {split: rated[split]["rate"] for split in rated if split in sum(pairs, ())}:
            rates = ", ".join(f"{rate:.3g} in {split}" for split, rate in changed.items())
            message = f"the rate of '{name}' changes more than {MAX_RATE_RATIO:g} times between splits: {rates}"
            low, high = min(changed.values()), max(changed.values())
            yield _finding("warning", "rate", name, message, 1 - low / high)


def _differ(one: Health, other: Health, kind: str) -> bool:
    """Whether one rate is more than `MAX_RATE_RATIO` times the other and, of a binary task, not by chance."""
    if not one["observed"] or not other["observed"]:
        return False
    (low, few), (high, many) = sorted((each["rate"], each["observed"]) for each in (one, other))
    if low < 0 or high <= MAX_RATE_RATIO * low:
        return False
    share = (low * few + high * many) / (few + many)
    error = (share * (1 - share) * (1 / few + 1 / many)) ** 0.5 if KINDS[kind].is_binary else 0.0
    return bool(high - low > _ERRORS * error)


def _leaks(feature: Health, labels: Health) -> Iterator[Finding]:
    for task, auc in feature["auc"].items():
        if auc is not None and auc > LEAK_AUC and _enough(labels[task]):
            columns = ", ".join(map(repr, feature["columns"]))
            message = (
                f"feature '{feature['name']}' (of {columns}) alone predicts task '{task}' with an AUC of {auc:.3f}: "
                "leave it out, unless it is known before the request"
            )
            yield _finding("problem", "leak", feature["name"], message)


def _enough(task: Health) -> bool:
    positives = task["observed"] / 2 if not KINDS[task["kind"]].is_binary else (task["rate"] or 0) * task["observed"]
    return bool(min(positives, task["observed"] - positives) >= _FEWEST)


def _constants(feature: Health) -> Iterator[Finding]:
    if constant := [each["name"] for each in feature["inputs"] if each["constant"]]:
        message = f"feature '{feature['name']}' is the same in all training rows (inputs: {', '.join(constant)})"
        yield _finding("warning", "constant", feature["name"], message)


def _coverage(feature: Health) -> Iterator[Finding]:
    shares = {split: share for split, share in feature["coverage"].items() if share is not None}
    if low := [f"{share:.1%} of the {split} rows" for split, share in shares.items() if share < MIN_COVERAGE]:
        message = f"feature '{feature['name']}' has a value in only {' and '.join(low)}"
        lost = max(0.0, shares.get("train", 0.0) - shares.get("test", 1.0))
        yield _finding("warning", "coverage", feature["name"], message, lost * predictive_power(feature))


def _unknown(feature: Health) -> Iterator[Finding]:
    share = feature["unknown"]["test"]
    if share is not None and share > MAX_UNKNOWN_FRACTION:
        message = (
            f"{share:.1%} of the ids of feature '{feature['name']}' in test rows have no table row of their own (in "
            f"training {feature['unknown']['train'] or 0:.1%}): lower its min_count, or train on later rows"
        )
        cost = share * (1.0 if feature["is_key"] else max(predictive_power(feature), MIN_ID_WEIGHT))
        yield _finding("warning", "unknown", feature["name"], message, cost)


def _drift(feature: Health) -> Iterator[Finding]:
    worst = worst_drift(feature)
    if worst is not None and worst["psi"] > STRONG_DRIFT_PSI:
        message = f"feature '{feature['name']}' drifts strongly, PSI {worst['psi']:.2f}: {describe_shift(worst)}"
        if feature["kind"] == "counter":
            message += ". A count of all of the past grows with any log, and `window_days` bounds it"
        # Values that are more than twice as frequent as in training.
        moved = sum(bin_["test"] - bin_["train"] for bin_ in worst["bins"] if bin_["test"] > 2 * bin_["train"])
        yield _finding("warning", "drift", feature["name"], message, moved * predictive_power(feature))


def describe_shift(each: Mapping[str, Any]) -> str:
    """Name the bin of an input whose fraction of the rows has changed most."""
    most = max(each["bins"], key=lambda part: abs(part["test"] - part["train"]))
    words = {"missing": "without a value", "unknown": "of unknown ids", "all others": "of all less frequent ids"}
    what = f"of id '{most['bin']}'" if each["table"] else f"of values {most['bin']} (standardized)"
    part = words.get(most["bin"], what)
    return f"the share of '{each['name']}' {part} goes from {most['train']:.1%} to {most['test']:.1%}"
