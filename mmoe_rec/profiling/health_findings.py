"""Findings about a data set, in words.

A finding is a `problem` if training would be wrong or meaningless, and a `warning` otherwise. Findings are ordered by
cost. If there are many warnings, only the first ones are shown.

The cost estimates the fraction of test predictions that a finding harms, from 0 to 1:

    fraction of the rows affected x weight of the feature in these rows

The weight of a feature is its own ranking power on validation rows: 2 AUC - 1, for the task that it ranks best. An
unknown user or candidate has weight 1, because the model knows nothing of it. Other ids have at least weight `LEAST`,
because unknown ids lower their own AUC. A drift affects the rows of values that were less than half as frequent in
training. A change of a label's rate affects all rows. Wasted space costs 0. The order says nothing of a model's gain.

Many findings carry advice, with the override of the command line that carries it out. `mmoe-rec compare` measures the
gain.
"""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import combinations
from typing import Any

from mmoe_rec.auc import FEWEST
from mmoe_rec.task_kinds import KINDS

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
FEATURE_CHECKS = ("leak", "constant", "coverage", "unknown", "seldom", "drift")
_FEWEST = 10  # rows of a class below which a high AUC may be chance
_NAMED = 5  # names in a list, more are counted
_ERRORS = 3.0  # how many standard errors rates must differ by
_SHOWN = 5  # warnings before the rest is folded

SELDOM_ROWS = 5
"""Training rows below which little is learnt of an id."""
_LEFT_OUT = 0.01  # of training lookups, which a vocabulary leaves out
_WINDOWS = (7, 28, 91)  # days
_PERIODS = 3  # windows that the training rows should hold
_LATER = "train on later rows, and more often (`mmoe-rec refresh`)"

Health = Mapping[str, Any]
Finding = dict[str, Any]
Advice = dict[str, str | None]


def find(health: Health) -> list[Finding]:
    """All findings, problems first, the costliest of each first, with what it is about and which check found it."""
    found = [finding for feature in health["features"] for finding in _leaks(feature, health)]
    found += [*_files(health), *_labels(health), *_users(health), *_rare(health)]
    for feature in health["features"]:
        for check in (_constants, _coverage, _unknown, _seldom):
            found += check(feature, health)
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


def describe(findings: Sequence[Finding]) -> str:
    """Say how many findings there are and which costs most."""
    kinds = Counter(each["severity"] for each in findings)
    told = [f"{kinds[word]} {word}{'s' * (kinds[word] > 1)}" for word in ("problem", "warning") if kinds[word]]
    if not told:
        return "nothing suspicious found"
    lines = [each["override"] for each in findings[0]["advice"] if each["override"]]
    advice = f" (`{lines[0]}`)" if lines else ""
    return f"{' and '.join(told)} found; above all: {findings[0]['message']}{advice}"


def _finding(
    severity: str, check: str, about: str, message: str, cost: float = 0.0, advice: Sequence[Advice] = ()
) -> Finding:
    found = {"severity": severity, "check": check, "about": about, "message": message}
    return found | {"cost": cost, "advice": list(advice)}


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
        advice = [_change(f"give all rows of a user the same value of column '{column}'")]
        yield _finding("warning", "users", "users in training and test", message, share, advice)


def _rare(health: Health) -> Iterator[Finding]:
    splits = health["overview"]["splits"]
    for name, task in splits["test"]["tasks"].items():
        for split in ("test", "validation"):
            observed, rate = (splits[split]["tasks"][name][key] for key in ("observed", "rate"))
            if not KINDS[task["kind"]].is_binary or not observed:
                continue
            rarer = round(min(rate, 1 - rate) * observed)
            needed = FEWEST if split == "test" else 2 * FEWEST  # half of the validation users select, half judge
            if rarer < needed:
                message = f"task '{name}' has {rarer} rows of its rarer label in {split} rows, and {needed} are needed"
                told = {"test": "no verdict rests on it", "validation": "no state or calibration is chosen well by it"}
                advice = [_change(f"begin the {split} rows earlier, or take a log of more rows")]
                yield _finding("warning", "rare", name, f"{message}: {told[split]}", 1 - rarer / needed, advice)


