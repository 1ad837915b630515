"""What happened after a request: the columns of labels, where these are known, and when they are final."""

import math
from collections.abc import Sequence

from mmoe_rec.errors import UserError
from mmoe_rec.profiling.meaning import STEADY, Meaning, TaskGuess
from mmoe_rec.profiling.profile import Column, days
from mmoe_rec.profiling.words import BEFORE, CODES, EVENT_TYPES, LABELS, NUMBERS, PLACEMENT, begins, has, is_unwanted

_MOST_TASKS, _TYPES = 5, 20
_YES_NO = {"0", "1", "f", "false", "ja", "n", "nein", "no", "non", "oui", "si", "sí", "t", "true", "y", "yes"}


def find_tasks(meaning: Meaning) -> None:
    """Fills in `tasks`. Raises UserError where no column looks like a label, or a given one can't be."""
    given = meaning.corrections.get("task", ())
    if given:
        for name in given:
            _check_label(meaning, meaning.columns[name])
        meaning.tasks = [
            TaskGuess(name, "binary" if meaning.columns[name].binary else "regression") for name in dict.fromkeys(given)
        ]
    else:
        meaning.tasks = _guess_tasks(meaning)
    near_labels = _explain_near_labels(meaning)
    names = [each.name for each in meaning.tasks]
    if twins := [each.column for each in meaning.tasks if names.count(each.name) > 1]:
        both = "' and '".join(twins)
        raise UserError(f"columns '{both}' would be tasks of one name: rename one, or take it out with --leave-out")
    binary = [each for each in meaning.tasks if each.kind == "binary"]
    binary.sort(key=lambda each: (-_rate(meaning, each.column), each.column))
    for place, each in enumerate(binary):
        _find_condition(meaning, each, binary[:place])
    others = [each for each in meaning.tasks if each.kind != "binary"]
    for each in others:
        each.score_weight = 0.0 if binary else 1.0
    meaning.tasks = [*binary, *others]
    scored = any(each.score_weight for each in meaning.tasks)
    for each in binary:
        if scored and is_unwanted(each.column):
            each.checks.append("by its name a good candidate has none of it: predicted, and not in the score")
        elif not scored:  # or all scores would be the same
            each.score_weight = 1.0
            each.checks.append("by its name it is unwanted: the higher the score, the likelier it is")
    if not meaning.tasks:
        types = [each.name for each in meaning.columns.values() if each.kind == "text" and each.distinct <= _TYPES]
        if types := [name for name in types if has(name, EVENT_TYPES)]:
            raise UserError(
                f"'{meaning.profile.name}' looks like a log of events, by its column '{types[0]}': --events takes it, "
                "beside a log with a row for each candidate that was shown, taken or not"
            )
        near = "".join(f" '{name}' {why}." for name, why in list(near_labels.items())[:3])
        raise UserError(
            f"'{meaning.profile.name}' has no column that looks like a label, 0 or 1 in each row.{near} Write a column "
            "of 0 and 1 for each behavior, or name a label with --task (mmoe-rec join-labels makes such a log)"
        )


def _explain_near_labels(meaning: Meaning) -> dict[str, str]:
    """Leave out columns that have a label's name and few values, but are no label.

    If no guessed task has a label's name, such a column is the label, and the guesses are dropped.

    Returns:
        What is wrong with each such column.
    """
    found, free = dict[str, str](), {each.name for each in meaning.free()} - {*meaning.corrections.get("placement", ())}
    named = [each for each in meaning.columns.values() if each.name in free | meaning.left_out.keys()]
    named = [each for each in named if begins(each.name, LABELS) and not has(each.name, BEFORE | PLACEMENT | CODES)]
    named = [each for each in named if each.kind in ("text", "integer", "number", "boolean") and each.distinct <= 3]
    constant = _find_constant(meaning, [each for each in named if each.name in free])
    is_guess = not any(begins(task.column, LABELS + NUMBERS) for task in meaning.tasks)
    for each in named:
        purpose = constant.get(each.name)
        if each.binary and purpose is None:
            continue
        values = ", ".join(map(str, sorted(meaning.profile.values(each.name, 3))))
        wrong = f"holds {values}{' and null' if each.nulls else ''} instead of 0 and 1"
        found[each.name] = wrong = f"is the same in all rows of a {purpose}" if each.binary else wrong
        is_text = each.kind == "text" and not {str(each.low).lower(), str(each.high).lower()} <= _YES_NO
        is_attribute = purpose is not None and not each.binary
        if is_text or is_attribute or each.name not in free or (meaning.is_plain and not is_guess):
            continue
        why = f"it has a label's name, but {wrong}"
        if purpose in ("user", "candidate"):
            meaning.checks[each.name] = f"{why}: is it known before the request?"
            continue
        meaning.leave_out(each.name, why)
        meaning.warnings.append(f"'{each.name}' is left out: {why}")
        if purpose is None and is_guess and not meaning.corrections.get("task"):
            meaning.tasks = []
    return found


