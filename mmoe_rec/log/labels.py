"""The labels of log rows: each task's own, and the outcome over all rows of a satisfaction that follows engagement.

A task with `given` exists only where the given task's label is 1. Its own label is unobserved elsewhere; its outcome
(engaged and satisfied, as in ESMM: Ma et al., SIGIR 2018) is 0 where there was no engagement.
"""

from __future__ import annotations

import numpy as np

from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.settings.columns import outcome_name

_FOREVER = np.iinfo(np.int64).max


def labels_of(rows: LogRows, known_by: int) -> dict[str, np.ndarray]:
    """Task or outcome -> (N,) float64 labels, NaN where unobserved at `known_by` (microseconds since 1970 UTC).

    An outcome is unobserved, engagement or not, until the satisfaction's label could have matured: if the zeros of
    recent rows were known before their ones, satisfaction would seem lower than it is.
    """
    tasks = rows.schema.tasks
    labels = {name: rows.labels(task, known_by) for name, task in tasks.items()}
    outcomes = {}
    for name, task in tasks.items():
        if task.given is not None:
            matured = rows.times() + maturity(task, rows.schema) <= known_by
            not_engaged = (labels[task.given] == 0) & matured
            outcomes[outcome_name(task.given, name)] = np.where(not_engaged, 0.0, labels[name])
    return labels | outcomes


def unmatured(rows: LogRows, known_by: int) -> dict[str, int]:
    """Task -> number of labels that the log holds but that had not matured at `known_by`."""
    counts = {}
    for name, task in rows.schema.tasks.items():
        late = rows.times() + maturity(task, rows.schema) > known_by
        counts[name] = int((~np.isnan(rows.labels(task, _FOREVER)[late])).sum()) if late.any() else 0
    return counts
