"""What a log means, by the words of its columns' names and by what goes together in its rows: a user's country does not
change from one of the user's requests to the next. Of each guess that a person should check, `checks` says why."""

from __future__ import annotations

from difflib import get_close_matches

from mmoe_rec.errors import UserError
from mmoe_rec.profiling.keys import find_keys
from mmoe_rec.profiling.labels import find_maturity, find_tasks
from mmoe_rec.profiling.meaning import PURPOSES, STEADY, Corrections, Meaning
from mmoe_rec.profiling.profile import Column, Profile
from mmoe_rec.profiling.roles import find_roles
from mmoe_rec.profiling.words import SAMPLING, WEIGHED, WEIGHT, has, words_of
from mmoe_rec.settings.log_columns import SPLITS

_SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "holdout": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_TEXT = 40
"""Characters of the mean value from which text is no name of a thing."""


def guess(profile: Profile, corrections: Corrections) -> Meaning:
    """What a log means. Raises UserError where it can't be used, or a correction names no column that fits."""
    meaning = Meaning(profile, corrections)
    _check_corrections(meaning)
    _leave_out(meaning)
    find_keys(meaning)
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
    said = next((f"{each}; or " for each in meaning.warnings if "--time" in each or "pandas.to_datetime" in each), "")
    of_request = f"[log['{meaning.keys['request']}'].factorize()[0]]" if "request" in meaning.keys else ""
    raise UserError(
        f"'{meaning.profile.name}' has neither a column of times (--time) nor one that says which rows are train, "
        f"validation and test: {said}add the latter with pandas: log['split'] = numpy.random.default_rng(1).choice("
        f"['train', 'validation', 'test'], len(log), p=[0.8, 0.1, 0.1]){of_request}"
    )
