"""Infer tasks: the label columns, the rows in which labels are observed, and the days until labels are final."""

import math
from collections.abc import Sequence

from mmoe_rec.errors import UserError
from mmoe_rec.profiling.inferred_schema import MAX_CHANGE_RATE, InferredSchema, InferredTask
from mmoe_rec.profiling.name_hints import (
    CODE_WORDS,
    EVENT_TYPE_WORDS,
    LABEL_STEMS,
    NUMERIC_LABEL_STEMS,
    PAST_WORDS,
    PLACEMENT_WORDS,
    has_stem,
    has_word,
    is_negative_label,
)
from mmoe_rec.profiling.profile import Column, to_days

_MAX_TASKS = 5
_MAX_EVENT_TYPES = 20
"""Maximum number of distinct values in a column of event types."""
_YES_NO = {"0", "1", "f", "false", "ja", "n", "nein", "no", "non", "oui", "si", "sí", "t", "true", "y", "yes"}


def infer_tasks(schema: InferredSchema) -> None:
    """Infer the tasks of a log.

    Raises:
        UserError: No column looks like a label, or a column that the user named can't be a label.
    """
    if named := [schema.columns[name] for name in dict.fromkeys(schema.corrections.get("task", ()))]:
        for label in named:
            _check_label(label)
        schema.tasks = [InferredTask(label.name, "binary" if label.is_binary else "regression") for label in named]
    else:
        schema.tasks = _guess_tasks(schema)
    near_labels = _explain_near_labels(schema)
    names = [task.name for task in schema.tasks]
    if twins := [task.column for task in schema.tasks if names.count(task.name) > 1]:
        both = "' and '".join(twins)
        raise UserError(f"columns '{both}' would be tasks of the same name. Rename one, or pass it to --leave-out.")
    binary = [task for task in schema.tasks if task.kind == "binary"]
    binary.sort(key=lambda task: (-_rate(schema, task.column), task.column))
    for index, task in enumerate(binary):
        _find_condition(schema, task, binary[:index])
    regression = [task for task in schema.tasks if task.kind != "binary"]
    for task in regression:
        task.score_weight = 0.0 if binary else 1.0
    schema.tasks = [*binary, *regression]
    scored = any(task.score_weight for task in schema.tasks)
    for task in binary:
        if scored and is_negative_label(task.column):
            task.checks.append("its name suggests unwanted behavior: predicted, but not part of the score")
        elif not scored:  # Without any weight, all scores would be equal.
            task.score_weight = 1.0
            task.checks.append("its name suggests unwanted behavior, but a high score means that it is likely")
    if not schema.tasks:
        columns = [column for column in schema.columns.values() if has_word(column.name, EVENT_TYPE_WORDS)]
        if types := [text.name for text in columns if text.kind == "text" and text.distinct <= _MAX_EVENT_TYPES]:
            raise UserError(
                f"'{schema.profile.name}' looks like a log of events, by its column '{types[0]}'. Pass it to --events, "
                "next to a log with one row for each candidate that was shown."
            )
        near = "".join(f" '{name}' {why}." for name, why in list(near_labels.items())[:3])
        raise UserError(
            f"'{schema.profile.name}' has no column that looks like a label, 0 or 1 in each row.{near} Write a column "
            "of 0 and 1 for each behavior, or name a label with --task (mmoe-rec join-labels makes such a log)."
        )


def _explain_near_labels(schema: InferredSchema) -> dict[str, str]:
    """Return column -> why it isn't a label, for columns with a label's name. Some are left out of the inputs.

    If no guessed task has a label's name, such a column is probably the real label, so the guesses are dropped.
    """
    near_labels, placements = dict[str, str](), schema.corrections.get("placement", ())
    unassigned = {column.name for column in schema.unassigned()}.difference(placements)
    named = [
        column
        for column in schema.columns.values()
        if column.name in unassigned | schema.left_out.keys()
        and has_stem(column.name, LABEL_STEMS)
        and not has_word(column.name, PAST_WORDS | PLACEMENT_WORDS | CODE_WORDS)
        and column.kind in ("text", "integer", "number", "boolean")
        and column.distinct <= 3
    ]
    constant = _find_constant(schema, [column for column in named if column.name in unassigned])
    is_guess = not any(has_stem(task.column, LABEL_STEMS + NUMERIC_LABEL_STEMS) for task in schema.tasks)
    for column in named:
        key_name = constant.get(column.name)
        if column.is_binary and key_name is None:
            continue
        values = ", ".join(map(str, sorted(schema.profile.top_values(column.name, 3))))
        wrong = f"holds {values}{' and null' if column.nulls else ''} instead of 0 and 1"
        near_labels[column.name] = wrong = f"is the same in all rows of a {key_name}" if column.is_binary else wrong
        is_text = column.kind == "text" and not {str(column.low).lower(), str(column.high).lower()} <= _YES_NO
        is_attribute = key_name is not None and not column.is_binary
        if is_text or is_attribute or column.name not in unassigned or (schema.is_plain_table and not is_guess):
            continue
        why = f"it has a label's name, but {wrong}"
        if key_name in ("user", "candidate"):
            schema.checks[column.name] = f"{why}: is it available before the request?"
            continue
        schema.leave_out(column.name, why)
        schema.warnings.append(f"'{column.name}' is left out: {why}")
        if key_name is None and is_guess and not schema.corrections.get("task"):
            schema.tasks = []
    return near_labels


