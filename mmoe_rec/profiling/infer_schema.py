"""Infer the schema of a log from the names of its columns and from the dependencies between them.

For example, a user's country does not change between the requests of the user. `InferredSchema.checks` explains each
guess that a person should check.
"""

import math
import shlex
from difflib import get_close_matches

from mmoe_rec.errors import UserError
from mmoe_rec.profiling.infer_roles import infer_roles
from mmoe_rec.profiling.infer_tasks import infer_label_delays, infer_tasks
from mmoe_rec.profiling.inferred_schema import KEY_NAMES, MAX_CHANGE_RATE, Corrections, InferredSchema
from mmoe_rec.profiling.name_hints import (
    CLOCK_WORDS,
    GROUP_WORDS,
    ID_WORDS,
    NUMERIC_LABEL_STEMS,
    OUTCOME_STEMS,
    PAST_WORDS,
    SAMPLING_WORDS,
    TIME_WORDS,
    WEIGHT_QUALIFIERS,
    WEIGHT_WORDS,
    has_stem,
    has_word,
    match_key_name,
    split_words,
)
from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.settings.log_columns import SPLITS

_MIN_USERS = 10
_MIN_CANDIDATES = 20
"""In a table without users and requests, a column with fewer values is not taken for the candidate."""
_ERROR_RATE = 0.01
"""Highest change rate of a column that counts as constant, because a few changes can be errors in the data."""
_TIME_ADVICE = "write them as timestamps, for example with pandas.to_datetime, or as whole s, ms, us or ns since 1970"
_AMOUNT_WORDS = PAST_WORDS | {"price", "age", "length", "size", "year"}
_MAX_REQUEST_SECONDS = 1800
"""Longest time between the first and the last row of a request."""
_SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "holdout": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_MAX_NAME_LENGTH = 40
"""Columns with longer text on average (in characters) hold free text rather than names."""


def infer_schema(profile: Profile, corrections: Corrections) -> InferredSchema:
    """Infer the schema of a log.

    Args:
        profile: Statistics of the log.
        corrections: Columns that the user named. They replace guesses.

    Raises:
        UserError: The log can't be used, or a correction names a column that doesn't exist or fit.
    """
    schema = InferredSchema(profile, corrections)
    _check_corrections(schema)
    _leave_out_unusable(schema)
    _find_keys(schema)
    _find_weights(schema)
    _find_split(schema)
    infer_tasks(schema)
    infer_roles(schema)
    infer_label_delays(schema)
    return schema


def _check_corrections(schema: InferredSchema) -> None:
    named: dict[str, str] = {}  # Column -> option that names it as a key.
    for option, name in ((option, name) for option, names in schema.corrections.items() for name in names):
        if option in KEY_NAMES and (twin := named.setdefault(name, option)) != option:
            raise UserError(f"--{twin} and --{option} both name column '{name}'. Name it in one of these options.")
        if name not in schema.columns:
            near = get_close_matches(name, schema.columns, 1) or list(schema.columns)[:8]
            log = schema.profile.name
            raise UserError(f"--{option}: '{log}' has no column '{name}'. Columns are, for example, {', '.join(near)}.")


def _leave_out_unusable(schema: InferredSchema) -> None:
    excluded = schema.corrections.get("leave-out", ())
    for column in schema.columns.values():
        why = "named in --leave-out" if column.name in excluded else _explain_unusable(column)
        has_gap = f"len(list_filter({column.sql}::DOUBLE[], lambda e: e IS NULL OR NOT isfinite(e))) > 0"
        if column.kind == "vector" and why is None and schema.profile.count_rows(has_gap):
            why = "some of its lists contain null, NaN or infinity: write null instead of the whole list"
        if column.name in schema.profile.unreadable:
            why = schema.profile.unreadable[column.name]
            schema.warnings.append(f"column '{column.name}' is left out: {why}")
        if why and column.name not in schema.corrections.get("task", ()):
            schema.left_out[column.name] = why


