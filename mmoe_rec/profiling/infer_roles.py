"""What the other columns describe, and which of them can't have been known at the request."""

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import pyarrow as pa

from mmoe_rec.profiling.inferred_schema import MAX_CHANGE_RATE, InferredSchema, KeyName
from mmoe_rec.profiling.name_hints import (
    LABEL_STEMS,
    OUTCOME_STEMS,
    PAST_WORDS,
    PLACEMENT_WORDS,
    TIME_WORDS,
    has_stem,
    has_word,
)
from mmoe_rec.profiling.profile import (
    HALF_COLUMN,
    Column,
    factorize,
    factorize_binned,
    implies_positive,
    target_encoding_auc,
)
from mmoe_rec.settings.log_columns import Role

LEAK_AUC, SUSPICIOUS_AUC = 0.93, 0.8
"""AUC of a column alone from which it is taken for what became known later, or may be."""
PLAIN_TABLE_LEAK_AUC = 0.985
"""The same in a plain table, whose columns are all that is known."""
_CONSTANT = 0.001
_MANY_USERS, _FEWEST_KEYS = 50, 10
_TOO_WELL = "it predicts {} too well to be known beforehand (AUC {:.3f} alone)"
_AFTER = "it says something only where {} is 1, so it is taken for what is known then"


def infer_roles(schema: InferredSchema) -> None:
    """Fills in `roles` and `left_out`."""
    keys, profile = schema.keys, schema.profile
    schema.roles["placement"] += dict.fromkeys(schema.corrections.get("placement", ()))
    names = [each.name for each in schema.unassigned()]
    unknown = dict.fromkeys(names, math.nan)
    of_request = of_user = of_candidate = unknown
    if names and schema.rows_per_request > 1.05:
        of_request = profile.change_rates(schema.request_keys, names)
    if names and "user" in keys:
        of_user = profile.change_rates([keys["user"]], names, schema.time_sql, merge_ties=True)
    if names and "candidate" in keys:
        of_candidate = profile.change_rates([keys["candidate"]], names, schema.time_sql)
    aucs = LeakDetector(schema)
    for each in schema.unassigned():
        change_rates = of_request[each.name], of_user[each.name], of_candidate[each.name]
        role = None
        if why := _why_later(schema, each) or _why_growing(schema, each):
            schema.left_out[each.name] = why
            if each.may_be_time and not each.nulls:
                schema.checks[each.name] = why  # such as the day of a journey that is searched for
        elif each.kind != "number" and profile.is_unique(each.name):
            schema.leave_out(each.name, "it differs in each row, so nothing is learnt of it")
        elif schema.is_plain_table:
            role = _role_in_table(schema, each, change_rates[2], aucs)
        else:
            role = _role_of(schema, each, change_rates, aucs)
        if role is not None:
            schema.roles[role].append(each.name)
        is_number = each.kind in ("integer", "number") and not each.is_binary
        if (
            role in ("user", "candidate")
            and is_number
            and has_stem(each.name, LABEL_STEMS + OUTCOME_STEMS)
            and not schema.is_plain_table
        ):
            why = "if it sums up what happened in these very rows, it tells what comes: as of when is it?"
            schema.checks.setdefault(each.name, why)


def _role_of(
    schema: InferredSchema, each: Column, change_rates: tuple[float, float, float], aucs: "LeakDetector"
) -> Role | None:
    """Find the role of a column of a log with users or requests. Leaves the column out if it is nearly a label."""
    role = _role_in_log(schema, each, change_rates, aucs)
    if role is None:
        return _role_in_doubt(schema, each, change_rates, aucs)
    whole: list[KeyName] = (
        ["user"] if change_rates[1] <= 4 * MAX_CHANGE_RATE else ["request"] if change_rates[0] <= _CONSTANT else []
    )
    if why := aucs.find_leak(each, [*whole, "candidate"] if change_rates[2] <= MAX_CHANGE_RATE else whole):
        schema.leave_out(each.name, why)
    return None if why else role


def _role_in_table(schema: InferredSchema, each: Column, of_candidate: float, aucs: "LeakDetector") -> Role | None:
    best_auc, task = aucs.best_auc(each)
    if each.kind == "time" and "time" not in schema.keys:
        schema.left_out[each.name] = "a time in a table that has no time of requests"
        return None
    if best_auc > PLAIN_TABLE_LEAK_AUC:
        schema.leave_out(each.name, _TOO_WELL.format(task, best_auc))
        return None
    if after := aucs.implied_task(each):
        schema.leave_out(each.name, _AFTER.format(after))
        return None
    if has_stem(each.name, OUTCOME_STEMS) and not has_word(each.name, PAST_WORDS):
        schema.checks[each.name] = f"by its name it may be known only after {task or 'the label'}"
    is_placement = has_word(each.name, PLACEMENT_WORDS) and of_candidate > MAX_CHANGE_RATE
    return "placement" if is_placement else "candidate"


