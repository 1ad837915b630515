"""python -m pipelines.evaluation.tune_weights --config configs/shop.yaml --model models:/shop@champion --goal bought

Tries other weights of the tasks in the score of a model, and picks those that rank best for one task (`--goal`) while
the others lose no more NDCG@10 than they may (`--keep rebought=0.002`, else `evaluation.margin`). The choice is made on
the validation rows; what it gains and costs is told on the test rows, with intervals. Prints the front of weights of
which none is better for all tasks, and writes all to `data.work`/tradeoffs/tradeoffs.json. Nothing is trained: put the
weights into the settings as `score_weight`, or send them with a request as `task_weights`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import read_command, show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder"
    )
    parser.add_argument("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="TASK=LOSS", help="NDCG@10 that another task may lose at most"
    )
    parser.add_argument("--out", metavar="DIR", help="where tradeoffs.json goes (default: data.work/tradeoffs)")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    margins = dict(_margin(word) for word in arguments.keep)
    from pathlib import Path

    from mmoe_rec.jobs.tune_weights import tune_weights
    from mmoe_rec.report.tables import show_choice

    out = Path(arguments.out or Path(settings.data.work) / "tradeoffs")
    show(show_choice(tune_weights(settings, arguments.model, arguments.goal, margins, out)))
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
