"""Slices of rows, and how well a model does on each: what it gives some users while the mean hides it.

A slice is compared with all rows, by the same redraws of users, or with another model on the rows of the slice. See
README.md for which are judged (Slices and findings).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from scipy.stats import t as student

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    LEVEL,
    Difference,
    Key,
    Resampled,
    Values,
    correct_all,
    find_difference,
    resample,
)
from mmoe_rec.evaluation.metrics.metric import distance_from_one
from mmoe_rec.evaluation.summary import SCORE, MeasuredModel, UserMetrics
from mmoe_rec.evaluation.sums import count_rarer_label, describe_other_rows

_NDCG = "ndcg_at_10"
METRICS_OF_SLICES = ("auc", "calibration", "r2", _NDCG)
"""The metrics of binary tasks, of a regression, and of the score."""
ALL = "all rows"
MOST_VALUES = 1_000
"""A column of more values is an id or a number, and is not sliced."""
SHOWN_VALUES = 20
"""So many values with the most rows are slices; what is left is one more."""
MISSING, OTHERS = "(missing)", "(all others)"
_BUCKET = re.compile(r"bucket\(\s*(.+?)\s*,\s*(\d+)\s*\)")


@dataclass(frozen=True)
class SliceBy:
    """name: as it was asked for; column: of the rows; buckets: how many, None for the column's values."""

    name: str
    column: str
    buckets: int | None = None

    @staticmethod
    def of(word: str, option: str = "--slices") -> "SliceBy":
        """What `COLUMN` or `bucket(COLUMN, N)` says; option: the one that named it.

        Raises UserError for a number of buckets that there can't be.
        """
        found = _BUCKET.fullmatch(word.strip())
        if found is None:
            if word.startswith("bucket("):
                raise UserError(f"{option} {word}: expected 'bucket(COLUMN, N)', such as 'bucket(price, 10)'")
            return SliceBy(word, word)
        if not 2 <= int(found[2]) <= 100:
            raise UserError(f"{option} {word}: expected 2 to 100 buckets")
        return SliceBy(word, found[1], int(found[2]))

    def read(self, values: pa.Array) -> pa.Array:
        """Values as strings, or numbers as float64; null where they are missing.

        Raises ValueError, which says what the column holds, where it can't be sliced by.
        """
        values = values.dictionary_decode() if pt.is_dictionary(values.type) else values
        if pt.is_null(values.type):
            return pa.nulls(len(values), pa.string() if self.buckets is None else pa.float64())
        if pt.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if self.buckets is None:
            if pt.is_nested(values.type) or pt.is_binary(values.type):
                raise ValueError(f"holds {values.type}, which rows can't be sliced by")
            return values.cast(pa.string())
        if not (pt.is_integer(values.type) or pt.is_floating(values.type) or pt.is_boolean(values.type)):
            raise ValueError(f"holds {values.type}, and buckets are of numbers")
        return values.cast(pa.float64(), safe=False)

    def find_slices(self, values: pa.Array) -> "Slices":
        """The slices of values that `read` gave. Raises UserError where there are too many."""
        known = values.drop_null()
        if self.buckets is None:
            counted = known.value_counts()
            return self.of_values(counted.field("values").to_pylist(), counted.field("counts").to_pylist())
        if not len(known):
            return Slices(self, ())
        numbers = known.to_numpy()
        edges = np.quantile(numbers, self.shares, method="inverted_cdf")
        return self.of_numbers(edges, numbers.min(), numbers.max())

    def of_values(self, values: Sequence[str], rows: Sequence[int]) -> "Slices":
        """The slices of values by how many rows have each. Raises UserError for more than `MOST_VALUES`."""
        if len(values) > MOST_VALUES:
            raise UserError(
                f"column '{self.column}' has more than {MOST_VALUES:,} values, such as {min(values)!r}: too many to "
                f"slice by; slice by 'bucket({self.column}, 10)' if it is a number"
            )
        often = sorted(zip(values, rows, strict=True), key=lambda each: (-each[1], each[0]))[:SHOWN_VALUES]
        return Slices(self, tuple(sorted(value for value, _ in often)))

    @property
    def shares(self) -> list[float]:
        """The share of the rows up to the end of each bucket but the last."""
        return [number / (self.buckets or 1) for number in range(1, self.buckets or 1)]

    def of_numbers(self, edges: Iterable[float], least: float, largest: float) -> "Slices":
        """The slices of a number. edges: the largest number of each of the `shares`."""
        return Slices(self, (), tuple(sorted({float(each) for each in edges})), (float(least), float(largest)))


