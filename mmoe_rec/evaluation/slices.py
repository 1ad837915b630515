"""Slices of rows, and how well a model does on each: what it gives some users while the mean hides it.

Rows are sliced by columns of the log or of files of predictions, and by what training knew of their users and
candidates (`RowSlicer`). A slice is compared with all rows, by the same redraws of users, or with another model on the
rows of the slice. See README.md for which are judged (Slices and findings).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt
from scipy.stats import t as student

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    ALPHA,
    Difference,
    Estimate,
    MetricKey,
    Replicates,
    bootstrap,
    compute_difference,
    holm_correct,
)
from mmoe_rec.evaluation.metrics.metric import distance_from_one
from mmoe_rec.evaluation.summary import SCORE, BootstrapMetrics, MeasuredModel, RowsBySlice
from mmoe_rec.evaluation.sums import PredictedRows, count_minority, describe_row_mismatch
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.columns import column_uses, combine_hashes, hash_column
from mmoe_rec.log.reader import Log, find_bad_file
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions, adapt_schema
from mmoe_rec.preprocessing.prepare import find_existing_features
from mmoe_rec.progress import bar
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.sections import Settings

_NDCG = "ndcg_at_10"
SLICE_METRICS = ("auc", "calibration", "r2", _NDCG)
"""The metrics of binary tasks, of a regression, and of the score."""
ALL_ROWS = "all rows"
MAX_COLUMN_VALUES = 1_000
"""A column of more values is an id or a number, and is not sliced."""
TOP_VALUES = 20
"""So many values with the most rows are slices; what is left is one more."""
MISSING, OTHERS = "(missing)", "(all others)"
ACTIVITY_BUCKETS = 10  # groups of users of equal size, by how many training rows they have
OPTION = "slices"
_ADVICE = "leave out slices by columns of the log (--evaluation.slices '[]')"
_BUCKET = re.compile(r"bucket\(\s*(.+?)\s*,\s*(\d+)\s*\)")


@dataclass(frozen=True)
class SliceSpec:
    """name: as it was asked for; column: of the rows; buckets: how many, None for the column's values."""

    name: str
    column: str
    buckets: int | None = None

    @staticmethod
    def parse(word: str, option: str = "--slices") -> "SliceSpec":
        """What `COLUMN` or `bucket(COLUMN, N)` says; option: the one that named it.

        Raises UserError for a number of buckets that there can't be.
        """
        found = _BUCKET.fullmatch(word.strip())
        if found is None:
            if word.startswith("bucket("):
                raise UserError(f"{option} {word}: expected 'bucket(COLUMN, N)', such as 'bucket(price, 10)'")
            return SliceSpec(word, word)
        if not 2 <= int(found[2]) <= 100:
            raise UserError(f"{option} {word}: expected 2 to 100 buckets")
        return SliceSpec(word, found[1], int(found[2]))

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

    def find_slices(self, values: pa.Array) -> dict[str, np.ndarray]:
        """Slice rows by values that `read` gave. A bucket (1, 2] holds values above 1 and at most 2.

        Returns:
            Name of the slice -> numbers of its rows, for slices that have rows.

        Raises:
            UserError: The column has more than `MAX_COLUMN_VALUES` values.
        """
        names, place = self._by_value(values) if self.buckets is None else self._by_bucket(values, self.buckets)
        place[values.is_null().to_numpy(zero_copy_only=False)] = len(names)
        names.append(MISSING)
        return {names[each]: np.flatnonzero(place == each) for each in np.unique(place)}

    def _by_value(self, values: pa.Array) -> tuple[list[str], np.ndarray]:
        counts = values.drop_null().value_counts().to_pylist()
        counts.sort(key=lambda each: (-each["counts"], each["values"]))
        if len(counts) > MAX_COLUMN_VALUES:
            raise UserError(
                f"column '{self.column}' has more than {MAX_COLUMN_VALUES:,} values, such as "
                f"{counts[0]['values']!r}: too "
                f"many to slice by; slice by 'bucket({self.column}, 10)' if it is a number"
            )
        shown = sorted(each["values"] for each in counts[:TOP_VALUES])
        place = pc.fill_null(pc.index_in(values, value_set=pa.array(shown, pa.string())), len(shown))
        names = [each if each.strip() and each not in (MISSING, OTHERS) else f"'{each}'" for each in shown]
        return [*names, OTHERS], place.to_numpy().astype(np.int64)

    def _by_bucket(self, values: pa.Array, buckets: int) -> tuple[list[str], np.ndarray]:
        numbers, names = values.drop_null().to_numpy(), list[str]()
        if not len(numbers):
            return names, np.zeros(len(values), np.int64)
        edges = np.unique(np.quantile(numbers, np.arange(1, buckets) / buckets, method="inverted_cdf"))
        ends = [numbers.min(), *edges, numbers.max()]
        for digits in (6, 9, 12, 17):  # as many as tell them apart
            shown = [f"{each:.{digits}g}" for each in ends]
            names = [f"({low}, {top}]" for low, top in pairwise(shown)]
            if len(set(names)) == len(names):
                break
        names[0] = f"[{names[0][1:]}"
        return names, np.searchsorted(edges, pc.fill_null(values, 0.0).to_numpy(), side="left")


