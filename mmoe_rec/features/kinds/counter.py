"""The feature kind `counter`: counts and rates of the earlier labels of a key, such as a user and a brand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import EncoderContext, FeatureKind, PointInTimeEncoder, State
from mmoe_rec.features.numeric_statistics import DenseNumber, NumberHistogram
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.point_in_time.join import NEVER, EventStore, Lookups, SortedEvents, availability_times, take_or_default
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Days, EventFeature, InputSemantics, Schema, Unique

_NO_CUTOFF = np.iinfo(np.int64).max
_ROUNDING = 1e-12
LABEL_SCALE = 2.0**20
"""Labels are stored as int64 multiples of 1 / `LABEL_SCALE`, so their sums don't depend on the order of rows."""
_MAX_UNITS = 2.0**62
MAX_LABEL_SUM = _MAX_UNITS / LABEL_SCALE
"""Largest absolute label or sum of labels. The difference of two sums then fits into 64 bits."""


class CounterFeature(EventFeature):
    """Statistics of a task's label, or of events, over earlier rows with the same key.

    Only labels and events that were available at the time of the request count.
    """

    kind: Literal["counter"]
    by: Annotated[tuple[str, ...], Unique] = Field(
        min_length=1, description="columns that form the key, such as [user_id, brand]"
    )
    outputs: Annotated[tuple[Literal["log_sum", "log_count", "rate", "recency"], ...], Unique] = Field(
        ("log_sum", "rate", "recency"),
        description="log_sum: log(1 + sum of labels); log_count: log(1 + rows); rate: smoothed mean label "
        "(not for events); recency: log(1 + days since the last positive label became available), missing without any",
    )
    window_days: Annotated[tuple[Days | None, ...], Unique] = Field(
        (None,), min_length=1, description="lengths of trailing windows; null means all of the past"
    )
    smoothing: float = Field(20.0, gt=0, description="number of rows at the overall mean to add to a rate")

    @model_validator(mode="before")
    @classmethod
    def _outputs_of_events(cls, values: Any) -> Any:
        """Leave `rate` out of the default `outputs` if the counter reads an event log, which has no labels."""
        if isinstance(values, dict) and values.get("events") is not None and "outputs" not in values:
            return {**values, "outputs": ("log_sum", "recency")}
        return values

    @model_validator(mode="after")
    def _rate_has_labels(self) -> Self:
        if self.events is not None and "rate" in self.outputs:
            raise ValueError("events have no rate. Set outputs to [log_sum, recency], for example.")
        return self

    def output_names(self, name: str) -> list[str]:
        """Return the names of the statistics of the counter `name`, such as `brand_clicked_rate_7d`."""
        totals = [output for output in self.outputs if output != "recency"]
        names = [f"{name}_{output}{window_suffix(days)}" for days in self.window_days for output in totals]
        return names + [f"{name}_recency"] * ("recency" in self.outputs)

    def reads(self) -> Mapping[str, ColumnUse]:
        return dict.fromkeys(self.by, "key")

    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        return self.reads()

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics(self.by)


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Round (N,) `labels` to float64 multiples of 1 / `LABEL_SCALE`. NaN stays NaN."""
    return np.rint(labels * LABEL_SCALE) / LABEL_SCALE


def _to_fixed_point(labels: np.ndarray) -> np.ndarray:
    """Round `labels` to int64 multiples of 1 / `LABEL_SCALE`."""
    units = np.rint(labels * LABEL_SCALE)
    _check_range(units)
    return units.astype(np.int64)


def _check_range(units: np.ndarray) -> None:
    if len(units) and np.abs(units).max() >= _MAX_UNITS:
        raise OverflowError


@dataclass(eq=False)
class CounterStore(EventStore):
    """Running totals per key. Each of E events stands for a time at which the totals of a key change.

    Attributes:
        rows: (E,) int32 number of the key's rows up to the event.
        label_sum: (E,) int64 sum of the key's labels up to the event, times `LABEL_SCALE`. None without labels.
        last_positive: (E,) int64 microseconds at which the key's last positive label up to the event became available,
            or `NEVER`. None without labels (each event is positive) or without the output `recency`.
    """

    rows: np.ndarray
    label_sum: np.ndarray | None
    last_positive: np.ndarray | None

    @staticmethod
    def empty(labels: bool = True, recency: bool = True) -> "CounterStore":
        """Return a store without events.

        Args:
            labels: Whether events have labels.
            recency: Whether the counter has the output `recency`.
        """
        times = np.empty(0, np.int64)
        events, rows = SortedEvents(np.empty(0, np.uint64), times), times.astype(np.int32)
        return CounterStore(events, rows, times if labels else None, times if labels and recency else None)

    def extended(
        self, key: np.ndarray, available_at: np.ndarray, label: np.ndarray | None, is_sorted: bool = False
    ) -> "CounterStore":
        """Return a store with E additional events in any order.

        Args:
            key: (E,) uint64 keys.
            available_at: (E,) int64 microseconds at which the events become available.
            label: (E,) labels, None if the store has no labels.
            is_sorted: Whether the events are sorted by key and `available_at`.

        Raises:
            OverflowError: A label, or a sum of labels, is out of range.
        """
        labels, positive = None, None
        if label is not None:
            labels = _to_fixed_point(label)
            if self.last_positive is not None:
                positive = np.where(labels > 0, available_at, NEVER)
        return self.with_steps(key, available_at, np.ones(len(key), np.int32), labels, positive, is_sorted)

    def merged(self, store: "CounterStore") -> "CounterStore":
        """Return a store with the events of both stores and the `compacted_at` of this store.

        Raises:
            OverflowError: A sum of labels is out of range.
        """
        key, available_at, rows = store.events.key, store.events.available_at, store._steps(store.rows)
        labels, positive = _map(store._steps, store.label_sum), store.last_positive
        return self.with_steps(key, available_at, rows, labels, positive, is_sorted=True)

    def with_steps(
        self,
        key: np.ndarray,
        available_at: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | None = None,
        positive: np.ndarray | None = None,
        is_sorted: bool = False,
    ) -> "CounterStore":
        """Return a store with E additional events, which change the totals of their keys.

        Args:
            key: (E,) uint64 keys.
            available_at: (E,) int64 microseconds at which the events become available.
            rows: (E,) int32 numbers to add to the number of rows.
            labels: (E,) int64 numbers to add to `label_sum`. None if the store has no labels.
            positive: (E,) int64 times of positive labels, as in `last_positive`. None if the store has none.
            is_sorted: Whether the events are sorted by key and `available_at`.
        """
        if not len(key):
            return self
        if len(self):
            key, available_at = np.append(self.events.key, key), np.append(self.events.available_at, available_at)
            rows = np.append(self._steps(self.rows), rows)
            labels = _map(np.append, _map(self._steps, self.label_sum), labels)
            positive, is_sorted = _map(np.append, self.last_positive, positive), False
        if not is_sorted:
            order = np.lexsort((available_at, key))
            key, available_at = key[order], available_at[order]
            rows, labels, positive = (_map(lambda steps: steps[order], steps) for steps in (rows, labels, positive))
        groups = SortedEvents(key, available_at)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (available_at[1:] != available_at[:-1]), True))
        first = groups.starts[groups.group_ids[kept]]

        def running(steps: np.ndarray, dtype: type) -> np.ndarray:
            total: np.ndarray = np.zeros(len(steps) + 1, dtype)
            np.cumsum(steps, dtype=dtype, out=total[1:])
            return total[1:][kept] - total[first]

        if labels is not None:
            # Check float64 sums, because int64 sums would wrap around.
            _check_range(running(labels, np.float64))
        sums = _map(partial(running, dtype=np.int64), labels)
        if positive is not None:
            import pandas as pd

            # Each event keeps the last positive time of its key so far, so take a running maximum.
            positive = pd.Series(positive).groupby(groups.group_ids).cummax().to_numpy()[kept]
        events, totals = SortedEvents(key[kept], available_at[kept]), running(rows, np.int64).astype(np.int32)
        return replace(self, events=events, rows=totals, label_sum=sums, last_positive=positive)

    def without_zero_steps(self) -> "CounterStore":
        """Return a store of rows without the events that don't change the number of rows."""
        kept = np.flatnonzero(self._steps(self.rows))
        return replace(self, events=self.events.take(kept), rows=self.rows[kept])

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """Return the amount that each event added to its key's running `totals`."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def sums(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return row counts and label sums times `LABEL_SCALE`, both (N,) int64, at N event indices, 0 for index -1."""
        rows = take_or_default(self.rows, index, 0).astype(np.int64)
        return rows, rows * int(LABEL_SCALE) if self.label_sum is None else take_or_default(self.label_sum, index, 0)

    def last_positive_at(self, index: np.ndarray) -> np.ndarray:
        """Return `last_positive` at N event indices as (N,) int64 microseconds, `NEVER` for index -1."""
        last_positive = self.events.available_at if self.label_sum is None else self.last_positive
        assert last_positive is not None
        return take_or_default(last_positive, index, NEVER)

    def compacted(self, moment: int, window: int, all_time: bool) -> "CounterStore":
        """Return a store without the events that requests from `moment` on can't see.

        Args:
            moment: Earliest time of later requests in microseconds.
            window: Longest window of the counter in microseconds, 0 without windows.
            all_time: Whether the counter also needs totals over all of the past, or `last_positive`.
        """
        later, compacted_at = self.events.available_at > moment - window, self._compaction_time(moment)
        if not all_time:
            # Count totals from the start of the window, so that they don't depend on events that earlier calls dropped.
            # The events of a key are ordered by time, so the kept events are the last ones.
            starts = self.events.starts
            kept = np.diff(np.append(0, np.cumsum(later))[starts])
            first = starts[1:] - kept

            def since_window(totals: np.ndarray) -> np.ndarray:
                dropped = np.where(first > starts[:-1], totals[first - 1], 0).astype(totals.dtype)
                return totals[later] - np.repeat(dropped, kept)

            labels = _map(since_window, self.label_sum)
            events, rows = self.events.take(later), since_window(self.rows)
            return replace(self, events=events, rows=rows, label_sum=labels, compacted_at=compacted_at)
        # Also keep the last event of each key before the window. Its totals include the dropped events.
        needed = later | np.append(later[1:], False)
        needed[self.events.starts[1:] - 1] = True
        columns = {name: column[needed] for name, column in self.to_columns().items()}
        return self.with_columns(columns, compacted_at)

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "available_at": self.events.available_at, "rows": self.rows}
        optional = {"label_sum": self.label_sum, "last_positive": self.last_positive}
        return columns | {name: column for name, column in optional.items() if column is not None}

    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> "CounterStore":
        """Return a store with the events in `columns` instead.

        Args:
            columns: Columns of the events, as from `to_columns`.
            compacted_at: Time of the last compaction in microseconds, None without compaction.
        """
        totals: dict[str, Any] = {name: columns.get(name) for name in ("rows", "label_sum", "last_positive")}
        events = SortedEvents(columns["key"], columns["available_at"])
        return replace(self, events=events, **totals, compacted_at=compacted_at)


