"""Reads a settings file and command-line overrides, strictly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmoe_rec.errors import UserError
from mmoe_rec.program import TEMPLATE
from mmoe_rec.settings.messages import explain
from mmoe_rec.settings.sections import Settings
from mmoe_rec.settings.yaml_text import load_yaml


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