def _check_label(column: Column) -> None:
    if column.kind not in ("integer", "number", "boolean"):
        raise UserError(
            f"--task '{column.name}' has values of type {column.type}. A label must be a number, 0 or 1, true or false."
        )
    if column.distinct < 2:
        raise UserError(f"--task '{column.name}' has the same value in all rows, so there is nothing to learn.")


def _rate(schema: InferredSchema, column: str) -> float:
    return schema.profile.fraction(schema.columns[column].positive_sql)


def _guess_tasks(schema: InferredSchema) -> list[InferredTask]:
    """Guess tasks from binary columns with a label's name, else from other binary columns, else from numbers."""
    placements = schema.corrections.get("placement", ())
    flags = [flag for flag in schema.unassigned() if flag.is_binary and flag.name not in placements]
    flags = _keep_varying(schema, flags)
    inputs = PAST_WORDS | PLACEMENT_WORDS
    named = [flag for flag in flags if has_stem(flag.name, LABEL_STEMS) and not has_word(flag.name, inputs)]
    tasks = [InferredTask(flag.name) for flag in named]
    if schema.is_plain_table and len(tasks) > 1:
        for task in tasks:
            task.checks.append("is it a label, or available before the request?")
    for flag in flags:
        if flag not in named and not has_word(flag.name, PAST_WORDS) and (why := _why_label(schema, flag, named)):
            tasks.append(InferredTask(flag.name, checks=[why]))
    numbers = [number for number in schema.unassigned() if number.kind in ("integer", "number") and not number.unit]
    numbers = [number for number in numbers if number.distinct > 2 and has_stem(number.name, NUMERIC_LABEL_STEMS)]
    numbers = _keep_varying(schema, numbers)
    are_inputs = all(has_word(flag.name, inputs) for flag in flags)
    if not named and flags and not (numbers and are_inputs):
        why = "no name says so, but it is 0 or 1: is it a label?"
        tasks = [InferredTask(flag.name, checks=[why]) for flag in flags[: 3 if schema.is_plain_table else 2]]
    if not tasks:
        why = "its name suggests a number to predict"
        tasks = [InferredTask(number.name, "regression", checks=[why]) for number in numbers[:2]]
    return _keep_most_frequent(schema, tasks)


def _why_label(schema: InferredSchema, column: Column, named: Sequence[Column]) -> str | None:
    """Return why the values of a binary column without a label's name make it a label, None if they don't."""
    if first := next((label for label in named if _implies(schema, column, label)), None):
        return f"it is 1 only where {first.name} is 1, so it may follow {first.name}"
    if has_word(column.name, PLACEMENT_WORDS):
        return None
    if then := next((label for label in named if _implies(schema, label, column)), None):
        return f"{then.name} is 1 only where it is 1, so it may come before {then.name}"
    is_late = _null_at_end(schema, column, "true") is not None
    return "it is null in the latest rows, like a label that becomes final later" if is_late else None


def _keep_most_frequent(schema: InferredSchema, tasks: list[InferredTask]) -> list[InferredTask]:
    """Return the `_MAX_TASKS` tasks with the most positive labels, and leave out the columns of the rest."""
    if len(tasks) > _MAX_TASKS:
        tasks.sort(key=lambda task: (-_rate(schema, task.column), task.column))
    for task in tasks[_MAX_TASKS:]:
        why = f"it looks like a label, but {_MAX_TASKS} other labels are more frequent: choose tasks with --task"
        schema.leave_out(task.column, why)
    return tasks[:_MAX_TASKS]


def _keep_varying(schema: InferredSchema, columns: Sequence[Column]) -> list[Column]:
    """Return the columns except those that a user, a candidate or a request determines."""
    constant = _find_constant(schema, columns)
    return [column for column in columns if column.name not in constant]


def _find_constant(schema: InferredSchema, columns: Sequence[Column]) -> dict[str, str]:
    """Return column -> the key (`user`, `candidate` or `request`) that determines it, for columns with such a key.

    A rare label is not constant. It changes seldom, but as often within a user as anywhere, so its change rate is high.
    """
    constant, keys = dict[str, str](), schema.keys
    limits = {"user": (2 * MAX_CHANGE_RATE, 1.5), "candidate": (2 * MAX_CHANGE_RATE, 1.5), "request": (0.001, 1.05)}
    for key_name, (max_rate, min_rows) in limits.items():
        by = schema.request_keys if key_name == "request" else [keys[key_name]] if key_name in keys else []
        names = [column.name for column in columns if column.name not in constant]
        if by and names and schema.profile.rows_per_key(by) > min_rows:
            merge_ties = key_name == "user" and schema.rows_per_request <= 1.05
            change_rates = schema.profile.change_rates(by, names, schema.time_sql, merge_ties)
            constant |= {name: key_name for name in names if change_rates[name] <= max_rate}
    return constant


