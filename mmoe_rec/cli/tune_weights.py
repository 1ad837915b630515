"""mmoe-rec tune-weights --config configs/shop.yaml --goal bought

Tries other weights of the tasks in a model's score, and picks those that rank best for one task (`--goal`) while the
others lose no more NDCG@10 than they may (`--keep rebought=0.002`, else `evaluation.margin`). It reads the predictions
that `evaluate --split validation` and `evaluate` wrote: the validation rows choose, and the test rows say what the
choice gains and costs. Prints the front, weights that no others beat for all tasks, and writes all to tradeoffs.json.
Put the weights into the settings as `score_weight`, or send them with a request as `task_weights`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import click

from mmoe_rec.cli.main import Configuration, out_option, settings_command, show
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
@click.option("--keep", multiple=True, metavar="TASK=LOSS...", help="NDCG@10 that another task may lose at most")
@click.option("--predictions", nargs=2, metavar="V T", help="of validation and test rows (default: in data.work)")
@out_option("data.work/tradeoffs", "where tradeoffs.json goes")
def tune_weights(
    configuration: Configuration,
    goal: str | None,
    keep: tuple[str, ...],
    predictions: tuple[str, str],
    out: Path | None,
) -> None:
    settings, work, margins = configuration.settings, Path(configuration.settings.data.work), dict[str, float]()
    tasks = list(settings.tasks)
    goal = goal or tasks[0]
    for word in keep:
        if (found := re.fullmatch(r"([^=]+)=(\d*\.?\d+)", word)) is None:
            raise UserError(f"--keep takes TASK=LOSS, such as rebought=0.002; found '{word}'")
        margins[found[1]] = float(found[2])
    if len(tasks) < 2:
        raise UserError(f"the settings have one task, '{tasks[0]}': there is nothing to weigh")
    if unknown := [name for name in (goal, *margins) if name not in tasks]:
        raise UserError(f"there is no task '{unknown[0]}'; the settings have {', '.join(tasks)}")
    if goal in margins:
        raise UserError(f"'{goal}' is the goal, and can't be kept as well")
    margins = {name: margins.get(name, settings.evaluation.margin) for name in tasks if name != goal}
    from rich.table import Table

    from mmoe_rec.atomic import write_text
    from mmoe_rec.evaluation.prediction_files import columns_of_settings, open_predictions
    from mmoe_rec.evaluation.tradeoffs import Sweep, make_grid

    weights, columns = make_grid([task.score_weight for task in settings.tasks.values()]), columns_of_settings(settings)
    folders = [str(work / name / "predictions.parquet") for name in ("evaluation_validation", "evaluation")]
    rows = [open_predictions(columns, source, "--predictions") for source in predictions or folders]
    if any(len(each.requests.unique()) == len(each.requests) for each in rows):
        raise UserError("every request of the validation or test rows has one row, which no weights can rank")
    on_validation, on_test = (Sweep(each, tasks, weights, settings.evaluation.resamples) for each in rows)
    chosen, front = on_validation.choose(goal, margins), on_test.find_front().tolist()
    apart = on_test.compare_with_first(chosen)
    table = Table(" : ".join(tasks), *tasks, "", title="NDCG@10 of each task by weights in the score, test rows")
    for number, of in enumerate(on_test.values):
        marks = [name for name, place in (("the settings'", 0), ("chosen", chosen)) if place == number]
        if front[number] or marks:
            ratios = " : ".join(f"{weight:.3g}" for weight in weights[number])
            table.add_row(ratios, *(f"{value:.4f}" for value in of), ", ".join(marks))
    values = [[value if math.isfinite(value) else None for value in of] for of in on_test.values.tolist()]
    tree = {"goal": goal, "margins": margins, "tasks": tasks, "weights": weights, "values": values, "front": front}
    tree |= {"chosen": chosen, "apart": {task: asdict(each) for task, each in apart.items()}}
    file = (out or work / "tradeoffs") / "tradeoffs.json"
    write_text(file, json.dumps(tree, indent=1))
    told = {task: "nothing" if each.value is None else each.shown() for task, each in apart.items()}
    lines = [f"no weights serve {goal} better within the losses allowed: keep those of the settings"]
    if chosen:  # the first weights are those of the settings
        lines = [f"{task}: NDCG@10 changes by {change} on the test rows" for task, change in told.items()]
        if (apart[goal].low or 0.0) <= 0:
            lines.append(f"a gain of {goal} is not shown on the test rows: the settings' weights may be as good")
        chosen_weights = zip(tasks, weights[chosen], strict=True)
        lines += [f"  tasks.{task}.score_weight: {weight:.4g}" for task, weight in chosen_weights]
    show([table, *lines, f"all weights: {file}"])
