"""What a log means, by the words of its columns' names and by what goes together in its rows: a user's country does not
change from one of the user's requests to the next. Of each guess that a person should check, `checks` says why."""

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

_FEWEST_USERS = 10
_FEWEST_CANDIDATES = 20
"""In a table without users and requests."""
_ALMOST = 0.01
"""What changes so seldom is the same but for errors."""
_PARSE = "write them as timestamps, say with pandas.to_datetime, or as whole s, ms, us or ns since 1970"
_AMOUNTS = PAST_WORDS | {"price", "age", "length", "size", "year"}
_SPAN = 1800
"""Seconds in which the rows of a list are shown."""
_SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "holdout": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_TEXT = 40
"""Characters of the mean value from which text is no name of a thing."""


def infer_schema(profile: Profile, corrections: Corrections) -> InferredSchema:
    """What a log means. Raises UserError where it can't be used, or a correction names no column that fits."""
    schema = InferredSchema(profile, corrections)
    _check_corrections(schema)
    _leave_out(schema)
    _find_keys(schema)
    _find_weights(schema)
    _find_split(schema)
    infer_tasks(schema)
    infer_roles(schema)
    infer_label_delays(schema)
    return schema


def _check_corrections(schema: InferredSchema) -> None:
    named: dict[str, str] = {}  # column -> the option that names it as a key
    for option, name in ((option, name) for option, names in schema.corrections.items() for name in names):
        if option in KEY_NAMES and (twin := named.setdefault(name, option)) != option:
            raise UserError(f"--{twin} and --{option} both name column '{name}': one column is one of them")
        if name not in schema.columns:
            near = get_close_matches(name, schema.columns, 1) or list(schema.columns)[:8]
            log = schema.profile.name
            raise UserError(f"--{option} '{name}' is no column of '{log}'; there are, for example: {', '.join(near)}")


def _leave_out(schema: InferredSchema) -> None:
    """What can't be an input."""
    for each in schema.columns.values():
        why = "as you said" if each.name in schema.corrections.get("leave-out", ()) else _why_unusable(each)
        gap = f"len(list_filter({each.sql}::DOUBLE[], lambda e: e IS NULL OR NOT isfinite(e))) > 0"
        if each.kind == "vector" and why is None and schema.profile.count_rows(gap):
            why = "some of its lists hold null, NaN or infinity: write null instead of the whole list"
        if each.name in schema.profile.unreadable:
            why = schema.profile.unreadable[each.name]
            schema.warnings.append(f"column '{each.name}' is left out: {why}")
        if why and each.name not in schema.corrections.get("task", ()):
            schema.left_out[each.name] = why


def _why_unusable(each: Column) -> str | None:
    why = None
    if each.kind == "empty":
        why = "it is null in all rows"
    elif each.kind == "other":
        why = f"values of type {each.type} can't be read: write what they hold as columns of numbers or text"
    elif each.kind == "integer" and each.high >= 2**63:
        why = "some of its integers need more than 63 bits: write it as text"
    elif each.kind not in ("keys", "vector") and each.distinct <= 1 and not each.nulls:
        why = "it has one value in all rows"
    elif each.kind in ("keys", "vector") and not each.length_range[1]:
        why = "its lists are empty"
    elif each.kind == "vector" and each.length_range[0] != each.length_range[1]:
        why = "its lists of numbers differ in length"
    elif each.kind == "text" and each.mean_length > _TEXT and each.distinct > 0.5 * (each.rows - each.nulls):
        why = "it looks like free text: embed it, and write the vectors as lists of numbers"
    return why


def _find_weights(schema: InferredSchema) -> None:
    for each in schema.unassigned():
        number = each.kind in ("number", "integer") and not each.nulls
        number &= each.name not in schema.corrections.get("task", ())
        if not number or each.low <= 0 or each.distinct < 2:
            continue
        weighs = has_word(each.name, WEIGHT_WORDS) and set(split_words(each.name)) <= WEIGHT_WORDS | WEIGHT_QUALIFIERS
        if weighs and "candidate" in schema.keys:  # as a parcel's, or a row's?
            weighs = (
                not schema.profile.change_rates([schema.keys["candidate"]], [each.name])[each.name] <= MAX_CHANGE_RATE
            )
        if has_word(each.name, SAMPLING_WORDS) and each.high <= 1 and schema.sampling_rate is None:
            schema.sampling_rate = each.name
            schema.checks[each.name] = "by its name taken for the rate at which the row was sampled"
        elif weighs and schema.weight is None:
            schema.weight = each.name
            schema.checks[each.name] = "by its name taken for the weight of the row"


