"""Layout of a model's inputs and outputs: the layout of encoded rows, table widths, and weights of tasks.

Widths and weights come from the settings when a model is created. Encoded rows don't depend on them, so code that only
reads rows uses the plain `Layout`.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import AttentionHistory, IdInput, Layout, TableSpec, TaskOutput, position_input
from mmoe_rec.settings.log_columns import MODEL_CHOICES

if TYPE_CHECKING:
    from mmoe_rec.settings.sections import Settings

T = TypeVar("T", TableSpec, TaskOutput)


@dataclass(frozen=True)
class EmbeddingTable(TableSpec):
    """Embedding table of `rows` x `dim` float32. Rows 1 to `oov_buckets` are buckets of unseen ids."""

    dim: int
    oov_buckets: int = 0


@dataclass(frozen=True)
class ModelTask(TaskOutput):
    """Task with one logit per row, and the task's settings that don't affect encoded rows.

    `mmoe_rec.settings.log_columns.TaskSettings` describes `objective` and the weights.
    """

    objective: str
    loss_weight: float = 1.0
    score_weight: float = 1.0


@dataclass(frozen=True)
class ModelLayout(Layout):
    """Inputs and outputs of a model.

    Attributes:
        tables: Embedding tables.
        tasks: Tasks in the order of the logits.
        attention: Histories pooled by attention. Other histories are pooled by their mean.
    """

    tables: tuple[EmbeddingTable, ...]
    tasks: tuple[ModelTask, ...]
    attention: tuple[AttentionHistory, ...] = ()

    @staticmethod
    def of(layout: Layout, settings: "Settings") -> "ModelLayout":
        """Add table widths, task weights and attention from the settings to the layout of rows.

        Args:
            layout: Layout of the encoded rows.
            settings: Settings with all features and tasks of the layout.

        Raises:
            UserError: The settings lack a feature or task of the rows.
        """
        tables, tasks = [], []
        for table in layout.tables:
            name = table.feature or table.name
            feature = settings.features.get(name)
            dim = getattr(feature, "dim", None)
            if dim is None:
                raise _unknown("feature", name)
            tables.append(EmbeddingTable(**vars(table), dim=dim, oov_buckets=getattr(feature, "oov_buckets", 0)))
        for task in layout.tasks:
            task_settings = settings.tasks.get(task.name)
            if task_settings is None:
                raise _unknown("task", task.name)
            choices = {name: getattr(task_settings, name) for name in MODEL_CHOICES["tasks"]}
            tasks.append(ModelTask(**vars(task), **choices))
        features: dict[str, Any] = {column.name: settings.features.get(column.name) for column in layout.ids}
        attended = {name: kind for name, kind in features.items() if getattr(kind, "pooling", None) == "attention"}
        pooled = (AttentionHistory(name, feature.length) for name, feature in attended.items())
        # Attention compares events with a candidate's IDs in the same tables. Without these, a model takes the mean.
        attention = tuple(pool for pool in pooled if any(partner for _, partner in layout.history_inputs(pool)))
        return ModelLayout(tuple(tables), layout.ids, layout.dense, tuple(tasks), attention)

    def row_layout(self) -> Layout:

        def plain(kind: type[T], source: T) -> T:
            return kind(**{spec.name: getattr(source, spec.name) for spec in fields(kind)})

        tables = tuple(plain(TableSpec, table) for table in self.tables)
        return Layout(tables, self.ids, self.dense, tuple(plain(TaskOutput, task) for task in self.tasks))

    def table(self, name: str) -> EmbeddingTable:
        return next(table for table in self.tables if table.name == name)

    def width(self, placement: bool) -> int:
        """Return the number of columns of all placement inputs, or of all other inputs if `placement` is false."""
        dims = {column.name: self.table(column.table).dim for column in self.ids}
        return sum(dims[name] for name in self.id_names(placement)) + len(self.dense_names(placement))

    def id_names(self, placement: bool) -> list[str]:
        """Return the names of placement ID inputs, or of all others. Attention pools a history to a single input."""
        further_inputs = {name for history in self.attention for name, _ in self.history_inputs(history)[1:]}
        return [name for name in super().id_names(placement) if name not in further_inputs]

    def lookup_inputs(self) -> list[IdInput]:
        """Return the ID inputs of sharded tables, which can only sum the embeddings of an input.

        Attention needs the embedding of each event, so each position of a history is an input of its own.
        """
        lengths = {name: column.length for column in self.attention for name, _ in self.history_inputs(column)}
        inputs = list[IdInput]()
        for column in self.ids:
            positions = range(lengths.get(column.name, 0))
            parts = [IdInput(position_input(column.name, position), column.table) for position in positions]
            inputs += parts or [column]
        return inputs


def _unknown(kind: str, name: str) -> UserError:
    return UserError(
        f"the existing features include the {kind} '{name}', but the settings don't. Rebuild the features, or restore "
        "the setting."
    )