def _explain_unusable(column: Column) -> str | None:
    why, present = None, column.rows - column.nulls
    if column.kind == "empty":
        why = "it is null in all rows"
    elif column.kind == "other":
        why = f"values of type {column.type} can't be read: write their content as columns of numbers or text"
    elif column.kind == "integer" and column.high >= 2**63:
        why = "some of its integers need more than 63 bits: write it as text"
    elif column.kind not in ("keys", "vector") and column.distinct <= 1 and not column.nulls:
        why = "it has one value in all rows"
    elif column.kind in ("keys", "vector") and not column.length_range[1]:
        why = "all its lists are empty"
    elif column.kind == "vector" and column.length_range[0] != column.length_range[1]:
        why = "its lists of numbers differ in length"
    elif column.kind == "text" and column.mean_length > _MAX_NAME_LENGTH and column.distinct > 0.5 * present:
        why = "it looks like free text: embed it, and write the vectors as lists of numbers"
    return why


def _find_weights(schema: InferredSchema) -> None:
    for column in schema.unassigned():
        name, is_number = column.name, column.kind in ("number", "integer") and not column.nulls
        is_number &= name not in schema.corrections.get("task", ())
        if not is_number or column.low <= 0 or column.distinct < 2:
            continue
        is_weight = has_word(name, WEIGHT_WORDS) and set(split_words(name)) <= WEIGHT_WORDS | WEIGHT_QUALIFIERS
        if is_weight and "candidate" in schema.keys:  # A candidate's constant weight is physical.
            is_weight = not schema.profile.change_rates([schema.keys["candidate"]], [name])[name] <= MAX_CHANGE_RATE
        if has_word(name, SAMPLING_WORDS) and column.high <= 1 and schema.sampling_rate is None:
            schema.sampling_rate = name
            schema.checks[name] = "its name suggests the rate at which the row was sampled"
        elif is_weight and schema.weight is None:
            schema.weight = name
            schema.checks[name] = "its name suggests the weight of the row"


def _find_split(schema: InferredSchema) -> None:
    """Find the column that assigns the rows of a table without times to splits."""
    if "time" in schema.keys:
        return
    for column in schema.unassigned():
        if column.kind != "text" or column.nulls or column.distinct > len(_SPLITS) + 2:
            continue
        splits = {value: _SPLITS.get(str(value).lower()) for value in schema.profile.top_values(column.name, 20)}
        if all(splits.values()) and len(set(splits.values())) > 1:
            parts = {name: sorted(value for value, split in splits.items() if split == name) for name in SPLITS}
            if name := next((name for name, values in parts.items() if not values), None):
                problem = f"column '{column.name}' assigns rows to train, validation or test, but none to {name}"
                raise UserError(f"{problem}. Write '{name}' in some of the rows.")
            schema.split = column.name, parts
            return
    clocks = [name for name in schema.columns if has_word(name, TIME_WORDS | CLOCK_WORDS)]
    named = ", ".join(name for name in clocks if not has_word(name, PAST_WORDS | ID_WORDS))
    times = f" {named} may be the time, but the values can't be read: {_TIME_ADVICE}." if named else ""
    raise UserError(
        f"'{schema.profile.name}' has neither a column of times nor one that assigns rows to train, validation and "
        f"test.{times} Name the times with --time, or add a column 'split' of train, validation and test."
    )


# Keys: user, candidate, time and request


def _find_keys(schema: InferredSchema) -> None:
    """Find the keys and the columns that identify a request.

    Raises:
        UserError: A column that the user named can't be the key.
    """
    keys, corrections = schema.keys, schema.corrections
    for key_name in KEY_NAMES:
        for name in corrections.get(key_name, ()):
            _check_key(schema, key_name, schema.columns[name])
            keys[key_name] = name
    _find_by_name(schema, "user")
    _find_by_name(schema, "candidate")
    _find_time(schema)
    _find_request(schema)
    _find_by_structure(schema)
    candidates = schema.count_distinct("candidate")
    if schema.is_plain_table and "candidate" not in corrections and 0 < candidates < _MIN_CANDIDATES:
        del keys["candidate"]  # With so few values, it is an attribute, such as a job.
    for key_name in ("user", "candidate"):
        is_guess = key_name in keys and key_name not in corrections and "request" not in keys
        if is_guess and schema.profile.is_unique(keys[key_name]):  # Nothing can be counted by a unique ID.
            schema.key_checks.pop(key_name, None)
            schema.left_out[keys.pop(key_name)] = "it differs in each row"
    _check_repeats(schema)
    if "user" not in keys:
        names = ", ".join([column.name for column in _shared_ids(schema) if _may_be_user(column)][:3])
        why = "no user column was found, so no feature follows a user"
        schema.key_checks["user"] = f"{why}. If there is one{names and f' (perhaps {names})'}, name it with --user"