def _find_split(schema: InferredSchema) -> None:
    """The column that says which rows of a table without times are the test."""
    if "time" in schema.keys:
        return
    for each in schema.unassigned():
        if each.kind != "text" or each.nulls or each.distinct > len(_SPLITS) + 2:
            continue
        told = {value: _SPLITS.get(str(value).lower()) for value in schema.profile.values(each.name, 20)}
        if all(told.values()) and len(set(told.values())) > 1:
            parts = {name: sorted(value for value, split in told.items() if split == name) for name in SPLITS}
            for name, values in parts.items():
                if not values:
                    raise UserError(
                        f"column '{each.name}' says which rows are train, validation or test, but of none that it is "
                        f"{name}: call a part of the rows '{name}'"
                    )
            schema.split = each.name, parts
            return
    named = [
        name
        for name in schema.columns
        if has_word(name, TIME_WORDS | CLOCK_WORDS) and not has_word(name, PAST_WORDS | ID_WORDS)
    ]
    times = f" By name {', '.join(named)} may be the time, but has no times of requests: {_PARSE}." if named else ""
    raise UserError(
        f"'{schema.profile.name}' has neither a column of times nor one that says which rows are train, validation "
        f"and test.{times} Name the times with --time, or add a column 'split' of train, validation and test"
    )


# Keys: who, what, when and in which list


def _find_keys(schema: InferredSchema) -> None:
    """Fills in `keys`, what belongs to them, and `request_keys`. Raises UserError for a given column that can't be
    one."""
    keys, given = schema.keys, schema.corrections
    for key_name in KEY_NAMES:
        for name in given.get(key_name, ()):
            _check_key(schema, key_name, schema.columns[name])
            keys[key_name] = name
    _find_by_name(schema, "user")
    _find_by_name(schema, "candidate")
    _find_time(schema)
    _find_request(schema)
    _find_by_structure(schema)
    if schema.is_plain_table and "candidate" not in given and 0 < schema.distinct("candidate") < _FEWEST_CANDIDATES:
        del keys["candidate"]  # a column like the others, such as a person's job
    for key_name in ("user", "candidate"):
        free = key_name in keys and key_name not in given and "request" not in keys
        if free and schema.profile.is_unique(keys[key_name]):  # nothing is known of a row by it
            schema.key_checks.pop(key_name, None)
            schema.left_out[keys.pop(key_name)] = "it differs in each row"
    _check_repeats(schema)
    if "user" not in keys:
        names = ", ".join([each.name for each in _shared_ids(schema) if _may_be_user(each)][:3])
        why = "no user column was found, so no feature follows a user"
        schema.key_checks["user"] = f"{why}. If there is one{names and f' (perhaps {names})'}, name it with --user"


def _check_key(schema: InferredSchema, key_name: str, each: Column) -> None:
    if key_name == "time" and not each.may_be_time:
        raise UserError(f"--time '{each.name}' holds no times that can be read ({each.type}): {_PARSE}")
    if key_name != "time" and each.kind not in ("integer", "text"):
        raise UserError(f"--{key_name} '{each.name}' holds values of type {each.type}; ids are integers or text")
    if each.nulls:
        raise UserError(f"--{key_name} '{each.name}' is null in {each.nulls:,} rows: leave those rows out")
    schema.left_out.pop(each.name, None)


def _find_by_name(schema: InferredSchema, key_name: str) -> None:
    if key_name in schema.keys:
        return
    ranks = {name: match_key_name(name, key_name) for name in schema.columns}
    fewest = _FEWEST_USERS if key_name == "user" else 2
    usable = [
        each
        for each in schema.unassigned()
        if ranks[each.name] and each.can_be_key and not each.unit and not each.is_binary and each.distinct >= fewest
    ]
    if not usable:
        for each in schema.columns.values():
            if ranks[each.name] == 2 and (each.nulls or each.kind in ("number", "other")) and not each.may_be_time:
                why = f"it looks like the {key_name}, but ids are integers or text, without nulls"
                schema.leave_out(each.name, why)
                schema.warnings.append(f"'{each.name}' is left out: {why} ({each.type}, {each.nulls:,} nulls)")
        return
    unique = int(0.9 * schema.profile.rows)  # as of a message that the user was sent

    def order(each: Column) -> tuple[int, bool, int, list[int]]:
        distinct = min(each.distinct, unique)
        return ranks[each.name], distinct < unique, distinct, [-ord(sign) for sign in each.name]

    name = max(usable, key=order).name
    schema.keys[key_name] = name
    others = sorted(each.name for each in usable if ranks[each.name] == ranks[name] and each.name != name)
    doubts = [f"'{name}' stands for the {key_name}, as no column has a better name"] if ranks[name] == 1 else []
    doubts += [f"it could also be {', '.join(others)}"] if others else []
    if doubts:
        schema.key_checks[key_name] = "; ".join(doubts)


