"""Divide rows into slices and measure each slice, to show losses of some users that the mean hides.

Rows are sliced by columns of the log or of prediction files, and by the number of training rows of their users and
candidates (`RowSlicer`). The metric of a model in a slice is compared with its metric on all rows, or with the metric
of another model in the slice. Both are measured on the same resamples of users. docs/how-to/compare-and-promote.md
describes the slices.
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
"""Metrics that are computed for slices: two of binary tasks, `r2` of regressions, and one of the score."""
ALL_ROWS = "all rows"
MAX_COLUMN_VALUES = 1_000
"""Maximum number of values of a column that is sliced by value. Columns with more values hold IDs or numbers."""
TOP_VALUES = 20
"""Number of the most frequent values that become slices. The other values share one more slice."""
MISSING, OTHERS = "(missing)", "(all others)"
ACTIVITY_BUCKETS = 10  # buckets of users by the number of their training rows
OPTION = "slices"
_ADVICE = "leave out slices by columns of the log (--evaluation.slices '[]')"
_BUCKET = re.compile(r"bucket\(\s*(.+?)\s*,\s*(\d+)\s*\)")


@dataclass(frozen=True)
class SliceSpec:
    """Specification of how a column slices rows: by its values, or by buckets of about equally many rows.

    Attributes:
        name: Text of the specification, such as `bucket(price, 10)`.
        column: Name of the column.
        buckets: Number of buckets, None for slices by value.
    """

    name: str
    column: str
    buckets: int | None = None

    @staticmethod
    def parse(word: str, option: str = "--slices") -> "SliceSpec":
        """Parse `COLUMN` or `bucket(COLUMN, N)`.

        Args:
            word: Text to parse.
            option: Option to name in errors.

        Raises:
            UserError: The text begins with `bucket(` and is malformed, or N is not between 2 and 100.
        """
        match = _BUCKET.fullmatch(word.strip())
        if match is None:
            if word.startswith("bucket("):
                raise UserError(f"{option} {word}: expected 'bucket(COLUMN, N)', such as 'bucket(price, 10)'")
            return SliceSpec(word, word)
        if not 2 <= int(match[2]) <= 100:
            raise UserError(f"{option} {word}: expected 2 to 100 buckets")
        return SliceSpec(word, match[1], int(match[2]))

    def read(self, values: pa.Array) -> pa.Array:
        """Convert a column's values for `find_slices`: to strings, or to float64 for buckets. NaN becomes null.

        Raises:
            ValueError: Rows can't be sliced by the values. The message continues a sentence about the column.
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
        """Slice rows by values that `read` returned. A bucket (1, 2] has values above 1 and at most 2.

        Returns:
            Name of the slice -> positions of its rows in `values`, for slices that have rows.

        Raises:
            UserError: The column has more than `MAX_COLUMN_VALUES` values.
        """
        names, slice_index = self._by_value(values) if self.buckets is None else self._by_bucket(values, self.buckets)
        slice_index[values.is_null().to_numpy(zero_copy_only=False)] = len(names)
        names.append(MISSING)
        return {names[index]: np.flatnonzero(slice_index == index) for index in np.unique(slice_index)}

    def _by_value(self, values: pa.Array) -> tuple[list[str], np.ndarray]:
        counts = values.drop_null().value_counts().to_pylist()
        counts.sort(key=lambda count: (-count["counts"], count["values"]))
        if len(counts) > MAX_COLUMN_VALUES:
            raise UserError(
                f"column '{self.column}' has more than {MAX_COLUMN_VALUES:,} values, such as {counts[0]['values']!r}: "
                f"too many to slice by; slice by 'bucket({self.column}, 10)' if it is a number"
            )
        shown = sorted(count["values"] for count in counts[:TOP_VALUES])
        slice_index = pc.fill_null(pc.index_in(values, value_set=pa.array(shown, pa.string())), len(shown))
        names = [value if value.strip() and value not in (MISSING, OTHERS) else f"'{value}'" for value in shown]
        return [*names, OTHERS], slice_index.to_numpy().astype(np.int64)

    def _by_bucket(self, values: pa.Array, buckets: int) -> tuple[list[str], np.ndarray]:
        numbers, names = values.drop_null().to_numpy(), list[str]()
        if not len(numbers):
            return names, np.zeros(len(values), np.int64)
        edges = np.unique(np.quantile(numbers, np.arange(1, buckets) / buckets, method="inverted_cdf"))
        ends = [numbers.min(), *edges, numbers.max()]
        for digits in (6, 9, 12, 17):  # enough digits to distinguish the ends
            shown = [f"{end:.{digits}g}" for end in ends]
            names = [f"({low}, {top}]" for low, top in pairwise(shown)]
            if len(set(names)) == len(names):
                break
        names[0] = f"[{names[0][1:]}"
        return names, np.searchsorted(edges, pc.fill_null(values, 0.0).to_numpy(), side="left")


