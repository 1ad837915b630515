"""The benchmark's baseline `tuned_pandas`: a schema's features by an expert in pandas who writes for speed.

Strings are read as Arrow dictionaries, every key is turned into integers once for all features, and numpy does most of
the work (own vocabularies, lexsort, bincount, histories cut out of one array). Counters and histories are point in time
by `merge_asof`, numbers are standardised by scikit-learn.

It does less than `mmoe_rec.features`. Everything is in memory at once; nothing fitted or counted is kept, so a request
could not be encoded afterwards, nor could days be added; the log is not checked; there are no inputs of kinds ids,
vector and cross and no quantile buckets. Unknown ids are hashed to as many buckets, though by another hash. It does
nothing that ours does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.types import union_categoricals
from sklearn.preprocessing import StandardScaler

from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.features.kinds.history import HistoryFeature
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.numeric import NumericFeature
from mmoe_rec.features.kinds.time import TimeFeature
from mmoe_rec.settings.columns import Task
from mmoe_rec.settings.schema import Remembering, Schema

DAY = 86_400_000_000
LOG = "(log)"


def source_columns(schema: Schema) -> dict[str, list[str]]:
    """Source (the log, or the name of a log of events) -> the columns of it that the features and labels need."""
    names = schema.columns
    needed: dict[str, set[str | None]] = {LOG: {names.user, names.candidate, names.time, names.request}}
    needed[LOG] |= {names.sampling_rate}
    for task in schema.tasks.values():
        needed[LOG] |= {task.label, task.observed_when.column if task.observed_when else None}
    needed |= {name: {events.time} for name, events in schema.events.items()}
    for feature in schema.features.values():
        needed[LOG] |= set(feature.reads())
        if isinstance(feature, Remembering) and feature.events:
            needed[feature.events] |= set(feature.event_reads(schema))
    return {source: sorted(filter(None, columns)) for source, columns in needed.items()}


def source_files(log: str, schema: Schema) -> dict[str, list[Path]]:
    """Source -> its Parquet files."""
    paths = {LOG: log} | {name: events.path for name, events in schema.events.items()}
    return {
        source: sorted(Path(path).rglob("*.parquet") if Path(path).is_dir() else map(Path, glob(path, recursive=True)))
        for source, path in paths.items()
    }


def source_times(schema: Schema) -> dict[str, str]:
    """Source -> its column of time."""
    return {LOG: schema.columns.time} | {name: events.time for name, events in schema.events.items()}


def read_frame(files: list[Path], columns: list[str], time: str) -> pd.DataFrame:
    """Rows in the order of time; strings are categorical, times integers of microseconds."""
    found = pq.read_schema(files[0])
    strings = [name for name in columns if pa.types.is_string(found.field(name).type)]
    table = pq.read_table([str(file) for file in files], columns=columns, read_dictionary=strings)
    for name in columns:
        at, column = table.schema.get_field_index(name), table[name]
        if pa.types.is_timestamp(column.type):
            table = table.set_column(at, name, column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()))
    frame = table.to_pandas(self_destruct=True)
    return frame if frame[time].is_monotonic_increasing else frame.sort_values(time, kind="stable", ignore_index=True)


@dataclass(frozen=True)
class Codes:
    """A column of all sources as numbers 0 .. U; 0 is a missing value, code u > 0 means values[u - 1]."""

    of: dict[str, np.ndarray]
    values: pd.Index

    @staticmethod
    def make(columns: Mapping[str, pd.Series]) -> "Codes":
        """Number the values of one column in several sources."""
        parts = list(columns.values())
        if isinstance(parts[0].dtype, pd.CategoricalDtype):
            united = union_categoricals(parts) if len(parts) > 1 else parts[0].cat
            codes, values = np.asarray(united.codes), united.categories
        else:
            codes, values = pd.factorize(pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0])
        ends = np.cumsum([len(part) for part in parts])
        return Codes(dict(zip(columns, np.split(codes.astype(np.int64) + 1, ends[:-1]), strict=True)), pd.Index(values))


@dataclass
class Build:
    """One run over one log.

    windows: request times [start, end) of each split in microseconds; frames: rows until the last split's end, in the
    order of time; last: time of the log's last row, until which labels are known.
    """

    schema: Schema
    windows: dict[str, tuple[int | None, int | None]]
    frames: dict[str, pd.DataFrame]
    last: int
    ids: dict[str, pa.Array] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    vocabularies: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def time(self) -> np.ndarray:
        """(N,) rising microseconds of the log's requests."""
        return self.frames[LOG][self.schema.columns.time].to_numpy()

    def rows_of(self, split: str) -> slice:
        """The log's rows of a split, which are contiguous."""
        start, end = self.windows[split]
        first = 0 if start is None else int(np.searchsorted(self.time, start))
        return slice(first, len(self.time) if end is None else int(np.searchsorted(self.time, end)))

    def codes_of(self, column: str) -> Codes:
        """A column's numbers in all sources that have it; computed once."""
        if column not in self.codes:
            self.codes[column] = Codes.make({s: f[column] for s, f in self.frames.items() if column in f})
        return self.codes[column]

    def keys(self, source: str, columns: tuple[str, ...]) -> np.ndarray:
        """(N,) int64, one number for each combination of the columns' values."""
        key = self.codes_of(columns[0]).of[source]
        for column in columns[1:]:
            codes = self.codes_of(column)
            key = key * (len(codes.values) + 1) + codes.of[source]
        return key

    def label(self, task: Task, known_by: int | None = None) -> np.ndarray:
        """(N,) float64 labels, NaN where unobserved."""
        log = self.frames[LOG]
        observed = np.ones(len(log), bool)
        if known_by is not None:
            observed = self.time + round(task.matures_after_days * DAY) <= known_by
        if task.observed_when is not None:
            observed &= (log[task.observed_when.column] == task.observed_when.equals).to_numpy(bool)
        return np.where(observed, log[task.label].to_numpy(np.float64), np.nan)

    # Kinds

    def add_id(self, name: str, feature: IdFeature) -> None:
        """Row of the table: 0 missing, then the buckets of unknown ids, then known ones, most frequent first."""
        owner = self.schema.table_of(name)
        codes = self.codes_of(feature.column).of[LOG]
        rows = self.table_rows(owner)[codes] if owner == name else self.shared_rows(owner, feature.column)
        self.ids[name] = pa.array(rows, pa.int32())

    def table_rows(self, name: str) -> np.ndarray:
        """(U + 1,) table row of each code of an id feature's column."""
        if name not in self.vocabularies:
            feature = self.schema.features[name]
            codes = self.codes_of(feature.column)
            counts = np.bincount(codes.of[LOG][self.rows_of("train")], minlength=len(codes.values) + 1)[1:]
            alphabetical = np.argsort(np.argsort(codes.values.to_numpy()))
            order = np.lexsort((alphabetical, -counts))
            known = order[counts[order] >= feature.min_count][: feature.max_size]
            rows = 1 + (pd.util.hash_array(codes.values.to_numpy()) % np.uint64(feature.oov_buckets)).astype(np.int64)
            rows[known] = 1 + feature.oov_buckets + np.arange(len(known))
            self.vocabularies[name] = np.append(0, rows)
        return self.vocabularies[name]

    def shared_rows(self, owner: str, column: str) -> np.ndarray:
        """(N,) rows of another feature's table for a column of the log."""
        feature, codes = self.schema.features[owner], self.codes_of(column)
        known = self.codes_of(feature.column).values.get_indexer(codes.values)
        hashed = 1 + (pd.util.hash_array(codes.values.to_numpy()) % np.uint64(feature.oov_buckets)).astype(np.int64)
        rows = np.where(known >= 0, self.table_rows(owner)[known + 1], hashed)
        return np.append(0, rows)[codes.of[LOG]]

    def add_number(self, name: str, values: np.ndarray) -> None:
        """Standardise, clip to 10 deviations, mark missing values where training rows have some."""
        training = values[self.rows_of("train"), None]
        scaled = StandardScaler().fit(training).transform(values[:, None])[:, 0]
        missing = np.isnan(scaled)
        self.dense[name] = np.where(missing, 0, np.clip(scaled, -10, 10)).astype(np.float32)
        if np.isnan(training).any():
            self.dense[f"{name}_missing"] = missing.astype(np.float32)

    def add_numeric(self, name: str, feature: NumericFeature) -> None:
        """A number or its logarithm."""
        assert feature.transform != "buckets", "the baseline has no quantile buckets"
        values = self.frames[LOG][feature.column].to_numpy(np.float64)
        self.add_number(name, np.sign(values) * np.log1p(np.abs(values)) if feature.transform == "log" else values)

    def add_time(self, name: str, feature: TimeFeature) -> None:
        """Hour and weekday, 0 where missing; log of the age in days."""
        moments = self.frames[LOG][feature.column or self.schema.columns.time]
        local = pd.to_datetime(moments, unit="us", utc=True).dt.tz_convert(feature.timezone)
        if "hour" in feature.parts:
            self.ids[f"{name}_hour"] = pa.array((local.dt.hour + 1).fillna(0).to_numpy(np.int32))
        if "weekday" in feature.parts:
            self.ids[f"{name}_weekday"] = pa.array((local.dt.dayofweek + 1).fillna(0).to_numpy(np.int32))
        if "age" in feature.parts:
            days = (self.time - moments.to_numpy(np.float64)) / DAY
            self.add_number(f"{name}_age", np.sign(days) * np.log1p(np.abs(days)))

    def remembered(self, feature: CounterFeature | HistoryFeature) -> tuple[str, np.ndarray, np.ndarray]:
        """The source, each of its rows' labels (NaN where there is none), and when they are known, rising."""
        if feature.events is not None:
            frame = self.frames[feature.events]
            known = frame[self.schema.events[feature.events].time].to_numpy() + 1
            return feature.events, np.ones(len(frame)), known
        task = self.schema.tasks[feature.task or ""]
        return LOG, self.label(task), self.time + max(1, round(task.matures_after_days * DAY))

    def add_counter(self, name: str, feature: CounterFeature) -> None:
        """Running totals of each key, looked up as of the request; a window is the difference of two look-ups."""
        source, label, known = self.remembered(feature)
        labelled = ~np.isnan(label)
        memory = pd.DataFrame({"known": known, "key": self.keys(source, feature.by), "label": label})[labelled]
        of_key = memory.groupby("key", sort=False)
        totals = pd.DataFrame({"known": memory["known"], "key": memory["key"], "rows": of_key.cumcount() + 1.0})
        totals["sum"] = of_key["label"].cumsum()
        if "recency" in feature.outputs:
            positive = memory["known"].where(memory["label"] > 0)
            totals["last"] = positive.groupby(memory["key"], sort=False).ffill()
        keys = self.keys(LOG, feature.by)
        now = as_of(self.time, keys, totals)
        prior = 0.0
        if feature.task is not None:
            training = self.label(self.schema.tasks[feature.task], self.windows["train"][1])[self.rows_of("train")]
            prior = float(np.nanmean(training))
        for window in feature.window_days:
            rows, total = now["rows"].fillna(0).to_numpy(), now["sum"].fillna(0).to_numpy()
            if window is not None:
                before = as_of(self.time - round(window * DAY), keys, totals[["known", "key", "rows", "sum"]])
                rows, total = rows - before["rows"].fillna(0).to_numpy(), total - before["sum"].fillna(0).to_numpy()
            suffix = "" if window is None else f"_{window:g}d".replace(".", "p")
            if "positives" in feature.outputs:
                self.add_number(f"{name}_positives{suffix}", np.log1p(np.maximum(total, 0)))
            if "rows" in feature.outputs:
                self.add_number(f"{name}_rows{suffix}", np.log1p(rows))
            if "rate" in feature.outputs:
                rate = (total + feature.smoothing * prior) / (rows + feature.smoothing)
                self.add_number(f"{name}_rate{suffix}", rate)
        if "recency" in feature.outputs:
            self.add_number(f"{name}_recency", np.log1p((self.time - now["last"].to_numpy()) / DAY))

    def add_history(self, name: str, feature: HistoryFeature) -> None:
        """The last items of each user as of the request, cut out of one array of all users' items."""
        source, label, known = self.remembered(feature)
        engaged = label >= feature.at_least
        item = self.table_rows(feature.of)[self.codes_of(self.schema.features[feature.of].column).of[source][engaged]]
        users = self.keys(source, (self.schema.columns.user,))[engaged]
        order = np.lexsort((item, known[engaged], users))
        items, user = item[order], users[order]
        first = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
        start = np.repeat(first, np.diff(np.append(first, len(user))))
        memory = pd.DataFrame(
            {"known": known[engaged][order], "key": user, "start": start, "last": np.arange(len(user))}
        )
        found = as_of(
            self.time, self.keys(LOG, (self.schema.columns.user,)), memory.sort_values("known", kind="stable")
        )
        last, start = (found[each].fillna(-1).to_numpy(np.int64) for each in ("last", "start"))
        lengths = np.where(last < 0, 0, np.minimum(last - start + 1, feature.length))
        offsets = np.append(0, np.cumsum(lengths))
        at = np.arange(offsets[-1]) + np.repeat(last + 1 - lengths - offsets[:-1], lengths)
        self.ids[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(items[at], pa.int32()))

    # Together

    def add_all(self) -> None:
        """Compute every feature of the schema."""
        for name, feature in self.schema.features.items():
            match feature:
                case IdFeature():
                    self.add_id(name, feature)
                case NumericFeature():
                    self.add_numeric(name, feature)
                case TimeFeature():
                    self.add_time(name, feature)
                case CounterFeature():
                    self.add_counter(name, feature)
                case HistoryFeature():
                    self.add_history(name, feature)
                case _:
                    raise NotImplementedError(f"feature '{name}': the baseline has no kind '{feature.kind}'")

    def write(self, out: Path) -> None:
        """Write each split's rows, in the columns that `mmoe_rec.features` writes."""
        log, names = self.frames[LOG], self.schema.columns
        columns = {f"id.{name}": values for name, values in self.ids.items()}
        columns |= {f"dense.{name}": pa.array(values) for name, values in self.dense.items()}
        columns |= {"user": pa.array(log[names.user]), "candidate": pa.array(log[names.candidate])}
        columns["time"] = pa.array(self.time, pa.timestamp("us", tz="UTC"))
        columns["request"] = pa.array(
            log[names.request] if names.request else log.groupby([names.user, names.time], sort=False).ngroup()
        )
        rate = log[names.sampling_rate] if names.sampling_rate else np.ones(len(log))
        columns["sampling_rate"] = pa.array(np.asarray(rate, np.float32))
        for split, window in self.windows.items():
            known_by = window[1] if split == "train" else self.last
            for task, rule in self.schema.tasks.items():
                columns[f"label.{task}"] = pa.array(self.label(rule, known_by).astype(np.float32), from_pandas=True)
            rows = self.rows_of(split)
            table = pa.table(columns).slice(rows.start, rows.stop - rows.start)
            (out / split).mkdir(parents=True)
            path = out / split / "part-00000.parquet"
            pq.write_table(table, path, compression="zstd", compression_level=1, row_group_size=32_768)


def as_of(moments: np.ndarray, keys: np.ndarray, memory: pd.DataFrame) -> pd.DataFrame:
    """For each (rising) moment and key, the last row of `memory` that was known then; NaN where there is none."""
    left = pd.DataFrame({"known": moments, "key": keys})
    return pd.merge_asof(left, memory, on="known", by="key", allow_exact_matches=True)


def build(log: str, schema: Schema, windows: dict[str, tuple[int | None, int | None]], out: Path) -> None:
    """Fit, encode and write all splits to `out`."""
    columns, files, times = source_columns(schema), source_files(log, schema), source_times(schema)
    frames = {source: read_frame(files[source], columns[source], times[source]) for source in columns}
    last, end = int(frames[LOG][times[LOG]].iloc[-1]), windows["test"][1]
    if end is not None:
        # Nothing later is encoded, nor was it known to what is.
        frames = {each: frame[: frame[times[each]].searchsorted(end)] for each, frame in frames.items()}
    run = Build(schema, windows, frames, last)
    run.add_all()
    run.write(out)
