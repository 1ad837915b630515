"""Changes some values of a settings file and leaves its comments, order and layout as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from mmoe_rec.settings.sections import Settings, dump_flow, load_nodes, load_yaml


def edit_settings(text: str, values: Mapping[str, Any], removed: Iterable[Sequence[str]], target: Settings) -> str:
    """The text of a settings file with other values, such as `training.epochs`, and without what stands at the keys
    `removed`, such as [features, user].

    Where that does not give the target, as in a file with anchors, it is all settings of the target, without comments.
    """
    try:
        for keys in removed:
            text = _remove(text, keys)
        for name, value in values.items():
            keys = name.split(".")
            leaves_out = value is None and len(keys) == 2 and keys[0] == "features"  # as on the command line
            text = _remove(text, keys) if leaves_out else _set(text, keys, value)
        if Settings.model_validate(load_yaml(text)) == target:
            return text
    except (ValueError, LookupError, TypeError, yaml.YAMLError):
        pass
    return target.to_yaml()


def _set(text: str, keys: Sequence[str], value: Any) -> str:
    node, rest = load_nodes(text), keys
    while rest and isinstance(node, yaml.MappingNode) and (found := _find(node, rest[0])) is not None:
        node, rest = found[1], rest[1:]
    for key in reversed(rest[1:]):
        value = {key: value}
    if not rest or not isinstance(node, yaml.MappingNode):
        shown = dump_flow({rest[0]: value} if rest else value)
        start, end = node.start_mark.index, _end(node)
        return f"{text[:start]}{'' if start != end else ' '}{shown}{text[end:]}"
    entry = f"{rest[0]}: {dump_flow(value)}"
    if node.flow_style:
        start = node.start_mark.index + 1
        return f"{text[:start]}{entry}{', ' if node.value else ''}{text[start:]}"
    if len(rest) == len(keys):  # a section that the file lacks
        return f"{text.rstrip()}\n\n{entry}\n"
    start = node.start_mark.index
    return f"{text[:start]}{entry}\n{' ' * node.start_mark.column}{text[start:]}"


def _remove(text: str, keys: Sequence[str]) -> str:
    node = load_nodes(text)
    for key in keys[:-1]:
        node = _require(node, key)[1]
    key_node, value = _require(node, keys[-1])
    start, end = key_node.start_mark.index, _end(value)
    if node.flow_style:
        rest = text[end:].lstrip()
        if rest.startswith(","):
            return text[:start] + rest[1:].lstrip()
        return text[:start].rstrip().removesuffix(",") + text[end:]
    line_end = text.find("\n", end)
    above = text[: text.rfind("\n", 0, start) + 1].splitlines(keepends=True)
    below = "" if line_end < 0 else text[line_end + 1 :]
    first = len(above)  # of the comments above, which go with it
    while first and above[first - 1].startswith(" " * key_node.start_mark.column + "#"):
        first -= 1
    following = below.partition("\n")[0]
    goes_on = following.strip() and len(following) - len(following.lstrip()) == key_node.start_mark.column
    if first and not above[first - 1].strip() and goes_on:
        first = min(first + 1, len(above))  # but for the heading of a group of which others stay
    return "".join(above[:first]) + below


def _find(node: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next((pair for pair in node.value if pair[0].value == key), None)


def _require(node: Any, key: str) -> tuple[yaml.Node, yaml.Node]:
    if not isinstance(node, yaml.MappingNode) or (found := _find(node, key)) is None:
        raise LookupError(key)
    return found


def _end(node: yaml.Node) -> int:
    """Where a value ends: YAML counts the lines to the next key as part of a section."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