class RowSlicer:
    """Divides the measured rows into slices, by columns of the log and by counts of training rows.

    Encoded rows have only the columns that a model reads, so the log is read again. This happens once, for the first
    model, because all models are measured on the same rows. Rows of the log and encoded rows are matched by request and
    candidate, or by row number if the log has no candidates.
    """

    def __init__(self, settings: Settings, artifact: Path) -> None:
        """Open the log.

        Args:
            settings: Settings of the log and the slices.
            artifact: Folder of the first model, whose schema and types of IDs apply to the log.

        Raises:
            UserError: The log lacks a column to slice by, or the column has an unsuitable type.
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
            Name of the slicing (a `SliceSpec`, `user`, `candidate` or `training rows of the user`) -> name of the slice
                -> positions (n,) in `rows`.

        Raises:
            UserError: The log has changed, a column has too many values, or an earlier call had other rows.
        """
        slices = slice_by_training_counts(rows, self._training)
        if self._log is None:
            return slices
        ids = rows.row if rows.candidates is None else rows.candidates
        keys = combine_hashes([hash_column(rows.requests), hash_column(ids)])
        order = np.argsort(keys, kind="stable")
        if self._read is None:
            self._read = keys[order], _read_slices(self._log, self._by, keys[order], self._skips)
        seen_keys, slices_of_sorted_rows = self._read
        if not np.array_equal(keys[order], seen_keys):
            raise UserError("the models were not measured on the same rows, so their slices can't be compared")
        for by, rows_by_slice in slices_of_sorted_rows.items():
            named = {name: np.sort(order[positions]) for name, positions in rows_by_slice.items()}
            slices[f"column {by}" if by in slices else by] = named
        return slices


def _open_log(settings: Settings, artifact: Path, slices: Sequence[SliceSpec]) -> Log:
    options, pipeline = BuildOptions.of(settings.data), FeaturePipeline.load(artifact / "features", stores=False)
    schema = adapt_schema(settings, pipeline.schema)
    uses = column_uses(schema)
    if not schema.columns.has_candidate and options.skip_bad_files:
        raise UserError(
            "slices by columns of the log need columns.candidate, because data.skip_bad_files is set. Without "
            f"candidates, rows are matched by number, and a skipped file would shift the numbers; {_ADVICE}"
        )
    extra: dict[str, ColumnUse] = {spec.column: "any" for spec in slices if spec.column not in uses}
    source, types, skip = settings.data.log, pipeline.key_types, options.skip_bad_files
    try:
        log = Log(source, schema, skip_bad_files=skip, types=types, max_time=options.max_time, extra_columns=extra)
    except BadFile as error:
        raise UserError(f"{error} ({OPTION})" if extra else str(error)) from None
    for spec in slices:  # raise errors before rows are scored
        _values_of(spec, pa.nulls(0, log.types.get(spec.column, pa.null())))
    return log


def _read_slices(log: Log, slices: Sequence[SliceSpec], wanted: np.ndarray, skips: bool) -> RowsBySlice:
    """Read the slices of rows from the log, as positions in `wanted`: the sorted keys (N,) uint64 of the measured rows.

    `skips`: Whether to leave out files that can't be read.
    """
    names, split, columns = log.schema.columns, log.schema.split, dict.fromkeys(spec.column for spec in slices)
    needed = {names.user, names.candidate, names.request, names.time, None if split is None else split.column, *columns}
    reader = replace(log.reader, uses={name: use for name, use in log.uses.items() if name in needed})
    log = log.without_bad_files(map(find_bad_file, log.pieces(reader))) if skips else log
    keys, parts = list[np.ndarray](), list[pa.Table]()
    with bar() as progress:
        task = progress.add_task("slicing", total=log.rows)
        for rows in chain.from_iterable(map(reader.read, log.parts())):
            row_keys = combine_hashes([hash_column(rows.requests()), rows.hashes([names.candidate])])
            progress.advance(task, len(row_keys))
            is_wanted = wanted[np.minimum(np.searchsorted(wanted, row_keys), len(wanted) - 1)] == row_keys
            keys.append(row_keys[is_wanted])
            parts.append(pa.table({name: rows.column(name) for name in columns}).filter(pa.array(is_wanted)))
    hashes = np.concatenate(keys)
    order = np.argsort(hashes, kind="stable")
    if len(order) > len(wanted):  # duplicate rows count once
        order = order[np.unique(hashes[order], return_index=True)[1]]
    if not np.array_equal(hashes[order], wanted):
        problem = f"of the {len(wanted):,} rows that are measured, the log '{log.source}' has {len(hashes):,}"
        raise UserError(f"{problem}, so their slices are unknown; {_ADVICE}")
    table = pa.concat_tables(parts, promote_options="default").take(pa.array(order))
    return {spec.name: spec.find_slices(_values_of(spec, one_array(table[spec.column]))) for spec in slices}


