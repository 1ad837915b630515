"""What the other columns describe, and which of them can't have been known at the request."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import pyarrow as pa

from mmoe_rec.profiling.meaning import STEADY, Meaning, Purpose
from mmoe_rec.profiling.profile import HALF, Column, auc_alone, codes_of, keys_of, tells_it
from mmoe_rec.profiling.words import BEFORE, LABELS, OUTCOMES, PLACEMENT, TIME, begins, has
from mmoe_rec.settings.log_columns import Role

LEAK, SUSPECT = 0.93, 0.8
"""AUC of a column alone from which it is taken for what became known later, or may be."""
LEAK_OF_TABLE = 0.985
"""The same in a plain table, whose columns are all that is known."""
_CONSTANT = 0.001
_MANY_USERS, _FEWEST_KEYS = 50, 10
_TOO_WELL = "it predicts {} too well to be known beforehand (AUC {:.3f} alone)"
_AFTER = "it says something only where {} is 1, so it is taken for what is known then"


def find_roles(meaning: Meaning) -> None:
    """Fills in `roles` and `left_out`."""
    keys, profile = meaning.keys, meaning.profile
    meaning.roles["placement"] += dict.fromkeys(meaning.corrections.get("placement", ()))
    names = [each.name for each in meaning.free()]
    unknown = dict.fromkeys(names, math.nan)
    of_request = of_user = of_candidate = unknown
    if names and meaning.rows_per_request > 1.05:
        of_request = profile.changes(meaning.list_keys, names)
    if names and "user" in keys:
        of_user = profile.changes([keys["user"]], names, meaning.time, at_once=True)
    if names and "candidate" in keys:
        of_candidate = profile.changes([keys["candidate"]], names, meaning.time)
    aucs = Aucs(meaning)
    for each in meaning.free():
        changes = of_request[each.name], of_user[each.name], of_candidate[each.name]
        role = None
        if why := _why_later(meaning, each) or _why_growing(meaning, each):
            meaning.left_out[each.name] = why
            if each.is_time and not each.nulls:
                meaning.checks[each.name] = why  # such as the day of a journey that is searched for
        elif each.kind != "number" and profile.is_unique(each.name):
            meaning.leave_out(each.name, "it differs in each row, so nothing is learnt of it")
        elif meaning.is_plain:
            role = _role_in_table(meaning, each, changes[2], aucs)
        else:
            role = _role_of(meaning, each, changes, aucs)
        if role is not None:
            meaning.roles[role].append(each.name)
        is_number = each.kind in ("integer", "number") and not each.binary
        if (
            role in ("user", "candidate")
            and is_number
            and begins(each.name, LABELS + OUTCOMES)
            and not meaning.is_plain
        ):
            why = "if it sums up what happened in these very rows, it tells what comes: as of when is it?"
            meaning.checks.setdefault(each.name, why)


def _role_of(meaning: Meaning, each: Column, changes: tuple[float, float, float], aucs: "Aucs") -> Role | None:
    """Find the role of a column of a log with users or requests. Leaves the column out if it is nearly a label."""
    role = _role_in_log(meaning, each, changes, aucs)
    if role is None:
        return _role_in_doubt(meaning, each, changes, aucs)
    whole: list[Purpose] = ["user"] if changes[1] <= 4 * STEADY else ["request"] if changes[0] <= _CONSTANT else []
    if why := aucs.find_leak(each, [*whole, "candidate"] if changes[2] <= STEADY else whole):
        meaning.leave_out(each.name, why)
    return None if why else role


def _role_in_table(meaning: Meaning, each: Column, of_candidate: float, aucs: "Aucs") -> Role | None:
    best, task = aucs.best(each)
    if each.kind == "time" and "time" not in meaning.keys:
        meaning.left_out[each.name] = "a time in a table that has no time of requests"
        return None
    if best > LEAK_OF_TABLE:
        meaning.leave_out(each.name, _TOO_WELL.format(task, best))
        return None
    if after := aucs.comes_after(each):
        meaning.leave_out(each.name, _AFTER.format(after))
        return None
    if begins(each.name, OUTCOMES) and not has(each.name, BEFORE):
        meaning.checks[each.name] = f"by its name it may be known only after {task or 'the label'}"
    is_placement = has(each.name, PLACEMENT) and of_candidate > STEADY
    return "placement" if is_placement else "candidate"


def _role_in_log(  # noqa: PLR0911 - as above
    meaning: Meaning, each: Column, changes: tuple[float, float, float], aucs: "Aucs"
) -> Role | None:
    """What the column changes with, None where neither user nor candidate nor request determines it, or it may be an
    outcome."""
    of_request, of_user, of_candidate = changes
    if of_request <= _CONSTANT:
        if of_user <= 4 * STEADY and not (each.is_key and of_user > 0 and each.distinct > meaning.distinct("user")):
            if of_user > STEADY:
                why = "it changes now and then for a user: does it describe the user, or the request?"
                meaning.checks[each.name] = why
            return "user"
        if begins(each.name, OUTCOMES) and not has(each.name, BEFORE):
            return None
        if math.isnan(of_user) and "user" in meaning.keys:
            meaning.checks[each.name] = "users have one request each, so it may describe the user as well"
        return "context"
    if math.isnan(of_request) and of_user <= STEADY and not of_candidate < of_user:
        return "user"
    if of_candidate <= STEADY:
        return "candidate"
    if has(each.name, PLACEMENT) and aucs.best(each)[0] <= LEAK:
        why = "taken for where a candidate was shown: it teaches, and is absent in serving"
        meaning.checks[each.name] = why
        return "placement"
    return None


def _role_in_doubt(meaning: Meaning, each: Column, changes: tuple[float, float, float], aucs: "Aucs") -> Role | None:
    """Of a column that differs from row to row: known before the request, or what happened then?"""
    best, task = aucs.best(each)
    if begins(each.name, OUTCOMES) and not has(each.name, BEFORE):
        meaning.leave_out(each.name, "by its name it may be known only after the request")
    elif best > LEAK:
        meaning.leave_out(each.name, _TOO_WELL.format(task, best))
    elif after := aucs.comes_after(each):
        meaning.leave_out(each.name, _AFTER.format(after))
    elif each.binary and begins(each.name, LABELS) and not has(each.name, BEFORE):
        meaning.leave_out(each.name, "it looks like a label: --task makes it one")
    elif math.isnan(changes[0]):
        meaning.checks[each.name] = "does it describe the request, and is it known before it?"
        return "context"
    else:
        seen = f"; alone it ranks {task} with an AUC of {best:.2f}" if best > SUSPECT else ""
        why = f"it differs from request to request of a candidate: is it known before?{seen}"
        meaning.checks[each.name] = why
        return "candidate"
    return None


def _why_later(meaning: Meaning, each: Column) -> str | None:
    """Why a time is that of an outcome, None where it is not."""
    time = meaning.keys.get("time")
    if time is None or not each.is_time or (each.kind != "time" and not has(each.name, TIME)):
        return None
    later = meaning.profile.share(f"{each.microseconds} > {meaning.time}", f"{each.sql} IS NOT NULL")
    return "it lies after the request" if later > 0.5 else None


def _why_growing(meaning: Meaning, each: Column) -> str | None:
    """Why a number, or a date as text, only tells when the row was made: it never falls, from request to request."""
    ordered = each.kind in ("integer", "number", "text") and "time" in meaning.keys
    if not ordered or each.nulls or each.distinct < 5 or each.binary:
        return None
    before = "lag(high) OVER (ORDER BY o)"
    rows = f"SELECT {meaning.time} AS o, min({each.sql}) AS low, max({each.sql}) AS high FROM log GROUP BY ALL"
    steps = f"SELECT low < {before} OR low < high AS fell, low <> {before} OR low < high AS moved FROM ({rows})"
    fallen, moved = meaning.profile.row(f"SELECT count(*) FILTER (fell), count(*) FILTER (moved) FROM ({steps})")
    grows = moved and fallen <= 0.001 * moved
    return "it grows with time, so later rows have values that training has not seen" if grows else None


class Aucs:
    """How well each column alone tells each task: a binary label, or whether a number lies above its median."""

    def __init__(self, meaning: Meaning) -> None:
        self._meaning = meaning
        self._codes = lru_cache(1)(lambda name: codes_of(self._sample[0].column(name)))  # asked for in turn

    def best(self, each: Column) -> tuple[float, str]:
        """Return the highest AUC of a column and its task, 0 if there is none."""
        rows, tasks = self._sample
        codes, half = self._codes(each.name), rows.column(HALF).to_numpy().astype(bool)
        found = {task: float(np.nan_to_num(auc_alone(codes, its, half)[0])) for task, its in tasks.items()}
        task = max(found, key=lambda name: (found[name], name), default="")
        return found.get(task, 0.0), task

    def comes_after(self, each: Column) -> str | None:
        """Return the task in whose positive rows alone a column has a value that is not its usual one."""
        codes, (_, tasks) = self._codes(each.name), self._sample
        return next((task for task, its in tasks.items() if tells_it(codes, its, (its == 1).mean())), None)

    def find_leak(self, each: Column, purposes: Sequence[Purpose]) -> str | None:
        """Look for labels in a column that is constant within a request, a user or a candidate.

        Among single rows such a leak is weak: a request's order total is positive beside all its candidates, although
        only one was ordered. So the rows of a key are one, with their mean label, and with whether any of them has the
        label. Keys of many rows have it more often, so a column has to predict that better than their number does.

        Returns:
            Why the column is nearly a label. Otherwise None, and a column that predicts a label well gets a check.
        """
        codes, (_, tasks) = self._codes(each.name), self._sample
        for purpose, (task, labels) in product(purposes, tasks.items()):
            value, learned, number, mean = _merge_rows(*self._keys[purpose], codes, labels)
            found = [(task, *auc_alone(value, mean, learned), LEAK, SUSPECT)]
            some, what = (mean > 0).astype(float), f"{purpose}s with {task} = 1"
            auc, precision = auc_alone(value, some, learned, _FEWEST_KEYS)
            by_number, _ = auc_alone(codes_of(pa.chunked_array([number])), some, learned)
            if auc > LEAK and 1 - auc < 0.5 * (1 - np.fmax(by_number, 0.5)):
                found.append((what, auc, precision, LEAK_OF_TABLE, LEAK))
            for subject, auc, precision, sure, likely in found:
                if auc > sure and precision > 0.5:
                    return _TOO_WELL.format(subject, auc)
                if auc > likely:
                    why = f"is it known before? alone it predicts {subject} with an AUC of {auc:.3f}"
                    self._meaning.checks.setdefault(each.name, why)
            by_chance = np.fmax(1 - (1 - np.nanmean(labels)) ** number, some.mean())
            if tells_it(value, some, np.where(by_chance < 0.5, by_chance, 1)):
                return f"it has an unusual value only for {what}, so it may be known only after them"
        return None

    @cached_property
    def _sample(self) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """Rows, and the labels of each task, (N,) 0 or 1, NaN where unobserved."""
        meaning = self._meaning
        names = [each.name for each in meaning.free()] + [each.column for each in meaning.tasks]
        rows = meaning.profile.sample(meaning.list_keys, list(dict.fromkeys([*names, *meaning.keys.values()])))
        found: dict[str, np.ndarray] = {}
        for task in meaning.tasks:
            labels = rows.column(task.column).cast(pa.float64(), safe=False).to_numpy()
            if task.kind != "binary":
                labels = np.where(np.isnan(labels), np.nan, labels > np.nanmedian(labels))
            if task.observed_when is not None:
                seen = rows.column(task.observed_when[0]).cast(pa.float64()).to_numpy() == 1
                labels = np.where(seen, labels, np.nan)
            if not np.isnan(labels).all():
                found[task.column if task.kind == "binary" else f"{task.column} above its median"] = labels
        return rows, found

    @cached_property
    def _keys(self) -> dict[Purpose, tuple[np.ndarray, np.ndarray]]:
        """(N,) int64 the key of each row, and (N,) bool its half of the keys. Requests of many users are halved by
        user, so that a name of a user or of a session is no label."""
        meaning, (rows, _) = self._meaning, self._sample
        found: dict[Purpose, np.ndarray] = {}
        for purpose in ("user", "candidate", "request"):
            codes, own = np.zeros(rows.num_rows, np.int64), meaning.keys.get(purpose)
            for name in meaning.list_keys if purpose == "request" else filter(None, [own]):
                column = keys_of(rows.column(name))
                codes = np.unique(codes * (column.max(initial=0) + 1) + column, return_inverse=True)[1]
            found[purpose] = codes
        of_request = found["user"] if meaning.distinct("user") >= _MANY_USERS else found["request"]
        return {key: (codes, (of_request if key == "request" else codes) % 2 == 0) for key, codes in found.items()}


def _merge_rows(keys: np.ndarray, half: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Make one row of the labelled rows of one key and one code.

    Returns:
        For each, its code, its half, the number of rows and their mean label.
    """
    seen = ~np.isnan(labels)
    keys, codes, half, labels = keys[seen], codes[seen], half[seen], labels[seen]
    pairs = keys * (codes.max(initial=0) + 1) + codes
    _, first, of_pair = np.unique(pairs, return_index=True, return_inverse=True)
    number = np.bincount(of_pair)
    return codes[first], half[first], number, np.bincount(of_pair, labels) / number
