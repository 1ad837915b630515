"""The YAML of settings files: what looks like a number is one, and no key is written twice.

YAML 1.1, which PyYAML reads, takes 1e-3 for text, 1:30 for ninety and 017 for fifteen. Here the first is a number, and
the others are text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS, _EXPONENT = "[0-9][0-9_]*", "[eE][-+]?[0-9]+"
_NUMBERS = {
    _INT: re.compile("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    _FLOAT: re.compile(
        rf"[-+]?({_DIGITS}{_EXPONENT}|({_DIGITS}\.[0-9_]*|\.{_DIGITS})({_EXPONENT})?|\.(inf|Inf|INF))$"
        r"|\.(nan|NaN|NAN)$"
    ),
}


def _with_numbers(base: type) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's rules for what plain text is, by its first letter, with those of YAML 1.2 for numbers."""
    rules = {
        first: [(tag, rule) for tag, rule in found if tag not in _NUMBERS]
        for first, found in base.yaml_implicit_resolvers.items()  # type: ignore[attr-defined]
    }
    for first in "-+.0123456789":
        rules[first] = [*rules.get(first, []), *_NUMBERS.items()]
    return rules


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, where YAML would silently take the last; an impossible date stays text."""

    yaml_implicit_resolvers = _with_numbers(yaml.SafeLoader)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' is written twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # not a date, such as 2024-02-30, or too many digits: what expects one reports it
            if not isinstance(node, yaml.ScalarNode):
                raise
            return node.value


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""

    yaml_implicit_resolvers = _with_numbers(yaml.SafeDumper)


def load_yaml(text: str) -> Any:
    """The values of a YAML text. Raises yaml.YAMLError where it is not valid."""
    return yaml.load(text, _Loader)


def dump_yaml(tree: Any) -> str:
    """YAML that `load_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