def _check_key(schema: InferredSchema, key_name: str, column: Column) -> None:
    if key_name == "time" and not column.may_be_time:
        raise UserError(f"--time '{column.name}' has no readable times ({column.type}): {_TIME_ADVICE}.")
    if key_name != "time" and column.kind not in ("integer", "text"):
        raise UserError(f"--{key_name} '{column.name}' has values of type {column.type}. IDs must be integers or text.")
    if column.nulls:
        raise UserError(f"--{key_name} '{column.name}' is null in {column.nulls:,} rows. Leave these rows out.")
    schema.left_out.pop(column.name, None)


def _find_by_name(schema: InferredSchema, key_name: str) -> None:
    if key_name in schema.keys:
        return
    ranks = {name: match_key_name(name, key_name) for name in schema.columns}
    min_distinct = _MIN_USERS if key_name == "user" else 2
    usable = [column for column in schema.unassigned() if ranks[column.name] and column.may_be_id]
    usable = [column for column in usable if not column.is_binary and column.distinct >= min_distinct]
    if not usable:
        for column in schema.columns.values():
            is_unfit = column.nulls or column.kind in ("number", "other")
            if ranks[column.name] == 2 and is_unfit and not column.may_be_time:
                why = f"it looks like the {key_name}, but IDs must be integers or text, without nulls"
                schema.leave_out(column.name, why)
                schema.warnings.append(f"'{column.name}' is left out: {why} ({column.type}, {column.nulls:,} nulls)")
        return
    # IDs that are almost unique come last. They may identify a message to the user rather than the user.
    unique = int(0.9 * schema.profile.rows)

    def order(column: Column) -> tuple[int, bool, int, list[int]]:
        distinct = min(column.distinct, unique)
        return ranks[column.name], distinct < unique, distinct, [-ord(character) for character in column.name]

    name = max(usable, key=order).name
    schema.keys[key_name] = name
    rivals = sorted(column.name for column in usable if ranks[column.name] == ranks[name] and column.name != name)
    doubts = [f"'{name}' serves as the {key_name}, as no column has a better name"] if ranks[name] == 1 else []
    doubts += [f"it could also be {', '.join(rivals)}"] if rivals else []
    if doubts:
        schema.key_checks[key_name] = "; ".join(doubts)


def _find_time(schema: InferredSchema) -> None:
    keys = schema.keys
    if "time" in keys:
        schema.time_unit = schema.columns[keys["time"]].unit
        return
    times = [time for time in schema.unassigned() if time.may_be_time and not time.nulls and time.distinct > 1]
    times = [time for time in times if time.name not in schema.profile.path_columns]
    named = [time for time in times if time.kind == "time" or has_word(time.name, TIME_WORDS)]
    times = named or [time for time in times if time.distinct > 0.01 * time.rows]
    times = _without_attributes(schema, _without_times_of_keys(schema, times))
    if not times:
        return

    def order(time: Column) -> tuple[int, bool, int, str]:
        fractions = [schema.profile.fraction(f"{time.time_sql} <= {later.time_sql}") for later in times]
        earlier = sum(fraction > 0.98 for fraction in fractions)
        return -earlier, not has_word(time.name, TIME_WORDS), -time.distinct, time.name

    best = min(times, key=order)
    keys["time"] = best.name
    schema.time_unit = best.unit
    if not named:
        schema.key_checks["time"] = f"no name says so, but its integers may be {best.unit} since 1970"
    if rivals := ", ".join(sorted(time.name for time in times if time is not best)):
        schema.key_checks["time"] = f"it is earlier than {rivals} in most rows, so it may be the request's time"


