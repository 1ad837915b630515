"""What a model makes of a layout of rows: how wide each table is, and how much each task counts in loss and score.

The rows are the same whatever is chosen here, so these values come from the settings when a model is made, and are
saved as JSON inside a served model. Code that only reads rows takes the plain `Layout` and never sees them.
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
    """An embedding table: `rows` x `dim` float32."""

    dim: int


@dataclass(frozen=True)
class ModelTask(TaskOutput):
    """One logit a row. `objective` and weights as in `mmoe_rec.settings.log_columns.TaskSettings`.

    No encoded row depends on these choices.
    """

    objective: str
    loss_weight: float = 1.0
    score_weight: float = 1.0


@dataclass(frozen=True)
class ModelLayout(Layout):
    """Inputs and outputs of a model. attention: the histories that are pooled by it; all others by their mean."""

    tables: tuple[EmbeddingTable, ...]
    tasks: tuple[ModelTask, ...]
    attention: tuple[AttentionHistory, ...] = ()

    @staticmethod
    def of(layout: Layout, settings: "Settings") -> "ModelLayout":
        """The layout of rows with what the settings make of it.

        Raises UserError where the settings lack a feature or task of the rows.
        """
        tables, tasks = [], []
        for table in layout.tables:
            name = table.feature or table.name
            dim = getattr(settings.features.get(name), "dim", None)
            if dim is None:
                raise _unknown("feature", name)
            tables.append(EmbeddingTable(**vars(table), dim=dim))
        for task in layout.tasks:
            chosen = settings.tasks.get(task.name)
            if chosen is None:
                raise _unknown("task", task.name)
            choices = {name: getattr(chosen, name) for name in MODEL_CHOICES["tasks"]}
            tasks.append(ModelTask(**vars(task), **choices))
        features: dict[str, Any] = {each.name: settings.features.get(each.name) for each in layout.ids}
        asked = {name: each for name, each in features.items() if getattr(each, "pooling", None) == "attention"}
        pooled = (AttentionHistory(name, each.length) for name, each in asked.items())
        # Where what is looked at is left out, a history is pooled by its mean.
        attention = tuple(each for each in pooled if any(partner for _, partner in layout.history_inputs(each)))
        return ModelLayout(tuple(tables), layout.ids, layout.dense, tuple(tasks), attention)

    def row_layout(self) -> Layout:

        def plain(kind: type[T], of: T) -> T:
            return kind(**{each.name: getattr(of, each.name) for each in fields(kind)})

        tables, tasks = (
            (plain(TableSpec, each) for each in self.tables),
            (plain(TaskOutput, each) for each in self.tasks),
        )
        return Layout(tuple(tables), self.ids, self.dense, tuple(tasks))

    def table(self, name: str) -> EmbeddingTable:
        return next(table for table in self.tables if table.name == name)

    def width(self, placement: bool) -> int:
        """Number of model inputs: the embeddings' widths plus the dense inputs."""
        dims = {each.name: self.table(each.table).dim for each in self.ids}
        return sum(dims[name] for name in self.id_names(placement)) + len(self.dense_names(placement))

    def id_names(self, placement: bool) -> list[str]:
        """As of any layout, but all that attention pools of a history is one input, of the history's name."""
        others = {name for each in self.attention for name, _ in self.history_inputs(each)[1:]}
        return [name for name in super().id_names(placement) if name not in others]

    def lookup_inputs(self) -> list[IdInput]:
        """The inputs of sharded tables, which add up all ids of a row: where attention looks at each event, the ids at
        each place of a list are an input of their own."""
        lengths = {name: each.length for each in self.attention for name, _ in self.history_inputs(each)}
        found = list[IdInput]()
        for each in self.ids:
            places = range(lengths.get(each.name, 0))
            found += [IdInput(position_input(each.name, place), each.table) for place in places] or [each]
        return found


def _unknown(what: str, name: str) -> UserError:
    return UserError(
        f"the existing features have the {what} '{name}', which the settings do not have: build the features anew, or "
        "restore the setting"
    )
