"""What a model has learnt of placement: what its tower adds to each task's logit where a candidate was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmoe_rec.model.layout import ModelLayout


@dataclass(frozen=True)
class PlacementEffects:
    """Of each input of placement, what is added where it has a value, beside what is added to the mean row.

    inputs: name -> numbers of R rows of its table, (R,) int64, how many of the rows have each, (R,) int64, and the
    effect, (R, T) float64: to a binary task's logit, or to a regression in its label's unit.
    """

    inputs: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


class PlacementSums:
    """Adds up what the tower gives, batch by batch."""

    def __init__(self, layout: ModelLayout) -> None:
        self._rows, self._total = 0, np.zeros(len(layout.tasks))
        self._sums = {
            each.name: np.zeros((layout.table(each.table).rows, 1 + len(layout.tasks)))
            for each in layout.ids
            if each.placement and not each.many
        }

    def add(self, added: np.ndarray, ids: Mapping[str, Any]) -> None:
        """added: (B, T) what the tower gives rows; ids: their inputs, of which those with one id a row are read."""
        counted = np.hstack([np.ones((len(added), 1)), added])
        self._rows, self._total = self._rows + len(added), self._total + added.sum(0)
        for name, sums in self._sums.items():
            np.add.at(sums, np.asarray(ids[name]), counted)

    def result(self) -> PlacementEffects:
        """Of all rows."""
        found = {}
        for name, sums in self._sums.items():
            seen = np.flatnonzero(sums[:, 0])
            effects = sums[seen, 1:] / sums[seen, :1] - self._total / max(self._rows, 1)
            found[name] = seen, sums[seen, 0].astype(np.int64), effects
        return PlacementEffects(found)
