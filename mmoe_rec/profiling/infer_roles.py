"""Infer the roles of columns that are neither keys nor labels. Leave out columns unavailable at request time."""

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
"""A column that alone predicts a task with a higher AUC is left out as a label leak, or marked as suspicious."""
PLAIN_TABLE_LEAK_AUC = 0.985
"""LEAK_AUC of a table without users and requests. Without counters, good columns may have a higher AUC."""
_MAX_ERROR_RATE = 0.001
"""Highest change rate, within requests, of a column that is constant in a request."""
_MANY_USERS, _MIN_KEYS = 50, 10
_LEAK_REASON = "it predicts {} too well to be known beforehand (AUC {:.3f} alone)"
_IMPLIED_REASON = "it has an unusual value only where {} is 1, so it may be available only after it"


def infer_roles(schema: InferredSchema) -> None:
    """Set the role of each column that is neither key, label, weight nor split, or leave it out of the inputs."""
    keys, profile = schema.keys, schema.profile
    schema.roles["placement"] += dict.fromkeys(schema.corrections.get("placement", ()))
    names = [column.name for column in schema.unassigned()]
    of_request = of_user = of_candidate = dict.fromkeys(names, math.nan)
    if names and schema.rows_per_request > 1.05:
        of_request = profile.change_rates(schema.request_keys, names)
    if names and "user" in keys:
        of_user = profile.change_rates([keys["user"]], names, schema.time_sql, merge_ties=True)
    if names and "candidate" in keys:
        of_candidate = profile.change_rates([keys["candidate"]], names, schema.time_sql)
    leaks = _LeakDetector(schema)
    for column in schema.unassigned():
        change_rates = of_request[column.name], of_user[column.name], of_candidate[column.name]
        role = None
        if why := _explain_later(schema, column) or _explain_growing(schema, column):
            schema.left_out[column.name] = why
            if column.may_be_time and not column.nulls:
                schema.checks[column.name] = why  # A request may contain a later time, such as the day of a trip.
        elif column.kind != "number" and profile.is_unique(column.name):
            schema.leave_out(column.name, "it differs in each row, so there is nothing to learn from it")
        elif schema.is_plain_table:
            role = _role_in_table(schema, column, change_rates[2], leaks)
        else:
            role = _find_role(schema, column, change_rates, leaks)
        if role is not None:
            schema.roles[role].append(column.name)
        is_attribute = role in ("user", "candidate") and not schema.is_plain_table
        is_number = column.kind in ("integer", "number") and not column.is_binary
        if is_attribute and is_number and has_stem(column.name, LABEL_STEMS + OUTCOME_STEMS):
            why = "at which time was it computed? A total that includes these rows would reveal their labels"
            schema.checks.setdefault(column.name, why)


def _find_role(
    schema: InferredSchema, column: Column, change_rates: tuple[float, float, float], leaks: "_LeakDetector"
) -> Role | None:
    """Return the role of a column in a log with users or requests, None if the column leaks a label and is left out.

    `change_rates` are `Profile.change_rates` of the column within requests, users and candidates, NaN if unknown.
    """
    role = _role_in_log(schema, column, change_rates, leaks)
    if role is None:
        return _role_in_doubt(schema, column, change_rates, leaks)
    keys: list[KeyName] = []
    if change_rates[1] <= 4 * MAX_CHANGE_RATE:
        keys = ["user"]
    elif change_rates[0] <= _MAX_ERROR_RATE:
        keys = ["request"]
    if why := leaks.find_leak(column, [*keys, "candidate"] if change_rates[2] <= MAX_CHANGE_RATE else keys):
        schema.leave_out(column.name, why)
    return None if why else role


def _role_in_table(schema: InferredSchema, column: Column, of_candidate: float, leaks: "_LeakDetector") -> Role | None:
    best_auc, task = leaks.best_auc(column)
    if column.kind == "time" and "time" not in schema.keys:
        schema.left_out[column.name] = "a time, but the table has no request times to compare it with"
        return None
    if best_auc > PLAIN_TABLE_LEAK_AUC:
        schema.leave_out(column.name, _LEAK_REASON.format(task, best_auc))
        return None
    if after := leaks.implied_task(column):
        schema.leave_out(column.name, _IMPLIED_REASON.format(after))
        return None
    if has_stem(column.name, OUTCOME_STEMS) and not has_word(column.name, PAST_WORDS):
        schema.checks[column.name] = f"its name suggests that it is available only after {task or 'the label'}"
    is_placement = has_word(column.name, PLACEMENT_WORDS) and of_candidate > MAX_CHANGE_RATE
    return "placement" if is_placement else "candidate"


