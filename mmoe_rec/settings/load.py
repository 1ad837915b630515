"""Read a settings file with command-line overrides, check it strictly and explain each error.

The module also describes all settings for `mmoe-rec settings`.
"""

import builtins
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mmoe_rec.errors import UserError, suggest
from mmoe_rec.features.kinds import FEATURE_KINDS
from mmoe_rec.settings.log_columns import TaskSettings
from mmoe_rec.settings.sections import Settings, load_yaml

_INSTALLED = Path(__file__).parent / "template.yaml"
TEMPLATE = str(_INSTALLED) if _INSTALLED.is_file() else "configs/template.yaml"
"""Template of a settings file, in configs/ of the repository or next to this file in an installed package."""

_WORDS = {
    **{"Input should": "must", "Value error, ": "", "valid tuple": "list", "Tuple": "list", "Dictionary": "section"},
    **{"valid integer": "whole number", "valid number": "number"},
    **{"a valid boolean": "true or false", "a valid string": "text"},
}
"""Words in pydantic's messages -> words for users."""


def describe_errors(error: ValidationError, source_of: Callable[[Any], str]) -> Iterator[str]:
    """Describe each problem in one sentence with its key, the expected and the actual value, and the nearest valid key.

    Args:
        error: Error raised by pydantic.
        source_of: Function that returns the file or option that caused a problem, an entry of `error.errors()`.
    """
    # pydantic also reports a list with an invalid entry as too short.
    problems = [problem for problem in error.errors() if problem["type"] != "too_short"] or error.errors()
    yield from dict.fromkeys(f"{source_of(problem)}: {_sentence(problem)}" for problem in problems)


def _sentence(problem: Any) -> str:
    problem_type, loc, value, message = (problem[part] for part in ("type", "loc", "input", "msg"))
    # pydantic adds the kind of a feature and the name of a union member to the location.
    location = [str(part) for part in (loc[:2] + loc[3:] if loc[:1] == ("features",) else loc)]
    name = ".".join(location)
    if problem_type == "extra_forbidden":
        is_feature = loc[0] == "features"
        keys = [*FEATURE_KINDS[loc[2]].feature.model_fields] if is_feature else _keys_at(location[:-1])
        return f"unknown key '{name}'; {suggest(location[-1], keys)}"
    if problem_type == "missing":
        return f"key '{name}' is missing; `mmoe-rec settings` lists all keys"
    if problem_type in ("model_type", "model_attributes_type", "dict_type"):
        return f"'{name}' must contain keys ({', '.join(_keys_at(location))})"
    if problem_type in ("union_tag_not_found", "union_tag_invalid"):
        kind = str(value.get("kind", "nothing"))
        kinds = [*FEATURE_KINDS]
        return f"'{name}.kind' must be one of {', '.join(kinds)}, found '{kind}'{_nearest(kind, kinds)}"
    if location and location[-1] in ("bool", "int", "constrained-int", "float", "str"):
        name = ".".join(location[:-1])
    for old, new in _WORDS.items():
        message = message.replace(old, new)
    value_text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    value_text = repr(list(value)) if isinstance(value, tuple) else value_text
    suffix = f", found {value_text}" if name and len(value_text) < 80 and not isinstance(value, dict) else ""
    suffix += _nearest(str(value), re.findall("'([^']*)'", message)) if problem_type == "literal_error" else ""
    separator = " " if message.startswith(("must", "lists")) else ": "
    return f"'{name}'{separator}{message}{suffix}" if name else message


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


@cache
def _all_settings() -> list[list[str]]:
    """Return the path of each setting, such as [tasks, NAME, kind]. NAME is any name of a task, feature or log."""
    names = re.findall(r"^  --(\S+)", describe_settings(), re.MULTILINE)
    return [name.split(".") for name in (*names, "features.NAME.kind")]


def _keys_at(location: Sequence[str]) -> list[str]:
    """Return the keys that are allowed in the section with the path `location`."""
    depth, settings = len(location), _all_settings()
    return list(dict.fromkeys(keys[depth] for keys in settings if len(keys) > depth and _leads_to(location, keys)))


def _leads_to(location: Sequence[str], setting: Sequence[str]) -> bool:
    return all(part in ("NAME", key) for key, part in zip(location, setting, strict=False))