class RowSlicer:
    """What models' rows, which are the same, are sliced by: `evaluation.slices`, by columns of the log; and, where
    features were built of the log, how users and candidates stand in training.

    Encoded rows hold what a model reads, and slices are thought of afterwards: so the log is read once more, for the
    first model, and rows are known by request and candidate, or by their number in a log without candidates.
    """

    def __init__(self, settings: Settings, artifact: Path) -> None:
        """Open the log. artifact: folder of the model, by whose keys rows are known.

        Raises:
            UserError: The log has no such column, or it can't be sliced by.
        """
        self._by = [SliceSpec.parse(word, OPTION) for word in dict.fromkeys(settings.evaluation.slices)]
        self._log = _open_log(settings, artifact, self._by) if self._by else None
        self._read: tuple[np.ndarray, RowsBySlice] | None = None
        self._skips = settings.data.skip_bad_files
        prepared = find_existing_features(BuildInputs.of(settings))
        self._training = {
            name: _count_by(prepared.split("train"), name)
            for name, has in (("user", settings.columns.has_user), ("candidate", settings.columns.has_candidate))
            if has and prepared is not None
        }

    def find(self, rows: PredictedRows) -> RowsBySlice:
        """Find the slices of rows.

        Returns:
            What rows are sliced by -> name of the slice -> (n,) numbers of the rows.

        Raises:
            UserError: The log has other rows by now, a column has too many values, or models have other rows.
        """
        slices = slice_by_training_counts(rows, self._training)
        if self._log is None:
            return slices
        ids = rows.row if rows.candidates is None else rows.candidates
        keys = combine_hashes([hash_column(rows.requests), hash_column(ids)])
        order = np.argsort(keys, kind="stable")
        if self._read is None:
            self._read = keys[order], _read_slices(self._log, self._by, keys[order], self._skips)
        known, found = self._read
        if not np.array_equal(keys[order], known):
            raise UserError("the models were not measured on the same rows, so their slices can't be compared")
        for by, each in found.items():
            named = {name: np.sort(order[places]) for name, places in each.items()}
            slices[f"column {by}" if by in slices else by] = named
        return slices


def _open_log(settings: Settings, artifact: Path, slices: Sequence[SliceSpec]) -> Log:
    options, pipeline = BuildOptions.of(settings.data), FeaturePipeline.load(artifact / "features", stores=False)
    schema = adapt_schema(settings, pipeline.schema)
    uses = column_uses(schema)
    if not schema.columns.has_candidate and options.skip_bad_files:
        raise UserError(
            "slices by columns of the log need columns.candidate where files may be left out (data.skip_bad_files): "
            f"without it rows are known by their number in the log; {_ADVICE}"
        )
    extra_columns: dict[str, ColumnUse] = {each.column: "any" for each in slices if each.column not in uses}
    types, source = pipeline.key_types, settings.data.log
    try:
        log = Log(
            source,
            schema,
            skip_bad_files=options.skip_bad_files,
            types=types,
            max_time=options.max_time,
            extra_columns=extra_columns,
        )
    except BadFile as error:
        raise UserError(f"{error} ({OPTION})" if extra_columns else str(error)) from None
    for each in slices:  # before rows are scored
        _values_of(each, pa.nulls(0, log.types.get(each.column, pa.null())))
    return log


