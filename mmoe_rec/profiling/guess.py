"""What a log means, by the words of its columns' names and by what goes together in its rows: a user's country does not
change from one of the user's requests to the next. Of each guess that a person should check, `checks` says why."""

import math
import shlex
from difflib import get_close_matches

from mmoe_rec.errors import UserError
from mmoe_rec.profiling.labels import find_maturity, find_tasks
from mmoe_rec.profiling.meaning import PURPOSES, STEADY, Corrections, Meaning
from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.profiling.roles import find_roles
from mmoe_rec.profiling.words import (
    BEFORE,
    CLOCK,
    IDS,
    NUMBERS,
    OUTCOMES,
    SAMPLING,
    SHARED,
    TIME,
    WEIGHED,
    WEIGHT,
    begins,
    has,
    rank_of,
    words_of,
)
from mmoe_rec.settings.log_columns import SPLITS

_FEWEST_USERS = 10
_FEWEST_CANDIDATES = 20
"""In a table without users and requests."""
_ALMOST = 0.01
"""What changes so seldom is the same but for errors."""
_PARSE = "write them as timestamps, say with pandas.to_datetime, or as whole s, ms, us or ns since 1970"
_AMOUNTS = BEFORE | {"price", "age", "length", "size", "year"}
_SPAN = 1800
"""Seconds in which the rows of a list are shown."""
_SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "holdout": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_TEXT = 40
"""Characters of the mean value from which text is no name of a thing."""


def guess(profile: Profile, corrections: Corrections) -> Meaning:
    """What a log means. Raises UserError where it can't be used, or a correction names no column that fits."""
    meaning = Meaning(profile, corrections)
    _check_corrections(meaning)
    _leave_out(meaning)
    _find_keys(meaning)
    _find_weights(meaning)
    _find_split(meaning)
    find_tasks(meaning)
    find_roles(meaning)
    find_maturity(meaning)
    return meaning


def _check_corrections(meaning: Meaning) -> None:
    named: dict[str, str] = {}  # column -> the option that names it as a key
    for option, name in ((option, name) for option, names in meaning.corrections.items() for name in names):
        if option in PURPOSES and (twin := named.setdefault(name, option)) != option:
            raise UserError(f"--{twin} and --{option} both name column '{name}': one column is one of them")
        if name not in meaning.columns:
            near = get_close_matches(name, meaning.columns, 1) or list(meaning.columns)[:8]
            log = meaning.profile.name
            raise UserError(f"--{option} '{name}' is no column of '{log}'; there are, for example: {', '.join(near)}")


def _leave_out(meaning: Meaning) -> None:
    """What can't be an input."""
    for each in meaning.columns.values():
        why = "as you said" if each.name in meaning.corrections.get("leave-out", ()) else _why_unusable(each)
        gap = f"len(list_filter({each.sql}::DOUBLE[], lambda e: e IS NULL OR NOT isfinite(e))) > 0"
        if each.kind == "vector" and why is None and meaning.profile.count(gap):
            why = "some of its lists hold null, NaN or infinity: write null instead of the whole list"
        if each.name in meaning.profile.unreadable:
            why = meaning.profile.unreadable[each.name]
            meaning.warnings.append(f"column '{each.name}' is left out: {why}")
        if why and each.name not in meaning.corrections.get("task", ()):
            meaning.left_out[each.name] = why


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
    elif each.kind in ("keys", "vector") and not each.lengths[1]:
        why = "its lists are empty"
    elif each.kind == "vector" and each.lengths[0] != each.lengths[1]:
        why = "its lists of numbers differ in length"
    elif each.kind == "text" and each.long > _TEXT and each.distinct > 0.5 * (each.rows - each.nulls):
        why = "it looks like free text: embed it, and write the vectors as lists of numbers"
    return why


def _find_weights(meaning: Meaning) -> None:
    for each in meaning.free():
        number = each.kind in ("number", "integer") and not each.nulls
        number &= each.name not in meaning.corrections.get("task", ())
        if not number or each.low <= 0 or each.distinct < 2:
            continue
        weighs = has(each.name, WEIGHT) and set(words_of(each.name)) <= WEIGHT | WEIGHED
        if weighs and "candidate" in meaning.keys:  # as a parcel's, or a row's?
            weighs = not meaning.profile.changes([meaning.keys["candidate"]], [each.name])[each.name] <= STEADY
        if has(each.name, SAMPLING) and each.high <= 1 and meaning.sampling_rate is None:
            meaning.sampling_rate = each.name
            meaning.checks[each.name] = "by its name taken for the rate at which the row was sampled"
        elif weighs and meaning.weight is None:
            meaning.weight = each.name
            meaning.checks[each.name] = "by its name taken for the weight of the row"


