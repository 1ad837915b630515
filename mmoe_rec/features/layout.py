"""The layout of encoded rows, which lists id inputs, dense inputs, tables and tasks in one fixed order.

The layout is saved as JSON next to encoded rows. Widths of embeddings and weights of tasks belong to a model instead
(see `mmoe_rec.model.model_layout`). The ids in encoded rows are row numbers of embedding tables.
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
    """An embedding table, for the ids 0 to `rows` - 1.

    Attributes:
        name: Name of the table.
        rows: Number of rows.
        feature: Name of the feature that owns the table, None if it is the name of the table.
    """

    name: str
    rows: int
    feature: str | None = field(default=None, kw_only=True)


class _FeatureInput(_AsJson):
    """An input that a feature computes. The name of the feature defaults to the name of the input."""

    name: str
    feature: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature", self.feature or self.name)


@dataclass(frozen=True)
class IdInput(_FeatureInput):
    """One id per row or a list of ids per row (`is_list`), looked up in `table`.

    The embeddings of a list are averaged. An empty list gives zeros.
    """

    name: str
    table: str
    is_list: bool = False
    placement: bool = False
    feature: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class DenseInput(_FeatureInput):
    """One float32 number per row.

    Attributes:
        name: Name of the input.
        placement: Whether the input describes where a candidate was shown, which is unavailable in serving.
        edges: Ascending quantiles of the input in training rows, for piecewise-linear encoding.
        feature: Name of the feature that computes the input.
    """

    name: str
    placement: bool = False
    edges: tuple[float, ...] = ()
    feature: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class TaskOutput(_AsJson):
    """A task with one logit per row.

    Attributes:
        name: Name of the task.
        kind: Binary or regression.
        mean: Mean of a regression's training labels. Training standardizes labels, so that the unit of the label
            doesn't affect the weight of the task.
        std: Standard deviation of a regression's training labels.
        conditional_on: Name of the binary task whose label must be 1 for this task's label to be observed.
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
        """Name of the label that the loss compares with, the joint outcome of both tasks with `conditional_on`."""
        return self.name if self.conditional_on is None else joint_task_name(self.conditional_on, self.name)


@dataclass(frozen=True)
class AttentionHistory(_AsJson):
    """A history that a model pools by attention over its events.

    Attributes:
        history: Name of the feature.
        length: Maximum number of events per row.
    """

    history: str
    length: int


def position_input(name: str, position: int) -> str:
    """Return the name under which sharded tables look up the ids at one position of an input's lists.

    Args:
        name: Name of the input.
        position: Position in the lists.
    """
    return f"{name}@{position}"


@dataclass(frozen=True)
class Layout(_AsJson):
    """Inputs and tasks of encoded rows. Columns of tensors are in the order of the tuples."""

    tables: tuple[TableSpec, ...]
    ids: tuple[IdInput, ...]
    dense: tuple[DenseInput, ...]
    tasks: tuple[TaskOutput, ...]

    def table(self, name: str) -> TableSpec:
        """Return the table called `name`."""
        return next(table for table in self.tables if table.name == name)

    @property
    def joint_outcomes(self) -> dict[str, tuple[int, int]]:
        """Indices of the `conditional_on` task and of the dependent task, by the name of their joint outcome."""
        indices = {task.name: index for index, task in enumerate(self.tasks)}
        conditions = {task: task.conditional_on for task in self.tasks if task.conditional_on is not None}
        return {task.loss_label: (indices[name], indices[task.name]) for task, name in conditions.items()}

    def id_names(self, placement: bool) -> list[str]:
        """Return the names of the id inputs that describe placement (or that don't, if `placement` is false)."""
        return [key.name for key in self.ids if key.placement == placement]

    def single_ids(self) -> list[str]:
        """Return the names of the inputs with one id per row, except inputs of placement and of frequent values."""
        single = (key for key in self.ids if not key.is_list and not key.placement)
        return [key.name for key in single if key.name != f"{key.feature}_value"]

    def dense_names(self, placement: bool) -> list[str]:
        """Return the names of the dense inputs that describe placement (or that don't, if `placement` is false)."""
        return [number.name for number in self.dense if number.placement == placement]

    @property
    def attention(self) -> tuple[AttentionHistory, ...]:
        """Histories that are pooled by attention. Empty here, because a model chooses them."""
        return ()

    def history_inputs(self, attention: AttentionHistory) -> list[tuple[str, str | None]]:
        """Return pairs of names: an input of the history, and the candidate's input with the same table, or None.

        The first pair has the input with the history's items. The next pairs have inputs with attributes of the items.
        """
        single = self.single_ids()
        event_inputs = [key for key in self.ids if key.feature == attention.history]
        return [(key.name, key.table if key.table in single else None) for key in event_inputs]

    def without(self, features: Collection[str] = (), tasks: Collection[str] = ()) -> Self:
        """Return the layout of the same rows for a model without some features or tasks.

        A task whose `conditional_on` task is removed is trained on its own label.

        Args:
            features: Names of features or single inputs to remove.
            tasks: Names of tasks to remove.

        Raises:
            UserError: A feature or task does not exist, or no task is left.
        """
        names = {"feature": {name for key in (*self.ids, *self.dense) for name in (key.feature, key.name)}}
        names["task"] = {task.name for task in self.tasks}
        for (noun, available), removed in zip(names.items(), (features, tasks), strict=True):
            if unknown := sorted({*removed} - available):
                raise UserError(f"There is no {noun} '{unknown[0]}' to leave out. Choose from {sorted(available)}.")
        if not features and not tasks:
            return self
        if names["task"] <= {*tasks}:
            raise UserError("A model needs a task, but all tasks are left out. Keep at least one task.")
        ids = tuple(key for key in self.ids if not {key.feature, key.name} & {*features})
        used_tables = {key.table for key in ids}
        kept_tasks = [task for task in self.tasks if task.name not in tasks]
        return replace(
            self,
            tables=tuple(table for table in self.tables if table.name in used_tables),
            ids=ids,
            dense=tuple(number for number in self.dense if not {number.feature, number.name} & {*features}),
            tasks=tuple(
                replace(task, conditional_on=None) if task.conditional_on in tasks else task for task in kept_tasks
            ),
        )

    def to_json(self) -> str:
        """Return the layout as JSON for `read`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the layout from the `folder` of encoded rows or of a model.

        Raises:
            UserError: The file is missing, damaged or of another version.
        """
        path = folder / "layout.json"
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError):
            fix = "Build the features again" if cls is Layout else "Train the model again"
            raise UserError(f"'{path}' is missing, damaged or of another version. {fix}.") from None