def _labels(health: Health) -> Iterator[Finding]:
    splits = health["overview"]["splits"]
    tasks = {name: task["kind"] for split in splits.values() for name, task in split["tasks"].items()}
    for name, kind in tasks.items():
        for split, each in splits.items():
            if not each["tasks"][name]["observed"]:
                message = f"task '{name}' has no observed label in the {split} split: it can't be judged there"
                advice = [_change("move the ends of the splits back, so that labels have matured by then")]
                yield _finding("problem", "labels", name, message, advice=advice)
        rated = {split: each["tasks"][name] for split, each in splits.items()}
        pairs = [(one, other) for one, other in combinations(rated, 2) if _differ(rated[one], rated[other], kind)]
        if changed := {split: rated[split]["rate"] for split in rated if split in sum(pairs, ())}:
            rates = ", ".join(f"{rate:.3g} in {split}" for split, rate in changed.items())
            message = f"the rate of '{name}' changes more than {RATE_CHANGE:g} times between splits: {rates}"
            low, high = min(changed.values()), max(changed.values())
            yield _finding("warning", "rate", name, message, 1 - low / high if high > 0 else 0.0)


def _differ(one: Health, other: Health, kind: str) -> bool:
    """Whether one rate is more than `RATE_CHANGE` times the other and, of a binary task, not by chance."""
    if not one["observed"] or not other["observed"]:
        return False
    low, high = sorted((each["rate"], each["observed"]) for each in (one, other))
    if low[0] < 0 or high[0] <= RATE_CHANGE * low[0]:
        return False
    share = (low[0] * low[1] + high[0] * high[1]) / (low[1] + high[1])
    error = (share * (1 - share) * (1 / low[1] + 1 / high[1])) ** 0.5 if KINDS[kind].is_binary else 0.0
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
                advice = [_leave_out(feature, health, ", unless its column is filled before the request")]
                yield _finding("problem", "leak", feature["name"], message, advice=advice)


def _enough(task: Health) -> bool:
    if not KINDS[task["kind"]].is_binary:
        return bool(task["observed"] >= 2 * _FEWEST)
    positives = task["rate"] * task["observed"]
    return bool(min(positives, task["observed"] - positives) >= _FEWEST)


def _constants(feature: Health, health: Health) -> Iterator[Finding]:
    constant = [each["name"] for each in feature["inputs"] if each["constant"]]
    if constant:
        inputs = "" if constant == [feature["name"]] else f" ({_listed('input', constant)})"
        message = f"feature '{feature['name']}'{inputs} is the same in all training rows: nothing can be learnt from it"
        yield _finding("warning", "constant", feature["name"], message, advice=[_leave_out(feature, health)])


def _coverage(feature: Health, health: Health) -> Iterator[Finding]:
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
            advice = [_leave_out(feature, health, ", where `mmoe-rec compare --features` shows no loss")]
            yield _finding("warning", "coverage", feature["name"], message, lost * importance(feature), advice)
            return


def _unknown(feature: Health, health: Health) -> Iterator[Finding]:
    share = feature["unknown"]["test"]
    if share is not None and share > UNKNOWN:
        before = feature["unknown"]["train"]
        known = "" if before is None else f" (in training {before:.1%})"
        message = (
            f"{share:.1%} of the ids of feature '{feature['name']}' in test rows have no table row of their own{known}"
        )
        advice = list(_know_more(feature))
        yield _finding("warning", "unknown", feature["name"], message, cost_of_unknown(feature), advice)


def _seldom(feature: Health, health: Health) -> Iterator[Finding]:
    for each in feature["inputs"]:
        if each["rows_per_id"] is not None and each["rows_per_id"] < SELDOM_ROWS:
            message = (
                f"a known id of feature '{feature['name']}' has {each['rows_per_id']:.1f} training rows on average"
                f"{_by(feature, each)}: hardly anything is learnt of most"
            )
            advice = [_leave_out(feature, health, ", and count by its column instead")]
            if "min_count" in feature["settings"] and feature["settings"]["table"] is None:
                what = "let seldom ids share rows"
                advice.insert(0, _change(what, f"features.{feature['name']}.min_count", SELDOM_ROWS))
            cost = (each["seldom"] or 0.0) * max(importance(feature), LEAST)
            yield _finding("warning", "seldom", feature["name"], message, cost, advice)
            return


def _drifts(health: Health) -> Iterator[Finding]:
    features = [feature for feature in health["features"] if feature["inputs"]]
    worst = [max(each["inputs"], key=partial(_order_of_drift, each)) for each in features]
    drifted = [pair for pair in zip(features, worst, strict=True) if drift_beyond_noise(pair[1]) > STRONG_DRIFT]
    for feature, each in sorted(drifted, key=lambda pair: -pair[1]["psi"]):  # of equal cost, the stronger first
        how = f"PSI {each['psi']:.2f}{_by(feature, each)}: {describe_move(each)}"
        how += "; a count of all of the past grows with any log" if _is_total(feature, each) else ""
        message = f"feature '{feature['name']}' drifts strongly, {how}"
        grows = any(_is_total(feature, part) and drift_beyond_noise(part) > STRONG_DRIFT for part in feature["inputs"])
        advice = [
            _count_over_windows(feature, health) if grows else _change(f"see whether its column changed, or {_LATER}")
        ]
        yield _finding("warning", "drift", feature["name"], message, cost_of_drift(feature, each), advice)