def _implies(schema: InferredSchema, rarer: Column, wider: Column) -> bool:
    """Return whether `rarer` is 1 only where `wider` is 1, and less often."""
    if rarer is wider:
        return False
    rows = schema.profile.count_rows(rarer.positive_sql)
    both = schema.profile.fraction(wider.positive_sql, rarer.positive_sql)
    return rows >= 20 and both > 0.999 and _rate(schema, rarer.name) < 0.98 * _rate(schema, wider.name)


def _find_condition(schema: InferredSchema, task: InferredTask, earlier: Sequence[InferredTask]) -> None:
    """Set a task's score weight, and `observed_when` if its label is 1 only where an `earlier` task is positive."""
    column = schema.columns[task.column]
    task.score_weight = 0.0 if is_negative_label(task.column) else 1.0
    positives = {wider.column: schema.columns[wider.column].positive_sql for wider in earlier}
    observed, condition = f"{column.sql} IS NOT NULL", None
    if column.nulls:  # Try rare tasks first: a return depends on the purchase rather than on the click.
        nearest = (name for name in reversed(positives) if schema.profile.fraction(positives[name], observed) > 0.999)
        condition = next(nearest, None)
    if condition is None:
        first = (wider.column for wider in earlier if wider.observed_when is None)
        condition = next((name for name in first if _implies(schema, column, schema.columns[name])), None)
        task.checks += [f"it is 1 only where {condition} is 1: predicted for these rows"] if condition else []
    if condition is not None:
        task.observed_when = condition, (True if schema.columns[condition].kind == "boolean" else 1)
        task.objective = "satisfaction"
        task.score_weight = 0.5 * task.score_weight


def infer_label_delays(schema: InferredSchema) -> None:
    """Infer after how many days labels are final, from times of outcomes or from the last rows with labels."""
    if "time" not in schema.keys:
        return
    fraction = schema.profile.fraction
    outcomes = [column for column in schema.columns.values() if column.kind == "time" and column.nulls]
    for task in schema.tasks:
        label = schema.columns[task.column]
        happened = label.positive_sql if task.kind == "binary" else f"{label.sql} IS NOT NULL"
        for outcome in outcomes:  # A time of the label's outcome is null exactly where the label is not positive.
            has_time = f"{outcome.sql} IS NOT NULL"
            if fraction(happened, has_time) > 0.98 and fraction(has_time, happened) > 0.98:
                delay = schema.profile.quantile(f"{outcome.time_sql} - {schema.time_sql}", 0.999, has_time)
                if delay is not None and delay > 0:
                    task.label_delay_days = _round_up(to_days(delay))
                    task.notes.append(f"{outcome.name} is at most this much later than the request")
        # Nulls show a delay only in rows in which the label can be observed, such as clicked rows.
        condition = "true" if task.observed_when is None else schema.columns[task.observed_when[0]].positive_sql
        if not task.label_delay_days and (days := _null_at_end(schema, label, condition)) is not None:
            task.label_delay_days = days
            task.notes.append("its label is null in all later rows")
        is_late = task.objective == "satisfaction" or task.kind == "regression"
        if is_late and not task.label_delay_days:
            task.checks.append("after how many days is it final? No column shows a delay, so it is final at once")


def _null_at_end(schema: InferredSchema, label: Column, condition: str) -> float | None:
    """Return for how many days at the log's end a label is null wherever an SQL condition holds, None if it isn't."""
    profile, t = schema.profile, schema.time_sql
    if "time" not in schema.keys or not label.nulls:
        return None
    last_label = profile.scalar(f"SELECT max({t}) FROM log WHERE {label.sql} IS NOT NULL")
    rows_after = profile.count_rows(f"({condition}) AND {t} > {last_label}")
    first_null = profile.scalar(f"SELECT min({t}) FROM log WHERE ({condition}) AND {t} > {last_label}")
    last = profile.time_range(t)[1]
    gap = to_days(last - last_label)
    labeled_before = profile.fraction(f"{label.sql} IS NOT NULL", f"({condition}) AND {t} <= {last_label}")
    if rows_after < 50 or labeled_before <= 0.5 or gap <= 0.01:
        return None
    whole = math.floor(gap + 1e-6)
    return float(whole) if whole >= to_days(last - first_null) - 0.05 else _round_up(gap)


def _round_up(value: float) -> float:
    """Round up to two significant digits, or to an integer from 5 on."""
    if value >= 5:
        return float(math.ceil(value - 1e-6))
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits - 1e-9) / 10**digits
