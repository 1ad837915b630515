"""Reads a settings file and command-line overrides, strictly, and says what is wrong in sentences for their author."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmoe_rec.errors import UserError
from mmoe_rec.features.kinds import KINDS
from mmoe_rec.settings.columns import Section
from mmoe_rec.settings.sections import Settings
from mmoe_rec.settings.yaml_text import load_yaml

_INSTALLED = Path(__file__).parent / "template.yaml"
TEMPLATE = str(_INSTALLED) if _INSTALLED.is_file() else "configs/template.yaml"
"""The settings file to start from: an installed package has it, the repository keeps it with its other ones."""


def explain(error: ValidationError, tree: Any, where: str) -> Iterator[str]:
    """One sentence per problem: where it is, what was expected, what was found, the nearest valid key."""
    told = set()
    for problem in error.errors():
        if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
            continue  # It is long enough; an invalid entry, which has its own sentence, was not counted.
        # A tagged union puts the tag into the location, where the user's file has no such key.
        location = [str(part) for part in _user_location(problem["loc"], tree)]
        sentence = _sentence(problem["type"], location, problem, tree)
        # A union reports each of its members.
        if sentence not in told:
            told.add(sentence)
            yield f"{where}: {sentence}"


def _sentence(kind: str, location: list[str], problem: Any, tree: Any) -> str:
    name, found, context = ".".join(location), _found(problem["input"]), problem.get("ctx", {})
    if location[-1:] == ["[key]"]:
        return f"'{'.'.join(location[:-2])}' has the key {location[-2]}, which is not text; put it in quotes"
    if location[-2:-1] == ["equals"]:
        return f"'{name.rpartition('.')[0]}' must be a number, text, true or false{found}"
    if location[-2:-1] in (["low"], ["high"]):
        return f"'{name.rpartition('.')[0]}' must be a number{found}{_unquoted('float_type', problem['input'])}"
    match kind:
        case "extra_forbidden":
            keys = valid_keys(location[:-1], tree)
            text = f"unknown key '{name}'{_nearest(location[-1], keys)} (valid here: {', '.join(keys)})"
        case "missing":
            text = f"key '{name}' is missing ({_meaning(location, tree)})"
        case "union_tag_not_found":
            text = f"'{name}' needs a kind: {', '.join(feature_kinds())}"
        case "union_tag_invalid":
            kinds, tag = list(feature_kinds()), context["tag"]
            text = f"'{name}.kind' must be one of {', '.join(kinds)}, found '{tag}'{_nearest(tag, kinds)}"
        case "literal_error":
            values = [str(value) for value in _literals(location, tree)]
            text = f"'{name}' must be one of {', '.join(values)}{found}{_nearest(str(problem['input']), values)}"
        case "dict_type":
            text = f"'{name}' must hold a section for each name{found}"
        case "model_type" | "model_attributes_type":
            text = f"'{name}' must hold keys ({', '.join(valid_keys(location, tree)) or 'kind and others'}){found}"
        case _ if kind in _EXPECTED:
            text = f"'{name}' must be {_EXPECTED[kind].format(**context)}{found}{_unquoted(kind, problem['input'])}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            joint = " " if message.startswith(("must", "lists")) else ": "
            text = f"'{name}'{joint}{message}{found}" if name else message
    return text


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text, in quotes where it looks like a number or a date",
    "tuple_type": "a list, such as [a, b]",
    "list_type": "a list, such as [a, b]",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "longer: at least {min_length} needed",
    "datetime_type": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
    "datetime_parsing": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
    "datetime_from_date_parsing": "a time such as 2024-01-31 or 2024-01-31T18:00:00",
}


def _found(value: Any) -> str:
    """What was found, as YAML writes it."""
    if value is None:
        return ", found nothing (null)"
    if isinstance(value, bool):
        return f", found {str(value).lower()}"
    found = repr(list(value) if isinstance(value, tuple) else value)
    return f", found {found}" if isinstance(value, str | int | float | list | tuple) and len(found) < 80 else ""


def _unquoted(kind: str, value: Any) -> str:
    wanted = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}.get(kind)
    if wanted is None or not isinstance(value, str):
        return ""
    try:
        meant = load_yaml(value)
    except yaml.YAMLError:
        return ""
    return "; write it without quotes" if type(meant) in wanted else ""


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _meaning(location: Sequence[str], tree: Any) -> str:
    field = _field(location, tree)
    if field is None or field.description is None:
        return f"it holds {', '.join(valid_keys(location, tree)) or 'a value'}"
    return field.description


def _field(location: Sequence[str], tree: Any) -> FieldInfo | None:
    model = _model_at(location[:-1], tree)
    return model.model_fields.get(location[-1]) if model is not None else None


def _literals(location: Sequence[str], tree: Any) -> Iterator[Any]:
    names = list(location)
    while names and names[-1].isdigit():
        names.pop()
    field = _field(names, tree)
    waiting = [field.annotation] if field is not None else []
    while waiting:
        annotation = waiting.pop(0)
        if typing.get_origin(annotation) is typing.Literal:
            yield from typing.get_args(annotation)
        else:
            waiting += typing.get_args(annotation)


def _user_location(location: tuple[int | str, ...], tree: Any) -> Iterator[int | str]:
    for index, part in enumerate(location):
        if isinstance(tree, dict) and part not in tree and part == tree.get("kind"):
            continue
        yield part
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list | tuple) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif index < len(location) - 1:
            tree = None


def valid_keys(location: Sequence[str], tree: Any) -> list[str]:
    """Keys that are valid at a place of the settings."""
    model = _model_at(location, tree)
    return list(model.model_fields) if model is not None else []


def _model_at(location: Sequence[str], tree: Any) -> type[BaseModel] | None:
    model: Any = Settings
    for part in location:
        tree = tree.get(part) if isinstance(tree, dict) else None
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        elif typing.get_origin(model) is dict:
            model = typing.get_args(model)[1]
            if typing.get_origin(model) is typing.Annotated:
                kind = tree.get("kind") if isinstance(tree, dict) else None
                model = feature_kinds().get(str(kind))
        else:
            model = None
        model = without_none(model)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def feature_kinds() -> dict[str, type[Section]]:
    return {name: kind.settings for name, kind in KINDS.items()}


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file, applies overrides such as `--model.experts.count 16`, and checks every key.

    Raises UserError with one sentence per wrong key.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"settings file '{path}' {what}; start from {TEMPLATE}")
    try:
        tree = load_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"settings file '{path}' is not valid YAML: {_yaml_problem(error)}") from None
    except OSError as error:
        raise UserError(f"settings file '{path}' cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must hold keys such as name, data, columns, tasks, features, split")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, tree, str(path)))) from None


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
        if not argument.startswith("--"):
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        key, equals, text = argument[2:].partition("=")
        if not all(key.split(".")):
            raise UserError(f"'{argument}' is not a setting; write --section.key value")
        if not equals:
            if not rest:
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
