"""Other weights of the tasks in the score of a model: chosen on the validation rows, told of on the test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.tradeoffs import (
    Sweep,
    WeightsChoice,
    choose_weights,
    find_front,
    make_grid,
    normalise,
)
from mmoe_rec.jobs.evaluate import scored_rows
from mmoe_rec.report.documents import write_json
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model


def tune_weights(
    settings: Settings, address: str, goal: str | None, margins: Mapping[str, float], out: Path
) -> WeightsChoice:
    """Chooses weights that serve the goal best on the validation rows, while the NDCG of other tasks loses no more than
    their margins; measures them on the test rows, and writes `tradeoffs.json` to a folder.

    goal: a task, None for the first one; margins: task -> what it may lose; of those left out, `evaluation.margin`.
    Raises UserError for a task that there is not, or a model with one task.
    """
    tasks = list(settings.tasks)
    if len(tasks) < 2:
        raise UserError(f"the settings have one task, '{tasks[0]}': there is nothing to weigh")
    goal = tasks[0] if goal is None else goal
    for name in (goal, *margins):
        if name not in tasks:
            raise UserError(f"there is no task '{name}'; the settings have {', '.join(tasks)}")
    if goal in margins:
        raise UserError(f"'{goal}' is the goal, and can't be kept as well")
    kept = {name: margins.get(name, settings.evaluation.margin) for name in tasks if name != goal}
    found, resamples = find_model(address, settings.tracking.address), settings.evaluation.resamples
    validation, test = (scored_rows(settings, found, address, split) for split in ("validation", "test"))
    if not (validation.ranks and test.ranks):
        raise UserError(
            "every request of the validation or test rows has one row, which no weights can rank: weights of tasks are "
            "for candidate lists (columns.request, or columns.user with columns.time)"
        )
    deployed = normalise([task.score_weight for task in validation.layout.tasks])
    weights = make_grid(len(tasks), deployed)
    number = choose_weights(Sweep(validation, weights, resamples), goal, kept)
    on_test = Sweep(test, weights, resamples)
    choice = WeightsChoice(
        goal,
        kept,
        dict(zip(on_test.tasks, weights[0], strict=True)),
        dict(zip(on_test.tasks, weights[number], strict=True)),
        on_test.compare_with_first(number),
        find_front(on_test),
    )
    write_json(out / "tradeoffs.json", asdict(choice))
    return choice