@dataclass(frozen=True)
class Slices:
    """The slices of a column. values: of those that are shown; edges: last value of each bucket but the last; ends: the
    least and the largest value. A bucket (1, 2] holds what is above 1 and at most 2."""

    by: SliceBy
    values: tuple[str, ...]
    edges: tuple[float, ...] = ()
    ends: tuple[float, float] = (0.0, 0.0)

    @property
    def names(self) -> list[str]:
        """The names of all slices, in the order in which they are best read."""
        if self.by.buckets is None:
            shown = [each if each.strip() and each not in (MISSING, OTHERS) else f"'{each}'" for each in self.values]
            return [*shown, OTHERS, MISSING]
        bounds = [self.ends[0], *self.edges]
        tops = [*self.edges, self.ends[1]]
        if not self.edges:
            return ["all", MISSING]
        for digits in (6, 9, 12, 17):  # as many as tell them apart
            ends = [(f"{low:.{digits}g}", f"{top:.{digits}g}") for low, top in zip(bounds, tops, strict=True)]
            names = [f"{'(' if place else '['}{low}, {top}]" for place, (low, top) in enumerate(ends)]
            if len(set(names)) == len(names):
                break
        return [*names, MISSING]

    def rows(self, values: pa.Array) -> Mapping[str, np.ndarray]:
        """Name -> numbers of its rows among those that have the values; only slices that have rows."""
        missing = values.is_null().to_numpy(zero_copy_only=False)
        if self.by.buckets is None:
            place = pc.fill_null(pc.index_in(values, value_set=pa.array(self.values, pa.string())), len(self.values))
            number = place.to_numpy().astype(np.int64)
        else:
            number = np.searchsorted(self.edges, pc.fill_null(values, 0.0).to_numpy(), side="left")
        names = self.names
        number[missing] = len(names) - 1
        return {names[each]: np.flatnonzero(number == each) for each in np.unique(number)}


@dataclass(frozen=True)
class SliceRecord:
    """A metric of a model in a slice, beside its value on all rows, or that of another model in the slice.

    by, slice: what rows are sliced by, and the value; group: the task, or `score`; labels: rows of the rarer label,
    None of the score; requests: of NDCG, those that rank anything; beside: `ALL`, or the name of another model; apart:
    by how much the value differs, with its interval, its standard error by how many effective users, and p-values. What
    can't be judged for want of labels is None.
    """

    by: str
    slice: str
    group: str
    metric: str
    rows: int
    labels: int | None
    requests: int | None
    value: float | None
    beside: str
    apart: float | None
    low: float | None
    high: float | None
    error: float | None
    effective_users: float | None
    p: float | None
    p_corrected: float | None = None

    @property
    def is_worse(self) -> bool:
        """True if the metric is shown to be lower, or the probabilities to be further off."""
        if self.value is None or self.apart is None or not self.is_significant:
            return False
        if self.metric != "calibration":
            return self.apart < 0
        return distance_from_one(self.value) > distance_from_one(self.value - self.apart)

    @property
    def is_significant(self) -> bool:
        """True if the difference is shown after the correction for how many slices are compared."""
        return self.p_corrected is not None and self.p_corrected < LEVEL

    def test_loss(self, margin: float) -> float:
        """The p-value of a loss of more than the margin, by both tails as an interval's; 1 where it can't be tested."""
        if self.apart is None or self.error is None or self.effective_users is None or not self.error:
            return 1.0
        return float(2 * student.cdf((self.apart + margin) / self.error, self.effective_users - 1))


