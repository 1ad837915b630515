"""Other weights of the tasks in the score of a model: chosen on the validation rows, told of on the test rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.tradeoffs import (
    CUTOFF,
    Sweep,
    apart_from_first,
    choose,
    grid,
    lists_of,
    normalised,
    told_of_sweep,
)
from mmoe_rec.jobs.evaluate import scored_rows
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import find_model


@dataclass(frozen=True)
class Choice:
    """Weights for a goal. before, weights: task -> weight, which sum to 1; apart: task -> difference of NDCG on the
    test rows, see `differences`; goal, margins: as asked; records: of the sweep over the test rows, see
    `told_of_sweep`."""

    goal: str
    margins: dict[str, float]
    before: dict[str, float]
    weights: dict[str, float]
    apart: dict[str, dict[str, float | None]]
    records: list[dict[str, Any]]

    @property
    def changes(self) -> bool:
        """Whether other weights were chosen than those that the model has."""
        return self.before != self.weights


def tune_weights(settings: Settings, address: str, goal: str | None, margins: Mapping[str, float], out: Path) -> Choice:
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
    deployed = normalised([task.score_weight for task in validation.layout.tasks])
    weights, names = grid(len(tasks), deployed), [task.name for task in validation.layout.tasks]
    number = choose(Sweep(names, lists_of(validation), weights), goal, kept, resamples)
    on_test = Sweep(names, lists_of(test), weights)
    choice = Choice(
        goal,
        kept,
        dict(zip(names, weights[0], strict=True)),
        dict(zip(names, weights[number], strict=True)),
        apart_from_first(on_test, number, resamples),
        told_of_sweep(on_test, resamples),
    )
    with atomic_file(out / "tradeoffs.json") as file:
        file.write_text(json.dumps(choice.__dict__, indent=1), encoding="utf-8")
    return choice


def told(choice: Choice) -> list[str]:
    """For people."""
    from mmoe_rec.evaluation.numbers import with_interval

    lines = []
    for task, each in choice.apart.items():
        if each["value"] is None:
            lines.append(f"{task}: no request of the test rows ranks anything")
            continue
        lines.append(f"{task}: NDCG@{CUTOFF} changes by {with_interval(each)} on the test rows")
    kept = ", ".join(f"{name} by {margin:g}" for name, margin in choice.margins.items())
    if not choice.changes:
        return [f"no weights serve {choice.goal} better without a loss of {kept} or more: keep those of the model"]
    lines = [f"chosen on the validation rows for {choice.goal}, with a loss of at most {kept}", *lines]
    gain = choice.apart[choice.goal]
    if gain["low"] is None or gain["low"] <= 0:
        lines.append(f"a gain of {choice.goal} is not shown on the test rows: the model's weights may be as good")
    return lines