def _role_in_log(  # noqa: PLR0911 - as above
    schema: InferredSchema, each: Column, change_rates: tuple[float, float, float], aucs: "LeakDetector"
) -> Role | None:
    """What the column changes with, None where neither user nor candidate nor request determines it, or it may be an
    outcome."""
    of_request, of_user, of_candidate = change_rates
    if of_request <= _CONSTANT:
        if of_user <= 4 * MAX_CHANGE_RATE and not (
            each.can_be_key and of_user > 0 and each.distinct > schema.distinct("user")
        ):
            if of_user > MAX_CHANGE_RATE:
                why = "it changes now and then for a user: does it describe the user, or the request?"
                schema.checks[each.name] = why
            return "user"
        if has_stem(each.name, OUTCOME_STEMS) and not has_word(each.name, PAST_WORDS):
            return None
        if math.isnan(of_user) and "user" in schema.keys:
            schema.checks[each.name] = "users have one request each, so it may describe the user as well"
        return "context"
    if math.isnan(of_request) and of_user <= MAX_CHANGE_RATE and not of_candidate < of_user:
        return "user"
    if of_candidate <= MAX_CHANGE_RATE:
        return "candidate"
    if has_word(each.name, PLACEMENT_WORDS) and aucs.best_auc(each)[0] <= LEAK_AUC:
        why = "taken for where a candidate was shown: it teaches, and is absent in serving"
        schema.checks[each.name] = why
        return "placement"
    return None


def _role_in_doubt(
    schema: InferredSchema, each: Column, change_rates: tuple[float, float, float], aucs: "LeakDetector"
) -> Role | None:
    """Of a column that differs from row to row: known before the request, or what happened then?"""
    best_auc, task = aucs.best_auc(each)
    if has_stem(each.name, OUTCOME_STEMS) and not has_word(each.name, PAST_WORDS):
        schema.leave_out(each.name, "by its name it may be known only after the request")
    elif best_auc > LEAK_AUC:
        schema.leave_out(each.name, _TOO_WELL.format(task, best_auc))
    elif after := aucs.implied_task(each):
        schema.leave_out(each.name, _AFTER.format(after))
    elif each.is_binary and has_stem(each.name, LABEL_STEMS) and not has_word(each.name, PAST_WORDS):
        schema.leave_out(each.name, "it looks like a label: --task makes it one")
    elif math.isnan(change_rates[0]):
        schema.checks[each.name] = "does it describe the request, and is it known before it?"
        return "context"
    else:
        seen = f"; alone it ranks {task} with an AUC of {best_auc:.2f}" if best_auc > SUSPICIOUS_AUC else ""
        why = f"it differs from request to request of a candidate: is it known before?{seen}"
        schema.checks[each.name] = why
        return "candidate"
    return None


def _why_later(schema: InferredSchema, each: Column) -> str | None:
    """Why a time is that of an outcome, None where it is not."""
    time = schema.keys.get("time")
    if time is None or not each.may_be_time or (each.kind != "time" and not has_word(each.name, TIME_WORDS)):
        return None
    later = schema.profile.fraction(f"{each.time_sql} > {schema.time_sql}", f"{each.sql} IS NOT NULL")
    return "it lies after the request" if later > 0.5 else None


def _why_growing(schema: InferredSchema, each: Column) -> str | None:
    """Why a number, or a date as text, only tells when the row was made: it never falls, from request to request."""
    ordered = each.kind in ("integer", "number", "text") and "time" in schema.keys
    if not ordered or each.nulls or each.distinct < 5 or each.is_binary:
        return None
    before = "lag(high) OVER (ORDER BY o)"
    rows = f"SELECT {schema.time_sql} AS o, min({each.sql}) AS low, max({each.sql}) AS high FROM log GROUP BY ALL"
    steps = f"SELECT low < {before} OR low < high AS fell, low <> {before} OR low < high AS moved FROM ({rows})"
    fallen, moved = schema.profile.row(f"SELECT count(*) FILTER (fell), count(*) FILTER (moved) FROM ({steps})")
    grows = moved and fallen <= 0.001 * moved
    return "it grows with time, so later rows have values that training has not seen" if grows else None


