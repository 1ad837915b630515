"""Labels as two classes, whatever the task's kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmoe_rec.features.layout import Layout


@dataclass(frozen=True)
class BinaryLabels:
    """Indices of the positive and of the negative rows among N, per task; an unobserved row is in neither.

    A regression's row is positive where its label is above the task's mean in training.
    """

    positive: list[np.ndarray]
    negative: list[np.ndarray]

    @staticmethod
    def of(labels: np.ndarray, layout: Layout) -> BinaryLabels:
        """Of (N, T) labels, NaN is unobserved."""
        bounds = [0.5 if task.kind == "binary" else task.mean for task in layout.tasks]
        above = [labels[:, task] > bound for task, bound in enumerate(bounds)]
        seen = ~np.isnan(labels)
        return BinaryLabels(
            [np.flatnonzero(each) for each in above],
            [np.flatnonzero(seen[:, task] & ~each) for task, each in enumerate(above)],
        )