def _check_label(meaning: Meaning, each: Column) -> None:
    if each.kind not in ("integer", "number", "boolean"):
        raise UserError(
            f"--task '{each.name}' holds values of type {each.type}; a label is a number, 0 or 1, true or false"
        )
    if each.distinct < 2:
        raise UserError(f"--task '{each.name}' has the same value in all rows: there is nothing to learn")


def _rate(meaning: Meaning, column: str) -> float:
    return meaning.profile.share(meaning.columns[column].is_one)


def _guess_tasks(meaning: Meaning) -> list[TaskGuess]:
    """Guess tasks from columns of 0 and 1 with a label's name, else from other such columns, else from numbers."""
    flags = [each for each in meaning.free() if each.binary]
    flags = _that_vary(meaning, [each for each in flags if each.name not in meaning.corrections.get("placement", ())])
    named = [each for each in flags if begins(each.name, LABELS) and not has(each.name, BEFORE | PLACEMENT)]
    tasks = [TaskGuess(each.name) for each in named]
    if meaning.is_plain and len(tasks) > 1:
        for task in tasks:
            task.checks.append("is it to be predicted, or known before?")
    for each in flags:
        if each not in named and not has(each.name, BEFORE) and (why := _why_label(meaning, each, named)):
            tasks.append(TaskGuess(each.name, checks=[why]))
    numbers = [each for each in meaning.free() if each.kind in ("integer", "number") and each.unit is None]
    numbers = _that_vary(meaning, [each for each in numbers if each.distinct > 2 and begins(each.name, NUMBERS)])
    known_before = all(has(each.name, BEFORE | PLACEMENT) for each in flags)
    if not named and flags and not (numbers and known_before):
        why = "no name says so, but it is 0 or 1: is it what is to be predicted?"
        tasks = [TaskGuess(each.name, checks=[why]) for each in flags[: 3 if meaning.is_plain else 2]]
    if not tasks:
        why = "a number by whose name it may be what is to be predicted"
        tasks = [TaskGuess(each.name, "regression", checks=[why]) for each in numbers[:2]]
    return _keep_most_frequent(meaning, tasks)


def _why_label(meaning: Meaning, each: Column, named: Sequence[Column]) -> str | None:
    """Say why the rows of a flag without a label's name make it a label, None if they don't."""
    if first := next((other for other in named if _implies(meaning, each, other)), None):
        return f"it is 1 only where {first.name} is 1, so it is taken for what happens then"
    if has(each.name, PLACEMENT):
        return None
    if then := next((other for other in named if _implies(meaning, other, each)), None):
        return f"{then.name} is 1 only where it is 1, so it comes before"
    is_late = _null_at_end(meaning, each, "true") is not None
    return "it is null in the latest rows, as what is known later" if is_late else None


def _keep_most_frequent(meaning: Meaning, tasks: list[TaskGuess]) -> list[TaskGuess]:
    """Leave out the rarest of many tasks."""
    if len(tasks) > _MOST_TASKS:
        tasks.sort(key=lambda task: (-_rate(meaning, task.column), task.column))
    for task in tasks[_MOST_TASKS:]:
        why = f"it looks like a label, rarer than {_MOST_TASKS} others: --task names those that are to be predicted"
        meaning.leave_out(task.column, why)
    return tasks[:_MOST_TASKS]


def _that_vary(meaning: Meaning, columns: Sequence[Column]) -> list[Column]:
    """Return the columns that neither user nor candidate nor request determines."""
    constant = _find_constant(meaning, columns)
    return [each for each in columns if each.name not in constant]


def _find_constant(meaning: Meaning, columns: Sequence[Column]) -> dict[str, str]:
    """Return the columns that a user, a candidate or a request determines, each with what does. (A rare label changes
    seldom, but as often from one row of a user to the next as anywhere.)"""
    found, keys = dict[str, str](), meaning.keys
    for purpose, most, fewest in (("user", 2 * STEADY, 1.5), ("candidate", 2 * STEADY, 1.5), ("request", 0.001, 1.05)):
        by = meaning.list_keys if purpose == "request" else [keys[purpose]] if purpose in keys else []
        names = [each.name for each in columns if each.name not in found]
        if by and names and meaning.profile.rows_per_key(by) > fewest:
            at_once = purpose == "user" and meaning.rows_per_request <= 1.05
            changes = meaning.profile.changes(by, names, meaning.time, at_once)
            found |= {name: purpose for name in names if changes[name] <= most}
    return found


