"""What happened after a request: the columns of labels, where these are known, and when they are final."""

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

_MOST_TASKS, _TYPES = 5, 20
_YES_NO = {"0", "1", "f", "false", "ja", "n", "nein", "no", "non", "oui", "si", "sí", "t", "true", "y", "yes"}


def infer_tasks(schema: InferredSchema) -> None:
    """Fills in `tasks`. Raises UserError where no column looks like a label, or a given one can't be."""
    given = schema.corrections.get("task", ())
    if given:
        for name in given:
            _check_label(schema, schema.columns[name])
        schema.tasks = [
            InferredTask(name, "binary" if schema.columns[name].is_binary else "regression")
            for name in dict.fromkeys(given)
        ]
    else:
        schema.tasks = _guess_tasks(schema)
    near_labels = _explain_near_labels(schema)
    names = [each.name for each in schema.tasks]
    if twins := [each.column for each in schema.tasks if names.count(each.name) > 1]:
        both = "' and '".join(twins)
        raise UserError(f"columns '{both}' would be tasks of one name: rename one, or take it out with --leave-out")
    binary = [each for each in schema.tasks if each.kind == "binary"]
    binary.sort(key=lambda each: (-_rate(schema, each.column), each.column))
    for place, each in enumerate(binary):
        _find_condition(schema, each, binary[:place])
    others = [each for each in schema.tasks if each.kind != "binary"]
    for each in others:
        each.score_weight = 0.0 if binary else 1.0
    schema.tasks = [*binary, *others]
    scored = any(each.score_weight for each in schema.tasks)
    for each in binary:
        if scored and is_negative_label(each.column):
            each.checks.append("by its name a good candidate has none of it: predicted, and not in the score")
        elif not scored:  # or all scores would be the same
            each.score_weight = 1.0
            each.checks.append("by its name it is unwanted: the higher the score, the likelier it is")
    if not schema.tasks:
        types = [each.name for each in schema.columns.values() if each.kind == "text" and each.distinct <= _TYPES]
        if types := [name for name in types if has_word(name, EVENT_TYPE_WORDS)]:
            raise UserError(
                f"'{schema.profile.name}' looks like a log of events, by its column '{types[0]}': --events takes it, "
                "beside a log with a row for each candidate that was shown, taken or not"
            )
        near = "".join(f" '{name}' {why}." for name, why in list(near_labels.items())[:3])
        raise UserError(
            f"'{schema.profile.name}' has no column that looks like a label, 0 or 1 in each row.{near} Write a column "
            "of 0 and 1 for each behavior, or name a label with --task (mmoe-rec join-labels makes such a log)"
        )


def _explain_near_labels(schema: InferredSchema) -> dict[str, str]:
    """Leave out columns that have a label's name and few values, but are no label.

    If no guessed task has a label's name, such a column is the label, and the guesses are dropped.

    Returns:
        What is wrong with each such column.
    """
    found, unassigned = (
        dict[str, str](),
        {each.name for each in schema.unassigned()} - {*schema.corrections.get("placement", ())},
    )
    named = [each for each in schema.columns.values() if each.name in unassigned | schema.left_out.keys()]
    named = [
        each
        for each in named
        if has_stem(each.name, LABEL_STEMS) and not has_word(each.name, PAST_WORDS | PLACEMENT_WORDS | CODE_WORDS)
    ]
    named = [each for each in named if each.kind in ("text", "integer", "number", "boolean") and each.distinct <= 3]
    constant = _find_constant(schema, [each for each in named if each.name in unassigned])
    is_guess = not any(has_stem(task.column, LABEL_STEMS + NUMERIC_LABEL_STEMS) for task in schema.tasks)
    for each in named:
        key_name = constant.get(each.name)
        if each.is_binary and key_name is None:
            continue
        values = ", ".join(map(str, sorted(schema.profile.values(each.name, 3))))
        wrong = f"holds {values}{' and null' if each.nulls else ''} instead of 0 and 1"
        found[each.name] = wrong = f"is the same in all rows of a {key_name}" if each.is_binary else wrong
        is_text = each.kind == "text" and not {str(each.low).lower(), str(each.high).lower()} <= _YES_NO
        is_attribute = key_name is not None and not each.is_binary
        if is_text or is_attribute or each.name not in unassigned or (schema.is_plain_table and not is_guess):
            continue
        why = f"it has a label's name, but {wrong}"
        if key_name in ("user", "candidate"):
            schema.checks[each.name] = f"{why}: is it known before the request?"
            continue
        schema.leave_out(each.name, why)
        schema.warnings.append(f"'{each.name}' is left out: {why}")
        if key_name is None and is_guess and not schema.corrections.get("task"):
            schema.tasks = []
    return found