def _without_times_of_keys(schema: InferredSchema, times: list[Column]) -> list[Column]:
    """Drop times that hardly change within a user or a candidate, such as dates of birth or publication."""
    for key_name in ("user", "candidate"):
        key = schema.keys.get(key_name)
        if not times or key is None or match_key_name(key, key_name) == 1:
            continue
        change_rates = schema.profile.change_rates([key], [time.name for time in times])
        all_times, times = times, [time for time in times if not change_rates[time.name] <= MAX_CHANGE_RATE]
        if not times:
            name = max(all_times, key=lambda time: (time.distinct, time.name)).name
            schema.warnings.append(
                f"'{name}' hardly changes within a {key_name}, so it is not used as the request's time. If it is the "
                f"request's time, pass --time {shlex.quote(name)}"
            )
    return times


def _without_attributes(schema: InferredSchema, times: list[Column]) -> list[Column]:
    """Drop times that are attributes of another column, such as the start of a session.

    The other column determines such a time, but does not determine a finer time (with more distinct values).
    """
    pool = [key for key in schema.unassigned() if key.may_be_id and 1 < key.distinct < key.rows / 2]
    for key in sorted(pool, key=lambda key: (-key.distinct, key.name))[:12] if len(times) > 1 else ():
        change_rates = schema.profile.change_rates([key.name], [time.name for time in times])
        finest = max((time.distinct for time in times if change_rates[time.name] > 10 * MAX_CHANGE_RATE), default=0)
        times = [time for time in times if not (change_rates[time.name] <= MAX_CHANGE_RATE and time.distinct < finest)]
    return times


def _find_request(schema: InferredSchema) -> None:
    keys = schema.keys
    if "request" in keys:
        _find_scope(schema, keys["request"], True)
        return
    pool = [id_ for id_ in schema.unassigned() if id_.may_be_id and id_.distinct > 1]
    fitting = [(-rank, -id_.distinct, id_.name) for id_ in pool if (rank := match_key_name(id_.name, "request"))]
    for rank, _, name in sorted(fitting):
        if _find_scope(schema, name, False):
            keys["request"] = name
            return
        if rank == -2 and _spans_minutes(schema, name):
            keys["request"] = name
            schema.key_checks["request"] = "the times of its rows differ by minutes, and the first one counts"
            return
    if "time" not in keys:
        return
    # The name doesn't matter here. A request has one time, so there are at least as many requests as times.
    min_distinct = 0.9 * schema.columns[keys["time"]].distinct
    for column in sorted(schema.unassigned(), key=lambda column: (column.distinct, column.name)):
        fits = max(20, min_distinct) <= column.distinct <= 0.9 * column.rows
        if not column.may_be_id or not fits:
            continue
        fixed = [keys[key_name] for key_name in ("user", "time") if key_name in keys]
        changes = schema.profile.change_rates([column.name], fixed).values()
        if schema.profile.rows_per_key([column.name]) > 1.2 and all(change <= _ERROR_RATE for change in changes):
            keys["request"] = column.name
            schema.key_checks["request"] = "no name says so, but its rows have one time"
            return


def _find_scope(schema: InferredSchema, name: str, named_by_user: bool) -> bool:
    """Return whether a column identifies requests, and set `request_scope` if its IDs are unique only for each user.

    Rows with equal ID (or equal ID and user) must have one user and one time, with few exceptions. With `named_by_user`
    (the person who runs `init`), the column always counts.
    """
    keys = schema.keys
    fixed = [keys[key_name] for key_name in ("user", "time") if key_name in keys and keys[key_name] != name]
    if not fixed:
        return True
    if schema.profile.rows_per_key([name]) < 1.02:
        return named_by_user  # A request would have one row. Accept this only for a column that the user named.
    change_rates = schema.profile.change_rates([name], fixed)
    if all(change_rates[column] <= _ERROR_RATE for column in fixed):
        return True
    if "user" in keys and "time" in keys:
        of_user = schema.profile.change_rates([keys["user"], name], [keys["time"]])[keys["time"]]
        if of_user <= _ERROR_RATE or math.isnan(of_user):
            schema.request_scope = "user"
            schema.key_checks["request"] = "its IDs count within a user: several users share some of them"
            return True
    if named_by_user and "user" in keys and change_rates[keys["user"]] > _ERROR_RATE:
        schema.request_scope = "user"
    return named_by_user


