"""The shape of encoded rows: which id inputs, dense inputs, tables and tasks there are, in one fixed order.

Features write rows in this layout and batches carry them; it is saved as JSON beside encoded rows. What a model makes
of it, widths and weights, is not part of it: see `mmoe_rec.model.model_layout`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter

from mmoe_rec.errors import UserError
from mmoe_rec.point_in_time.arrays import Ragged, one_array
from mmoe_rec.settings.log_columns import joint_task_name
from mmoe_rec.task_kinds import TaskKindField, find_kind


class _AsJson:
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TableSpec(_AsJson):
    """What ids are looked up in: ids 0 to rows - 1. feature: the one that owns it, if its name differs."""

    name: str
    rows: int
    feature: str | None = field(default=None, kw_only=True)


class _OfFeature(_AsJson):
    """An input of a feature, which has the input's name unless it is given."""

    name: str
    feature: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature", self.feature or self.name)


@dataclass(frozen=True)
class IdInput(_OfFeature):
    """Ids looked up in `table`: one a row, or any number a row (`is_list`), then averaged; no id gives zeros."""

    name: str
    table: str
    is_list: bool = False
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
class TaskOutput(_AsJson):
    """One logit a row; `kind` and `conditional_on` as in `mmoe_rec.settings.log_columns.Task`.

    mean, deviation: of a regression's training labels. A model learns the standardised label, so that its unit does not
    decide how much a task counts, and predicts in the label's own unit.
    """

    name: str
    kind: TaskKindField
    mean: float = field(default=0.0, kw_only=True)
    std: float = field(default=1.0, kw_only=True)
    conditional_on: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", find_kind(self.kind))

    @property
    def loss_label(self) -> str:
        """Name of the label that the loss is computed from: the task's or, with `conditional_on`, its outcome's of all
        rows."""
        return self.name if self.conditional_on is None else joint_task_name(self.conditional_on, self.name)


@dataclass(frozen=True)
class AttentionHistory(_AsJson):
    """A history that a model pools by attention, which looks at each of its events. history: the feature; length: the
    most events of a row."""

    history: str
    length: int


def position_input(name: str, place: int) -> str:
    """What sharded tables call the input of the ids at one place of an input's lists."""
    return f"{name}@{place}"


@dataclass(frozen=True)
class Layout(_AsJson):
    """Inputs and labels of rows. The order of the tuples is the order of every tensor made from them."""

    tables: tuple[TableSpec, ...]
    ids: tuple[IdInput, ...]
    dense: tuple[DenseInput, ...]
    tasks: tuple[TaskOutput, ...]

    def table(self, name: str) -> TableSpec:
        return next(table for table in self.tables if table.name == name)

    @property
    def joint_outcomes(self) -> dict[str, tuple[int, int]]:
        """Name of an outcome of two tasks -> their places: of the `conditional_on` task, and of the task that follows
        it."""
        places = {task.name: place for place, task in enumerate(self.tasks)}
        given = {task: task.conditional_on for task in self.tasks if task.conditional_on is not None}
        return {task.loss_label: (places[name], places[task.name]) for task, name in given.items()}

    def id_names(self, placement: bool) -> list[str]:
        """Names of the id inputs that describe placement, or of all others."""
        return [each.name for each in self.ids if each.placement == placement]

    def single_ids(self) -> list[str]:
        """Inputs with one id a row, without placement and values of numbers (which trees see as numbers)."""
        single = (each for each in self.ids if not each.is_list and not each.placement)
        return [each.name for each in single if each.name != f"{each.feature}_value"]

    def dense_names(self, placement: bool) -> list[str]:
        """Names of the dense inputs that describe placement, or of all others."""
        return [each.name for each in self.dense if each.placement == placement]

    @property
    def attention(self) -> tuple[AttentionHistory, ...]:
        """The histories that are pooled by it: none of rows, as it is a model's choice."""
        return ()

    def history_inputs(self, attention: AttentionHistory) -> list[tuple[str, str | None]]:
        """Inputs of a history's events, the history itself first, and of each the candidate's input with the same
        table, if there is one."""
        single = self.single_ids()
        own = [each for each in self.ids if each.feature == attention.history]
        return [(each.name, each.table if each.table in single else None) for each in own]

    def without(self, features: Collection[str] = (), tasks: Collection[str] = ()) -> Self:
        """The layout of the same rows for a model that never sees these features, or single inputs of features, or does
        not learn these tasks.

        A task that is learnt from what follows a `conditional_on` one is learnt from its own label where that one is
        left out. Raises UserError where a feature or task is none of the rows, or no task is left.
        """
        inputs = (*self.ids, *self.dense)
        known = {"feature": {n for each in inputs for n in (each.feature, each.name)}}
        known["task"] = {each.name for each in self.tasks}
        for (what, names), asked in zip(known.items(), (features, tasks), strict=True):
            if strange := sorted({*asked} - names):
                raise UserError(f"there is no {what} '{strange[0]}' to leave out; expected some of {sorted(names)}")
        if not features and not tasks:
            return self
        if known["task"] <= {*tasks}:
            raise UserError("all tasks are left out; leave one at least")
        ids = tuple(each for each in self.ids if not {each.feature, each.name} & {*features})
        looked_up = {each.table for each in ids}
        left = [each for each in self.tasks if each.name not in tasks]
        return replace(
            self,
            tables=tuple(each for each in self.tables if each.name in looked_up),
            ids=ids,
            dense=tuple(each for each in self.dense if not {each.feature, each.name} & {*features}),
            tasks=tuple(replace(each, conditional_on=None) if each.conditional_on in tasks else each for each in left),
        )

    def to_json(self) -> str:
        """JSON that `read` takes."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The layout saved in a folder of encoded rows, or of a model. Raises UserError without one of this version."""
        path = folder / "layout.json"
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError):
            what = "build the features anew" if cls is Layout else "train the model again"
            raise UserError(f"'{path}' is missing, damaged or of another version: {what}") from None