def compare_slices(models: Mapping[str, MeasuredModel], model: str, resamples: int) -> list[SliceRecord]:
    """A record for each slice of a model, task or `score`, metric, and what the slice is compared with."""
    slices, whole, requests = models[model].slices, models[model].sums, Counter[str]()
    measured, records = UserMetrics(whole, names=METRICS_OF_SLICES), list[SliceRecord]()
    # The same redraws as in each slice.
    of_all = resample(measured.at, measured.units, resamples) if slices else {}
    for (by, _), sums in slices.items():
        requests[by] += sums.total("requests")
    for key in slices:
        is_cut = requests[key[0]] > whole.total("requests")
        records += _compare_slice(key, models, model, of_all, resamples, is_cut)
    return correct_all(records)


def sort_worst_first(records: Sequence[SliceRecord]) -> list[SliceRecord]:
    """Those that are shown to be worse: AUC, R2 and NDCG by the difference, beside other models first, then
    probabilities by how far they are off; then the others of the former in their order."""
    ranked = [each for each in records if each.metric != "calibration" and each.value is not None]
    off = [each for each in records if each.metric == "calibration" and each.is_worse]
    return [
        *sorted((each for each in ranked if each.is_worse), key=lambda each: (each.beside == ALL, each.apart or 0.0)),
        *sorted(off, key=lambda each: -distance_from_one(each.value or 0.0)),
        *(each for each in ranked if not each.is_worse),
    ]


def _compare_slice(
    key: tuple[str, str],
    models: Mapping[str, MeasuredModel],
    model: str,
    of_all: Mapping[Key, Resampled],
    resamples: int,
    cut: bool,
) -> Iterator[SliceRecord]:
    """of_all: metrics of all rows; cut: whether requests have rows in other slices too."""
    here, units = models[model].slices[key], models[model].sums.tables["ranking"]["user"].combine_chunks()
    others = {name: each.slices[key] for name, each in models.items() if key in each.slices}
    sides = {name: its for name, its in others.items() if describe_other_rows(here, its) is None}
    measured = {side: UserMetrics(sums, names=METRICS_OF_SLICES) for side, sums in sides.items()}
    users = {side: sums.tables["ranking"]["user"] for side, sums in sides.items()}
    places = {side: pc.index_in(each, value_set=units).to_numpy() for side, each in users.items()}

    def values_of(counts: np.ndarray) -> Values:
        return {
            (side, *metric): value
            for side, place in places.items()
            for metric, value in measured[side].at(np.ascontiguousarray(counts[place])).items()
        }

    effective = measured[model].effective
    resampled = {(ALL, *metric): each for metric, each in of_all.items()}
    resampled |= resample(values_of, len(units), resamples)
    for (group, metric), sizes in effective.items():
        its, ranks = resampled[model, group, metric], metric == _NDCG
        task = None if group == SCORE else group
        labels = None if task is None else count_rarer_label(here, task)
        requests = here.total("ranked_requests", task) if ranks else None
        is_judged = min(each for each in (labels, requests, FEWEST) if each is not None) >= FEWEST
        for side in (ALL, *sides):
            if side == model or (side, group, metric) not in resampled:
                continue
            of_shorter_lists = ranks and cut and side == ALL
            if of_shorter_lists and len(sides) > 1:
                continue  # another model is what it can be compared with
            apart = Difference(None)
            if is_judged and not of_shorter_lists:
                apart = find_difference(its, resampled[side, group, metric], sizes, len(here.tables["ranking"]))
            value = its.value if is_judged and np.isfinite(its.value) else None
            told = (*key, group, metric, here.total("rows", task), labels, requests, value, side)
            yield SliceRecord(*told, apart.value, apart.low, apart.high, apart.error, apart.effective_users, apart.p)
