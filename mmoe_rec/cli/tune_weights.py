"""mmoe-rec tune-weights --config configs/shop.yaml --model models:/shop@champion --goal bought

Tries other weights of the tasks in the score of a model, and picks those that rank best for one task (`--goal`) while
the others lose no more NDCG@10 than they may (`--keep rebought=0.002`, else `evaluation.margin`). The choice is made on
the validation rows; what it gains and costs is told on the test rows, with intervals. Prints the front of weights of
which none is better for all tasks, and writes all to `data.work`/tradeoffs/tradeoffs.json. Nothing is trained: put the
weights into the settings as `score_weight`, or send them with a request as `task_weights`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmoe_rec.cli.main import Configuration, model_option, out_option, settings_command, show
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from mmoe_rec.evaluation.tradeoffs import WeightsChoice
    from mmoe_rec.settings.sections import Settings


@settings_command(__doc__)
@model_option
@click.option("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
@click.option("--keep", multiple=True, metavar="TASK=LOSS...", help="NDCG@10 that another task may lose at most")
@out_option("data.work/tradeoffs", "where tradeoffs.json goes")
def tune_weights(
    configuration: Configuration, model: str, goal: str | None, keep: tuple[str, ...], out: Path | None
) -> None:
    settings, margins = configuration.settings, {}
    for word in keep:
        task, equals, loss = word.partition("=")
        try:
            margins[task] = float(loss)
        except ValueError:
            margins[task] = math.nan
        if not equals or not margins[task] >= 0:
            raise UserError(f"--keep takes TASK=LOSS, such as rebought=0.002; found '{word}'")
    from mmoe_rec.atomic import write_text
    from mmoe_rec.report.tables import show_choice

    file = (out or Path(settings.data.work) / "tradeoffs") / "tradeoffs.json"
    choice = choose(settings, model, goal or next(iter(settings.tasks)), margins)
    write_text(file, json.dumps(asdict(choice), indent=1))
    show(show_choice(choice))
    print(f"all weights: {file}")


def choose(settings: Settings, address: str, goal: str, margins: Mapping[str, float]) -> WeightsChoice:
    """Weights that serve the goal best on the validation rows, while the NDCG of other tasks loses no more than their
    margins, else `evaluation.margin`; measured on the test rows.

    Raises UserError for a task that there is not, or a model with one task.
    """
    tasks = list(settings.tasks)
    if len(tasks) < 2:
        raise UserError(f"the settings have one task, '{tasks[0]}': there is nothing to weigh")
    for name in (goal, *margins):
        if name not in tasks:
            raise UserError(f"there is no task '{name}'; the settings have {', '.join(tasks)}")
    if goal in margins:
        raise UserError(f"'{goal}' is the goal, and can't be kept as well")
    from mmoe_rec.evaluation import tradeoffs
    from mmoe_rec.jobs.evaluate import scored_rows
    from mmoe_rec.tracking.registry import find_model

    kept = {name: margins.get(name, settings.evaluation.margin) for name in tasks if name != goal}
    found, resamples = find_model(address, settings.tracking.address), settings.evaluation.resamples
    validation, test = (scored_rows(settings, found, address, split) for split in ("validation", "test"))
    if not (validation.ranks and test.ranks):
        raise UserError(
            "every request of the validation or test rows has one row, which no weights can rank: weights of tasks are "
            "for candidate lists (columns.request, or columns.user with columns.time)"
        )
    deployed = tradeoffs.normalise([task.score_weight for task in validation.layout.tasks])
    weights = tradeoffs.make_grid(len(tasks), deployed)
    number = tradeoffs.choose_weights(tradeoffs.Sweep(validation, weights, resamples), goal, kept)
    on_test = tradeoffs.Sweep(test, weights, resamples)
    before, after = (dict(zip(on_test.tasks, weights[each], strict=True)) for each in (0, number))
    apart, front = on_test.compare_with_first(number), tradeoffs.find_front(on_test)
    return tradeoffs.WeightsChoice(goal, kept, before, after, apart, front)
