"""Where two trees of settings differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Name of each setting that differs, such as `model.experts.count`, and both values, as text."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    elif one != other:
        yield path, _text(one), _text(other)


def _text(value: Any) -> str:
    if value is None:
        return "missing"
    return "there" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)
