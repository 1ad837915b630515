"""Reads a settings file and command-line overrides, strictly, and says what is wrong in sentences for their author;
all settings as text, for `mmoe-rec settings`."""

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
"""The settings file to start from: an installed package has it, the repository keeps it with its other ones."""

_WORDS = {
    **{"Input should": "must", "Value error, ": "", "valid tuple": "list", "Tuple": "list", "Dictionary": "section"},
    **{"valid integer": "whole number", "valid number": "number"},
    **{"a valid boolean": "true or false", "a valid string": "text"},
}
"""Words of pydantic -> the words of settings."""


def describe_errors(error: ValidationError, where: Callable[[Any], str]) -> Iterator[str]:
    """Explain each problem in one sentence: its key, the expected and the given value, the nearest valid key.

    Args:
        error: The error that pydantic raised.
        where: Returns the source of a problem: a file, or an option.
    """
    # A list with an invalid entry is also too short.
    problems = [each for each in error.errors() if each["type"] != "too_short"] or error.errors()
    yield from dict.fromkeys(f"{where(problem)}: {_sentence(problem)}" for problem in problems)


def _sentence(problem: Any) -> str:
    kind, place, value, message = (problem[part] for part in ("type", "loc", "input", "msg"))
    # pydantic adds the kind of a feature, and the member of a union.
    location = [str(part) for part in (place[:2] + place[3:] if place[:1] == ("features",) else place)]
    name = ".".join(location)
    if kind == "extra_forbidden":
        is_feature = place[0] == "features"
        keys = [*FEATURE_KINDS[place[2]].feature.model_fields] if is_feature else _keys_at(location[:-1])
        return f"unknown key '{name}'; {suggest(location[-1], keys)}"
    if kind == "missing":
        return f"key '{name}' is missing; `mmoe-rec settings` lists them"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"'{name}' must hold keys ({', '.join(_keys_at(location))})"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        given = str(value.get("kind", "nothing"))
        return (
            f"'{name}.kind' must be one of {', '.join(FEATURE_KINDS)}, found "
            f"'{given}'{_nearest(given, [*FEATURE_KINDS])}"
        )
    if location and location[-1] in ("bool", "int", "constrained-int", "float", "str"):
        name = ".".join(location[:-1])
    for old, new in _WORDS.items():
        message = message.replace(old, new)
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    shown = repr(list(value)) if isinstance(value, tuple) else shown
    found = f", found {shown}" if name and len(shown) < 80 else ""
    found += _nearest(str(value), re.findall("'([^']*)'", message)) if kind == "literal_error" else ""
    joint = " " if message.startswith(("must", "lists")) else ": "
    return f"'{name}'{joint}{message}{found}" if name else message


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


@cache
def _all_settings() -> list[list[str]]:
    """Return the keys that lead to each setting. NAME stands for the name of a task, a feature or a log."""
    names = re.findall(r"^  --(\S+)", describe_settings(), re.MULTILINE)
    return [name.split(".") for name in (*names, "features.NAME.kind")]


def _keys_at(place: Sequence[str]) -> list[str]:
    """Return the keys that the section at a place may have."""
    found = (own[len(place)] for own in _all_settings() if len(own) > len(place) and _leads_to(place, own))
    return list(dict.fromkeys(found))


def _leads_to(place: Sequence[str], setting: Sequence[str]) -> bool:
    return all(own in ("NAME", key) for key, own in zip(place, setting, strict=False))


