"""The spread of a regression's labels, as sums that merge without losing it where the mean is large beside it.

The mean of squares less the square of the mean cancels: of labels of 1.7e9 +- 100, float64 keeps nothing of the
deviation. Kept instead is the sum of squares about the mean of each part, which merges by what the means of the parts
lie apart (Chan, Golub and LeVeque, 1983).
"""

import numpy as np
import pyarrow as pa

COLUMN = "label_spread"


def merged_spread(table: pa.Table) -> pa.Table:
    """Rows of parts, some of the same user, with spreads about the users' means: they add up to those of the users.

    table: `user`, `weight` (positive), `label` (weighted sum) and `label_spread` (weighted squares about the part's own
    mean, label / weight), float64 but for the user.
    """
    user = table["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    weight, label, spread = (table[name].to_numpy() for name in ("weight", "label", COLUMN))
    totals = np.bincount(user, weight)
    apart = label / weight - (np.bincount(user, label) / totals)[user]
    # The mean of a user is rounded: what that adds is taken off again.
    off = (np.bincount(user, weight * apart) / totals)[user]
    place = table.column_names.index(COLUMN)
    return table.set_column(place, COLUMN, pa.array(spread + weight * (apart - off) ** 2))


class Spread:
    """Variances of labels in resamples of users.

    Args:
        weight, label, spread: (U,) float64 as `merged_spread` describes them, 0 for a user without a label.
        least, largest: (U,) float64, of the user's labels; infinity and minus infinity without one.
    """

    def __init__(
        self, weight: np.ndarray, label: np.ndarray, spread: np.ndarray, least: np.ndarray, largest: np.ndarray
    ) -> None:
        seen = weight > 0
        mean = label[seen].sum() / weight[seen].sum() if seen.any() else 0.0
        apart = np.divide(label, weight, out=np.full(len(weight), mean), where=seen) - mean
        self._sums = np.stack([weight, weight * apart, spread + weight * apart**2])
        self._least, self._largest = least, largest

    def variance(self, counts: np.ndarray) -> np.ndarray:
        """(R,) float64 for `counts` (U, R) of each user; 0 where all labels are equal, NaN where there are none."""
        weight, apart, squares = self._sums @ counts
        some = weight > 0
        mean = np.divide(apart, weight, out=np.zeros_like(weight), where=some)
        variance = np.divide(squares, weight, out=np.full_like(weight, np.nan), where=some) - mean**2
        drawn = counts > 0
        least = np.where(drawn, self._least[:, None], np.inf).min(0)
        largest = np.where(drawn, self._largest[:, None], -np.inf).max(0)
        # What is left of equal labels is rounding.
        return np.where(some & (least == largest), 0.0, variance)