def _check_label(schema: InferredSchema, each: Column) -> None:
    if each.kind not in ("integer", "number", "boolean"):
        raise UserError(
            f"--task '{each.name}' holds values of type {each.type}; a label is a number, 0 or 1, true or false"
        )
    if each.distinct < 2:
        raise UserError(f"--task '{each.name}' has the same value in all rows: there is nothing to learn")


def _rate(schema: InferredSchema, column: str) -> float:
    return schema.profile.fraction(schema.columns[column].positive_sql)


def _guess_tasks(schema: InferredSchema) -> list[InferredTask]:
    """Guess tasks from columns of 0 and 1 with a label's name, else from other such columns, else from numbers."""
    flags = [each for each in schema.unassigned() if each.is_binary]
    flags = _that_vary(schema, [each for each in flags if each.name not in schema.corrections.get("placement", ())])
    named = [
        each
        for each in flags
        if has_stem(each.name, LABEL_STEMS) and not has_word(each.name, PAST_WORDS | PLACEMENT_WORDS)
    ]
    tasks = [InferredTask(each.name) for each in named]
    if schema.is_plain_table and len(tasks) > 1:
        for task in tasks:
            task.checks.append("is it to be predicted, or known before?")
    for each in flags:
        if each not in named and not has_word(each.name, PAST_WORDS) and (why := _why_label(schema, each, named)):
            tasks.append(InferredTask(each.name, checks=[why]))
    numbers = [each for each in schema.unassigned() if each.kind in ("integer", "number") and each.unit is None]
    numbers = _that_vary(
        schema, [each for each in numbers if each.distinct > 2 and has_stem(each.name, NUMERIC_LABEL_STEMS)]
    )
    known_before = all(has_word(each.name, PAST_WORDS | PLACEMENT_WORDS) for each in flags)
    if not named and flags and not (numbers and known_before):
        why = "no name says so, but it is 0 or 1: is it what is to be predicted?"
        tasks = [InferredTask(each.name, checks=[why]) for each in flags[: 3 if schema.is_plain_table else 2]]
    if not tasks:
        why = "a number by whose name it may be what is to be predicted"
        tasks = [InferredTask(each.name, "regression", checks=[why]) for each in numbers[:2]]
    return _keep_most_frequent(schema, tasks)


def _why_label(schema: InferredSchema, each: Column, named: Sequence[Column]) -> str | None:
    """Say why the rows of a flag without a label's name make it a label, None if they don't."""
    if first := next((other for other in named if _implies(schema, each, other)), None):
        return f"it is 1 only where {first.name} is 1, so it is taken for what happens then"
    if has_word(each.name, PLACEMENT_WORDS):
        return None
    if then := next((other for other in named if _implies(schema, other, each)), None):
        return f"{then.name} is 1 only where it is 1, so it comes before"
    is_late = _null_at_end(schema, each, "true") is not None
    return "it is null in the latest rows, as what is known later" if is_late else None


def _keep_most_frequent(schema: InferredSchema, tasks: list[InferredTask]) -> list[InferredTask]:
    """Leave out the rarest of many tasks."""
    if len(tasks) > _MOST_TASKS:
        tasks.sort(key=lambda task: (-_rate(schema, task.column), task.column))
    for task in tasks[_MOST_TASKS:]:
        why = f"it looks like a label, rarer than {_MOST_TASKS} others: --task names those that are to be predicted"
        schema.leave_out(task.column, why)
    return tasks[:_MOST_TASKS]


def _that_vary(schema: InferredSchema, columns: Sequence[Column]) -> list[Column]:
    """Return the columns that neither user nor candidate nor request determines."""
    constant = _find_constant(schema, columns)
    return [each for each in columns if each.name not in constant]


def _find_constant(schema: InferredSchema, columns: Sequence[Column]) -> dict[str, str]:
    """Return the columns that a user, a candidate or a request determines, each with what does. (A rare label changes
    seldom, but as often from one row of a user to the next as anywhere.)"""
    found, keys = dict[str, str](), schema.keys
    for key_name, most, fewest in (
        ("user", 2 * MAX_CHANGE_RATE, 1.5),
        ("candidate", 2 * MAX_CHANGE_RATE, 1.5),
        ("request", 0.001, 1.05),
    ):
        by = schema.request_keys if key_name == "request" else [keys[key_name]] if key_name in keys else []
        names = [each.name for each in columns if each.name not in found]
        if by and names and schema.profile.rows_per_key(by) > fewest:
            merge_ties = key_name == "user" and schema.rows_per_request <= 1.05
            change_rates = schema.profile.change_rates(by, names, schema.time_sql, merge_ties)
            found |= {name: key_name for name in names if change_rates[name] <= most}
    return found


