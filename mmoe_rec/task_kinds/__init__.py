"""The kinds of tasks, one file each: a new kind is its file, and its line in `NAMES`.

In: a kind's name in settings or a layout. Out: a `TaskKind`, with labels, loss, link function and words of the kind.
Begin with `task_kind.py`, which describes every attribute, then read `regression.py`.
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
"""Each is a `kind` of a task in a settings file, and the file of this folder whose `KIND` holds all of it."""

KINDS: dict[str, TaskKind] = {name: import_module(f"{__name__}.{name}").KIND for name in NAMES}
DEFAULT_KIND = KINDS[NAMES[0]]
"""The kind of a task that names none, and of the outcome of two tasks together."""

if TYPE_CHECKING:
    TaskKindField = TaskKind
else:
    TaskKindField = Annotated[Literal[NAMES], AfterValidator(KINDS.get), PlainSerializer(str)]
    """A kind in settings and layouts, which files hold by its name."""


def find_kind(name: str) -> TaskKind:
    """Return the kind of a name. Raises ValueError for an unknown name."""
    if name not in KINDS:
        near = get_close_matches(name, KINDS, 1)
        meant = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"there is no task kind '{name}'{meant}; expected {' or '.join(map(repr, NAMES))}")
    return KINDS[name]
