"""Kinds of tasks, one file each. Start with `task_kind.py`, which describes all properties of a kind.

To add a kind, add a file, and the file's name in `NAMES`.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, PlainSerializer

from mmoe_rec.task_kinds.task_kind import TaskKind

NAMES = (
    "binary",
    "regression",
)
"""Values of a task's `kind` in settings. The file with the same name in this folder defines `KIND`."""

KINDS: dict[str, TaskKind] = {name: import_module(f"{__name__}.{name}").KIND for name in NAMES}
DEFAULT_KIND = KINDS[NAMES[0]]
"""Kind of tasks without the setting `kind`, and of joint labels (whether two tasks are both positive)."""

if TYPE_CHECKING:
    TaskKindField = TaskKind
else:
    TaskKindField = Annotated[Literal[NAMES], AfterValidator(KINDS.get), PlainSerializer(str)]
    """Field type for a kind in settings and layouts. Files store the name."""


def find_kind(name: str) -> TaskKind:
    """Return the kind with a name, or raise ValueError for an unknown name."""
    if name not in KINDS:
        near = get_close_matches(name, KINDS, 1)
        meant = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"'{name}' is not a task kind{meant}. Valid kinds are {' and '.join(map(repr, NAMES))}.")
    return KINDS[name]