class LookupTotals:
    """Totals of a counter at N lookups.

    Attributes:
        time: (N,) int64 microseconds up to which totals count: the time of the lookup, at least `compacted_at`.
    """

    def __init__(self, store: CounterStore, lookups: Lookups) -> None:
        lookups = lookups.clamp_times(store.compacted_at)
        self.time = lookups.time
        self._joins = [(level, level.join(lookups)) for level in (store, *store.levels)]

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) int64 row counts and (N,) float64 label sums in the last `window` microseconds (None: ever)."""
        rows, labels = self._totals(0)
        if window is not None:
            rows_before, labels_before = self._totals(window)
            rows, labels = rows - rows_before, labels - labels_before
        return rows, labels / LABEL_SCALE

    def _totals(self, lag_us: int) -> tuple[Any, Any]:
        """Return row counts and label sums times `LABEL_SCALE`, `lag_us` microseconds before the lookups."""
        rows, labels = zip(*(store.sums(join.last(lag_us)) for store, join in self._joins), strict=True)
        return sum(rows), sum(labels)

    def last_positive(self) -> np.ndarray:
        """Return when the last positive label of each lookup's key became available, (N,) int64 microseconds.

        Labels that become available after the lookup don't count. `NEVER` stands for no positive label.
        """
        return np.max([store.last_positive_at(join.last()) for store, join in self._joins], axis=0)


def _map(function: Any, *values: Any) -> Any:
    """Apply a function to arrays, or return None if the arrays are None."""
    return None if values[0] is None else function(*values)


class CounterEncoder(PointInTimeEncoder[CounterStore]):
    """Encoder of statistics over the labels of a key, or over its events, that were available at the request.

    Attributes:
        prior: Mean label of the training rows. A rate includes `smoothing` additional rows with this label.
    """

    feature: CounterFeature

    def __init__(self, name: str, feature: CounterFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context, feature.by)
        self.label = feature.task
        self.prior = 0.0
        self.counts = {"": NumberHistogram()}
        self._totals = [output for output in feature.outputs if output != "recency"]
        # Window lengths in microseconds (None for all of the past) by the suffix of the output's name.
        self._windows = {
            window_suffix(days): None if days is None else round(days * MICROSECONDS_PER_DAY)
            for days in feature.window_days
        }
        self.numbers = {output: DenseNumber(output) for output in feature.output_names(name)}

    @property
    def has_fractional_labels(self) -> bool:
        """Whether labels can be fractional."""
        return self.source is None and not self.task.kind.is_binary

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Add the labels of training rows to `counts`, from which `finish_fit` computes `prior`.

        Args:
            rows: Training rows.
            label_cutoff: Time in microseconds. Labels that become available later don't count.
        """
        if self.source is None:
            self.counts[""].add(round_labels(rows.labels(self.task, label_cutoff)))

    def finish_fit(self) -> None:
        self.prior = self.counts[""].standardizer().mean

    def empty(self) -> CounterStore:
        return CounterStore.empty(self.source is None, "recency" in self.feature.outputs)

    def events(self, rows: LogRows) -> pa.Table:
        """Return the rows of an event log, or the rows with observed labels of the interaction log, as events."""
        key = rows.hashes(self.key_columns)
        if self.source is None:
            return self.events_from_labels(key, rows.times(), self.labels(rows))
        return pa.table({"key": key, "available_at": availability_times(rows.times(), self.label_delay_us)})

    def labels(self, rows: LogRows) -> np.ndarray:
        """Return (N,) labels, int8 for a binary task (-1 if unobserved), else float64 (NaN if unobserved)."""
        labels = rows.labels(self.task, _NO_CUTOFF)
        return labels if self.has_fractional_labels else np.where(np.isnan(labels), -1, labels).astype(np.int8)

    def events_from_labels(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        observed = ~np.isnan(labels) if self.has_fractional_labels else labels >= 0
        if not observed.all():
            key, times, labels = key[observed], times[observed], labels[observed]
        return pa.table({"key": key, "available_at": availability_times(times, self.label_delay_us), "label": labels})

    def extended(self, store: CounterStore, events: pa.Table, is_sorted: bool = False) -> CounterStore:
        """Return a store with additional events.

        Args:
            store: Store to extend. It is not modified.
            events: Table that `events` returned.
            is_sorted: Whether the events are sorted by key and `available_at`.

        Raises:
            UserError: A label or a sum of labels is out of range.
        """
        label = None if self.label is None else events["label"].to_numpy()
        try:
            return store.extended(events["key"].to_numpy(), events["available_at"].to_numpy(), label, is_sorted)
        except OverflowError:
            raise UserError(
                f"Counter '{self.name}': a sum of labels of '{self.task.label}' exceeds {MAX_LABEL_SUM:.1e}. "
                "Write the column in a larger unit."
            ) from None

    def compacted(self, store: CounterStore, moment: int) -> CounterStore:
        all_time = None in self.feature.window_days or "recency" in self.feature.outputs
        return store.compacted(moment, max(filter(None, self._windows.values()), default=0), all_time)

    def distinct_results(self, store: CounterStore, lookups: Lookups) -> dict[str, np.ndarray]:
        totals, results = LookupTotals(store, lookups), dict[str, np.ndarray]()
        for suffix, window in self._windows.items() if self._totals else ():
            count, label_sum = totals.totals(window)
            for output in self._totals:
                value = _statistic(output, count, label_sum, self.feature.smoothing, self.prior)
                results[f"{self.name}_{output}{suffix}"] = value
        if "recency" in self.feature.outputs:
            results[f"{self.name}_recency"] = _recency(totals.time, totals.last_positive())
        return results

    def centered(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a statistic. Rates of a regression task become differences from `prior`.

        Args:
            name: Name of the result.
            values: (N,) values of the statistic.
        """
        return _distances(values, self.offset) if name.startswith(f"{self.name}_rate") else values

    @property
    def offset(self) -> float:
        """Number to subtract from rates before they become float32: `prior` for a regression task, else 0."""
        return self.prior if self.has_fractional_labels else 0.0

    def state(self) -> State:
        return State({"prior": self.prior, **super().state().values})

    def restore(self, state: State) -> None:
        self.prior = state.values["prior"]
        super().restore(state)


def _statistic(output: str, rows: np.ndarray, labels: np.ndarray, smoothing: float, prior: float) -> np.ndarray:
    """Compute the `output` log_sum, log_count or rate from row counts and label sums."""
    match output:
        case "log_sum":
            return np.log1p(np.maximum(labels, 0.0))
        case "log_count":
            return np.log1p(rows)
        case _:
            return (labels + smoothing * prior) / (rows + smoothing)


def _distances(rates: np.ndarray, offset: Any) -> np.ndarray:
    """Return rates minus `offset`. Differences within the rounding error become exactly 0."""
    distances = rates - offset
    return np.where(np.abs(distances) <= _ROUNDING * np.abs(offset), 0.0, distances)


def _recency(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return log(1 + days) from the last positive labels at `moments` to `times`, NaN where `moments` is `NEVER`."""
    days = (times - moments.astype(np.float64)) / MICROSECONDS_PER_DAY
    return np.where(moments == NEVER, np.nan, np.log1p(np.maximum(days, 0.0)))


def window_suffix(window: float | None) -> str:
    """Return the suffix of an output's name for a `window` in days, such as `_7d` or `_0p5d` (empty for None)."""
    return "" if window is None else f"_{window:.15g}d".replace(".", "p")


KIND = FeatureKind(CounterFeature, CounterEncoder)