def _read_slices(log: Log, slices: Sequence[SliceSpec], wanted: np.ndarray, skips: bool) -> RowsBySlice:
    """Slices of rows by the places of their keys (N,) uint64, which rise."""
    names, split, columns = log.schema.columns, log.schema.split, dict.fromkeys(each.column for each in slices)
    needed = {names.user, names.candidate, names.request, names.time, None if split is None else split.column, *columns}
    reader = replace(log.reader, uses={name: use for name, use in log.uses.items() if name in needed})
    log = log.without_bad_files(map(find_bad_file, log.pieces(reader))) if skips else log
    keys, parts = list[np.ndarray](), list[pa.Table]()
    with bar() as progress:
        task = progress.add_task("slicing", total=log.rows)
        for rows in chain.from_iterable(map(reader.read, log.parts())):
            its = combine_hashes([hash_column(rows.requests()), rows.hashes([names.candidate])])
            progress.advance(task, len(its))
            there = wanted[np.minimum(np.searchsorted(wanted, its), len(wanted) - 1)] == its
            keys.append(its[there])
            parts.append(pa.table({name: rows.column(name) for name in columns}).filter(pa.array(there)))
    hashes = np.concatenate(keys)
    order = np.argsort(hashes, kind="stable")
    if len(order) > len(wanted):  # rows that came again count once
        order = order[np.unique(hashes[order], return_index=True)[1]]
    if not np.array_equal(hashes[order], wanted):
        told = f"of the {len(wanted):,} rows that are measured, the log '{log.source}' has {len(hashes):,}"
        raise UserError(f"{told}, so it can't be told what slices they are in; {_ADVICE}")
    table = pa.concat_tables(parts, promote_options="default").take(pa.array(order))
    return {each.name: each.find_slices(_values_of(each, one_array(table[each.column]))) for each in slices}