def _order_of_drift(feature: Health, each: Mapping[str, Any]) -> tuple[bool, float]:
    """Of strong drifts one that means something comes first, then the strongest."""
    drift = drift_beyond_noise(each)
    return drift > STRONG_DRIFT and not _is_total(feature, each), drift


def _is_total(feature: Health, each: Mapping[str, Any]) -> bool:
    """Whether an input counts all of the past, so that it grows as the log does."""
    return feature["kind"] == "counter" and each["name"].removeprefix(f"{feature['name']}_") in ("positives", "rows")


def describe_move(each: Mapping[str, Any]) -> str:
    """The bin of an input whose share of the rows has changed most, in words."""
    most = _moved_most(each)
    words = {"missing": "without a value", "unknown": "of unknown ids", "all others": "of all less frequent ids"}
    what = f"of id '{most['bin']}'" if each["table"] else f"of values {most['bin']} (standardised)"
    return f"the share {words.get(most['bin'], what)} goes from {most['train']:.1%} to {most['test']:.1%}"


def _moved_most(each: Mapping[str, Any]) -> Mapping[str, Any]:
    return max(each["bins"], key=lambda part: abs(part["test"] - part["train"]))


def _empty_tables(health: Health) -> Iterator[Finding]:
    for table in health["tables"]:
        if table["never_seen"] > NEVER_SEEN:
            key = "buckets" if table["hashed"] else "oov_buckets"
            message = (
                f"table '{table['name']}': training looks up {table['rows_seen']:,} of its {table['rows']:,} rows, "
                f"{table['never_seen']:.1%} are never seen; fewer `{key}` would do"
            )
            fewer = max(2, 2 * table["rows_seen"]) if table["hashed"] else 1
            advice = [_change("take fewer", f"features.{table['name']}.{key}", fewer)]
            yield _finding("warning", "empty table", table["name"], message, advice=advice)


def _by(feature: Health, each: Mapping[str, Any]) -> str:
    return "" if each["name"] == feature["name"] else f", by its input '{each['name']}'"


def _listed(word: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{word}{'s' * (len(names) > 1)} {', '.join(map(repr, names[:_NAMED]))}{more}"


def _change(what: str, key: str | None = None, value: object = None) -> Advice:
    """Advise a change, with the override that sets `key` to `value`, if there is one."""
    text = "null" if value is None else str(value)
    return {"do": what, "override": None if key is None else f"--{key} {shlex.quote(text)}"}


def _leave_out(feature: Health, health: Health, unless: str = "") -> Advice:
    """Advise to go without a feature, and the features that read its table. unless: how the sentence ends."""
    name = feature["name"]
    readers = [
        each["name"]
        for each in health["features"]
        if each["name"] != name and any(its["table"] == name for its in each["inputs"])
    ]
    of_table = f", and {', '.join(f'`{each}`' for each in readers)}, which read its table" if readers else ""
    override = " ".join(f"--features.{each} null" for each in (name, *readers))
    return {"do": f"leave out `{name}`{of_table}{unless}", "override": override}


def _know_more(feature: Health) -> Iterator[Advice]:
    """Advise a larger vocabulary if ids were left out of it, and later rows."""
    settings, vocabulary = feature["settings"], feature["vocabulary"]
    left_out = vocabulary is not None and vocabulary["distinct"] > vocabulary["known"]
    if left_out and (feature["unknown"]["train"] or 0.0) > _LEFT_OUT:
        is_full = settings.get("max_size") is not None and vocabulary["known"] >= settings["max_size"]
        key, value = ("max_size", None) if is_full else ("min_count", 1)
        owner = settings.get("table") or feature["name"]
        yield _change("give more ids a row of their own", f"features.{owner}.{key}", value)
    yield _change(_LATER)


def _count_over_windows(feature: Health, health: Health) -> Advice:
    """Advise windows for counts of all of the past, which grow."""
    train = health["overview"]["splits"]["train"]
    if train["first_request"] is None:
        return _change(_LATER)
    first, last = (datetime.fromisoformat(train[name]) for name in ("first_request", "last_request"))
    most = (last - first) / timedelta(days=1) / _PERIODS
    windows = ", ".join(f"{each}" for each in _WINDOWS if each <= most) or max(1, int(most))
    return _change("count over windows", f"features.{feature['name']}.window_days", f"[{windows}]")
