"""A request's task weights: which exponent each task has in the score.

A task's weight is its own weight times its objective's: the own weight is the one given under the task's name, else
the settings' `score_weight`; the objective's is the one given under its name, else 1. So
`{"satisfaction": 0.5}` halves the weight of every satisfaction task, and `{"bought": 2}` sets one task's weight.
A name that is both a task's and an objective's means the task.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmoe_rec.inference.errors import RequestError, quoted
from mmoe_rec.model.layout import ModelTask


def fused_weights(tasks: Sequence[ModelTask], given: Mapping[str, Any] | None) -> np.ndarray:
    """(T,) float64 weights of the tasks in the score.

    Raises RequestError for an unknown name, a weight that is negative or not finite, or weights that leave every task
    out.
    """
    if given is None:
        return np.array([task.score_weight for task in tasks])
    if not isinstance(given, Mapping):
        raise RequestError('task_weights must be an object of numbers, such as {"engagement": 1.0}')
    names = {task.name for task in tasks}
    objectives = {task.objective for task in tasks} - names
    for name, weight in given.items():
        _check(name, weight, [*sorted(names), *sorted(objectives)])
    weights = np.array(
        [
            float(given.get(task.name, task.score_weight))
            * (float(given.get(task.objective, 1.0)) if task.objective in objectives else 1.0)
            for task in tasks
        ]
    )
    if given and not weights.any():
        raise RequestError("task_weights leave every task out of the score: at least one weight must be above 0")
    return weights


def _check(name: str, weight: Any, valid: list[str]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(str(name), valid, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RequestError(
            f"task_weights names {quoted(name)}, which is no task or objective{hint} ({', '.join(valid)})"
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RequestError(f"task_weights: the weight of '{name}' must be a number, found {quoted(weight)}")
    if not math.isfinite(weight) or not 0 <= weight <= 1e6:
        raise RequestError(
            f"task_weights: the weight of '{name}' must lie between 0 and 1,000,000, found {quoted(weight)}"
        )