def _implies(meaning: Meaning, one: Column, other: Column) -> bool:
    """Whether one is 1 only where the other is, and is rarer."""
    if one is other:
        return False
    rows, both = meaning.profile.count(one.is_one), meaning.profile.share(other.is_one, one.is_one)
    return rows >= 20 and both > 0.999 and _rate(meaning, one.name) < 0.98 * _rate(meaning, other.name)


def _find_condition(meaning: Meaning, task: TaskGuess, earlier: Sequence[TaskGuess]) -> None:
    """The more frequent task in whose rows alone a label means something."""
    column = meaning.columns[task.column]
    task.score_weight = 0.0 if is_unwanted(task.column) else 1.0
    ones = {each.column: meaning.columns[each.column].is_one for each in earlier}
    known, given = f"{column.sql} IS NOT NULL", None
    if column.nulls:  # of the returns of what was bought, rather than of what was clicked
        given = next((name for name in reversed(ones) if meaning.profile.share(ones[name], known) > 0.999), None)
    if given is None:
        first = (each.column for each in earlier if each.observed_when is None)
        given = next((name for name in first if _implies(meaning, column, meaning.columns[name])), None)
        task.checks += [f"it is 1 only where {given} is 1: predicted for those rows"] if given else []
    if given is not None:
        task.observed_when = given, (True if meaning.columns[given].kind == "boolean" else 1)
        task.objective = "satisfaction"
        task.score_weight = 0.5 * task.score_weight


def find_maturity(meaning: Meaning) -> None:
    """After how many days labels are final, by the times of what happened, or by where they end."""
    keys = meaning.keys
    if "time" not in keys:
        return
    time = meaning.columns[keys["time"]]
    t = time.microseconds
    times = [each for each in meaning.columns.values() if each.kind == "time" and each.name != time.name and each.nulls]
    for task in meaning.tasks:
        label = meaning.columns[task.column]
        happened = label.is_one if task.kind == "binary" else f"{label.sql} IS NOT NULL"
        for each in times:
            there = f"{each.sql} IS NOT NULL"
            if meaning.profile.share(happened, there) > 0.98 and meaning.profile.share(there, happened) > 0.98:
                late = meaning.profile.quantile(f"{each.microseconds} - {t}", 0.999, there)
                if late is not None and late > 0:
                    task.label_delay_days = _rounded_up(days(late))
                    task.notes.append(f"{each.name} is at most so much later than the request")
        # A label means something only in the rows of its condition.
        seen = "true" if task.observed_when is None else meaning.columns[task.observed_when[0]].is_one
        if not task.label_delay_days and (late_by := _null_at_end(meaning, label, seen)) is not None:
            task.label_delay_days = late_by
            task.notes.append("its label is null in all later rows")
        late = task.objective == "satisfaction" or task.kind == "regression"
        if late and not task.label_delay_days:
            task.checks.append("after how many days is it final? at once, as no column says more")


def _null_at_end(meaning: Meaning, label: Column, condition: str) -> float | None:
    """Days before the log's end from which a label is null in all rows of a condition, None where it is not so."""
    keys, profile = meaning.keys, meaning.profile
    if "time" not in keys or not label.nulls:
        return None
    t = meaning.columns[keys["time"]].microseconds
    known = profile.number(f"SELECT max({t}) FROM log WHERE {label.sql} IS NOT NULL")
    since = profile.count(f"({condition}) AND {t} > {known}")
    unknown = profile.number(f"SELECT min({t}) FROM log WHERE ({condition}) AND {t} > {known}")
    last = profile.row_of_times(t)[1]
    gap = days(last - known)
    before = profile.share(f"{label.sql} IS NOT NULL", f"({condition}) AND {t} <= {known}")
    if since < 50 or before <= 0.5 or gap <= 0.01:
        return None
    whole = math.floor(gap + 1e-6)
    return float(whole) if whole >= days(last - unknown) - 0.05 else _rounded_up(gap)


def _rounded_up(value: float) -> float:
    """A number of two digits that is not less; whole days from five on."""
    if value >= 5:
        return float(math.ceil(value - 1e-6))
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits - 1e-9) / 10**digits
