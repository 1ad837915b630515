"""What is suspicious in a data set, in words.

A finding is a `problem` if training would be wrong or meaningless, a `warning` if one should know of it. They come
in order of what they cost; only the first of many warnings are shown at once.

What a finding costs: roughly the share of the test rows' predictions that it harms, from 0 to 1.

    share of the rows that it spoils x how much the feature matters in them

A feature matters as much as it alone ranks validation rows (2 AUC - 1, of the task that it ranks best). The id of the
user or the candidate matters fully where it is unknown, as all that was learnt of it is missing there; another id at
least `LEAST`, since rows of unknown ids are among those that its AUC is measured on. Of a drift, only the rows where
training had less than half as many count. A label rate that changes is in all rows. What only takes space costs 0.

It puts the findings in order; it does not measure what a model would gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

LEAST = 0.3
_SELDOM = 2.0  # times as often as in training


def importance(feature: Mapping[str, Any]) -> float:
    """How well a feature alone ranks the task that it ranks best: 0 is chance, 1 perfect."""
    known = [auc for auc in feature["auc"].values() if auc is not None]
    return max(0.0, 2 * max(known, default=0.5) - 1)


def cost_of_unknown(feature: Mapping[str, Any]) -> float:
    """What ids cost that training does not know."""
    share = float(feature["unknown"]["test"] or 0.0)
    return share * (1.0 if feature["is_key"] else max(importance(feature), LEAST))


def cost_of_drift(feature: Mapping[str, Any], each: Mapping[str, Any]) -> float:
    """What an input costs whose values have other shares than in training."""
    apart = (part["test"] - part["train"] for part in each["bins"] if part["test"] > _SELDOM * part["train"])
    return sum(apart) * importance(feature)


LEAK_AUC = 0.98
UNKNOWN = 0.20
DRIFT, STRONG_DRIFT = 0.10, 0.25
LEAST_COVERAGE = 0.05
RATE_CHANGE = 2.0
NEVER_SEEN = 0.90
FEATURE_CHECKS = ("leak", "constant", "coverage", "unknown", "drift")
_FEWEST = 10  # rows of a class below which a high AUC may be chance
_NAMED = 5  # names in a list, more are counted
_ERRORS = 3.0  # how many standard errors rates must differ by
_SHOWN = 5  # warnings before the rest is folded

Health = Mapping[str, Any]
Finding = dict[str, Any]


def find(health: Health) -> list[Finding]:
    """All findings, problems first, the costliest of each first, with what it is about and which check found it."""
    found = [finding for feature in health["features"] for finding in _leaks(feature, health)]
    found += [*_files(health), *_labels(health), *_users(health)]
    for feature in health["features"]:
        found += [*_constants(feature), *_coverage(feature), *_unknown(feature)]
    found += [*_drifts(health), *_empty_tables(health)]
    return sorted(found, key=lambda each: (str(each["severity"]), -each["cost"]))


def split_findings(findings: Sequence[Finding]) -> tuple[list[Finding], list[Finding]]:
    """All problems and the costliest warnings; the other warnings. One warning is not folded alone."""
    problems = [each for each in findings if each["severity"] == "problem"]
    warnings = [each for each in findings if each["severity"] != "problem"]
    kept = len(warnings) if len(warnings) <= _SHOWN + 1 else _SHOWN
    return problems + warnings[:kept], warnings[kept:]


def flags_of(health: Health, feature: str) -> list[str]:
    """Names of the checks that found something about a feature."""
    found = [each["check"] for each in health["findings"] if each["about"] == feature]
    return [check for check in FEATURE_CHECKS if check in found]


def drift_beyond_noise(each: Mapping[str, Any]) -> float:
    """PSI of an input beyond what its splits have by chance."""
    return 0.0 if each["psi"] is None else float(each["psi"] - each["psi_noise"])


def _finding(severity: str, check: str, about: str, message: str, cost: float = 0.0) -> Finding:
    return {"severity": severity, "check": check, "about": about, "message": message, "cost": cost}


def _files(health: Health) -> Iterator[Finding]:
    left_out = health["overview"]["left_out"]
    if left_out:
        files = f"{len(left_out)} files of the log" if len(left_out) > 1 else "a file of the log"
        such_as = ", such as" if len(left_out) > 1 else ":"
        message = f"{files} could not be used{such_as} '{left_out[0]['file']}' ({left_out[0]['reason']})"
        yield _finding("problem", "files", "files left out", message)


def _users(health: Health) -> Iterator[Finding]:
    share, column = (health["overview"].get(name) for name in ("users_in_both", "split_column"))
    if share:
        why = f"as column '{column}' splits rows of the same users"
        message = f"{share:.1%} of the users of test rows have training rows as well, {why}"
        yield _finding("warning", "users", "users in training and test", message, share)


def _labels(health: Health) -> Iterator[Finding]:
    splits = health["overview"]["splits"]
    tasks = {name: task["kind"] for split in splits.values() for name, task in split["tasks"].items()}
    for name, kind in tasks.items():
        for split, each in splits.items():
            if not each["tasks"][name]["observed"]:
                message = f"task '{name}' has no observed label in the {split} split: it can't be judged there"
                yield _finding("problem", "labels", name, message)
        changed = [
            (a, b)
            for a, b in combinations(splits, 2)
            if _differ(splits[a]["tasks"][name], splits[b]["tasks"][name], kind)
        ]
        if changed:
            rates = [
                f"{splits[split]['tasks'][name]['rate']:.3g} in {split}"
                for split in splits
                if split in sum(changed, ())
            ]
            message = f"the rate of '{name}' changes more than {RATE_CHANGE:g} times between splits: {', '.join(rates)}"
            told = sorted(splits[split]["tasks"][name]["rate"] for split in sum(changed, ()))
            yield _finding("warning", "rate", name, message, 1 - told[0] / told[-1] if told[-1] > 0 else 0.0)


def _differ(one: Health, other: Health, kind: str) -> bool:
    """Whether one rate is more than `RATE_CHANGE` times the other and, of a binary task, not by chance."""
    if not one["observed"] or not other["observed"]:
        return False
    low, high = sorted((each["rate"], each["observed"]) for each in (one, other))
    if low[0] < 0 or high[0] <= RATE_CHANGE * low[0]:
        return False
    share = (low[0] * low[1] + high[0] * high[1]) / (low[1] + high[1])
    error = (share * (1 - share) * (1 / low[1] + 1 / high[1])) ** 0.5 if kind == "binary" else 0.0
    return bool(high[0] - low[0] > _ERRORS * error)


def _leaks(feature: Health, health: Health) -> Iterator[Finding]:
    labels = health["overview"]["splits"]["validation"]["tasks"]
    for each in feature["inputs"]:
        for task, auc in each["auc"].items():
            if auc is not None and auc > LEAK_AUC and _enough(labels[task]):
                columns = _listed("column", feature["columns"])
                message = (
                    f"feature '{feature['name']}' ({columns}) alone predicts task '{task}' with an AUC of {auc:.3f}"
                    f"{_by(feature, each)}: does it know what happens after the request?"
                )
                yield _finding("problem", "leak", feature["name"], message)


def _enough(task: Health) -> bool:
    if task["kind"] != "binary":
        return bool(task["observed"] >= 2 * _FEWEST)
    positives = task["rate"] * task["observed"]
    return bool(min(positives, task["observed"] - positives) >= _FEWEST)


def _constants(feature: Health) -> Iterator[Finding]:
    constant = [each["name"] for each in feature["inputs"] if each["constant"]]
    if constant:
        inputs = "" if constant == [feature["name"]] else f" ({_listed('input', constant)})"
        message = f"feature '{feature['name']}'{inputs} is the same in all training rows: nothing can be learnt from it"
        yield _finding("warning", "constant", feature["name"], message)


def _coverage(feature: Health) -> Iterator[Finding]:
    for each in feature["inputs"]:
        low = [
            f"{share:.1%} of the {split} rows"
            for split, share in each["coverage"].items()
            if share is not None and share < LEAST_COVERAGE
        ]
        if low:
            message = f"feature '{feature['name']}' has a value in only {' and '.join(low)}{_by(feature, each)}"
            train, test = (each["coverage"][split] for split in ("train", "test"))
            lost = 0.0 if train is None or test is None else max(0.0, train - test)
            yield _finding("warning", "coverage", feature["name"], message, lost * importance(feature))
            return


def _unknown(feature: Health) -> Iterator[Finding]:
    share = feature["unknown"]["test"]
    if share is not None and share > UNKNOWN:
        before = feature["unknown"]["train"]
        known = "" if before is None else f" (in training {before:.1%})"
        message = (
            f"{share:.1%} of the ids of feature '{feature['name']}' in test rows have no table row of their own{known}"
        )
        yield _finding("warning", "unknown", feature["name"], message, cost_of_unknown(feature))


def _drifts(health: Health) -> Iterator[Finding]:
    features = [feature for feature in health["features"] if feature["inputs"]]
    worst = [max(each["inputs"], key=partial(_order_of_drift, each)) for each in features]
    drifted = [pair for pair in zip(features, worst, strict=True) if drift_beyond_noise(pair[1]) > STRONG_DRIFT]
    for feature, each in sorted(drifted, key=lambda pair: -pair[1]["psi"]):  # of equal cost, the stronger first
        how = f"PSI {each['psi']:.2f}{_by(feature, each)}: {describe_move(each)}"
        how += "; a count of all of the past grows with any log (`window_days`)" if _is_total(feature, each) else ""
        message = f"feature '{feature['name']}' drifts strongly, {how}"
        yield _finding("warning", "drift", feature["name"], message, cost_of_drift(feature, each))


def _order_of_drift(feature: Health, each: Mapping[str, Any]) -> tuple[bool, float]:
    """Of strong drifts one that means something comes first, then the strongest."""
    drift = drift_beyond_noise(each)
    return drift > STRONG_DRIFT and not _is_total(feature, each), drift


def _is_total(feature: Health, each: Mapping[str, Any]) -> bool:
    """Whether an input counts all of the past, so that it grows as the log does."""
    return feature["kind"] == "counter" and each["name"].removeprefix(f"{feature['name']}_") in ("positives", "rows")


def describe_move(each: Mapping[str, Any]) -> str:
    """The bin of an input whose share of the rows has changed most, in words."""
    most = max(each["bins"], key=lambda part: abs(part["test"] - part["train"]))
    words = {"missing": "without a value", "unknown": "of unknown ids", "all others": "of all less frequent ids"}
    what = f"of id '{most['bin']}'" if each["table"] else f"of values {most['bin']} (standardised)"
    return f"the share {words.get(most['bin'], what)} goes from {most['train']:.1%} to {most['test']:.1%}"


def _empty_tables(health: Health) -> Iterator[Finding]:
    for table in health["tables"]:
        if table["never_seen"] > NEVER_SEEN:
            advice = "fewer `buckets` would do" if table["hashed"] else "fewer `oov_buckets` would do"
            message = (
                f"table '{table['name']}': training looks up {table['rows_seen']:,} of its {table['rows']:,} rows, "
                f"{table['never_seen']:.1%} are never seen; {advice}"
            )
            yield _finding("warning", "empty table", table["name"], message)


def _by(feature: Health, each: Mapping[str, Any]) -> str:
    return "" if each["name"] == feature["name"] else f", by its input '{each['name']}'"


def _listed(word: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{word}{'s' * (len(names) > 1)} {', '.join(map(repr, names[:_NAMED]))}{more}"
