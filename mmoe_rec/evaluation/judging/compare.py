"""A model beside others: differences of all metrics, and a verdict on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmoe_rec.auc import FEWEST
from mmoe_rec.evaluation.closed import ClosedSums
from mmoe_rec.evaluation.judging.differences import differences
from mmoe_rec.evaluation.judging.objective import Objective, rarer
from mmoe_rec.evaluation.judging.verdict import Rule, verdict
from mmoe_rec.evaluation.metrics.resampling import are_few


def compare(
    models: Mapping[str, ClosedSums],
    model: str,
    summaries: Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str],
    decide_by: str,
    rule: Rule,
    resamples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """What `differences` gives of a model from all others, with a `verdict` on each.

    summaries: of all; tasks: those that may decide; decide_by: see `Objective.of`. Also holds `judged`, those of the
    tasks with labels enough, and `left_out`: each other task -> rows of its rarer label. Raises UserError where the
    rows are not the same, or for a metric that there is not.
    """
    mine = models[model]
    labels = {task: rarer(mine, task) for task in tasks}
    judged = [task for task, rows in labels.items() if rows >= FEWEST]
    found = differences(models, model, Objective.of(decide_by, mine, tasks), resamples, seed)
    for other, each in found["against"].items():
        each["verdict"] = verdict(found, other, summaries, judged, rule)
    return found | {"judged": judged, "left_out": {task: rows for task, rows in labels.items() if task not in judged}}


def told_of(compared: Mapping[str, Any]) -> list[str]:
    """For people: the verdicts, with the guardrails that hold a model back, and tasks that were not judged."""
    found = [each["verdict"]["sentence"] for each in compared["against"].values()]
    found += [
        f"{task} was not judged: {rows:,} rows have its rarer label, and {FEWEST} are needed"
        for task, rows in compared["left_out"].items()
    ]
    few = {name: users for name, users in compared["effective_users"].items() if are_few(users, compared["units"])}
    found += [
        f"few users have most rows of {name}: all tell as much as {users:.1f} of equal size, by which intervals of "
        "differences are wide"
        for name, users in few.items()
    ]
    if compared["objective"] is not None:
        what = compared["objective"]["name"]
        fewest = min(
            (each["objective"]["effective_users"] or np.inf for each in compared["against"].values()), default=np.inf
        )
        if not few and are_few(fewest, compared["units"]):
            found.append(
                f"few users decide on {what}, by their rows, weight, positive labels or influence: all tell as much as "
                f"{fewest:.1f} alike, by which intervals of differences are wide"
            )
    return found
