"""The kind `counter`: trailing counts and smoothed rates of a task's label per key, point in time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import EncoderContext, FeatureKind, Inputs, InputSpec, PointInTimeEncoder, State
from mmoe_rec.features.numeric_statistics import DenseNumber, NumberHistogram, Standardizer
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.point_in_time.join import NEVER, EventStore, Lookups, SortedEvents, availability_times, take_or_default
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Days, EventFeature, InputSemantics, Schema, Unique

_FOREVER = np.iinfo(np.int64).max
_ROUNDING = 1e-12
LABEL_SCALE = 2.0**20
"""Units of a label of 1. Labels are whole numbers of units, so their int64 sums depend on no order."""
_MOST_UNITS = 2.0**62
MAX_LABEL_SUM = _MOST_UNITS / LABEL_SCALE
"""Labels and sums of labels lie between this and its negative, so the difference of two sums fits into 64 bits."""


class CounterFeature(EventFeature):
    """Trailing statistics of a task's label, or of events, over all earlier rows with the same key, point in time."""

    kind: Literal["counter"]
    by: Annotated[tuple[str, ...], Unique] = Field(
        min_length=1, description="columns that form the key, such as [user_id, brand]"
    )
    outputs: Annotated[tuple[Literal["log_sum", "log_count", "rate", "recency"], ...], Unique] = Field(
        ("log_sum", "rate", "recency"),
        description="log_sum: log(1 + sum of labels); log_count: log(1 + rows); rate: smoothed mean label, not "
        "of events; "
        "recency: log(1 + days since the last row with a positive label became known), missing if never",
    )
    window_days: Annotated[tuple[Days | None, ...], Unique] = Field(
        (None,), min_length=1, description="trailing windows; null is all of the past"
    )
    smoothing: float = Field(20.0, gt=0, description="rows of the overall mean that are mixed into a rate")

    @model_validator(mode="before")
    @classmethod
    def _outputs_of_events(cls, values: Any) -> Any:
        """Events have no labels, so their default has no rate."""
        if isinstance(values, dict) and values.get("events") is not None and "outputs" not in values:
            return {**values, "outputs": ("log_sum", "recency")}
        return values

    @model_validator(mode="after")
    def _rate_has_labels(self) -> Self:
        if self.events is not None and "rate" in self.outputs:
            raise ValueError("events have no rate; set outputs, say, to [log_sum, recency]")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        return dict.fromkeys(self.by, "key")

    def event_reads(self, schema: Schema) -> Mapping[str, ColumnUse]:
        return self.reads()

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics(self.by)