class LeakDetector:
    """How well each column alone tells each task: a binary label, or whether a number lies above its median."""

    def __init__(self, schema: InferredSchema) -> None:
        self._meaning = schema
        self._codes = lru_cache(1)(lambda name: factorize_binned(self._sample[0].column(name)))  # asked for in turn

    def best_auc(self, each: Column) -> tuple[float, str]:
        """Return the highest AUC of a column and its task, 0 if there is none."""
        rows, tasks = self._sample
        codes, half = self._codes(each.name), rows.column(HALF_COLUMN).to_numpy().astype(bool)
        found = {task: float(np.nan_to_num(target_encoding_auc(codes, its, half)[0])) for task, its in tasks.items()}
        task = max(found, key=lambda name: (found[name], name), default="")
        return found.get(task, 0.0), task

    def implied_task(self, each: Column) -> str | None:
        """Return the task in whose positive rows alone a column has a value that is not its usual one."""
        codes, (_, tasks) = self._codes(each.name), self._sample
        return next((task for task, its in tasks.items() if implies_positive(codes, its, (its == 1).mean())), None)

    def find_leak(self, each: Column, key_names: Sequence[KeyName]) -> str | None:
        """Look for labels in a column that is constant within a request, a user or a candidate.

        Among single rows such a leak is weak: a request's order total is positive beside all its candidates, although
        only one was ordered. So the rows of a key are one, with their mean label, and with whether any of them has the
        label. Keys of many rows have it more often, so a column has to predict that better than their number does.

        Returns:
            Why the column is nearly a label. Otherwise None, and a column that predicts a label well gets a check.
        """
        codes, (_, tasks) = self._codes(each.name), self._sample
        for key_name, (task, labels) in product(key_names, tasks.items()):
            value, learned, number, mean = _merge_rows(*self._keys[key_name], codes, labels)
            found = [(task, *target_encoding_auc(value, mean, learned), LEAK_AUC, SUSPICIOUS_AUC)]
            some, what = (mean > 0).astype(float), f"{key_name}s with {task} = 1"
            auc, precision = target_encoding_auc(value, some, learned, _FEWEST_KEYS)
            by_number, _ = target_encoding_auc(factorize_binned(pa.chunked_array([number])), some, learned)
            if auc > LEAK_AUC and 1 - auc < 0.5 * (1 - np.fmax(by_number, 0.5)):
                found.append((what, auc, precision, PLAIN_TABLE_LEAK_AUC, LEAK_AUC))
            for subject, auc, precision, sure, likely in found:
                if auc > sure and precision > 0.5:
                    return _TOO_WELL.format(subject, auc)
                if auc > likely:
                    why = f"is it known before? alone it predicts {subject} with an AUC of {auc:.3f}"
                    self._meaning.checks.setdefault(each.name, why)
            by_chance = np.fmax(1 - (1 - np.nanmean(labels)) ** number, some.mean())
            if implies_positive(value, some, np.where(by_chance < 0.5, by_chance, 1)):
                return f"it has an unusual value only for {what}, so it may be known only after them"
        return None

    @cached_property
    def _sample(self) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """Rows, and the labels of each task, (N,) 0 or 1, NaN where unobserved."""
        schema = self._meaning
        names = [each.name for each in schema.unassigned()] + [each.column for each in schema.tasks]
        rows = schema.profile.sample(schema.request_keys, list(dict.fromkeys([*names, *schema.keys.values()])))
        found: dict[str, np.ndarray] = {}
        for task in schema.tasks:
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
    def _keys(self) -> dict[KeyName, tuple[np.ndarray, np.ndarray]]:
        """(N,) int64 the key of each row, and (N,) bool its half of the keys. Requests of many users are halved by
        user, so that a name of a user or of a session is no label."""
        schema, (rows, _) = self._meaning, self._sample
        found: dict[KeyName, np.ndarray] = {}
        for key_name in ("user", "candidate", "request"):
            codes, own = np.zeros(rows.num_rows, np.int64), schema.keys.get(key_name)
            for name in schema.request_keys if key_name == "request" else filter(None, [own]):
                column = factorize(rows.column(name))
                codes = np.unique(codes * (column.max(initial=0) + 1) + column, return_inverse=True)[1]
            found[key_name] = codes
        of_request = found["user"] if schema.distinct("user") >= _MANY_USERS else found["request"]
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
