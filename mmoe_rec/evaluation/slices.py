"""Slices of rows: by the values of a column, or by buckets of a number that hold about equally many rows.

How well a model does on parts of the rows: what it gives some users while the mean hides it.

A slice is compared with all rows, by the same redraws of users, or with another model on the rows of the slice, where
these are the same for it. Slices with fewer than FEWEST rows of either label, or requests that rank anything, are
counted, not judged; p-values are corrected for all that are. Where slices cut requests, their lists are shorter than
those of all rows, whose NDCG is no measure for theirs: they are compared between models alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import SCORE, check_same_rows, difference, holm, rarer
from mmoe_rec.evaluation.intervals import Resampling, Values, user_counts
from mmoe_rec.evaluation.summary import effective_by_metric, evaluate, sums_by_user
from mmoe_rec.evaluation.sums import ClosedSums

MOST_VALUES = 1_000
"""Of a column, beyond which it is an id or a number, and no slice."""
SHOWN_VALUES = 20
"""That have the most rows; what is left is one slice."""
MISSING, OTHERS = "(missing)", "(all others)"
_BUCKET = re.compile(r"bucket\(\s*(.+?)\s*,\s*(\d+)\s*\)")

Counts = tuple[np.ndarray, np.ndarray]
"""Values, rising, and how many rows have each."""


@dataclass(frozen=True)
class SliceBy:
    """name: as it was asked for; column: of the rows; buckets: how many, None for the column's values."""

    name: str
    column: str
    buckets: int | None = None

    @staticmethod
    def of(word: str, option: str = "--slices") -> SliceBy:
        """From `COLUMN` or `bucket(COLUMN, N)`; option: that named it.

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
            return pa.nulls(len(values), self._type)
        if pt.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        if self.buckets is None:
            if pt.is_nested(values.type) or pt.is_binary(values.type):
                raise ValueError(f"holds {values.type}, which rows can't be sliced by")
            return values.cast(pa.string())
        if not (pt.is_integer(values.type) or pt.is_floating(values.type) or pt.is_boolean(values.type)):
            raise ValueError(f"holds {values.type}, and buckets are of numbers")
        return values.cast(pa.float64(), safe=False)

    @property
    def _type(self) -> pa.DataType:
        return pa.string() if self.buckets is None else pa.float64()

    def count(self, values: Sequence[pa.Array]) -> Counts:
        """Of several parts. Raises UserError where there are too many values."""
        joined = pa.chunked_array(values, self._type)
        counted = joined.drop_null().value_counts()
        names, rows = counted.field("values"), counted.field("counts").to_numpy()
        return self._joined(names.to_numpy(zero_copy_only=False), rows)

    def add(self, parts: Sequence[Counts]) -> Counts:
        """Of all parts together. Raises as `count`."""
        names, rows = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        return self._joined(names, rows)

    def _joined(self, names: np.ndarray, rows: np.ndarray) -> Counts:
        distinct, place = np.unique(names.astype(str) if self.buckets is None else names, return_inverse=True)
        counts = np.bincount(place, rows, len(distinct)).astype(np.int64)
        if self.buckets is None and len(distinct) > MOST_VALUES:
            raise UserError(
                f"column '{self.column}' has more than {MOST_VALUES:,} values, such as {str(distinct[0])!r}: too many "
                f"to slice by; slice by 'bucket({self.column}, 10)' if it is a number"
            )
        return _thinned(distinct, counts) if self.buckets is not None else (distinct, counts)

    def slices(self, counts: Counts) -> Slices:
        """Which there are, by the counts of all rows."""
        values, rows = counts
        if self.buckets is None:
            shown = values[np.sort(np.argsort(-rows, kind="stable")[:SHOWN_VALUES])]
            return Slices(self, tuple(str(each) for each in shown))
        if not len(values):
            return Slices(self, ())
        ends = np.searchsorted(np.cumsum(rows), rows.sum() * np.arange(1, self.buckets) / self.buckets)
        edges = np.unique(values[np.minimum(ends, len(values) - 1)])
        return Slices(self, (), tuple(float(each) for each in edges), (float(values[0]), float(values[-1])))


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
        """Of all, in the order in which they are best read."""
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


def _thinned(values: np.ndarray, rows: np.ndarray, most: int = 4_096) -> Counts:
    """At most so many values, each of which stands for those after the one before."""
    if len(values) <= most:
        return values, rows
    group = np.minimum((np.cumsum(rows) - 1) * most // rows.sum(), most - 1)
    last = np.append(np.flatnonzero(np.diff(group)), len(values) - 1)
    kept = np.union1d([0], last)
    sums = np.add.reduceat(rows, np.append(0, kept[:-1] + 1)) if len(kept) > 1 else np.array([rows.sum()])
    return values[kept], sums


_NDCG = "ndcg_at_10"
METRICS = ("auc", "calibration", "r2", _NDCG)
"""That are measured of slices: of binary tasks, of regressions, and of the score."""
ALL = "all rows"


@dataclass(frozen=True)
class SlicedModel:
    """The sums of a model: of all rows, and of each slice, (what slices are by, value) -> sums, in the same units."""

    whole: ClosedSums
    slices: Mapping[tuple[str, str], ClosedSums]


def sliced(models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int = 0) -> list[dict[str, Any]]:
    """A record for each slice, task or `score`, metric, and what the slice is compared with.

    Of one model: `by`, `slice`, `group`, `metric`, `rows`, `labels` of the rarer kind (None of the score) and, of NDCG,
    `requests` that rank anything; `value`
    of the model in the slice, `beside`, which is `ALL` or the name of another model, and `apart`, `low`, `high`, `p`,
    `p_corrected`: by how much the value differs from that of the model on all rows, or of the other model in the slice.
    Where labels are too few to judge by, these and the value are None.
    """
    found: list[dict[str, Any]] = []
    cut = _that_cut_requests(models[model])
    for key in models[model].slices:
        found += _records(key, models, model, resamples, seed, key[0] in cut)
    judged = [each for each in found if each["p"] is not None]
    for each, corrected in zip(judged, holm([each["p"] for each in judged]), strict=True):
        each["p_corrected"] = corrected
    return found


def worst_first(records: Sequence[Mapping[str, Any]], level: float) -> list[Mapping[str, Any]]:
    """Those that are shown to be worse: AUC, R2 and NDCG by their size, then probabilities by how far they are off;
    then the others of the former in their order."""
    ranked = [each for each in records if each["metric"] != "calibration" and each["value"] is not None]
    worse = [each for each in ranked if is_worse(each, level)]
    off = [each for each in records if each["metric"] == "calibration" and is_worse(each, level)]
    return [
        *sorted(worse, key=lambda each: each["apart"]),
        *sorted(off, key=lambda each: -_off(each["value"])),
        *(each for each in ranked if each not in worse),
    ]


def is_worse(record: Mapping[str, Any], level: float) -> bool:
    """Whether it is shown to be lower, or its probabilities to be further off."""
    if record["value"] is None or record["p_corrected"] is None or record["p_corrected"] >= level:
        return False
    if record["metric"] != "calibration":
        return bool(record["apart"] < 0)
    return _off(record["value"]) > _off(record["value"] - record["apart"])


def told_of_slices(records: Sequence[Mapping[str, Any]], level: float, most: int = 3) -> Iterator[str]:
    """The worst that are shown to be, as sentences."""
    worse = [each for each in worst_first(records, level) if is_worse(each, level)]
    for each in worse[:most]:
        beside = "that of all rows" if each["beside"] == ALL else f"that of '{each['beside']}' there"
        other = each["value"] - each["apart"]
        yield (
            f"slice {each['by']}: {each['slice']} ({each['rows']:,} rows): {each['metric']} of {each['group']} is "
            f"{each['value']:.3f}, and {beside} is {other:.3f}"
        )
    if len(worse) > most:
        yield f"{len(worse) - most} more slices are shown to be worse; the report has them"


def _off(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def of_other_rows(models: Mapping[str, SlicedModel], model: str) -> Iterator[str]:
    """What slices are by that hold other rows for another model, as those of a rank do, so that it is not compared."""
    for by in dict.fromkeys(by for by, _ in models[model].slices):
        mine = {key: sums for key, sums in models[model].slices.items() if key[0] == by}
        # Of a model that is not sliced by it, nothing was asked.
        others = [
            each.slices for name, each in models.items() if name != model and any(by == key[0] for key in each.slices)
        ]
        if not all(_has_the_rows_of(sums, each.get(key)) for each in others for key, sums in mine.items()):
            yield by


def _has_the_rows_of(sums: ClosedSums, other: ClosedSums | None) -> bool:
    try:
        if other is not None:
            check_same_rows("", sums, "", other)
    except UserError:
        return False
    return other is not None


def _that_cut_requests(model: SlicedModel) -> set[str]:
    """What slices are by whose requests are more than there are, together."""
    requests: dict[str, int] = {}
    for (by, _), sums in model.slices.items():
        requests[by] = requests.get(by, 0) + int(sums.tables["ranking"]["requests"].to_numpy().sum())
    whole = int(model.whole.tables["ranking"]["requests"].to_numpy().sum())
    return {by for by, count in requests.items() if count > whole}


def _records(
    key: tuple[str, str], models: Mapping[str, SlicedModel], model: str, resamples: int, seed: int, cut: bool
) -> Iterator[dict[str, Any]]:
    """cut: whether requests have rows in other slices too."""
    mine = models[model]
    here = mine.slices[key]
    units = mine.whole.tables["ranking"]["user"].combine_chunks()
    sides = {(model, ALL): mine.whole} | {
        (name, key[1]): each.slices[key]
        for name, each in models.items()
        if _has_the_rows_of(here, each.slices.get(key))
    }
    groups = {side: sums_by_user(sums, METRICS) for side, sums in sides.items()}
    places = {
        side: pc.index_in(sums.tables["ranking"]["user"].combine_chunks(), value_set=units).to_numpy()
        for side, sums in sides.items()
    }

    def at(side: tuple[str, str], counts: np.ndarray) -> Values:
        return evaluate(groups[side], np.ascontiguousarray(counts[places[side]]))

    effective = effective_by_metric(groups[model, key[1]])
    resampling = {side: Resampling(at(side, np.ones((len(units), 1))), len(units)) for side in sides}
    for counts in user_counts(len(units), resamples, seed):
        for side, each in resampling.items():
            each.add(counts, at(side, counts))
    found = {side: each.found() for side, each in resampling.items()}
    for group, metric in found[model, key[1]]:
        labels = None if group == SCORE else rarer(here, group)
        table = here.tables["ranking" if group == SCORE else f"{group}.users"]
        rows, ranks = int(table["rows"].to_numpy().sum()), metric == _NDCG
        requests = int(table["ranked_requests"].to_numpy().sum()) if ranks else None
        told = {"by": key[0], "slice": key[1], "group": group, "metric": metric, "rows": rows, "labels": labels}
        told |= {"requests": requests}
        is_judged = min(each for each in (labels, requests, FEWEST) if each is not None) >= FEWEST
        for other in sides:
            if other == (model, key[1]) or (group, metric) not in found[other]:
                continue
            if ranks and cut and other == (model, ALL) and len(sides) > 2:
                continue  # another model is what it can be compared with
            its, beside = (found[side][group, metric] for side in ((model, key[1]), other))
            apart = difference(its, beside, effective[group, metric], len(here.tables["ranking"]))
            value = its.value
            is_compared = is_judged and not (ranks and cut and other == (model, ALL))
            yield {
                **told,
                "value": value if is_judged and np.isfinite(value) else None,
                "beside": ALL if other[1] == ALL and other[0] == model else other[0],
                "apart": apart["value"] if is_compared else None,
                **{name: apart[name] if is_compared else None for name in ("low", "high", "p")},
                "p_corrected": None,
            }
