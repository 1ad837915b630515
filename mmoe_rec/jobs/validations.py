"""What a training's validations found, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mmoe_rec.jobs.finished import Trained
    from mmoe_rec.settings.sections import Settings
    from mmoe_rec.training.validation import Validation

FEW_STEPS = 50
_COLUMNS = {"loss ↓": "loss", "auc ↑": "auc", "gauc ↑": "gauc", "calibration → 1": "calibration"}


def told_of(trained: Trained, settings: Settings) -> Iterator[Table | str]:
    """The table of all validations of a training that has ended, why its state was chosen, and warnings."""
    from mmoe_rec.inference.artifact import read_calibration
    from mmoe_rec.training.checkpoint import latest_checkpoint
    from mmoe_rec.training.validation import warnings_of, why_chosen

    checkpoint = latest_checkpoint(trained.artifact.parent / "checkpoints")
    if checkpoint is not None:
        yield validations_table(checkpoint.state.history, trained.best_step)
        if checkpoint.state.step < FEW_STEPS:
            steps = f"{checkpoint.state.step:,} step{'s' * (checkpoint.state.step != 1)}"
            yield (
                f"warning: the training had {steps}, of training.batch_size {settings.training.batch_size:,}: a model "
                "learns little in so few; take a smaller batch size, or more training.epochs"
            )
    yield from why_chosen(trained.best, trained.best_step, settings.training.select_by)
    for warning in warnings_of(trained.best, read_calibration(trained.artifact).tasks):
        yield f"warning: {warning}"


def validations_table(history: Sequence[tuple[int, Validation]], best_step: int) -> Table:
    """A row for each step and task; what is undefined is a dash. history: (step, validation) of each."""
    table = Table(title="Validations", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = "placement hidden, before calibration; gauc: by user; calibration: predicted / observed"
    table.caption_justify = "left"
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("task", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for step, found in history:
        names = dict.fromkeys([*found.loss, *found.auc])
        for place, name in enumerate(names):
            cells = [_cell(getattr(found, metric).get(name)) for metric in _COLUMNS.values()]
            shown = f"{step:,}{' chosen' if step == best_step else ''}" if place == 0 else ""
            style = "bold" if step == best_step else ""
            table.add_row(Text(shown), Text(name), *cells, style=style, end_section=place == len(names) - 1)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