def round_labels(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to float64 multiples of a unit. NaN stays."""
    return np.rint(labels * LABEL_SCALE) / LABEL_SCALE


def to_fixed_point(labels: np.ndarray) -> np.ndarray:
    """Round (N,) numbers to int64 units. Raises OverflowError for one out of range."""
    units = np.rint(labels * LABEL_SCALE)
    _check_range(units)
    return units.astype(np.int64)


def _check_range(units: np.ndarray) -> None:
    if len(units) and np.abs(units).max() >= _MOST_UNITS:
        raise OverflowError


@dataclass(eq=False)
class CounterStore(EventStore):
    """Running totals per key, one event for each moment at which a key's totals change.

    rows: (E,) int32, of all events of the key so far; label_sum: (E,) int64 units, of their labels; last_positive: (E,)
    int64 moment of its last positive one, `NEVER` without; None where nobody asks for it. Where each event counts 1, as
    in a log of events, rows and moments say it all, and both are None.
    """

    rows: np.ndarray
    label_sum: np.ndarray | None
    last_positive: np.ndarray | None

    @staticmethod
    def empty(labels: bool = True, recency: bool = True) -> "CounterStore":
        """Nothing remembered. labels: whether events have labels; recency: whether the last positive is asked for."""
        none = np.empty(0, np.int64)
        events, rows = SortedEvents(np.empty(0, np.uint64), none), none.astype(np.int32)
        return CounterStore(events, rows, none if labels else None, none if labels and recency else None)

    def extended(
        self, key: np.ndarray, available_at: np.ndarray, label: np.ndarray | None, is_sorted: bool = False
    ) -> "CounterStore":
        """Add (E,) events in any order.

        Args:
            key: (E,) uint64.
            available_at: (E,) int64 moments.
            label: (E,) numbers, None where each event counts 1.
            is_sorted: Whether the events are sorted by key and known time.

        Raises:
            OverflowError: A label, or a sum of labels, is out of range.
        """
        if not len(key):
            return self
        labels, positive = None, None
        if label is not None:
            labels = to_fixed_point(label)
            if self.last_positive is not None:
                positive = np.where(labels > 0, available_at, NEVER)
        return self._with_steps(key, available_at, np.ones(len(key), np.int32), labels, positive, is_sorted)

    def merged(self, other: "CounterStore") -> "CounterStore":
        """The events of both, of the same kind; as of this one's `compacted_at`. Raises OverflowError as `extended`."""
        if not len(other):
            return self
        key, available_at, rows = other.events.key, other.events.available_at, other._steps(other.rows)
        labels, positive = _map(other._steps, other.label_sum), other.last_positive
        return self._with_steps(key, available_at, rows, labels, positive, is_sorted=True)

    def _with_steps(
        self,
        key: np.ndarray,
        available_at: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray | None,
        positive: np.ndarray | None,
        is_sorted: bool,
    ) -> "CounterStore":
        """These events and (E,) further ones by what each adds: rows, labels, and the last positive."""
        if len(self):
            key, available_at = np.append(self.events.key, key), np.append(self.events.available_at, available_at)
            rows = np.append(self._steps(self.rows), rows)
            labels = _map(np.append, _map(self._steps, self.label_sum), labels)
            positive, is_sorted = _map(np.append, self.last_positive, positive), False
        if not is_sorted:
            order = np.lexsort((available_at, key))
            key, available_at = key[order], available_at[order]
            rows, labels, positive = (_map(lambda steps: steps[order], each) for each in (rows, labels, positive))
        groups = SortedEvents(key, available_at)
        kept = np.flatnonzero(np.append((key[1:] != key[:-1]) | (available_at[1:] != available_at[:-1]), True))
        first = groups.starts[groups.group_ids[kept]]

        def running(steps: np.ndarray, dtype: type) -> np.ndarray:
            total: np.ndarray = np.zeros(len(steps) + 1, dtype)
            np.cumsum(steps, dtype=dtype, out=total[1:])
            return total[1:][kept] - total[first]

        if labels is not None:
            _check_range(running(labels, np.float64))  # Sums of integers would wrap around.
        sums = _map(partial(running, dtype=np.int64), labels)
        if positive is not None:
            import pandas as pd

            # An event that came late may be earlier than what came before.
            positive = pd.Series(positive).groupby(groups.group_ids).cummax().to_numpy()[kept]
        events, totals = SortedEvents(key[kept], available_at[kept]), running(rows, np.int64).astype(np.int32)
        return replace(self, events=events, rows=totals, label_sum=sums, last_positive=positive)

    def _steps(self, totals: np.ndarray) -> np.ndarray:
        """(E,) what each event added to the running totals of its key."""
        steps = np.append(totals[:1], totals[1:] - totals[:-1])
        first = self.events.starts[:-1]
        steps[first] = totals[first]
        return steps

    def sums(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 numbers of rows and units of labels as of events by their index, 0 for index -1."""
        rows = take_or_default(self.rows, index, 0).astype(np.int64)
        return rows, rows * int(LABEL_SCALE) if self.label_sum is None else take_or_default(self.label_sum, index, 0)

    def last_positive_at(self, index: np.ndarray) -> np.ndarray:
        """(N,) int64 moments of the last positive event as of events by their index, `NEVER` for none."""
        last_positive = self.events.available_at if self.label_sum is None else self.last_positive
        assert last_positive is not None
        return take_or_default(last_positive, index, NEVER)

    def compacted(self, moment: int, window: int, all_time: bool) -> "CounterStore":
        """What requests at `moment` or later, which look back `window` microseconds, can ask for.

        all_time: whether they also ask for all of the past, or for the last positive event.
        """
        later, compacted_at = self.events.available_at > moment - window, self._later_floor(moment)
        if not all_time:  # Totals begin with the window, so they don't depend on the keys that earlier calls dropped.
            starts = self.events.starts
            kept = np.diff(np.append(0, np.cumsum(later))[starts])
            first = starts[1:] - kept  # Each key's events are in order of time, so it keeps its last ones.

            def since_window(totals: np.ndarray) -> np.ndarray:
                dropped = np.where(first > starts[:-1], totals[first - 1], 0).astype(totals.dtype)
                return totals[later] - np.repeat(dropped, kept)

            labels = _map(since_window, self.label_sum)
            events, rows = self.events.take(later), since_window(self.rows)
            return replace(self, events=events, rows=rows, label_sum=labels, compacted_at=compacted_at)
        # And the last one before of each key, which carries its totals.
        needed = later | np.append(later[1:], False)
        needed[self.events.starts[1:] - 1] = True
        labels, positive = (_map(lambda totals: totals[needed], each) for each in (self.label_sum, self.last_positive))
        events, rows = self.events.take(needed), self.rows[needed]
        return replace(
            self, events=events, rows=rows, label_sum=labels, last_positive=positive, compacted_at=compacted_at
        )

    def to_columns(self) -> dict[str, np.ndarray]:
        columns = {"key": self.events.key, "available_at": self.events.available_at, "rows": self.rows}
        optional = {"label_sum": self.label_sum, "last_positive": self.last_positive}
        return columns | {name: column for name, column in optional.items() if column is not None}

    def with_columns(self, columns: Mapping[str, np.ndarray], compacted_at: int | None) -> "CounterStore":
        events, labels = SortedEvents(columns["key"], columns["available_at"]), columns.get("label_sum")
        positive = columns.get("last_positive")
        return replace(
            self,
            events=events,
            rows=columns["rows"],
            label_sum=labels,
            last_positive=positive,
            compacted_at=compacted_at,
        )


class LookupTotals:
    """Totals that N look-ups see in a counter's memory and its levels.

    Attributes:
        time: Microseconds as of which they see them, shape (N,), int64.
    """

    def __init__(self, store: CounterStore, lookups: Lookups) -> None:
        lookups = lookups.clamp_times(store.compacted_at)
        self.time = lookups.time
        self._joins = [(each, each.join(lookups)) for each in (store, *store.levels)]

    def totals(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) int64 numbers of rows and (N,) float64 sums of labels.

        Args:
            window: Microseconds to look back, None for all of the past.
        """
        rows, labels = self._totals(0)
        if window is not None:
            rows_before, labels_before = self._totals(window)
            rows, labels = rows - rows_before, labels - labels_before
        return rows, labels / LABEL_SCALE

    def _totals(self, lag_us: int) -> tuple[Any, Any]:
        """(N,) int64 numbers of rows and units of labels, `lag_us` microseconds before the look-ups."""
        rows, labels = zip(*(store.sums(join.last(lag_us)) for store, join in self._joins), strict=True)
        return sum(rows), sum(labels)

    def last_positive(self) -> np.ndarray:
        """(N,) int64 moments of the last positive event, `NEVER` for none."""
        return np.max([store.last_positive_at(join.last()) for store, join in self._joins], axis=0)


def _map(function: Any, *values: Any) -> Any:
    """What a function makes of arrays, None where they are missing."""
    return None if values[0] is None else function(*values)


class CounterEncoder(PointInTimeEncoder[CounterStore]):
    """Statistics over all earlier rows with the same key whose label was known at the request."""

    feature: CounterFeature

    def __init__(self, name: str, feature: CounterFeature, shared: EncoderContext) -> None:
        super().__init__(name, feature, shared, feature.by)
        self.label = feature.task
        self.prior = 0.0
        self.counts = NumberHistogram()
        self._totals = [output for output in feature.outputs if output != "recency"]
        # The end of an output's name -> microseconds; None is all of the past.
        self._windows = {
            window_suffix(days): None if days is None else round(days * MICROSECONDS_PER_DAY)
            for days in feature.window_days
        }
        names = [f"{name}_{output}{suffix}" for suffix in self._windows for output in self._totals]
        if "recency" in feature.outputs:
            names.append(f"{name}_recency")
        self.numbers = {each: DenseNumber(each) for each in names}

    @property
    def has_fractional_labels(self) -> bool:
        """Whether labels may be other than whole numbers."""
        return self.source is None and not self.task.kind.is_binary

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Adds the training rows' labels to the overall mean."""
        if self.source is None:
            self.counts.add(round_labels(rows.labels(self.task, label_cutoff)))

    def finish_fit(self) -> None:
        self.prior = self.counts.standardizer().mean

    def empty(self) -> CounterStore:
        recency = "recency" in self.feature.outputs
        return CounterStore.empty(self.source is None, recency)

    def events(self, rows: LogRows) -> pa.Table:
        """The rows of a log of events. (Those of the interaction log come as look-ups with their labels.)"""
        key = rows.hashes(self.key_columns)
        if self.source is None:
            return self.events_from_labels(key, rows.times(), self.labels(rows))
        return pa.table({"key": key, "available_at": availability_times(rows.times(), self.label_delay_us)})

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels: int8 of a binary task, -1 where unobserved, or float64, NaN where unobserved."""
        labels = rows.labels(self.task, _FOREVER)
        return labels if self.has_fractional_labels else np.where(np.isnan(labels), -1, labels).astype(np.int8)

    def events_from_labels(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The rows whose label is observed; each becomes visible only when its label is known."""
        observed = ~np.isnan(labels) if self.has_fractional_labels else labels >= 0
        if not observed.all():
            key, times, labels = key[observed], times[observed], labels[observed]
        return pa.table({"key": key, "available_at": availability_times(times, self.label_delay_us), "label": labels})

    def extended(self, store: CounterStore, events: pa.Table, is_sorted: bool = False) -> CounterStore:
        """Raises UserError where a label or a sum of labels is out of range."""
        label = None if self.label is None else events["label"].to_numpy()
        try:
            return store.extended(events["key"].to_numpy(), events["available_at"].to_numpy(), label, is_sorted)
        except OverflowError:
            raise UserError(
                f"counter '{self.name}' sums labels of column '{self.task.label}' beyond {MAX_LABEL_SUM:.1e}: "
                "write that "
                "column in a larger unit"
            ) from None

    def compacted(self, store: CounterStore, moment: int) -> CounterStore:
        """The totals within the longest window before `moment`, and what comes later; of each key also its total as of
        `moment`, unless only windows are asked for."""
        all_time = None in self.feature.window_days or "recency" in self.feature.outputs
        return store.compacted(moment, max(filter(None, self._windows.values()), default=0), all_time)

    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        """The statistics under their names, such as `user_product_log_sum`."""
        return dict.fromkeys(self.numbers, ("number", pa.float64()))

    def distinct_results(self, store: CounterStore, lookups: Lookups) -> dict[str, np.ndarray]:
        found, result = LookupTotals(store, lookups), dict[str, np.ndarray]()
        for suffix, window in self._windows.items() if self._totals else ():
            count, label_sum = found.totals(window)
            for output in self._totals:
                value = _statistic(output, count, label_sum, self.feature.smoothing, self.prior)
                result[f"{self.name}_{output}{suffix}"] = value
        if "recency" in self.feature.outputs:
            result[f"{self.name}_recency"] = _recency(found.time, found.last_positive())
        return result

    def to_exchange_dtype(self, name: str, values: np.ndarray) -> np.ndarray:
        """The same as float32; rates of a regression, which it would not tell apart, as distances from the mean."""
        return self._distances(name, values).astype(np.float32)

    def _distances(self, name: str, values: np.ndarray) -> np.ndarray:
        return _distances(values, self.offset) if name.startswith(f"{self.name}_rate") else values

    @property
    def offset(self) -> float:
        """The number that rates are told apart from: the mean of a regression, 0 of a binary task."""
        return self.prior if self.has_fractional_labels else 0.0

    def input_spec(self) -> InputSpec:
        return InputSpec(dense=tuple(each for number in self.numbers.values() for each in number.inputs()))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised statistics. A column with the name of one wins."""
        given = {name: self._distances(name, rows.numbers(name)) for name in self.numbers if rows.has_column(name)}
        results = given if len(given) == len(self.numbers) else {**self.look_up(rows), **given}
        return Inputs(numbers=[(np.asarray(results[name]), number) for name, number in self.numbers.items()])

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """The statistics before they are standardised. A column with the name of one wins."""
        lookups = rows.lookups(self.key_columns)
        results = self.distinct_results(self.store, lookups)
        return {
            name: rows.numbers(name) if rows.has_column(name) else each.astype(np.float64)[lookups.inverse]
            for name, each in results.items()
        }

    def state(self) -> State:
        numbers = {name: asdict(number.standardizer) for name, number in self.numbers.items()}
        return State({"prior": self.prior, "numbers": numbers})

    def restore(self, state: State) -> None:
        self.prior = state.values["prior"]
        for name, values in state.values["numbers"].items():
            self.numbers[name].standardizer = Standardizer(**values)


def _statistic(output: str, rows: np.ndarray, labels: np.ndarray, smoothing: float, prior: float) -> np.ndarray:
    """An output of totals: numbers of rows and sums of labels."""
    match output:
        case "log_sum":
            return np.log1p(np.maximum(labels, 0.0))
        case "log_count":
            return np.log1p(rows)
        case _:
            return (labels + smoothing * prior) / (rows + smoothing)


def _distances(rates: np.ndarray, offset: Any) -> np.ndarray:
    """Rates less an offset, exactly 0 where only rounding tells them apart."""
    distances = rates - offset
    return np.where(np.abs(distances) <= _ROUNDING * np.abs(offset), 0.0, distances)


def _recency(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """log(1 + days) from moments of the last positive events to times, NaN where there is none."""
    days = (times - moments.astype(np.float64)) / MICROSECONDS_PER_DAY
    return np.where(moments == NEVER, np.nan, np.log1p(np.maximum(days, 0.0)))


def window_suffix(window: float | None) -> str:
    """End of an output's name: nothing for all of the past, `_7d`, `_0p5d`."""
    return "" if window is None else f"_{window:.15g}d".replace(".", "p")


KIND = FeatureKind(CounterFeature, CounterEncoder)