def _find_split(meaning: Meaning) -> None:
    """The column that says which rows of a table without times are the test."""
    if "time" in meaning.keys:
        return
    for each in meaning.free():
        if each.kind != "text" or each.nulls or each.distinct > len(_SPLITS) + 2:
            continue
        told = {value: _SPLITS.get(str(value).lower()) for value in meaning.profile.values(each.name, 20)}
        if all(told.values()) and len(set(told.values())) > 1:
            parts = {name: sorted(value for value, split in told.items() if split == name) for name in SPLITS}
            for name, values in parts.items():
                if not values:
                    raise UserError(
                        f"column '{each.name}' says which rows are train, validation or test, but of none that it is "
                        f"{name}: call a part of the rows '{name}'"
                    )
            meaning.split = each.name, parts
            return
    named = [name for name in meaning.columns if has(name, TIME | CLOCK) and not has(name, BEFORE | IDS)]
    times = f" By name {', '.join(named)} may be the time, but has no times of requests: {_PARSE}." if named else ""
    raise UserError(
        f"'{meaning.profile.name}' has neither a column of times nor one that says which rows are train, validation "
        f"and test.{times} Name the times with --time, or add a column 'split' of train, validation and test"
    )


# Keys: who, what, when and in which list


def _find_keys(meaning: Meaning) -> None:
    """Fills in `keys`, what belongs to them, and `list_keys`. Raises UserError for a given column that can't be one."""
    keys, given = meaning.keys, meaning.corrections
    for purpose in PURPOSES:
        for name in given.get(purpose, ()):
            _check_key(meaning, purpose, meaning.columns[name])
            keys[purpose] = name
    _find_by_name(meaning, "user")
    _find_by_name(meaning, "candidate")
    _find_time(meaning)
    _find_request(meaning)
    _find_by_structure(meaning)
    if meaning.is_plain and "candidate" not in given and 0 < meaning.distinct("candidate") < _FEWEST_CANDIDATES:
        del keys["candidate"]  # a column like the others, such as a person's job
    for purpose in ("user", "candidate"):
        free = purpose in keys and purpose not in given and "request" not in keys
        if free and meaning.profile.is_unique(keys[purpose]):  # nothing is known of a row by it
            meaning.key_checks.pop(purpose, None)
            meaning.left_out[keys.pop(purpose)] = "it differs in each row"
    _check_repeats(meaning)
    if "user" not in keys:
        names = ", ".join([each.name for each in _shared_ids(meaning) if _may_be_user(each)][:3])
        why = "no user column was found, so no feature follows a user"
        meaning.key_checks["user"] = f"{why}. If there is one{names and f' (perhaps {names})'}, name it with --user"


def _check_key(meaning: Meaning, purpose: str, each: Column) -> None:
    if purpose == "time" and not each.is_time:
        raise UserError(f"--time '{each.name}' holds no times that can be read ({each.type}): {_PARSE}")
    if purpose != "time" and each.kind not in ("integer", "text"):
        raise UserError(f"--{purpose} '{each.name}' holds values of type {each.type}; ids are integers or text")
    if each.nulls:
        raise UserError(f"--{purpose} '{each.name}' is null in {each.nulls:,} rows: leave those rows out")
    meaning.left_out.pop(each.name, None)


def _find_by_name(meaning: Meaning, purpose: str) -> None:
    if purpose in meaning.keys:
        return
    ranks = {name: rank_of(name, purpose) for name in meaning.columns}
    fewest = _FEWEST_USERS if purpose == "user" else 2
    usable = [
        each
        for each in meaning.free()
        if ranks[each.name] and each.is_key and not each.unit and not each.binary and each.distinct >= fewest
    ]
    if not usable:
        for each in meaning.columns.values():
            if ranks[each.name] == 2 and (each.nulls or each.kind in ("number", "other")) and not each.is_time:
                why = f"it looks like the {purpose}, but ids are integers or text, without nulls"
                meaning.leave_out(each.name, why)
                meaning.warnings.append(f"'{each.name}' is left out: {why} ({each.type}, {each.nulls:,} nulls)")
        return
    unique = int(0.9 * meaning.profile.rows)  # as of a message that the user was sent

    def order(each: Column) -> tuple[int, bool, int, list[int]]:
        distinct = min(each.distinct, unique)
        return ranks[each.name], distinct < unique, distinct, [-ord(sign) for sign in each.name]

    name = max(usable, key=order).name
    meaning.keys[purpose] = name
    others = sorted(each.name for each in usable if ranks[each.name] == ranks[name] and each.name != name)
    doubts = [f"'{name}' stands for the {purpose}, as no column has a better name"] if ranks[name] == 1 else []
    doubts += [f"it could also be {', '.join(others)}"] if others else []
    if doubts:
        meaning.key_checks[purpose] = "; ".join(doubts)