def _implies(schema: InferredSchema, one: Column, other: Column) -> bool:
    """Whether one is 1 only where the other is, and is rarer."""
    if one is other:
        return False
    rows, both = (
        schema.profile.count_rows(one.positive_sql),
        schema.profile.fraction(other.positive_sql, one.positive_sql),
    )
    return rows >= 20 and both > 0.999 and _rate(schema, one.name) < 0.98 * _rate(schema, other.name)


def _find_condition(schema: InferredSchema, task: InferredTask, earlier: Sequence[InferredTask]) -> None:
    """The more frequent task in whose rows alone a label means something."""
    column = schema.columns[task.column]
    task.score_weight = 0.0 if is_negative_label(task.column) else 1.0
    ones = {each.column: schema.columns[each.column].positive_sql for each in earlier}
    known, given = f"{column.sql} IS NOT NULL", None
    if column.nulls:  # of the returns of what was bought, rather than of what was clicked
        given = next((name for name in reversed(ones) if schema.profile.fraction(ones[name], known) > 0.999), None)
    if given is None:
        first = (each.column for each in earlier if each.observed_when is None)
        given = next((name for name in first if _implies(schema, column, schema.columns[name])), None)
        task.checks += [f"it is 1 only where {given} is 1: predicted for those rows"] if given else []
    if given is not None:
        task.observed_when = given, (True if schema.columns[given].kind == "boolean" else 1)
        task.objective = "satisfaction"
        task.score_weight = 0.5 * task.score_weight


def infer_label_delays(schema: InferredSchema) -> None:
    """After how many days labels are final, by the times of what happened, or by where they end."""
    keys = schema.keys
    if "time" not in keys:
        return
    time = schema.columns[keys["time"]]
    t = time.time_sql
    times = [each for each in schema.columns.values() if each.kind == "time" and each.name != time.name and each.nulls]
    for task in schema.tasks:
        label = schema.columns[task.column]
        happened = label.positive_sql if task.kind == "binary" else f"{label.sql} IS NOT NULL"
        for each in times:
            there = f"{each.sql} IS NOT NULL"
            if schema.profile.fraction(happened, there) > 0.98 and schema.profile.fraction(there, happened) > 0.98:
                late = schema.profile.quantile(f"{each.time_sql} - {t}", 0.999, there)
                if late is not None and late > 0:
                    task.label_delay_days = _rounded_up(to_days(late))
                    task.notes.append(f"{each.name} is at most so much later than the request")
        # A label means something only in the rows of its condition.
        seen = "true" if task.observed_when is None else schema.columns[task.observed_when[0]].positive_sql
        if not task.label_delay_days and (late_by := _null_at_end(schema, label, seen)) is not None:
            task.label_delay_days = late_by
            task.notes.append("its label is null in all later rows")
        late = task.objective == "satisfaction" or task.kind == "regression"
        if late and not task.label_delay_days:
            task.checks.append("after how many days is it final? at once, as no column says more")


def _null_at_end(schema: InferredSchema, label: Column, condition: str) -> float | None:
    """Days before the log's end from which a label is null in all rows of a condition, None where it is not so."""
    keys, profile = schema.keys, schema.profile
    if "time" not in keys or not label.nulls:
        return None
    t = schema.columns[keys["time"]].time_sql
    known = profile.scalar(f"SELECT max({t}) FROM log WHERE {label.sql} IS NOT NULL")
    since = profile.count_rows(f"({condition}) AND {t} > {known}")
    unknown = profile.scalar(f"SELECT min({t}) FROM log WHERE ({condition}) AND {t} > {known}")
    last = profile.time_range(t)[1]
    gap = to_days(last - known)
    before = profile.fraction(f"{label.sql} IS NOT NULL", f"({condition}) AND {t} <= {known}")
    if since < 50 or before <= 0.5 or gap <= 0.01:
        return None
    whole = math.floor(gap + 1e-6)
    return float(whole) if whole >= to_days(last - unknown) - 0.05 else _rounded_up(gap)


def _rounded_up(value: float) -> float:
    """A number of two digits that is not less; whole days from five on."""
    if value >= 5:
        return float(math.ceil(value - 1e-6))
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits - 1e-9) / 10**digits
