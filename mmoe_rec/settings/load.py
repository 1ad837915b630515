"""Reads a settings file and command-line overrides, strictly, and says what is wrong in sentences for their author;
all settings as text, for `--help`."""

import builtins
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmoe_rec.errors import UserError
from mmoe_rec.features.kinds import KINDS
from mmoe_rec.settings.log_columns import TaskSettings
from mmoe_rec.settings.sections import Settings, load_yaml

_INSTALLED = Path(__file__).parent / "template.yaml"
TEMPLATE = str(_INSTALLED) if _INSTALLED.is_file() else "configs/template.yaml"
"""The settings file to start from: an installed package has it, the repository keeps it with its other ones."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text, in quotes where it looks like a number or a date",
    "tuple_type": "a list, such as [a, b]",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "longer: at least {min_length} needed",
}
_UNQUOTED = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}


def explain(error: ValidationError, where: Callable[[Any], str]) -> Iterator[str]:
    """Explain each problem in one sentence: where it is, what was expected, what was found, the nearest valid key.

    Args:
        error: The error that pydantic raised.
        where: Returns the source of a problem: a file, or an option.
    """
    sentences: dict[str, None] = {}
    for problem in error.errors():
        if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
            continue  # It is long enough; an invalid entry, which has its own sentence, was not counted.
        sentences[f"{where(problem)}: {_sentence(problem)}"] = None  # once: of a union, each member reports
    yield from sentences


def _sentence(problem: Any) -> str:
    kind, place, value, context = problem["type"], problem["loc"], problem["input"], problem.get("ctx", {})
    if place[-1:] == ("[key]",):
        return f"'{'.'.join(map(str, place[:-2]))}' has the key {place[-2]}, which is not text; put it in quotes"
    location = _location(problem)
    of_union = kind in _EXPECTED and len(location) > 1 and location[-1] in ("bool", "int", "float", "str")
    name, found = ".".join(location[:-1] if of_union else location), _found(value)
    if of_union:
        is_number = location[-2] in ("low", "high")
        kind, expected = "float_type" if is_number else "", "a number" if is_number else "a number, text, true or false"
        text = f"'{name}' must be {expected}{found}{_unquoted(kind, value)}"
    elif kind == "extra_forbidden":
        keys = _valid_keys(place[:-1])
        text = f"unknown key '{name}'{_nearest(location[-1], keys)} (valid here: {', '.join(keys)})"
    elif kind == "missing":
        text = f"key '{name}' is missing ({_meaning(place)})"
    elif kind == "union_tag_not_found":
        text = f"'{name}' needs a kind: {', '.join(KINDS)}"
    elif kind in ("union_tag_invalid", "literal_error"):
        if kind == "union_tag_invalid":
            name, value, found = f"{name}.kind", context["tag"], _found(context["tag"])
        values = context.get("expected_tags", context.get("expected", "")).replace(" or ", ", ").replace("'", "")
        text = f"'{name}' must be one of {values}{found}{_nearest(str(value), values.split(', '))}"
    elif kind == "dict_type":
        text = f"'{name}' must hold a section for each name{found}"
    elif kind in ("model_type", "model_attributes_type"):
        text = f"'{name}' must hold keys ({', '.join(_valid_keys(place)) or 'kind and others'}){found}"
    elif kind in _EXPECTED:
        text = f"'{name}' must be {_EXPECTED[kind].format(**context)}{found}{_unquoted(kind, value)}"
    else:
        message = problem["msg"].removeprefix("Value error, ")
        joint = " " if message.startswith(("must", "lists")) else ": "
        text = f"'{name}'{joint}{message}{found}" if name else message
    return text


def _location(problem: Any) -> list[str]:
    """Return the keys that lead to a problem. pydantic adds members of a union, and a feature's kind, which goes."""
    place = problem["loc"]
    return [str(part) for part in (place[:2] + place[3:] if place[:1] == ("features",) else place)]