def label_types(layout: Layout) -> dict[str, pa.DataType]:
    """Name of each task and outcome -> type of its encoded labels.

    A regression's are float64: float32 numbers near 1.7e9, such as times in seconds, are 128 apart.
    """
    types = {task.name: pa.float64() if task.kind.is_linear else pa.float32() for task in layout.tasks}
    return types | dict.fromkeys(layout.joint_outcomes, pa.float32())


# Lists of ids in an encoded file.
ID_LIST_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))


def arrow_columns(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, pa.Array]:
    """Columns `id.NAME` (int32 or list of int32) and `dense.NAME` (float32), none of which has nulls, of N rows.

    ids: name -> (N,) int64 for one id a row, `Ragged` for any number; dense: name -> (N,) float32.
    """
    columns: dict[str, pa.Array] = {}
    for each in layout.ids:
        value = ids[each.name]
        if isinstance(value, Ragged):
            offsets = np.concatenate([[0], np.cumsum(value.lengths)]).astype(np.int32)
            values = pa.array(value.values.astype(np.int32, copy=False))
            columns[f"id.{each.name}"] = pa.ListArray.from_arrays(pa.array(offsets), values, type=ID_LIST_TYPE)
        else:
            columns[f"id.{each.name}"] = pa.array(value.astype(np.int32))
    for number in layout.dense:
        columns[f"dense.{number.name}"] = pa.array(np.ascontiguousarray(dense[number.name], np.float32))
    return columns


@dataclass(frozen=True)
class EncodedInputs:
    """N rows as a fitted pipeline encodes them.

    ids: name -> (N,) int64, or int32 from files, for one id a row, `Ragged` for any number; dense: (N, D) float32,
    columns as in `layout.dense`.
    """

    ids: dict[str, np.ndarray | Ragged]
    dense: np.ndarray

    def __len__(self) -> int:
        return len(self.dense)

    def slice(self, start: int, stop: int) -> "EncodedInputs":
        """Rows start to stop (exclusive, at most N), as views."""
        ids = {
            name: each.slice(start, stop) if isinstance(each, Ragged) else each[start:stop]
            for name, each in self.ids.items()
        }
        return EncodedInputs(ids, self.dense[start:stop])

    def take(self, rows: np.ndarray) -> "EncodedInputs":
        return EncodedInputs({name: each.take(rows) for name, each in self.ids.items()}, self.dense.take(rows, axis=0))

    @staticmethod
    def from_arrow(table: pa.Table, layout: Layout) -> "EncodedInputs":
        """Reads columns of `arrow_columns`. Ids stay int32, as rows are copied several times until in a batch."""
        ids: dict[str, np.ndarray | Ragged] = {}
        for each in layout.ids:
            column = one_array(table.column(f"id.{each.name}"))
            if each.is_list:
                lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
                ids[each.name] = Ragged(column.flatten().to_numpy(), lengths)
            else:
                ids[each.name] = column.to_numpy()
        dense = np.empty((table.num_rows, len(layout.dense)), np.float32)
        for index, each_dense in enumerate(layout.dense):
            dense[:, index] = table.column(f"dense.{each_dense.name}").to_numpy()
        return EncodedInputs(ids, dense)