def _find_time(schema: InferredSchema) -> None:
    keys = schema.keys
    if "time" in keys:
        schema.time_unit = schema.columns[keys["time"]].unit
        return
    found = [each for each in schema.unassigned() if each.may_be_time and not each.nulls and each.distinct > 1]
    found = [each for each in found if each.name not in schema.profile.path_columns]
    named = [each for each in found if each.kind == "time" or has_word(each.name, TIME_WORDS)]
    found = named or [each for each in found if each.distinct > 0.01 * each.rows]
    found = _without_attributes(schema, _without_times_of_keys(schema, found))
    if not found:
        return

    def order(each: Column) -> tuple[int, bool, int, str]:
        shares = [schema.profile.fraction(f"{each.time_sql} <= {other.time_sql}") for other in found]
        return (
            -sum(fraction > 0.98 for fraction in shares),
            not has_word(each.name, TIME_WORDS),
            -each.distinct,
            each.name,
        )

    best = min(found, key=order)
    keys["time"] = best.name
    schema.time_unit = best.unit
    if not named:
        schema.key_checks["time"] = f"no name says so, but its integers may count {best.unit} since 1970"
    if others := ", ".join(sorted(each.name for each in found if each is not best)):
        schema.key_checks["time"] = f"it lies before {others} in most rows, so it is taken for the request's time"


def _without_times_of_keys(schema: InferredSchema, times: list[Column]) -> list[Column]:
    """Return the times that change for a user and a candidate, unlike the days of a birth or of publication."""
    for key_name in ("user", "candidate"):
        key = schema.keys.get(key_name)
        if not times or key is None or match_key_name(key, key_name) == 1:
            continue
        change_rates = schema.profile.change_rates([key], [each.name for each in times])
        own, times = times, [each for each in times if not change_rates[each.name] <= MAX_CHANGE_RATE]
        if not times:
            name = max(own, key=lambda each: (each.distinct, each.name)).name
            schema.warnings.append(
                f"'{name}' hardly changes for a {key_name}, so it is not taken for the request's time: if it is "
                f"that, say --time {shlex.quote(name)}"
            )
    return times


def _without_attributes(schema: InferredSchema, times: list[Column]) -> list[Column]:
    """Return the times without those of things, such as the start of a session.

    A column determines such a time, and does not determine another time of more values.
    """
    pool = [
        each
        for each in schema.unassigned()
        if each.can_be_key and each.unit is None and 1 < each.distinct < each.rows / 2
    ]
    for key in sorted(pool, key=lambda each: (-each.distinct, each.name))[:12] if len(times) > 1 else ():
        change_rates = schema.profile.change_rates([key.name], [each.name for each in times])
        most = max((each.distinct for each in times if change_rates[each.name] > 10 * MAX_CHANGE_RATE), default=0)
        times = [each for each in times if not (change_rates[each.name] <= MAX_CHANGE_RATE and each.distinct < most)]
    return times


def _find_request(schema: InferredSchema) -> None:
    keys = schema.keys
    if "request" in keys:
        _find_scope(schema, keys["request"], True)
        return
    named = [each for each in schema.unassigned() if each.can_be_key and each.unit is None and each.distinct > 1]
    fitting = [(-rank, -each.distinct, each.name) for each in named if (rank := match_key_name(each.name, "request"))]
    for rank, _, name in sorted(fitting):
        if _find_scope(schema, name, False):
            keys["request"] = name
            return
        if rank == -2 and _spans_minutes(schema, name):
            keys["request"] = name
            schema.key_checks["request"] = "the times of its rows differ by minutes: they take the first"
            return
    if "time" not in keys:
        return
    # Whatever it is called: its rows have one user and one time, so there are as many of it as of the latter, or more.
    least = 0.9 * schema.columns[keys["time"]].distinct
    for each in sorted(schema.unassigned(), key=lambda each: (each.distinct, each.name)):
        if not each.can_be_key or each.unit is not None or not max(20, least) <= each.distinct <= 0.9 * each.rows:
            continue
        of_list = [keys[key_name] for key_name in ("user", "time") if key_name in keys]
        change_rates = schema.profile.change_rates([each.name], of_list)
        if schema.profile.rows_per_key([each.name]) > 1.2 and all(
            change <= _ALMOST for change in change_rates.values()
        ):
            keys["request"] = each.name
            schema.key_checks["request"] = "no name says so, but its rows have one time"
            return