def _found(value: Any) -> str:
    """What was found, as YAML writes it."""
    if value is None:
        return ", found nothing (null)"
    if isinstance(value, bool):
        return f", found {str(value).lower()}"
    found = repr(list(value) if isinstance(value, tuple) else value)
    return f", found {found}" if isinstance(value, str | int | float | list | tuple) and len(found) < 80 else ""


def _unquoted(kind: str, value: Any) -> str:
    if kind not in _UNQUOTED or not isinstance(value, str):
        return ""
    try:
        return "; write it without quotes" if type(load_yaml(value)) in _UNQUOTED[kind] else ""
    except yaml.YAMLError:
        return ""


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _meaning(place: Sequence[Any]) -> str:
    model = _model_at(place[:-1])
    description = None if model is None else model.model_fields[place[-1]].description
    return description or f"it holds {', '.join(_valid_keys(place))}"


def _valid_keys(place: Sequence[Any]) -> list[str]:
    model = _model_at(place)
    return [] if model is None else list(model.model_fields)


def _model_at(place: Sequence[Any]) -> type[BaseModel] | None:
    """The section at a place as pydantic tells it, which names the kinds of features."""
    model: Any = Settings
    for part in place:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = without_none(model.model_fields[part].annotation)
        elif typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
        else:  # a feature, by its kind
            model = KINDS[part].feature
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def without_none(annotation: Any) -> Any:
    """The type of a setting that may be null."""
    if isinstance(annotation, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def load_settings(path: str | Path, overrides: Sequence[str] = (), given_by: str = "command line") -> Settings:
    """Read a settings file, apply overrides and check every key.

    Args:
        path: A YAML file.
        overrides: Words such as `--model.experts.count 16`. `--features.NAME null` leaves a feature out.
        given_by: The source of the overrides, for error messages.

    Returns:
        The checked settings.

    Raises:
        UserError: A key or value is wrong. The message has one sentence for each and names the file or the override.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"settings file '{path}' {what}; mmoe-rec init writes one, or start from {TEMPLATE}")
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"settings file '{path}' is not valid YAML: {_yaml_problem(error)}") from None
    except OSError as error:
        raise UserError(f"settings file '{path}' cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must hold keys such as name, data, columns, tasks, features, split")
    check_names(overrides, given_by=given_by)
    given = list(parse_overrides(overrides))
    for key, value in given:
        if value is None and len(key) == 2 and key[0] == "features":
            _leave_out(tree, key[1], given_by)
        else:
            _set(tree, key, value)
    if isinstance(found := _validate(tree), Settings):
        return found
    own, keys = load_yaml(file.read_text(encoding="utf-8")), [key for key, _ in given]  # without the overrides
    alone = _validate(own)
    of_file = [] if isinstance(alone, Settings) else [(each["loc"], each["msg"]) for each in alone.errors()]

    def find_source(problem: Any) -> str:
        location = _location(problem)
        blamed = [key for key in keys if key == location[: len(key)]]  # the file has no part in such a value
        if not blamed and (problem["loc"], problem["msg"]) in of_file:
            return str(path)
        blamed = blamed or [key for key in keys if location == key[: len(location)]] or keys
        return f"{given_by} ({', '.join(dict.fromkeys(f'--{each}' for each in map('.'.join, blamed)))})"

    sections = [(key[:2], own[key[0]]) for key in keys if len(key) > 2 and isinstance(own.get(key[0]), dict)]
    new = {
        f" '{path}' has no '{'.'.join(key)}'{_nearest(key[1], [*names])}"
        for key, names in sections
        if key[1] not in names
    }
    raise UserError(".".join(["; ".join(explain(found, find_source)), *sorted(new)]))


def override_settings(settings: Settings, overrides: Sequence[str], given_by: str) -> Settings:
    """Return settings with overrides, checked.

    Args:
        settings: The settings to change.
        overrides: Words such as `--model.experts.count=16`.
        given_by: The source of the overrides, for error messages.

    Raises:
        UserError: A key or value is wrong.
    """
    check_names(overrides, given_by=given_by)
    tree = settings.model_dump(mode="json")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    if isinstance(found := _validate(tree), Settings):
        return found
    raise UserError("; ".join(explain(found, lambda _: given_by)))


def _validate(tree: Any) -> Settings | ValidationError:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        return error


def _yaml_problem(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b value` and `--a.b=value` as (["a", "b"], value read as YAML)."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"'--{key}' needs a value")
            text = rest.pop(0)
        try:
            yield key.split("."), load_yaml(text)
        except yaml.YAMLError:
            raise UserError(f"the value '{text}' of '--{key}' is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"'--{'.'.join(keys)}' goes below '{'.'.join(keys[:depth])}', which is a single value")
    tree[keys[-1]] = value


def _leave_out(tree: dict[str, Any], name: str, given_by: str) -> None:
    features = tree.get("features")
    if not isinstance(features, dict) or name not in features:
        hint = _nearest(name, [*features]) if isinstance(features, dict) else ""
        raise UserError(f"{given_by}: '--features.{name} null' leaves out a feature that is not there{hint}")
    del features[name]


def check_names(words: Iterable[str], options: Sequence[str] = (), given_by: str = "command line") -> None:
    """Raise UserError for an option that neither the command nor the settings have, and suggest the nearest one.

    Args:
        words: Options, overrides and their values, as they were typed. A value never begins with two dashes.
        options: Names of the command's own options, such as `seeds`.
        given_by: The source of the words, for the error message.
    """
    listed = re.findall(r"^  --(\S+)", describe(), re.MULTILINE)
    settings = [name.split(".") for name in (*listed, "features.NAME.kind")]
    valid = [*options, *(".".join(each[:depth]) for each in settings for depth in range(1, len(each) + 1))]
    by_last = {each.rpartition(".")[2]: each for each in reversed(valid)}
    for name in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
        typed = name.split(".")
        known = any(all(key in ("NAME", own) for key, own in zip(each, typed, strict=False)) for each in settings)
        if known or name in ("", *options):
            continue
        last = [by_last[each] for each in get_close_matches(typed[-1], by_last, 1)]
        near = (last if typed[-1] in by_last else get_close_matches(name, valid, 1)) or last
        hint = f"Did you mean '--{near[0]}'?" if near else "Run the command with --help to list options and settings."
        raise UserError(f"{given_by}: there is no option or setting '--{name}'. {hint}")


def describe(section: str | None = None) -> str:
    """Every setting, or those of one section, with type, default and meaning: the body of `--help`."""
    if section is None:
        return "\n".join(_describe(Settings, ""))
    inner = Settings.model_fields[section].annotation
    assert isinstance(inner, type), f"'{section}' is no section"
    return "\n".join(_describe(inner, f"{section}."))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = without_none(field.annotation)
        sections: dict[str, Any] = {}
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            sections = {f"{prefix}{name}": inner}
        elif name == "features":
            sections = {f"features.NAME (kind: {kind})": each.feature for kind, each in KINDS.items()}
        elif typing.get_origin(inner) is dict:
            sections = {f"{prefix}{name}.NAME": typing.get_args(inner)[1]}
        for heading, section in sections.items():
            yield f"\n{heading}: {(section.__doc__ or '').strip()}"
            yield from _describe(section, f"{heading.partition(' ')[0]}.")
        if not sections and (name != "kind" or model is TaskSettings):
            yield f"  --{prefix}{name}  {_default(field)}\n        {field.description}"


def _default(field: FieldInfo) -> str:
    kind = _words(field.annotation)
    if field.is_required():
        return f"<{kind}> (required)"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"<{kind}> (default {json.dumps(default)})"


def _words(annotation: Any) -> str:
    """A type as a user would say it."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", datetime: "time"}
    simple |= {type(None): "null", Any: "value"}
    if annotation in simple:
        return simple[annotation]
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return " | ".join(map(str, parts))
        case typing.Annotated:
            return _words(parts[0])
        case builtins.tuple:
            return f"list of {_words(parts[0])}"
    return " | ".join(map(_words, parts))