def label_types(layout: Layout) -> dict[str, pa.DataType]:
    """Return the types of encoded labels, by the name of the task or of the joint outcome."""
    # Labels of regressions are float64, because float32 rounds times in seconds (near 1.7e9) to multiples of 128.
    types = {task.name: pa.float64() if task.kind.is_linear else pa.float32() for task in layout.tasks}
    return types | dict.fromkeys(layout.joint_outcomes, pa.float32())


# Type of lists of ids in an encoded file.
ID_LIST_TYPE = pa.list_(pa.field("element", pa.int32(), nullable=False))


def arrow_columns(
    ids: Mapping[str, np.ndarray | Ragged], dense: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, pa.Array]:
    """Return N encoded rows as columns `id.NAME` (int32 or list of int32) and `dense.NAME` (float32) without nulls.

    Args:
        ids: (N,) int64 ids, or `Ragged` lists of ids, by input name.
        dense: (N,) float32 values by input name.
        layout: Layout of the rows.
    """
    columns: dict[str, pa.Array] = {}
    for key in layout.ids:
        value = ids[key.name]
        if isinstance(value, Ragged):
            offsets = np.concatenate([[0], np.cumsum(value.lengths)]).astype(np.int32)
            values = pa.array(value.values.astype(np.int32, copy=False))
            columns[f"id.{key.name}"] = pa.ListArray.from_arrays(pa.array(offsets), values, type=ID_LIST_TYPE)
        else:
            columns[f"id.{key.name}"] = pa.array(value.astype(np.int32))
    for number in layout.dense:
        columns[f"dense.{number.name}"] = pa.array(np.ascontiguousarray(dense[number.name], np.float32))
    return columns


@dataclass(frozen=True)
class EncodedInputs:
    """N rows that a fitted pipeline encoded.

    Attributes:
        ids: (N,) int64 ids (int32 if read from files), or `Ragged` lists of ids, by input name.
        dense: (N, D) float32 values of D dense inputs, in the order of `layout.dense`.
    """

    ids: dict[str, np.ndarray | Ragged]
    dense: np.ndarray

    def __len__(self) -> int:
        return len(self.dense)

    def slice(self, start: int, stop: int) -> "EncodedInputs":
        """Return a range of rows as views.

        Args:
            start: First row.
            stop: End of the range (exclusive, at most N).
        """
        ids = {
            name: values.slice(start, stop) if isinstance(values, Ragged) else values[start:stop]
            for name, values in self.ids.items()
        }
        return EncodedInputs(ids, self.dense[start:stop])

    def take(self, rows: np.ndarray) -> "EncodedInputs":
        """Return the rows at the indices `rows`, as copies."""
        ids = {name: values.take(rows) for name, values in self.ids.items()}
        return EncodedInputs(ids, self.dense.take(rows, axis=0))

    @staticmethod
    def from_arrow(table: pa.Table, layout: Layout) -> "EncodedInputs":
        """Read columns that `arrow_columns` wrote. Ids stay int32, which takes half the memory of int64.

        Args:
            table: Table with the columns.
            layout: Layout of the rows.
        """
        ids: dict[str, np.ndarray | Ragged] = {}
        for key in layout.ids:
            column = one_array(table.column(f"id.{key.name}"))
            if key.is_list:
                lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32)
                ids[key.name] = Ragged(column.flatten().to_numpy(), lengths)
            else:
                ids[key.name] = column.to_numpy()
        dense = np.empty((table.num_rows, len(layout.dense)), np.float32)
        for index, number in enumerate(layout.dense):
            dense[:, index] = table.column(f"dense.{number.name}").to_numpy()
        return EncodedInputs(ids, dense)