def without_none(annotation: Any) -> Any:
    """Return the type T of an annotation `T | None`, and any other annotation unchanged."""
    if isinstance(annotation, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def load_settings(path: str | Path, overrides: Sequence[str] = (), source: str = "command line") -> Settings:
    """Read a settings file, apply overrides and check every key.

    Args:
        path: YAML file.
        overrides: Options such as `--model.experts.count 16`. `--features.NAME null` removes a feature.
        source: Source of the overrides, for error messages.

    Returns:
        The checked settings.

    Raises:
        UserError: A key or value is wrong. The message has one sentence for each error and names the file or override.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree, file_tree = load_yaml(text), load_yaml(text)
    except FileNotFoundError:
        raise UserError(
            f"settings file '{path}' does not exist; mmoe-rec init writes one, or start from {TEMPLATE}"
        ) from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"settings file '{path}' can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must contain keys such as name, data, columns, tasks, features, split")
    check_option_names(overrides, source=source)
    changes = list(parse_overrides(overrides))
    for key, value in changes:
        _set(tree, key, value)
    result = _validate(tree)
    if isinstance(result, Settings):
        return result
    if not changes or not isinstance(_validate(file_tree), Settings):
        raise UserError("; ".join(describe_errors(result, lambda _: str(path))))
    hints = {
        f". '{path}' has no '{'.'.join(key[:2])}'{_nearest(key[1], [*file_tree[key[0]]])}"
        for key, _ in changes
        if len(key) > 2 and isinstance(file_tree.get(key[0]), dict) and key[1] not in file_tree[key[0]]
    }
    options = ", ".join(dict.fromkeys(f"--{'.'.join(key)}" for key, _ in changes))
    raise UserError("".join(["; ".join(describe_errors(result, lambda _: f"{source} ({options})")), *sorted(hints)]))


def override_settings(settings: Settings, overrides: Sequence[str], source: str) -> Settings:
    """Return a copy of settings with overrides, and check every key.

    Args:
        settings: Settings, which are not modified.
        overrides: Options such as `--model.experts.count=16`.
        source: Source of the overrides, for error messages.

    Raises:
        UserError: A key or value is wrong.
    """
    check_option_names(overrides, source=source)
    tree = settings.model_dump(mode="json")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    if isinstance(result := _validate(tree), Settings):
        return result
    raise UserError("; ".join(describe_errors(result, lambda _: source)))


def _validate(tree: Any) -> Settings | ValidationError:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        return error


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """Yield `--a.b value` and `--a.b=value` as (["a", "b"], value parsed as YAML).

    Raises:
        UserError: An argument doesn't have this form, or the value is not valid YAML.
    """
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
        except (yaml.YAMLError, ValueError):
            raise UserError(f"the value '{text}' of '--{key}' is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            section = ".".join(keys[:depth])
            raise UserError(f"'--{'.'.join(keys)}' is not a setting, because '{section}' is a single value")
    if value is not None or keys[0] != "features" or len(keys) > 2:
        tree[keys[-1]] = value
    elif tree.pop(keys[-1], None) is None:
        near = _nearest(keys[-1], [*tree])
        raise UserError(f"'--features.{keys[-1]} null' removes a feature that doesn't exist{near}")


def check_option_names(arguments: Iterable[str], options: Sequence[str] = (), source: str = "command line") -> None:
    """Raise UserError if an argument is neither an option of the command nor a setting, and suggest the nearest name.

    Args:
        arguments: Options, overrides and values as typed. A value never begins with two dashes.
        options: Names of the command's own options, such as `seeds`.
        source: Source of the arguments, for the error message.
    """
    settings = _all_settings()
    valid = [*options, *(".".join(keys[:depth]) for keys in settings for depth in range(1, len(keys) + 1))]
    by_last = {name.rpartition(".")[2]: name for name in reversed(valid)}
    for name in (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")):
        parts = name.split(".")
        if name in ("", *options) or any(_leads_to(parts, keys) for keys in settings):
            continue
        last = [by_last[key] for key in get_close_matches(parts[-1], by_last, 1)]
        near = (last if parts[-1] in by_last else get_close_matches(name, valid, 1)) or last
        hint = f"Did you mean '--{near[0]}'?" if near else "Run the command with --help to list options and settings."
        raise UserError(f"{source}: there is no option or setting '--{name}'. {hint}")


def describe_settings(section: str | None = None) -> str:
    """Return the types, defaults and descriptions of the settings.

    Args:
        section: Section to describe, such as `training`. None for all sections.
    """
    return "\n".join(_describe(Settings, "", section)).strip("\n")


def _describe(model: type[BaseModel], prefix: str, only: str | None = None) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if only not in (None, name):
            continue
        inner = without_none(field.annotation)
        sections: dict[str, Any] = {}
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            sections = {f"{prefix}{name}": inner}
        elif name == "features":
            sections = {f"features.NAME (kind: {kind})": kind_spec.feature for kind, kind_spec in FEATURE_KINDS.items()}
        elif typing.get_origin(inner) is dict:
            sections = {f"{prefix}{name}.NAME": typing.get_args(inner)[1]}
        for heading, section in sections.items():
            yield f"\n{heading}: {(section.__doc__ or '').strip()}"
            yield from _describe(section, f"{heading.partition(' ')[0]}.")
        if not sections and (name != "kind" or model is TaskSettings):
            yield f"  --{prefix}{name}  {_default(field)}\n        {field.description}"


def _default(field: FieldInfo) -> str:
    type_name = _type_name(field.annotation)
    if field.is_required():
        return f"<{type_name}> (required)"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"<{type_name}> (default: {json.dumps(default)})"


def _type_name(annotation: Any) -> str:
    """Return a type in words for users."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", datetime: "time"}
    simple |= {type(None): "null", Any: "value"}
    if annotation in simple:
        return simple[annotation]
    parts = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return " | ".join(map(str, parts))
        case typing.Annotated:
            return _type_name(parts[0])
        case builtins.tuple:
            return f"list of {_type_name(parts[0])}"
    return " | ".join(map(_type_name, parts))
