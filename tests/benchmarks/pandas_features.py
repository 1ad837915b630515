"""The benchmark's baseline `pandas`: a schema's features as one writes them with the pandas and scikit-learn API.

ids        `OrdinalEncoder` with `min_frequency`, fitted to the training rows
numbers    `StandardScaler`, `fillna` and an indicator of missing values
times      `dt.tz_convert`
counters   `groupby` with `cumcount` and `cumsum`, looked up as of the request by `merge_asof`; a window is the
           difference of two look-ups
histories  `groupby` with `shift`, looked up by `merge_asof`

Data frames keep the types that `pd.read_parquet` gives them (integers with missing values are floats), and no loop runs
over rows. `tuned_pandas_features.py` has the same features in faster code.

It does less than `mmoe_rec.features`. Everything is in memory at once; nothing fitted or counted is kept, so a request
could not be encoded afterwards, nor could days be added; the log is not checked; there are no inputs of kinds ids,
vector and cross, no quantile buckets and no `max_size`. Unknown and rare ids share the first bucket, as scikit-learn
has no hashing for them, and known ids are numbered by value instead of frequency. It does nothing that ours does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.features.kinds.history import HistoryFeature
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.kinds.numeric import NumericFeature
from mmoe_rec.features.kinds.time import TimeFeature
from mmoe_rec.settings.columns import Task
from mmoe_rec.settings.schema import Schema
from tests.benchmarks.sources import LOG, source_columns, source_files, source_times

MISSING, UNKNOWN = 0, 1  # codes of ids
DAY = pd.Timedelta(days=1)
INSTANT = pd.Timedelta(microseconds=1)
CLIP = 10


class IdCodes:
    """Codes of the ids in a column, fitted to its training rows; ids that are there too seldom count as unknown."""

    def __init__(self, training: pd.Series, min_count: int, first_known: int) -> None:
        self.first_known = first_known
        self.encoder = OrdinalEncoder(
            # Without a least frequency, scikit-learn need not count.
            min_frequency=min_count if min_count > 1 else None,
            handle_unknown="use_encoded_value",
            unknown_value=-1,
            encoded_missing_value=-2,
            dtype=np.int32,
        ).fit(training.to_frame("id"))
        (ids,), rare = self.encoder.categories_, None
        if min_count > 1:
            (rare,) = self.encoder.infrequent_categories_
        # scikit-learn gives rare ids one code of their own, after those of the known ones.
        self.known = len(ids) - pd.isna(ids).sum() - (0 if rare is None else len(rare))

    def transform(self, ids: pd.Series) -> pd.Series:
        """The codes of ids, as int32."""
        codes = pd.Series(self.encoder.transform(ids.to_frame("id"))[:, 0], ids.index)
        codes = (codes + self.first_known).where(codes.between(0, self.known - 1), UNKNOWN)
        return codes.mask(ids.isna(), MISSING)


@dataclass
class Build:
    """One run over one log.

    windows: request times [start, end) of each split; frames: rows until the last split's end, in the order of time;
    last: time of the log's last row, until which labels are known.
    """

    schema: Schema
    windows: dict[str, tuple[pd.Timestamp | None, pd.Timestamp | None]]
    frames: dict[str, pd.DataFrame]
    last: pd.Timestamp
    codes: dict[str, IdCodes] = field(default_factory=dict)
    ids: dict[str, pd.Series] = field(default_factory=dict)
    numbers: dict[str, pd.Series] = field(default_factory=dict)

    @property
    def log(self) -> pd.DataFrame:
        """The log's requests."""
        return self.frames[LOG]

    @property
    def time(self) -> pd.Series:
        """Times of the log's requests."""
        return self.log[self.schema.columns.time]

    def in_split(self, split: str) -> pd.Series:
        """Whether the log's rows belong to a split."""
        start, end = self.windows[split]
        inside = pd.Series(True, self.log.index)
        if start is not None:
            inside &= self.time >= start
        if end is not None:
            inside &= self.time < end
        return inside

    def requests(self) -> pd.Series:
        """Numbers of the requests, where the log has none: a user's rows of one instant form one."""
        return self.log.groupby([self.schema.columns.user, self.schema.columns.time], sort=False).ngroup()

    def label(self, task: Task, known_by: pd.Timestamp | None = None) -> pd.Series:
        """Labels of the log's rows, NaN where unobserved."""
        label = self.log[task.label].astype("float64")
        if task.observed_when is not None:
            label = label.where(self.log[task.observed_when.column] == task.observed_when.equals)
        if known_by is not None:
            label = label.where(self.time + task.matures_after_days * DAY <= known_by)
        return label

    def known_labels(self, feature: CounterFeature | HistoryFeature, columns: list[str]) -> pd.DataFrame:
        """What a feature remembers: these columns, `label`, and when it was `known`, in this order."""
        if feature.events is not None:
            events = self.frames[feature.events]
            known = events[self.schema.events[feature.events].time] + INSTANT
            return events[columns].assign(label=1.0, known=known)
        task = self.schema.tasks[feature.task]
        known = self.time + max(INSTANT, task.matures_after_days * DAY)
        return self.log[columns].assign(label=self.label(task), known=known).dropna(subset="label")

    # Kinds

    def codes_of(self, name: str) -> IdCodes:
        """The codes of an id feature, fitted once."""
        if name not in self.codes:
            feature = self.schema.features[name]
            assert feature.max_size is None, "the baseline has no max_size"
            training = self.log.loc[self.in_split("train"), feature.column]
            self.codes[name] = IdCodes(training, feature.min_count, first_known=1 + feature.oov_buckets)
        return self.codes[name]

    def add_id(self, name: str, feature: IdFeature) -> None:
        """Codes of the ids."""
        self.ids[name] = self.codes_of(self.schema.table_of(name)).transform(self.log[feature.column])

    def add_numeric(self, name: str, feature: NumericFeature) -> None:
        """A number or its logarithm."""
        assert feature.transform != "buckets", "the baseline has no quantile buckets"
        values = self.log[feature.column].astype("float64")
        self.numbers[name] = signed_log(values) if feature.transform == "log" else values

    def add_time(self, name: str, feature: TimeFeature) -> None:
        """Hour and weekday, 0 where missing; log of the age in days."""
        moment = self.log[feature.column or self.schema.columns.time]
        local = moment.dt.tz_convert(feature.timezone)
        if "hour" in feature.parts:
            self.ids[f"{name}_hour"] = (local.dt.hour + 1).fillna(0).astype("int32")
        if "weekday" in feature.parts:
            self.ids[f"{name}_weekday"] = (local.dt.dayofweek + 1).fillna(0).astype("int32")
        if "age" in feature.parts:
            self.numbers[f"{name}_age"] = signed_log((self.time - moment) / DAY)

    def add_counter(self, name: str, feature: CounterFeature) -> None:
        """Running totals of each key, looked up as of the request; a window is the difference of two look-ups."""
        by = list(feature.by)
        labels = self.known_labels(feature, by)
        labels["last"] = labels["known"].where(labels["label"] > 0)
        of_key = labels.groupby(by, sort=False, dropna=False)
        totals = labels[[*by, "known"]].assign(rows=of_key.cumcount() + 1, positives=of_key["label"].cumsum())
        if "recency" in feature.outputs:
            totals["last"] = of_key["last"].ffill()
        now = self.as_of(self.time, by, totals)
        sums = now[["rows", "positives"]].fillna(0)
        for window in feature.window_days:
            within, suffix = sums, ""
            if window is not None:
                earlier = self.as_of(self.time - window * DAY, by, totals[[*by, "known", "rows", "positives"]])
                within, suffix = sums - earlier[["rows", "positives"]].fillna(0), f"_{window:g}d".replace(".", "p")
            if "positives" in feature.outputs:
                self.numbers[f"{name}_positives{suffix}"] = np.log1p(within["positives"].clip(lower=0))
            if "rows" in feature.outputs:
                self.numbers[f"{name}_rows{suffix}"] = np.log1p(within["rows"])
            if "rate" in feature.outputs:
                prior = self.label(self.schema.tasks[feature.task], self.windows["train"][1])
                mixed = within["positives"] + feature.smoothing * prior[self.in_split("train")].mean()
                self.numbers[f"{name}_rate{suffix}"] = mixed / (within["rows"] + feature.smoothing)
        if "recency" in feature.outputs:
            self.numbers[f"{name}_recency"] = np.log1p((self.time - now["last"]) / DAY)

    def add_history(self, name: str, feature: HistoryFeature) -> None:
        """The last items of each user as of the request, oldest first."""
        user, item = self.schema.columns.user, self.schema.features[feature.of].column
        engaged = self.known_labels(feature, [user, item]).query("label >= @feature.at_least")
        # Of one instant, a rare item counts as the oldest, then the most frequent one, as it does in this project.
        frequency = self.log.loc[self.in_split("train"), item].value_counts().sort_index()
        frequency = frequency[frequency >= self.schema.features[feature.of].min_count]
        rank = engaged[item].map(frequency.rank(method="first", ascending=False))
        engaged = engaged.assign(item=self.codes_of(feature.of).transform(engaged[item]), rank=rank)
        engaged = engaged.sort_values(["known", "rank"], na_position="first")
        last = engaged.groupby(user, sort=False)[["item"]].shift(list(reversed(range(feature.length))))
        found = self.as_of(self.time, [user], engaged[[user, "known"]].join(last))
        self.ids[name] = lists_of(found[last.columns])

    def as_of(self, moments: pd.Series, by: Sequence[str], known: pd.DataFrame) -> pd.DataFrame:
        """For each row of the log, the last row of `known` with its key at the (rising) moment; NaN without."""
        asked = self.log[list(by)].assign(known=moments)
        return pd.merge_asof(asked, known, on="known", by=list(by))

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

    def standardised(self) -> pd.DataFrame:
        """All numbers in deviations from the mean, at most 10; 0 and an indicator where missing."""
        numbers = pd.DataFrame(self.numbers)
        training = numbers[self.in_split("train")]
        scaler = StandardScaler().set_output(transform="pandas").fit(training)
        dense = scaler.transform(numbers).clip(-CLIP, CLIP).fillna(0)
        missing = numbers.loc[:, training.isna().any()].isna().add_suffix("_missing")
        return dense.join(missing).astype("float32").add_prefix("dense.")

    def write(self, out: Path) -> None:
        """Write each split's rows, in the columns that `mmoe_rec.features` writes."""
        log, names = self.log, self.schema.columns
        ids = pd.DataFrame(self.ids).add_prefix("id.")
        rows = pd.concat([ids, self.standardised()], axis=1)
        rows = rows.assign(user=log[names.user], candidate=log[names.candidate], time=self.time)
        rows["request"] = log[names.request] if names.request else self.requests()
        rows["sampling_rate"] = log[names.sampling_rate].astype("float32") if names.sampling_rate else np.float32(1)
        for split, (_, end) in self.windows.items():
            known_by = end if split == "train" else self.last
            labels = {
                f"label.{name}": self.label(task, known_by).astype("float32")
                for name, task in self.schema.tasks.items()
            }
            (out / split).mkdir(parents=True)
            rows.assign(**labels)[self.in_split(split)].to_parquet(out / split / "part-00000.parquet", index=False)