def _spans_minutes(schema: InferredSchema, name: str) -> bool:
    """Return whether almost every value of a column has one user, and times within half an hour, in all its rows."""
    keys, profile = schema.keys, schema.profile
    if "time" not in keys or profile.rows_per_key([name]) < 1.2:
        return False
    fixed = [keys["user"]] if "user" in keys else []
    sql, t = schema.columns[name].sql, schema.columns[keys["time"]].time_sql
    spans = f"SELECT quantile_disc(s, 0.95) FROM (SELECT max({t}) - min({t}) s FROM log GROUP BY {sql})"
    has_one_user = all(change <= _ERROR_RATE for change in profile.change_rates([name], fixed).values())
    return has_one_user and int(profile.scalar(spans)) < _MAX_REQUEST_SECONDS * 1_000_000


def _find_by_structure(schema: InferredSchema) -> None:
    """Find missing user and candidate keys by dependencies: a request determines its user but not its candidates."""
    keys, pool = schema.keys, _shared_ids(schema)[:12]
    group = [keys["request"]] if "request" in keys else [keys[name] for name in ("user", "time") if name in keys]
    within = schema.profile.change_rates(group, [column.name for column in pool])
    users = [column for column in pool if within[column.name] <= _ERROR_RATE and _may_be_user(column)]
    if "user" not in keys and users:
        named = [column for column in users if has_word(column.name, ID_WORDS)] or users
        keys["user"] = max(named, key=lambda column: (column.kind == "text", column.distinct, column.name)).name
        schema.key_checks["user"] = "no name says so, but it is the same in all rows of a request"
    candidates = [column for column in pool if within[column.name] > _ERROR_RATE]
    if "candidate" not in keys and candidates and not keys.keys().isdisjoint(("user", "request")):
        keys["candidate"] = max(candidates, key=lambda column: (column.distinct, column.name)).name
        schema.key_checks["candidate"] = "no name says so, but it differs within requests"


def _shared_ids(schema: InferredSchema) -> list[Column]:
    """Return columns that may hold IDs with several rows each, most values first. Empty if the log has no times."""
    pool = [column for column in schema.unassigned() if column.may_be_id and not column.is_binary]
    pool = [column for column in pool if 30 <= column.distinct <= 0.5 * column.rows]
    pool = [column for column in pool if column.kind != "integer" or not has_word(column.name, _AMOUNT_WORDS)]
    return sorted(pool, key=lambda column: (-column.distinct, column.name)) if "time" in schema.keys else []


def _may_be_user(column: Column) -> bool:
    """Return whether a column may identify users: its name doesn't suggest an amount, a time or a group of users."""
    return not has_word(column.name, GROUP_WORDS | TIME_WORDS) and (
        column.kind == "text" or not has_stem(column.name, OUTCOME_STEMS + NUMERIC_LABEL_STEMS)
    )


def _check_repeats(schema: InferredSchema) -> None:
    keys, profile = schema.keys, schema.profile
    if "request" in keys:
        group = [keys["request"]] + ([keys["user"]] if schema.request_scope == "user" else [])
    else:
        group = [keys[name] for name in ("user", "time") if name in keys]
    schema.request_keys = group if "request" in keys or "user" in keys else []
    schema.rows_per_request = profile.rows_per_key(schema.request_keys) if schema.request_keys else 1.0
    by = [*schema.request_keys, keys["candidate"]] if schema.request_keys and "candidate" in keys else []
    if by and (repeats := profile.count_duplicates(by)):  # By default, one repeated row stops a run.
        why = f"{repeats:,} of {profile.rows:,} rows repeat a candidate of their request"
        schema.key_checks["duplicates"] = why
        schema.warnings.append(f"{why}: are these rows intended?")