def _find_time(meaning: Meaning) -> None:
    keys = meaning.keys
    if "time" in keys:
        meaning.time_unit = meaning.columns[keys["time"]].unit
        return
    found = [each for each in meaning.free() if each.is_time and not each.nulls and each.distinct > 1]
    found = [each for each in found if each.name not in meaning.profile.in_path]
    named = [each for each in found if each.kind == "time" or has(each.name, TIME)]
    found = named or [each for each in found if each.distinct > 0.01 * each.rows]
    found = _without_attributes(meaning, _without_times_of_keys(meaning, found))
    if not found:
        return

    def order(each: Column) -> tuple[int, bool, int, str]:
        shares = [meaning.profile.share(f"{each.microseconds} <= {other.microseconds}") for other in found]
        return -sum(share > 0.98 for share in shares), not has(each.name, TIME), -each.distinct, each.name

    best = min(found, key=order)
    keys["time"] = best.name
    meaning.time_unit = best.unit
    if not named:
        meaning.key_checks["time"] = f"no name says so, but its integers may count {best.unit} since 1970"
    if others := ", ".join(sorted(each.name for each in found if each is not best)):
        meaning.key_checks["time"] = f"it lies before {others} in most rows, so it is taken for the request's time"


def _without_times_of_keys(meaning: Meaning, times: list[Column]) -> list[Column]:
    """Return the times that change for a user and a candidate, unlike the days of a birth or of publication."""
    for purpose in ("user", "candidate"):
        key = meaning.keys.get(purpose)
        if not times or key is None or rank_of(key, purpose) == 1:
            continue
        changes = meaning.profile.changes([key], [each.name for each in times])
        own, times = times, [each for each in times if not changes[each.name] <= STEADY]
        if not times:
            name = max(own, key=lambda each: (each.distinct, each.name)).name
            meaning.warnings.append(
                f"'{name}' hardly changes for a {purpose}, so it is not taken for the request's time: if it is "
                f"that, say --time {shlex.quote(name)}"
            )
    return times


def _without_attributes(meaning: Meaning, times: list[Column]) -> list[Column]:
    """Return the times without those of things, such as the start of a session.

    A column determines such a time, and does not determine another time of more values.
    """
    pool = [each for each in meaning.free() if each.is_key and each.unit is None and 1 < each.distinct < each.rows / 2]
    for key in sorted(pool, key=lambda each: (-each.distinct, each.name))[:12] if len(times) > 1 else ():
        changes = meaning.profile.changes([key.name], [each.name for each in times])
        most = max((each.distinct for each in times if changes[each.name] > 10 * STEADY), default=0)
        times = [each for each in times if not (changes[each.name] <= STEADY and each.distinct < most)]
    return times


def _find_request(meaning: Meaning) -> None:
    keys = meaning.keys
    if "request" in keys:
        _find_scope(meaning, keys["request"], True)
        return
    named = [each for each in meaning.free() if each.is_key and each.unit is None and each.distinct > 1]
    fitting = [(-rank, -each.distinct, each.name) for each in named if (rank := rank_of(each.name, "request"))]
    for rank, _, name in sorted(fitting):
        if _find_scope(meaning, name, False):
            keys["request"] = name
            return
        if rank == -2 and _spans_minutes(meaning, name):
            keys["request"] = name
            meaning.key_checks["request"] = "the times of its rows differ by minutes: they take the first"
            return
    if "time" not in keys:
        return
    # Whatever it is called: its rows have one user and one time, so there are as many of it as of the latter, or more.
    least = 0.9 * meaning.columns[keys["time"]].distinct
    for each in sorted(meaning.free(), key=lambda each: (each.distinct, each.name)):
        if not each.is_key or each.unit is not None or not max(20, least) <= each.distinct <= 0.9 * each.rows:
            continue
        of_list = [keys[purpose] for purpose in ("user", "time") if purpose in keys]
        changes = meaning.profile.changes([each.name], of_list)
        if meaning.profile.rows_per_key([each.name]) > 1.2 and all(change <= _ALMOST for change in changes.values()):
            keys["request"] = each.name
            meaning.key_checks["request"] = "no name says so, but its rows have one time"
            return