def _role_in_log(  # noqa: PLR0911 - a return per role reads best
    schema: InferredSchema, column: Column, change_rates: tuple[float, float, float], leaks: "_LeakDetector"
) -> Role | None:
    """Return the role of a column that hardly changes within a key or whose name shows placement, None if in doubt.

    `change_rates` are as in `_find_role`. A column whose name suggests an outcome is in doubt, too.
    """
    of_request, of_user, of_candidate = change_rates
    if of_request <= _MAX_ERROR_RATE:
        if of_user <= 4 * MAX_CHANGE_RATE and not (
            column.can_be_key and of_user > 0 and column.distinct > schema.count_distinct("user")
        ):
            if of_user > MAX_CHANGE_RATE:
                why = "it changes sometimes within a user: does it describe the user or the request?"
                schema.checks[column.name] = why
            return "user"
        if has_stem(column.name, OUTCOME_STEMS) and not has_word(column.name, PAST_WORDS):
            return None
        if math.isnan(of_user) and "user" in schema.keys:
            schema.checks[column.name] = "every user has one request, so it may also describe the user"
        return "context"
    if math.isnan(of_request) and of_user <= MAX_CHANGE_RATE and not of_candidate < of_user:
        return "user"
    if of_candidate <= MAX_CHANGE_RATE:
        return "candidate"
    if has_word(column.name, PLACEMENT_WORDS) and leaks.best_auc(column)[0] <= LEAK_AUC:
        why = "its name suggests where a candidate was shown: used in training, but absent in serving"
        schema.checks[column.name] = why
        return "placement"
    return None


def _role_in_doubt(
    schema: InferredSchema, column: Column, change_rates: tuple[float, float, float], leaks: "_LeakDetector"
) -> Role | None:
    """Return a guessed role for a column that `_role_in_log` can't place, None if it is left out as an outcome."""
    best_auc, task = leaks.best_auc(column)
    if has_stem(column.name, OUTCOME_STEMS) and not has_word(column.name, PAST_WORDS):
        schema.leave_out(column.name, "its name suggests that it is available only after the request")
    elif best_auc > LEAK_AUC:
        schema.leave_out(column.name, _LEAK_REASON.format(task, best_auc))
    elif after := leaks.implied_task(column):
        schema.leave_out(column.name, _IMPLIED_REASON.format(after))
    elif column.is_binary and has_stem(column.name, LABEL_STEMS) and not has_word(column.name, PAST_WORDS):
        schema.leave_out(column.name, "it looks like a label: make it a task with --task")
    elif math.isnan(change_rates[0]):
        schema.checks[column.name] = "does it describe the request, and is it available at that time?"
        return "context"
    else:
        auc = f"; alone it ranks {task} with an AUC of {best_auc:.2f}" if best_auc > SUSPICIOUS_AUC else ""
        why = f"it differs between the requests of a candidate: is it known before?{auc}"
        schema.checks[column.name] = why
        return "candidate"
    return None


def _explain_later(schema: InferredSchema, column: Column) -> str | None:
    """Return why a time belongs to an outcome, None if it doesn't."""
    time = schema.keys.get("time")
    if time is None or not column.may_be_time or (column.kind != "time" and not has_word(column.name, TIME_WORDS)):
        return None
    later = schema.profile.fraction(f"{column.time_sql} > {schema.time_sql}", f"{column.sql} IS NOT NULL")
    return "it is later than the request" if later > 0.5 else None


def _explain_growing(schema: InferredSchema, column: Column) -> str | None:
    """Return why to leave out a column whose values grow with the time, such as serial numbers, None for others."""
    ordered = column.kind in ("integer", "number", "text") and "time" in schema.keys
    if not ordered or column.nulls or column.distinct < 5 or column.is_binary:
        return None
    before = "lag(high) OVER (ORDER BY o)"
    rows = f"SELECT {schema.time_sql} AS o, min({column.sql}) AS low, max({column.sql}) AS high FROM log GROUP BY ALL"
    steps = f"SELECT low < {before} OR low < high AS fell, low <> {before} OR low < high AS moved FROM ({rows})"
    fallen, moved = schema.profile.row(f"SELECT count(*) FILTER (fell), count(*) FILTER (moved) FROM ({steps})")
    grows = moved and fallen <= 0.001 * moved
    return "it grows with time, so later rows have values that training has not seen" if grows else None