def without_none(annotation: Any) -> Any:
    """The type of a setting that may be null."""
    if isinstance(annotation, types.UnionType):
        rest = [part for part in typing.get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def load_settings(path: str | Path, overrides: Sequence[str] = (), source: str = "command line") -> Settings:
    """Read a settings file, apply overrides and check every key.

    Args:
        path: A YAML file.
        overrides: Words such as `--model.experts.count 16`. `--features.NAME null` leaves a feature out.
        source: The source of the overrides, for error messages.

    Returns:
        The checked settings.

    Raises:
        UserError: A key or value is wrong. The message has one sentence for each and names the file or the override.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree, own = load_yaml(text), load_yaml(text)
    except FileNotFoundError:
        raise UserError(
            f"settings file '{path}' does not exist; mmoe-rec init writes one, or start from {TEMPLATE}"
        ) from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"settings file '{path}' can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file '{path}' must hold keys such as name, data, columns, tasks, features, split")
    check_option_names(overrides, source=source)
    given = list(parse_overrides(overrides))
    for key, value in given:
        _set(tree, key, value)
    found = _validate(tree)
    if isinstance(found, Settings):
        return found
    if not given or not isinstance(_validate(own), Settings):
        raise UserError("; ".join(describe_errors(found, lambda _: str(path))))
    new = {
        f". '{path}' has no '{'.'.join(key[:2])}'{_nearest(key[1], [*own[key[0]]])}"
        for key, _ in given
        if len(key) > 2 and isinstance(own.get(key[0]), dict) and key[1] not in own[key[0]]
    }
    words = ", ".join(dict.fromkeys(f"--{'.'.join(key)}" for key, _ in given))
    raise UserError("".join(["; ".join(describe_errors(found, lambda _: f"{source} ({words})")), *sorted(new)]))


def override_settings(settings: Settings, overrides: Sequence[str], source: str) -> Settings:
    """Return settings with overrides, checked.

    Args:
        settings: The settings to change.
        overrides: Words such as `--model.experts.count=16`.
        source: The source of the overrides, for error messages.

    Raises:
        UserError: A key or value is wrong.
    """
    check_option_names(overrides, source=source)
    tree = settings.model_dump(mode="json")
    for key, value in parse_overrides(overrides):
        _set(tree, key, value)
    if isinstance(found := _validate(tree), Settings):
        return found
    raise UserError("; ".join(describe_errors(found, lambda _: source)))


def _validate(tree: Any) -> Settings | ValidationError:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        return error


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
        except (yaml.YAMLError, ValueError):
            raise UserError(f"the value '{text}' of '--{key}' is not valid YAML") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"'--{'.'.join(keys)}' goes below '{'.'.join(keys[:depth])}', which is a single value")
    if value is not None or keys[0] != "features" or len(keys) > 2:
        tree[keys[-1]] = value
    elif tree.pop(keys[-1], None) is None:
        near = _nearest(keys[-1], [*tree])
        raise UserError(f"'--features.{keys[-1]} null' leaves out a feature that is not there{near}")


def check_option_names(words: Iterable[str], options: Sequence[str] = (), source: str = "command line") -> None:
    """Raise UserError for an option that neither the command nor the settings have, and suggest the nearest one.

    Args:
        words: Options, overrides and their values, as they were typed. A value never begins with two dashes.
        options: Names of the command's own options, such as `seeds`.
        source: The source of the words, for the error message.
    """
    valid = [*options, *(".".join(each[:depth]) for each in _all_settings() for depth in range(1, len(each) + 1))]
    by_last = {each.rpartition(".")[2]: each for each in reversed(valid)}
    for name in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
        typed = name.split(".")
        if name in ("", *options) or any(_leads_to(typed, each) for each in _all_settings()):
            continue
        last = [by_last[each] for each in get_close_matches(typed[-1], by_last, 1)]
        near = (last if typed[-1] in by_last else get_close_matches(name, valid, 1)) or last
        hint = f"Did you mean '--{near[0]}'?" if near else "Run the command with --help to list options and settings."
        raise UserError(f"{source}: there is no option or setting '--{name}'. {hint}")


def describe_settings(section: str | None = None) -> str:
    """Return the type, default and meaning of each setting.

    Args:
        section: Section to describe, such as `training`. None for all of them.
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
            sections = {f"features.NAME (kind: {kind})": each.feature for kind, each in FEATURE_KINDS.items()}
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
    return f"<{kind}> (default: {json.dumps(default)})"


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
