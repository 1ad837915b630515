"""The labels of log rows: each task's own, and the outcome over all rows of a satisfaction that follows engagement.

A task with `given` exists only where the given task's label is 1. Its own label is unobserved elsewhere; its outcome
(engaged and satisfied, as in ESMM: Ma et al., SIGIR 2018) is 0 where there was no engagement.
"""

from __future__ import annotations

import numpy as np

from mmoe_rec.features.rows import LogRows, maturity
from mmoe_rec.schema import outcome_name


def labels_of(rows: LogRows, known_by: int) -> dict[str, np.ndarray]:
    """Task or outcome -> (N,) float64 labels, NaN where unobserved at `known_by` (microseconds since 1970 UTC).

    An outcome is unobserved, engagement or not, until the satisfaction's label could have matured: were the zeros of
    recent rows known before their ones, there would seem to be less satisfaction than there is.
    """
    tasks = rows.schema.tasks
    labels = {name: rows.labels(task, known_by) for name, task in tasks.items()}
    outcomes = {}
    for name, task in tasks.items():
        if task.given is not None:
            engaged = labels[task.given]
            matured = rows.times() + maturity(task) <= known_by
            labels[name] = np.where(engaged == 1, labels[name], np.nan)
            outcomes[outcome_name(task.given, name)] = np.where((engaged == 0) & matured, 0.0, labels[name])
    return labels | outcomes
