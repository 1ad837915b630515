"""The shape of encoded rows: which id inputs, dense inputs, tables and tasks there are, in one fixed order.

Features write rows in this layout and batches carry them; it is saved as JSON beside encoded rows. What a model makes
of it, widths and weights, is not part of it: see `mmoe_rec.model.layout`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.settings.columns import outcome_name


@dataclass(frozen=True)
class Table:
    """What ids are looked up in: ids 0 to rows - 1. feature: the one that owns it, if its name differs."""

    name: str
    rows: int
    feature: str | None = field(default=None, kw_only=True)


class _OfFeature:
    """An input of a feature, which has the input's name unless it is given."""

    name: str
    feature: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature", self.feature or self.name)


@dataclass(frozen=True)
class IdInput(_OfFeature):
    """Ids looked up in `table`: one a row, or any number a row (`many`), then averaged; no id gives zeros."""

    name: str
    table: str
    many: bool = False
    placement: bool = False
    feature: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class DenseInput(_OfFeature):
    """One float32 number a row. edges: rising quantiles of its training values, at which a model may bend."""

    name: str
    placement: bool = False
    edges: tuple[float, ...] = ()
    feature: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class TaskOutput:
    """One logit a row; `kind` and `given` as in `mmoe_rec.settings.columns.Task`.

    mean, deviation: of a regression's training labels. A model learns the standardised label, so that its unit does not
    decide how much a task counts, and predicts in the label's own unit.
    """

    name: str
    kind: str
    mean: float = field(default=0.0, kw_only=True)
    deviation: float = field(default=1.0, kw_only=True)
    given: str | None = field(default=None, kw_only=True)

    @property
    def learnt_from(self) -> str:
        """Name of the label that the loss is computed from: the task's or, with `given`, its outcome's of all rows."""
        return self.name if self.given is None else outcome_name(self.given, self.name)


@dataclass(frozen=True)
class Layout:
    """Inputs and labels of rows. The order of the tuples is the order of every tensor made from them."""

    tables: tuple[Table, ...]
    ids: tuple[IdInput, ...]
    dense: tuple[DenseInput, ...]
    tasks: tuple[TaskOutput, ...]

    def table(self, name: str) -> Table:
        """The table of that name."""
        return next(table for table in self.tables if table.name == name)

    @property
    def outcomes(self) -> dict[str, tuple[int, int]]:
        """Outcome of two tasks -> places among the tasks of the given one and of the one that follows it."""
        places = {task.name: place for place, task in enumerate(self.tasks)}
        given = {task: task.given for task in self.tasks if task.given is not None}
        return {task.learnt_from: (places[name], places[task.name]) for task, name in given.items()}

    def id_names(self, placement: bool) -> list[str]:
        """Names of the id inputs that describe placement, or of all others."""
        return [each.name for each in self.ids if each.placement == placement]

    def dense_names(self, placement: bool) -> list[str]:
        """Names of the dense inputs that describe placement, or of all others."""
        return [each.name for each in self.dense if each.placement == placement]

    def to_json(self) -> str:
        """JSON that `from_json` reads back."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Layout:
        """The layout that `to_json` wrote."""
        tree = json.loads(text)
        return Layout(
            tables=tuple(Table(**each) for each in tree["tables"]),
            ids=tuple(IdInput(**each) for each in tree["ids"]),
            dense=tuple(DenseInput(**{**each, "edges": tuple(each["edges"])}) for each in tree["dense"]),
            tasks=tuple(TaskOutput(**each) for each in tree["tasks"]),
        )

    @staticmethod
    def read(folder: Path) -> Layout:
        """The layout saved in a folder of encoded rows. Raises UserError for a file of another version."""
        path = folder / "layout.json"
        text = path.read_text(encoding="utf-8")
        try:
            return Layout.from_json(text)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"'{path}' is damaged or of another version: build the features anew") from None
