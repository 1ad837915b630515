"""mmoe-rec tune-weights --config configs/shop.yaml --model models:/shop@champion --goal bought

Tries other weights of the tasks in the score of a model, and picks those that rank best for one task (`--goal`) while
the others lose no more NDCG@10 than they may (`--keep rebought=0.002`, else `evaluation.margin`). The choice is made on
the validation rows; what it gains and costs is told on the test rows, with intervals. Prints the front of weights of
which none is better for all tasks, and writes all to `data.work`/tradeoffs/tradeoffs.json. Nothing is trained: put the
weights into the settings as `score_weight`, or send them with a request as `task_weights`.
"""

from __future__ import annotations

import math
from pathlib import Path

import click

from mmoe_rec.cli.command import Configuration, model_option, out_option, settings_command, show
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@model_option
@click.option("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
@click.option("--keep", multiple=True, metavar="TASK=LOSS...", help="NDCG@10 that another task may lose at most")
@out_option("data.work/tradeoffs", "where tradeoffs.json goes")
def tune_weights(
    configuration: Configuration, model: str, goal: str | None, keep: tuple[str, ...], out: Path | None
) -> None:
    """Runs the command."""
    settings = configuration.settings
    margins = dict(_margin(word) for word in keep)
    from mmoe_rec.jobs import tune_weights as weights
    from mmoe_rec.report.tables import show_choice

    out = out or Path(settings.data.work) / "tradeoffs"
    show(show_choice(weights.tune_weights(settings, model, goal, margins, out)))
    print(f"all weights: {out / 'tradeoffs.json'}")


def _margin(word: str) -> tuple[str, float]:
    task, equals, loss = word.partition("=")
    try:
        margin = float(loss)
    except ValueError:
        margin = math.nan
    if not equals or not margin >= 0:
        raise UserError(f"--keep takes TASK=LOSS, such as rebought=0.002; found '{word}'")
    return task, margin