def _values_of(by: SliceSpec, values: pa.Array) -> pa.Array:
    try:
        return by.read(values)
    except (ValueError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{by.column}' of the log {error} ({OPTION})") from None


def slice_by_training_counts(
    rows: PredictedRows, training: Mapping[str, pd.Series]
) -> dict[str, Mapping[str, np.ndarray]]:
    """Slice rows by what training knew of their users and candidates.

    Args:
        rows: The rows.
        training: `user` or `candidate` -> training rows of each id.
    """
    slices: dict[str, Mapping[str, np.ndarray]] = {}
    for name, counts in training.items():
        ids = rows.candidates if name == "candidate" and rows.candidates is not None else rows.users
        known = counts.reindex(pd.Index(ids.to_pandas())).fillna(0).to_numpy(np.int64)
        slices[name] = {"new": np.flatnonzero(known == 0), "returning": np.flatnonzero(known)}
        if name == "user":
            rows_of_user = pa.array(known.astype(float), mask=known == 0)
            activity = SliceSpec("training rows of the user", name, ACTIVITY_BUCKETS).find_slices(rows_of_user)
            slices["training rows of the user"] = {each: of for each, of in activity.items() if each != MISSING}
    return {by: {name: places for name, places in each.items() if len(places)} for by, each in slices.items()}


def _count_by(folder: Path, name: str) -> pd.Series:
    """How many encoded rows have each value of a column."""
    counts = [pq.read_table(file, columns=[name])[name].to_pandas().value_counts() for file in folder.glob("*.parquet")]
    return pd.concat(counts).groupby(level=0).sum()


@dataclass(frozen=True)
class SliceRecord:
    """A metric of a model in a slice, beside its value on all rows, or that of another model in the slice.

    by, slice: what rows are sliced by, and the value; group: the task, or `score`; labels: rows of the rarer label,
    None of the score; requests: of NDCG, those that rank anything; beside: `ALL_ROWS`, or the name of another model;
    apart: by how much the value differs, with its interval, its standard error, degrees of freedom and p-values. What
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
    compared_to: str
    difference: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    degrees_of_freedom: float | None
    p_value: float | None
    corrected_p_value: float | None = None

    @property
    def is_worse(self) -> bool:
        """True if the metric is shown to be lower, or the probabilities to be further off."""
        if self.value is None or self.difference is None or not self.is_significant:
            return False
        if self.metric != "calibration":
            return self.difference < 0
        return distance_from_one(self.value) > distance_from_one(self.value - self.difference)

    @property
    def is_significant(self) -> bool:
        """True if the difference is shown after the correction for how many slices are compared."""
        return self.corrected_p_value is not None and self.corrected_p_value < ALPHA

    def loss_p_value(self, margin: float) -> float:
        """The p-value of a loss of more than the margin, by both tails as an interval's; 1 where it can't be tested."""
        if self.difference is None or self.degrees_of_freedom is None or not self.standard_error:
            return 1.0
        return float(2 * student.cdf((self.difference + margin) / self.standard_error, self.degrees_of_freedom))

    @property
    def message(self) -> str:
        """The slice beside all rows or another model."""
        compared_to = "that of all rows" if self.compared_to == ALL_ROWS else f"that of '{self.compared_to}'"
        value, difference = self.value or 0.0, self.difference or 0.0
        which = f"slice {self.by}: {self.slice} ({self.rows:,} rows)"
        return f"{which}: {self.metric} of {self.group} is {value:.3f}, where {compared_to} is {value - difference:.3f}"


def compare_slices(models: Mapping[str, MeasuredModel], model: str, resamples: int) -> list[SliceRecord]:
    """A record for each slice of a model, task or `score`, metric, and what the slice is compared with."""
    slices, whole, requests = models[model].slices, models[model].sums, Counter[str]()
    measured, records = BootstrapMetrics(whole, names=SLICE_METRICS), list[SliceRecord]()
    # The same redraws as in each slice.
    of_all = measured.bootstrap(resamples) if slices else {}
    for (by, _), sums in slices.items():
        requests[by] += sums.total("requests")
    for key in slices:
        is_cut = requests[key[0]] > whole.total("requests")
        records += _compare_slice(key, models, model, of_all, resamples, is_cut)
    return holm_correct(records)


def sort_worst_first(records: Sequence[SliceRecord]) -> list[SliceRecord]:
    """Those that are shown to be worse: AUC, R2 and NDCG by the difference, beside other models first, then
    probabilities by how far they are off; then the others of the former."""

    def place(each: SliceRecord) -> tuple[bool, bool, bool, float]:
        is_ratio = each.metric == "calibration"
        size = -distance_from_one(each.value or 0.0) if is_ratio else each.difference or 0.0
        return not each.is_worse, is_ratio, not is_ratio and each.compared_to == ALL_ROWS, size

    shown = [each for each in records if each.value is not None and (each.metric != "calibration" or each.is_worse)]
    return sorted(shown, key=place)


def _compare_slice(
    key: tuple[str, str],
    models: Mapping[str, MeasuredModel],
    model: str,
    of_all: Mapping[MetricKey, Estimate],
    resamples: int,
    cut: bool,
) -> Iterator[SliceRecord]:
    """of_all: metrics of all rows; cut: whether requests have rows in other slices too."""
    here, units = models[model].slices[key], models[model].sums.tables["ranking"]["user"].combine_chunks()
    others = {name: each.slices[key] for name, each in models.items() if key in each.slices}
    sides = {name: its for name, its in others.items() if describe_row_mismatch(here, its) is None}
    place = pc.index_in(here.tables["ranking"]["user"], value_set=units).to_numpy()  # of the slice's users
    measured = {side: BootstrapMetrics(sums, names=SLICE_METRICS) for side, sums in sides.items()}

    def values_of(counts: np.ndarray) -> Replicates:
        counts = np.ascontiguousarray(counts[place])
        return {
            (side, *metric): value for side, its in measured.items() for metric, value in its.compute(counts).items()
        }

    resampled = {(ALL_ROWS, *metric): each for metric, each in of_all.items()}
    for (side, *metric), each in bootstrap(values_of, len(units), resamples).items():
        if metric[0] not in measured[model].groups:  # an outcome that only the other side has
            continue
        effective_users = measured[model].effective_users((metric[0], metric[1]))
        resampled[side, *metric] = replace(each, effective_users=effective_users)
    for group, metric in [metric for side, *metric in resampled if side == model]:
        its, ranks = resampled[model, group, metric], metric == _NDCG
        task = None if group == SCORE else group
        labels = None if task is None else count_minority(here, task)
        requests = here.total("ranked_requests", task) if ranks else None
        is_judged = min(each for each in (labels, requests, MIN_RARER_ROWS) if each is not None) >= MIN_RARER_ROWS
        for side in (ALL_ROWS, *sides):
            if side == model or (side, group, metric) not in resampled:
                continue
            of_shorter_lists = ranks and cut and side == ALL_ROWS
            if of_shorter_lists and len(sides) > 1:
                continue  # another model is what it can be compared with
            apart = Difference(None)
            if is_judged and not of_shorter_lists:
                apart = compute_difference(its, resampled[side, group, metric])
            value = its.value if is_judged and np.isfinite(its.value) else None
            told = (*key, group, metric, here.total("rows", task), labels, requests, value, side)
            yield SliceRecord(
                *told, apart.value, apart.low, apart.high, apart.standard_error, apart.degrees_of_freedom, apart.p_value
            )