def _values_of(by: SliceSpec, values: pa.Array) -> pa.Array:
    try:
        return by.read(values)
    except (ValueError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{by.column}' of the log {error} ({OPTION})") from None


def slice_by_training_counts(
    rows: PredictedRows, training: Mapping[str, pd.Series]
) -> dict[str, Mapping[str, np.ndarray]]:
    """Slice rows into new and returning users and candidates, and by the user's number of training rows.

    Args:
        rows: The rows.
        training: `user` or `candidate` -> number of training rows by ID. New IDs have none.
    """
    slices: dict[str, Mapping[str, np.ndarray]] = {}
    for name, counts in training.items():
        ids = rows.candidates if name == "candidate" and rows.candidates is not None else rows.users
        training_rows = counts.reindex(pd.Index(ids.to_pandas())).fillna(0).to_numpy(np.int64)
        slices[name] = {"new": np.flatnonzero(training_rows == 0), "returning": np.flatnonzero(training_rows)}
        if name == "user":
            rows_of_user = pa.array(training_rows.astype(float), mask=training_rows == 0)
            activity = SliceSpec("training rows of the user", name, ACTIVITY_BUCKETS).find_slices(rows_of_user)
            activity.pop(MISSING, None)
            slices["training rows of the user"] = activity
    return {by: {name: rows for name, rows in named.items() if len(rows)} for by, named in slices.items()}


def _count_by(folder: Path, name: str) -> pd.Series:
    """Count the encoded rows in `folder` by value of the column `name`."""
    counts = [pq.read_table(file, columns=[name])[name].to_pandas().value_counts() for file in folder.glob("*.parquet")]
    return pd.concat(counts).groupby(level=0).sum()


@dataclass(frozen=True)
class SliceRecord:
    """Metric of a model in a slice, compared with all rows or with another model in the slice.

    `value` and the numbers about the difference are None if they are undefined or there are too few labels.

    Attributes:
        by: Name of the slicing, such as a column (see `RowSlicer.find`).
        slice: Name of the slice.
        group: Task, or `score`.
        metric: Name of the metric.
        rows: Number of rows.
        labels: Number of rows with the rarer label, or with any label for a regression. None for the score.
        requests: Number of requests that NDCG uses, None for other metrics.
        value: Value of the metric in the slice.
        compared_to: `ALL_ROWS`, or the name of the other model.
        difference: `value` minus the metric on all rows, or of the other model in the slice.
        low: Lower end of the difference's 95% interval.
        high: Upper end of the difference's 95% interval.
        standard_error: Standard error of the difference.
        degrees_of_freedom: Degrees of freedom of the standard error.
        p_value: p-value of the difference.
        corrected_p_value: p-value corrected for the number of comparisons, None before `holm_correct`.
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
        """Whether the metric is significantly lower, or significantly further from 1 if it is `calibration`."""
        if self.value is None or self.difference is None or not self.is_significant:
            return False
        if self.metric != "calibration":
            return self.difference < 0
        return distance_from_one(self.value) > distance_from_one(self.value - self.difference)

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant after the correction for the number of comparisons."""
        return self.corrected_p_value is not None and self.corrected_p_value < ALPHA

    def loss_p_value(self, margin: float) -> float:
        """Return twice the one-sided p-value of a loss of more than `margin`. 1 if there is no standard error."""
        if self.difference is None or self.degrees_of_freedom is None or not self.standard_error:
            return 1.0
        return float(2 * student.cdf((self.difference + margin) / self.standard_error, self.degrees_of_freedom))

    @property
    def message(self) -> str:
        """Sentence that compares the slice with all rows or with another model."""
        compared_to = "that of all rows" if self.compared_to == ALL_ROWS else f"that of '{self.compared_to}'"
        value, difference = self.value or 0.0, self.difference or 0.0
        label = f"slice {self.by}: {self.slice} ({self.rows:,} rows)"
        return f"{label}: {self.metric} of {self.group} is {value:.3f}, where {compared_to} is {value - difference:.3f}"


def compare_slices(models: Mapping[str, MeasuredModel], model: str, resamples: int) -> list[SliceRecord]:
    """Compare each slice with all rows and with other models.

    Args:
        models: Name -> measured model.
        model: Name of the model to judge.
        resamples: Number of bootstrap resamples.

    Returns:
        A record for each slice, metric of a task or of the score, and comparison, with corrected p-values.
    """
    slices, whole, requests = models[model].slices, models[model].sums, Counter[str]()
    measured, records = BootstrapMetrics(whole, names=SLICE_METRICS), list[SliceRecord]()
    # Slices use the same resamples as all rows, because `bootstrap` gets the same seed and number of users.
    all_rows = measured.bootstrap(resamples) if slices else {}
    for (by, _), sums in slices.items():
        requests[by] += sums.total("requests")
    for key in slices:
        is_cut = requests[key[0]] > whole.total("requests")
        records += _compare_slice(key, models, model, all_rows, resamples, is_cut)
    return holm_correct(records)


def sort_worst_first(records: Sequence[SliceRecord]) -> list[SliceRecord]:
    """Sort records with the significantly worse slices first.

    Among worse slices, AUC, R2 and NDCG come first. Comparisons with other models precede comparisons with all rows,
    and larger losses precede smaller losses. Calibration follows, furthest from 1 first. Slices that are not worse come
    last, in the same order and without calibration. Records without a value are left out.
    """

    def sort_key(record: SliceRecord) -> tuple[bool, bool, bool, float]:
        is_ratio = record.metric == "calibration"
        size = -distance_from_one(record.value or 0.0) if is_ratio else record.difference or 0.0
        return not record.is_worse, is_ratio, not is_ratio and record.compared_to == ALL_ROWS, size

    shown = [record for record in records if record.metric != "calibration" or record.is_worse]
    return sorted((record for record in shown if record.value is not None), key=sort_key)


def _compare_slice(
    key: tuple[str, str],
    models: Mapping[str, MeasuredModel],
    model: str,
    all_rows: Mapping[MetricKey, Estimate],
    resamples: int,
    is_cut: bool,
) -> Iterator[SliceRecord]:
    """Yield records of the slice `key`, a key of `MeasuredModel.slices`.

    If `is_cut`, the rows of a request are in several slices, so requests have fewer rows in the slice. NDCG depends on
    the number of rows, so it is not compared with all rows then.
    """
    slice_sums, units = models[model].slices[key], models[model].sums.tables["ranking"]["user"].combine_chunks()
    others = {name: model.slices[key] for name, model in models.items() if key in model.slices}
    sides = {name: sums for name, sums in others.items() if describe_row_mismatch(slice_sums, sums) is None}
    user_index = pc.index_in(slice_sums.tables["ranking"]["user"], value_set=units).to_numpy()  # of the slice's users
    measured = {side: BootstrapMetrics(sums, names=SLICE_METRICS) for side, sums in sides.items()}

    def values_of(counts: np.ndarray) -> Replicates:
        counts = np.ascontiguousarray(counts[user_index])
        return {
            (side, *metric): value
            for side, metrics in measured.items()
            for metric, value in metrics.compute(counts).items()
        }

    resampled = {(ALL_ROWS, *metric): total for metric, total in all_rows.items()}
    for (side, *metric), estimated in bootstrap(values_of, len(units), resamples).items():
        if metric[0] not in measured[model].groups:  # only another model predicts this outcome
            continue
        effective_users = measured[model].effective_users((metric[0], metric[1]))
        resampled[side, *metric] = replace(estimated, effective_users=effective_users)
    for group, metric in [metric for side, *metric in resampled if side == model]:
        estimate, ranks = resampled[model, group, metric], metric == _NDCG
        task = None if group == SCORE else group
        labels = None if task is None else count_minority(slice_sums, task)
        requests = slice_sums.total("ranked_requests", task) if ranks else None
        is_judged = min(count for count in (labels, requests, MIN_RARER_ROWS) if count is not None) >= MIN_RARER_ROWS
        for side in (ALL_ROWS, *sides):
            if side == model or (side, group, metric) not in resampled:
                continue
            of_shorter_lists = ranks and is_cut and side == ALL_ROWS
            if of_shorter_lists and len(sides) > 1:
                continue  # The slice is compared with another model instead of all rows.
            difference = Difference(None)
            if is_judged and not of_shorter_lists:
                difference = compute_difference(estimate, resampled[side, group, metric])
            value = estimate.value if is_judged and np.isfinite(estimate.value) else None
            description = (*key, group, metric, slice_sums.total("rows", task), labels, requests, value, side)
            interval = (difference.value, difference.low, difference.high)
            test = (difference.standard_error, difference.degrees_of_freedom, difference.p_value)
            yield SliceRecord(*description, *interval, *test)