class _LeakDetector:
    """Measures how well a single column predicts the labels. Numeric labels count as 1 above their median."""

    def __init__(self, schema: InferredSchema) -> None:
        self._schema = schema
        # A cache of one column is enough, since all calls for a column come one after the other.
        self._codes = lru_cache(1)(lambda name: factorize_binned(self._sample[0].column(name)))

    def best_auc(self, column: Column) -> tuple[float, str]:
        """Return the highest AUC of a column alone, and the task with this AUC. Returns 0 and "" without tasks."""
        rows, tasks = self._sample
        codes, half = self._codes(column.name), rows.column(HALF_COLUMN).to_numpy().astype(bool)
        leaks = {name: target_encoding_auc(codes, labels, half)[0] for name, labels in tasks.items()}
        task = max(leaks, key=lambda name: (float(np.nan_to_num(leaks[name])), name), default="")
        return float(np.nan_to_num(leaks.get(task, 0.0))), task

    def implied_task(self, column: Column) -> str | None:
        """Return a task that is positive wherever a column differs from its most frequent value, None if none is."""
        codes, (_, tasks) = self._codes(column.name), self._sample
        implied = (name for name, labels in tasks.items() if implies_positive(codes, labels, (labels == 1).mean()))
        return next(implied, None)

    def find_leak(self, column: Column, key_names: Sequence[KeyName]) -> str | None:
        """Return why a column that is constant within the given keys leaks a label, None if it doesn't.

        A leak is weak in single rows: a request's order total is positive for all its candidates, although the user
        ordered only one. So each key's rows are merged. The column leaks if it predicts a key's mean label, or whether
        the key has a positive label. It must predict the latter clearly better than the key's number of rows does.
        """
        codes, (_, tasks) = self._codes(column.name), self._sample
        for key_name, (task, labels) in product(key_names, tasks.items()):
            values, fit_mask, rows, means = _merge_rows(*self._keys[key_name], codes, labels)
            results = [(task, *target_encoding_auc(values, means, fit_mask), LEAK_AUC, SUSPICIOUS_AUC)]
            is_positive, positives = (means > 0).astype(float), f"{key_name}s with {task} = 1"
            auc, precision = target_encoding_auc(values, is_positive, fit_mask, _MIN_KEYS)
            auc_by_rows, _ = target_encoding_auc(factorize_binned(pa.chunked_array([rows])), is_positive, fit_mask)
            if auc > LEAK_AUC and 1 - auc < 0.5 * (1 - np.fmax(auc_by_rows, 0.5)):
                results.append((positives, auc, precision, PLAIN_TABLE_LEAK_AUC, LEAK_AUC))
            for subject, auc, precision, leak_auc, suspicious_auc in results:
                if auc > leak_auc and precision > 0.5:
                    return _LEAK_REASON.format(subject, auc)
                if auc > suspicious_auc:
                    why = f"is it known before? alone it predicts {subject} with an AUC of {auc:.3f}"
                    self._schema.checks.setdefault(column.name, why)
            chance = np.fmax(1 - (1 - np.nanmean(labels)) ** rows, is_positive.mean())
            if implies_positive(values, is_positive, np.where(chance < 0.5, chance, 1)):
                return f"it has an unusual value only for {positives}, so it may be available only after them"
        return None

    @cached_property
    def _sample(self) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """N sampled rows, and task -> labels of these rows, (N,), 0 or 1, NaN where unobserved."""
        schema = self._schema
        names = [column.name for column in schema.unassigned()] + [task.column for task in schema.tasks]
        rows = schema.profile.sample(schema.request_keys, list(dict.fromkeys([*names, *schema.keys.values()])))
        tasks: dict[str, np.ndarray] = {}
        for task in schema.tasks:
            labels = rows.column(task.column).cast(pa.float64(), safe=False).to_numpy()
            if task.kind != "binary":
                labels = np.where(np.isnan(labels), np.nan, labels > np.nanmedian(labels))
            if task.observed_when is not None:
                is_observed = rows.column(task.observed_when[0]).cast(pa.float64()).to_numpy() == 1
                labels = np.where(is_observed, labels, np.nan)
            if not np.isnan(labels).all():
                tasks[task.column if task.kind == "binary" else f"{task.column} above its median"] = labels
        return rows, tasks

    @cached_property
    def _keys(self) -> dict[KeyName, tuple[np.ndarray, np.ndarray]]:
        """Key name -> index of each row's key, (N,) int64, and whether the key is in the half to fit on, (N,) bool.

        With many users, the halves of requests have different users, so a column that names users predicts no label.
        """
        schema, (rows, _) = self._schema, self._sample
        keys: dict[KeyName, np.ndarray] = {}
        for key_name in ("user", "candidate", "request"):
            codes, key = np.zeros(rows.num_rows, np.int64), schema.keys.get(key_name)
            for name in schema.request_keys if key_name == "request" else filter(None, [key]):
                values = factorize(rows.column(name))
                codes = np.unique(codes * (values.max(initial=0) + 1) + values, return_inverse=True)[1]
            keys[key_name] = codes
        of_request = keys["user"] if schema.count_distinct("user") >= _MANY_USERS else keys["request"]
        return {key: (codes, (of_request if key == "request" else codes) % 2 == 0) for key, codes in keys.items()}


def _merge_rows(keys: np.ndarray, half: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Merge labeled rows with equal keys and column codes. Returns the code, half, row count and mean label of each."""
    observed = ~np.isnan(labels)
    keys, codes, half, labels = keys[observed], codes[observed], half[observed], labels[observed]
    pairs = keys * (codes.max(initial=0) + 1) + codes
    _, first, pair_index = np.unique(pairs, return_index=True, return_inverse=True)
    rows = np.bincount(pair_index)
    return codes[first], half[first], rows, np.bincount(pair_index, labels) / rows
