"""What a training's validations found, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmoe_rec.report.tables import validations_table

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.jobs.workspace import Trained
    from mmoe_rec.settings.sections import Settings

FEW_STEPS = 50


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