def _find_scope(meaning: Meaning, name: str, given: bool) -> bool:
    """Whether a column says which rows were one list: rows with its value, or with it and the user's, have one
    user and, in all but a few, one time."""
    keys = meaning.keys
    fixed = [keys[each] for each in ("user", "time") if each in keys and keys[each] != name]
    if not fixed:
        return True
    if meaning.profile.rows_per_key([name]) < 1.02:
        return given  # each row is its own anyway
    changes = meaning.profile.changes([name], fixed)
    if all(changes[each] <= _ALMOST for each in fixed):
        return True
    if "user" in keys and "time" in keys:
        of_user = meaning.profile.changes([keys["user"], name], [keys["time"]])[keys["time"]]
        if of_user <= _ALMOST or math.isnan(of_user):
            meaning.request_scope = "user"
            meaning.key_checks["request"] = "its ids are a user's own: several users share some of them"
            return True
    if given and "user" in keys and changes[keys["user"]] > _ALMOST:
        meaning.request_scope = "user"
    return given


def _spans_minutes(meaning: Meaning, name: str) -> bool:
    """Whether rows of a value have one user, and times that lie near each other."""
    keys, profile = meaning.keys, meaning.profile
    if "time" not in keys or profile.rows_per_key([name]) < 1.2:
        return False
    fixed = [keys["user"]] if "user" in keys else []
    sql, t = meaning.columns[name].sql, meaning.columns[keys["time"]].microseconds
    spans = f"SELECT quantile_disc(s, 0.95) FROM (SELECT max({t}) - min({t}) s FROM log GROUP BY {sql})"
    same = all(change <= _ALMOST for change in profile.changes([name], fixed).values())
    return same and int(profile.number(spans)) < _SPAN * 1_000_000


def _find_by_structure(meaning: Meaning) -> None:
    """Find a user and a candidate that no name tells: a request determines its user, and its candidates differ."""
    keys, pool = meaning.keys, _shared_ids(meaning)[:12]
    group = [keys["request"]] if "request" in keys else [keys[each] for each in ("user", "time") if each in keys]
    within = meaning.profile.changes(group, [each.name for each in pool])
    users = [each for each in pool if within[each.name] <= _ALMOST and _may_be_user(each)]
    if "user" not in keys and users:
        named = [each for each in users if has(each.name, IDS)] or users
        keys["user"] = max(named, key=lambda each: (each.kind == "text", each.distinct, each.name)).name
        meaning.key_checks["user"] = "no name says so, but rows of one list have one value of it"
    candidates = [each for each in pool if within[each.name] > _ALMOST]
    if "candidate" not in keys and candidates and not keys.keys().isdisjoint(("user", "request")):  # else no lists
        keys["candidate"] = max(candidates, key=lambda each: (each.distinct, each.name)).name
        meaning.key_checks["candidate"] = "no name says so, but it differs within lists"


def _shared_ids(meaning: Meaning) -> list[Column]:
    """Return the columns of a log with times that may hold ids of what occurs in several rows, the finest first."""
    pool = [each for each in meaning.free() if each.is_key and each.unit is None and not each.binary]
    pool = [each for each in pool if 30 <= each.distinct <= 0.5 * each.rows]
    pool = [each for each in pool if each.kind != "integer" or not has(each.name, _AMOUNTS)]
    return sorted(pool, key=lambda each: (-each.distinct, each.name)) if "time" in meaning.keys else []


def _may_be_user(each: Column) -> bool:
    """Whether nothing in a column's name says that it holds amounts, times, or places of many users."""
    return not has(each.name, SHARED | TIME) and (each.kind == "text" or not begins(each.name, OUTCOMES + NUMBERS))


def _check_repeats(meaning: Meaning) -> None:
    keys, profile = meaning.keys, meaning.profile
    if "request" in keys:
        group = [keys["request"]] + ([keys["user"]] if meaning.request_scope == "user" else [])
    else:
        group = [keys[each] for each in ("user", "time") if each in keys]
    meaning.list_keys = group if "request" in keys or "user" in keys else []
    meaning.rows_per_request = profile.rows_per_key(meaning.list_keys) if meaning.list_keys else 1.0
    by = [*meaning.list_keys, keys["candidate"]] if meaning.list_keys and "candidate" in keys else []
    if by and (repeats := profile.count_repeats(by)):  # a single one stops a training
        why = f"{repeats:,} of {profile.rows:,} rows repeat a candidate of their request"
        meaning.key_checks["duplicates"] = why
        meaning.warnings.append(f"{why}: is each of them meant?")