def _find_scope(schema: InferredSchema, name: str, given: bool) -> bool:
    """Whether a column says which rows were one list: rows with its value, or with it and the user's, have one
    user and, in all but a few, one time."""
    keys = schema.keys
    fixed = [keys[each] for each in ("user", "time") if each in keys and keys[each] != name]
    if not fixed:
        return True
    if schema.profile.rows_per_key([name]) < 1.02:
        return given  # each row is its own anyway
    change_rates = schema.profile.change_rates([name], fixed)
    if all(change_rates[each] <= _ALMOST for each in fixed):
        return True
    if "user" in keys and "time" in keys:
        of_user = schema.profile.change_rates([keys["user"], name], [keys["time"]])[keys["time"]]
        if of_user <= _ALMOST or math.isnan(of_user):
            schema.request_scope = "user"
            schema.key_checks["request"] = "its ids are a user's own: several users share some of them"
            return True
    if given and "user" in keys and change_rates[keys["user"]] > _ALMOST:
        schema.request_scope = "user"
    return given


def _spans_minutes(schema: InferredSchema, name: str) -> bool:
    """Whether rows of a value have one user, and times that lie near each other."""
    keys, profile = schema.keys, schema.profile
    if "time" not in keys or profile.rows_per_key([name]) < 1.2:
        return False
    fixed = [keys["user"]] if "user" in keys else []
    sql, t = schema.columns[name].sql, schema.columns[keys["time"]].time_sql
    spans = f"SELECT quantile_disc(s, 0.95) FROM (SELECT max({t}) - min({t}) s FROM log GROUP BY {sql})"
    same = all(change <= _ALMOST for change in profile.change_rates([name], fixed).values())
    return same and int(profile.scalar(spans)) < _SPAN * 1_000_000


def _find_by_structure(schema: InferredSchema) -> None:
    """Find a user and a candidate that no name tells: a request determines its user, and its candidates differ."""
    keys, pool = schema.keys, _shared_ids(schema)[:12]
    group = [keys["request"]] if "request" in keys else [keys[each] for each in ("user", "time") if each in keys]
    within = schema.profile.change_rates(group, [each.name for each in pool])
    users = [each for each in pool if within[each.name] <= _ALMOST and _may_be_user(each)]
    if "user" not in keys and users:
        named = [each for each in users if has_word(each.name, ID_WORDS)] or users
        keys["user"] = max(named, key=lambda each: (each.kind == "text", each.distinct, each.name)).name
        schema.key_checks["user"] = "no name says so, but rows of one list have one value of it"
    candidates = [each for each in pool if within[each.name] > _ALMOST]
    if "candidate" not in keys and candidates and not keys.keys().isdisjoint(("user", "request")):  # else no lists
        keys["candidate"] = max(candidates, key=lambda each: (each.distinct, each.name)).name
        schema.key_checks["candidate"] = "no name says so, but it differs within lists"


def _shared_ids(schema: InferredSchema) -> list[Column]:
    """Return the columns of a log with times that may hold ids of what occurs in several rows, the finest first."""
    pool = [each for each in schema.unassigned() if each.can_be_key and each.unit is None and not each.is_binary]
    pool = [each for each in pool if 30 <= each.distinct <= 0.5 * each.rows]
    pool = [each for each in pool if each.kind != "integer" or not has_word(each.name, _AMOUNTS)]
    return sorted(pool, key=lambda each: (-each.distinct, each.name)) if "time" in schema.keys else []


def _may_be_user(each: Column) -> bool:
    """Whether nothing in a column's name says that it holds amounts, times, or places of many users."""
    return not has_word(each.name, GROUP_WORDS | TIME_WORDS) and (
        each.kind == "text" or not has_stem(each.name, OUTCOME_STEMS + NUMERIC_LABEL_STEMS)
    )


def _check_repeats(schema: InferredSchema) -> None:
    keys, profile = schema.keys, schema.profile
    if "request" in keys:
        group = [keys["request"]] + ([keys["user"]] if schema.request_scope == "user" else [])
    else:
        group = [keys[each] for each in ("user", "time") if each in keys]
    schema.request_keys = group if "request" in keys or "user" in keys else []
    schema.rows_per_request = profile.rows_per_key(schema.request_keys) if schema.request_keys else 1.0
    by = [*schema.request_keys, keys["candidate"]] if schema.request_keys and "candidate" in keys else []
    if by and (repeats := profile.count_duplicates(by)):  # a single one stops a training
        why = f"{repeats:,} of {profile.rows:,} rows repeat a candidate of their request"
        schema.key_checks["duplicates"] = why
        schema.warnings.append(f"{why}: is each of them meant?")
