"""Reliability of probabilities: predictions against observed rates, in bins that hold equally many rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_matrix

from mmoe_rec.evaluation.resampling import Values, replicate, with_interval


def calibration_bins(
    histogram: pa.Table, users: pa.ChunkedArray, resamples: int, seed: int, bins: int = 10
) -> list[dict[str, Any]]:
    """Equal-mass bins of rising prediction, from the histogram of a binary task.

    Rows of one histogram bin stay together, so masses differ where many rows share a prediction, and there are fewer
    bins than asked for where a single prediction holds more rows than a bin.

    Args:
        histogram: `TASK.histogram` of `EvaluationSums`.
        users: all users that were measured, those without an observed label included.
        resamples: of the bootstrap over users that gives the intervals; bins stay where they are.
        seed: of the bootstrap.
        bins: how many to aim for.

    Returns:
        One dict a bin: `rows`, `weight`, `mean_predicted`, and `observed_rate` with its 95% interval `low` and `high`
        (None for a single user). Means are weighted. Empty without rows.
    """
    if len(histogram) == 0:
        return []
    bin_of_row = _equal_mass(histogram, bins)
    used = int(bin_of_row.max()) + 1
    total = {name: np.bincount(bin_of_row, histogram[name].to_numpy(), used) for name in histogram.column_names[2:]}
    user = pc.index_in(histogram["user"], value_set=users.combine_chunks()).to_numpy()
    weight, label = (
        csr_matrix((histogram[name].to_numpy(), (bin_of_row, user)), (used, len(users))) for name in ("weight", "label")
    )

    def observed_rates(counts: np.ndarray) -> Values:
        mass = weight @ counts
        rates = np.divide(label @ counts, mass, out=np.full_like(mass, np.nan), where=mass > 0)
        return {("bin", str(i)): rates[i] for i in range(used)}

    replicates = replicate(observed_rates, len(users), resamples, seed)
    result = []
    for i in range(used):
        rate = with_interval(total["label"][i] / total["weight"][i], replicates["bin", str(i)], len(users))
        result.append(
            {
                "rows": int(total["rows"][i]),
                "weight": float(total["weight"][i]),
                "mean_predicted": float(total["prediction"][i] / total["weight"][i]),
                "observed_rate": rate["value"],
                "low": rate["low"],
                "high": rate["high"],
            }
        )
    return result


def expected_calibration_error(bins: list[dict[str, Any]]) -> float | None:
    """Mean over bins, by weight, of |mean predicted - observed rate| (Naeini et al., 2015); None without bins."""
    weight = sum(row["weight"] for row in bins)
    if weight == 0:
        return None
    return float(sum(row["weight"] * abs(row["mean_predicted"] - row["observed_rate"]) for row in bins) / weight)


def _equal_mass(histogram: pa.Table, bins: int) -> np.ndarray:
    """(rows of the histogram,) int64, the wide bin of each; wide bins without rows are skipped in the numbering."""
    logit_bin, index = np.unique(histogram["bin"].to_numpy(), return_inverse=True)
    mass = np.bincount(index, histogram["weight"].to_numpy(), len(logit_bin))
    middle = np.cumsum(mass) - 0.5 * mass
    wide = np.minimum((bins * middle / mass.sum()).astype(np.int64), bins - 1)
    return np.unique(wide, return_inverse=True)[1][index]
