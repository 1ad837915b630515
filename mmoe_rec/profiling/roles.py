"""What the other columns describe, and which of them can't have been known at the request."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import pyarrow as pa

from mmoe_rec.profiling.meaning import STEADY, Meaning
from mmoe_rec.profiling.profile import HALF, Column, auc_alone, tells_it
from mmoe_rec.profiling.words import BEFORE, LABELS, OUTCOMES, PLACEMENT, TIME, begins, has
from mmoe_rec.settings.columns import Role

LEAK, SUSPECT = 0.93, 0.8
"""AUC of a column alone from which it is taken for what became known later, or may be."""
LEAK_OF_TABLE = 0.985
"""The same in a plain table, whose columns are all that is known."""
_CONSTANT = 0.001
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
            role = _role_in_log(meaning, each, changes, aucs) or _role_in_doubt(meaning, each, changes, aucs)
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


def _role_in_table(meaning: Meaning, each: Column, of_candidate: float, aucs: Aucs) -> Role | None:
    best, task = aucs.best(each)
    if each.kind == "time" and "time" not in meaning.keys:
        meaning.left_out[each.name] = "a time in a table that has no time of requests"
        return None
    if best > LEAK_OF_TABLE:
        meaning.leave_out(each.name, f"it tells {task} too well to be known before it (AUC {best:.3f} alone)")
        return None
    if after := aucs.comes_after(each):
        meaning.leave_out(each.name, _AFTER.format(after))
        return None
    if begins(each.name, OUTCOMES) and not has(each.name, BEFORE):
        meaning.checks[each.name] = f"by its name it may be known only after {task or 'the label'}"
    is_placement = has(each.name, PLACEMENT) and of_candidate > STEADY
    return "placement" if is_placement else "candidate"


def _role_in_log(  # noqa: PLR0911 - as above
    meaning: Meaning, each: Column, changes: tuple[float, float, float], aucs: Aucs
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
    if (has(each.name, PLACEMENT) or _is_rank(meaning, each)) and aucs.best(each)[0] <= LEAK:
        why = "taken for where a candidate was shown: it teaches, and is absent in serving"
        meaning.checks[each.name] = why
        return "placement"
    return None


def _role_in_doubt(meaning: Meaning, each: Column, changes: tuple[float, float, float], aucs: Aucs) -> Role | None:
    """Of a column that differs from row to row: known before the request, or what happened then?"""
    best, task = aucs.best(each)
    if begins(each.name, OUTCOMES) and not has(each.name, BEFORE):
        meaning.leave_out(each.name, "by its name it may be known only after the request")
    elif best > LEAK:
        meaning.leave_out(each.name, f"it tells {task} too well to be known before it (AUC {best:.2f} alone)")
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


def _is_rank(meaning: Meaning, each: Column) -> bool:
    """Whether a column numbers the rows of each list."""
    starts = each.kind == "integer" and each.low in (0, 1) and not each.binary and not each.nulls
    return starts and bool(meaning.list_keys) and meaning.profile.numbers_rows(meaning.list_keys, each.name)


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
    """How well each column alone tells each binary task; read when it is asked for."""

    def __init__(self, meaning: Meaning) -> None:
        self._meaning = meaning

    def best(self, each: Column) -> tuple[float, str]:
        """The highest AUC of a column, and its task; 0 where there is none."""
        known = {task: auc for task, auc in self._found.get(each.name, {}).items() if not math.isnan(auc)}
        task = max(known, key=lambda name: (known[name], name), default="")
        return known.get(task, 0.0), task

    def comes_after(self, each: Column) -> str | None:
        """The task in whose positive rows alone a column has a value that is not its usual one."""
        if each.name not in self._found:
            return None
        rows, labels, _ = self._sample
        return next((task for task, its in labels.items() if tells_it(rows.column(each.name), its)), None)

    @cached_property
    def _sample(self) -> tuple[pa.Table, dict[str, np.ndarray], list[str]]:
        """Rows, the labels of each task, (N,) NaN where unobserved, and the columns in question."""
        meaning = self._meaning
        tasks = [each for each in meaning.tasks if each.kind == "binary"]
        names = [each.name for each in meaning.free() if each.kind != "vector"]
        rows = meaning.profile.sample(meaning.list_keys, [*names, *(each.column for each in tasks)])
        labels = {each.column: rows.column(each.column).cast(pa.float64()).to_numpy() for each in tasks}
        for each in tasks:
            if each.observed_when is not None:
                seen = labels[each.observed_when[0]] == 1
                labels[each.column] = np.where(seen, labels[each.column], np.nan)
        return rows, labels, names

    @cached_property
    def _found(self) -> dict[str, dict[str, float]]:
        rows, labels, names = self._sample
        half = rows.column(HALF).to_numpy().astype(bool)
        return {name: {task: auc_alone(rows.column(name), its, half) for task, its in labels.items()} for name in names}
