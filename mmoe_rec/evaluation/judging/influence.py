"""How many users tell what a difference is, judged by how much each of them moves it.

A resample draws a user more often or less, and a metric moves with it: their covariance over the resamples is the
user's influence d (for a mean over users, its deviation / their number). Where U users tell alike, with normal
influence, the mean of sum d^4 / (sum d^2)^2 is 3 (U - 1) / (U (U + 1)); the U that would give what was found is the
effective number. It falls where few users have most rows, most of the weight, or nearly all positive labels, and is
what Student's degrees of freedom are counted from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmoe_rec.evaluation.metrics.resampling import Values, defined_well, of_few

Key = tuple[str, str]
_FEW = 0.45  # what four users give
_ALONE = 2.0  # users, where two or three have all of the influence, who can't be told apart by it


@dataclass(frozen=True)
class Resampled:
    """A number of U users. value: of all; redrawn: (R,) of the resamples; influence: (U,) of each user."""

    value: float
    redrawn: np.ndarray
    influence: np.ndarray

    def less(self, other: Resampled) -> Resampled:
        """The difference from another one in the same resamples."""
        return Resampled(self.value - other.value, self.redrawn - other.redrawn, self.influence - other.influence)

    @cached_property
    def defined(self) -> np.ndarray:
        """(D,) of the resamples, those in which it is."""
        return self.redrawn[np.isfinite(self.redrawn)]

    @property
    def effective_users(self) -> float:
        """From 1 to U; U where nothing varies."""
        users, resamples = len(self.influence), len(self.defined)
        variance = float(self.defined.var()) if resamples else 0.0
        if not variance:
            return float(users)
        # Covariances of R resamples err by the deviation / sqrt(R), which adds to the fourth powers.
        noise = (6 + 3 * users / resamples) / resamples
        return min(float(users), _users_of(float((self.influence**4).sum()) / variance**2 - noise))

    def error(self, effective: float, units: int | None = None) -> tuple[float | None, float]:
        """The standard error from the choice of users, None where too few resamples are defined, and how many users
        alike would tell as much.

        effective: how many would by their sizes; units: how many of the U have rows, None for all.
        """
        if not defined_well(self.defined, len(self.redrawn), len(self.influence) if units is None else units):
            return None, effective
        effective = min(effective, self.effective_users)
        return float(self.defined.std()) * of_few(effective), effective


def _users_of(share: float) -> float:
    """How many users alike, of normal influence, give this sum d^4 / (sum d^2)^2."""
    if share <= 0:
        return np.inf
    if share <= _FEW:
        return ((3 - share) + float(np.sqrt((3 - share) ** 2 - 12 * share))) / (2 * share)
    return max(1.0, float(np.interp(share, [_FEW, 0.5, 1.0], [4.0, _ALONE, 1.0])))


class Resampling:
    """Values of metrics in resamples, which are added some at a time. once: those of all users."""

    def __init__(self, once: Values, users: int) -> None:
        self._once = {key: float(value[0]) for key, value in once.items()}
        self._redrawn: dict[Key, list[np.ndarray]] = {key: [] for key in once}
        self._sums = np.zeros((users, len(once)))

    def add(self, counts: np.ndarray, values: Values) -> None:
        """Values (R,) of resamples that draw the users `counts` (U, R) times."""
        for key, value in values.items():
            self._redrawn[key].append(value)
        away = np.array([values[key] - once for key, once in self._once.items()])
        away[~np.isfinite(away)] = 0.0
        self._sums += (counts - 1) @ away.T

    def found(self) -> Mapping[Key, Resampled]:
        """All that was added."""
        redrawn = {key: np.concatenate(each) for key, each in self._redrawn.items()}
        return {
            key: Resampled(once, redrawn[key], self._sums[:, place] / len(redrawn[key]))
            for place, (key, once) in enumerate(self._once.items())
        }