def signed_log(values: pd.Series) -> pd.Series:
    """sign(x) log(1 + |x|)."""
    return np.sign(values) * np.log1p(values.abs())


def lists_of(columns: pd.DataFrame) -> pd.Series:
    """Each row's values as a list, without missing ones."""
    values = columns.to_numpy()
    present = ~np.isnan(values)
    ends = np.append(0, present.sum(axis=1).cumsum())
    lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values[present], pa.int32(), safe=False))
    return pd.Series(lists, columns.index, dtype=pd.ArrowDtype(lists.type))


def read_frame(files: Sequence[Path], columns: list[str], time: str) -> pd.DataFrame:
    """Rows of all files in the order of time."""
    rows = pd.concat([pd.read_parquet(file, columns=columns) for file in files])
    return rows.sort_values(time, kind="stable", ignore_index=True)


def with_shared_types(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The frames with integers as floats in columns that are floats in another frame, where some are missing."""
    floats = {name for frame in frames.values() for name in frame.select_dtypes("float64").columns}
    return {source: frame.astype(dict.fromkeys(floats & set(frame), "float64")) for source, frame in frames.items()}


def moment(microseconds: int | None) -> pd.Timestamp | None:
    """A time given in microseconds since 1970 UTC."""
    return None if microseconds is None else pd.Timestamp(microseconds, unit="us", tz="UTC")


def build(log: str, schema: Schema, windows: dict[str, tuple[int | None, int | None]], out: Path) -> None:
    """Fit, encode and write all splits to `out`. `windows`: microseconds since 1970 UTC."""
    columns, files, times = source_columns(schema), source_files(log, schema), source_times(schema)
    frames = with_shared_types({each: read_frame(files[each], columns[each], times[each]) for each in columns})
    last, end = frames[LOG][times[LOG]].max(), windows["test"][1]
    if end is not None:
        # Nothing later is encoded, nor was it known to what is.
        frames = {each: frame[frame[times[each]] < moment(end)] for each, frame in frames.items()}
    moments = {split: (moment(start), moment(end)) for split, (start, end) in windows.items()}
    run = Build(schema, moments, frames, last)
    run.add_all()
    run.write(out)
