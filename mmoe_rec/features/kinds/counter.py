"""The kind `counter`: trailing counts and smoothed rates of a task's label per key, point in time."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Inputs, Kind, MemoryEncoder, Outline, Shared, State
from mmoe_rec.features.numbers import DenseNumber, NumberHistogram, Standardiser
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows
from mmoe_rec.point_in_time.counters import MOST, CounterMemory, SeenTotals, round_labels
from mmoe_rec.point_in_time.join import NEVER, LookUps, known_at
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Days, Meaning, Once, Remembering, Schema

_FOREVER = np.iinfo(np.int64).max
_ROUNDING = 1e-12


class CounterFeature(Remembering):
    """Trailing statistics of a task's label, or of events, over all earlier rows with the same key, point in time."""

    kind: Literal["counter"]
    by: Annotated[tuple[str, ...], Once] = Field(
        min_length=1, description="columns that form the key, such as [user_id, brand]"
    )
    outputs: Annotated[tuple[Literal["positives", "rows", "rate", "recency"], ...], Once] = Field(
        ("positives", "rate", "recency"),
        description="positives: log(1 + sum of labels); rows: log(1 + rows); rate: smoothed mean label, not of events; "
        "recency: log(1 + days since the last row with a positive label became known), missing if never",
    )
    window_days: Annotated[tuple[Days | None, ...], Once] = Field(
        (None,), min_length=1, description="trailing windows; null is all of the past"
    )
    smoothing: float = Field(20.0, gt=0, description="rows of the overall mean that are mixed into a rate")

    @model_validator(mode="before")
    @classmethod
    def _outputs_of_events(cls, values: Any) -> Any:
        """Events have no labels, so their default has no rate."""
        if isinstance(values, dict) and values.get("events") is not None and "outputs" not in values:
            return {**values, "outputs": ("positives", "recency")}
        return values

    @model_validator(mode="after")
    def _rate_has_labels(self) -> Self:
        if self.events is not None and "rate" in self.outputs:
            raise ValueError("events have no rate; set outputs, say, to [positives, recency]")
        return self

    @field_validator("window_days")
    @classmethod
    def _each_named(cls, windows: tuple[float | None, ...]) -> tuple[float | None, ...]:
        names: dict[str, float] = {}
        for window in filter(None, windows):
            if (other := names.setdefault(f"{window:g}", window)) != window:
                raise ValueError(f"lists {other!r} and {window!r}, but windows are named by their first six digits")
        return windows

    def reads(self) -> Mapping[str, Use]:
        return dict.fromkeys(self.by, "key")

    def event_reads(self, schema: Schema) -> Mapping[str, Use]:
        return self.reads()

    def meaning(self, schema: Schema) -> Meaning:
        return Meaning(self.by)


class CounterEncoder(MemoryEncoder[CounterMemory]):
    """Statistics over all earlier rows with the same key whose label was known at the request."""

    feature: CounterFeature

    def __init__(self, name: str, feature: CounterFeature, shared: Shared) -> None:
        super().__init__(name, feature, shared, feature.by)
        self.label = feature.task
        self.prior = 0.0
        self.counts = NumberHistogram()
        self._totals = [output for output in feature.outputs if output != "recency"]
        # The end of an output's name -> microseconds; None is all of the past.
        self._windows = {
            suffix_of(days): None if days is None else round(days * MICROSECONDS_PER_DAY)
            for days in feature.window_days
        }
        names = [f"{name}_{output}{suffix}" for suffix in self._windows for output in self._totals]
        if "recency" in feature.outputs:
            names.append(f"{name}_recency")
        self.numbers = {each: DenseNumber(each) for each in names}

    @property
    def windows(self) -> list[int]:
        """Microseconds of each window that does not go back forever."""
        return [window for window in self._windows.values() if window is not None]

    @property
    def has_fractions(self) -> bool:
        """Whether labels may be other than whole numbers."""
        return self.source is None and not self.task.kind.is_binary

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Adds the training rows' labels to the overall mean."""
        if self.source is None:
            self.counts.add(round_labels(rows.labels(self.task, known_by)))

    def finish(self) -> None:
        self.prior = self.counts.standardiser().mean

    def empty(self) -> CounterMemory:
        recency = "recency" in self.feature.outputs
        return CounterMemory.empty(self.source is None, recency)

    def events(self, rows: LogRows) -> pa.Table:
        """The rows of a log of events. (Those of the interaction log come as look-ups with their labels.)"""
        key = rows.hashes(self.by)
        if self.source is None:
            return self.labelled(key, rows.times(), self.labels(rows))
        return pa.table({"key": key, "known": known_at(rows.times(), self.matures_after)})

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels: int8 of a binary task, -1 where unobserved, or float64, NaN where unobserved."""
        labels = rows.labels(self.task, _FOREVER)
        return labels if self.has_fractions else np.where(np.isnan(labels), -1, labels).astype(np.int8)

    def labelled(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The rows whose label is observed; each becomes visible only when its label is known."""
        observed = ~np.isnan(labels) if self.has_fractions else labels >= 0
        if not observed.all():
            key, times, labels = key[observed], times[observed], labels[observed]
        return pa.table({"key": key, "known": known_at(times, self.matures_after), "label": labels})

    def extended(self, memory: CounterMemory, events: pa.Table, in_order: bool = False) -> CounterMemory:
        """Raises UserError where a label or a sum of labels is out of range."""
        label = None if self.label is None else events["label"].to_numpy()
        try:
            return memory.extended(events["key"].to_numpy(), events["known"].to_numpy(), label, in_order)
        except OverflowError:
            raise UserError(
                f"counter '{self.name}' sums labels of column '{self.task.label}' beyond {MOST:.1e}: write that "
                "column in a larger unit"
            ) from None

    def compacted(self, memory: CounterMemory, moment: int) -> CounterMemory:
        """The totals within the longest window before `moment`, and what comes later; of each key also its total as of
        `moment`, unless only windows are asked for."""
        forever = None in self.feature.window_days or "recency" in self.feature.outputs
        return memory.compacted(moment, max(self.windows, default=0), forever)

    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """The statistics under their names, such as `user_product_positives`."""
        return dict.fromkeys(self.numbers, ("number", pa.float64()))

    def distinct_results(self, memory: CounterMemory, asked: LookUps) -> dict[str, np.ndarray]:
        found, result = SeenTotals(memory, asked), dict[str, np.ndarray]()
        for suffix, window in self._windows.items() if self._totals else ():
            count, label_sum = found.totals(window)
            for output in self._totals:
                value = _statistic(output, count, label_sum, self.feature.smoothing, self.prior)
                result[f"{self.name}_{output}{suffix}"] = value
        if "recency" in self.feature.outputs:
            result[f"{self.name}_recency"] = _recency(found.time, found.last_positive())
        return result

    def exchanged(self, name: str, values: np.ndarray) -> np.ndarray:
        """The same as float32; rates of a regression, which it would not tell apart, as distances from the mean."""
        return self._distances(name, values).astype(np.float32)

    def _distances(self, name: str, values: np.ndarray) -> np.ndarray:
        return _distances(values, self.offset) if name.startswith(f"{self.name}_rate") else values

    @property
    def offset(self) -> float:
        """The number that rates are told apart from: the mean of a regression, 0 of a binary task."""
        return self.prior if self.has_fractions else 0.0

    def outline(self) -> Outline:
        return Outline(dense=tuple(each for number in self.numbers.values() for each in number.inputs()))

    def encode(self, rows: LogRows) -> Inputs:
        """The standardised statistics. A column with the name of one wins."""
        given = {name: self._distances(name, rows.numbers(name)) for name in self.numbers if rows.has(name)}
        results = given if len(given) == len(self.numbers) else {**self.look_up(rows), **given}
        return Inputs(numbers=[(np.asarray(results[name]), number) for name, number in self.numbers.items()])

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """The statistics before they are standardised. A column with the name of one wins."""
        asked = rows.look_ups(self.by)
        results = self.distinct_results(self.memory, asked)
        return {
            name: rows.numbers(name) if rows.has(name) else each.astype(np.float64)[asked.number]
            for name, each in results.items()
        }

    def state(self) -> State:
        numbers = {name: asdict(number.standardiser) for name, number in self.numbers.items()}
        return State({"prior": self.prior, "numbers": numbers})

    def restore(self, state: State) -> None:
        self.prior = state.values["prior"]
        for name, values in state.values["numbers"].items():
            self.numbers[name].standardiser = Standardiser(**values)


def _statistic(output: str, rows: np.ndarray, labels: np.ndarray, smoothing: float, prior: float) -> np.ndarray:
    """An output of totals: numbers of rows and sums of labels."""
    match output:
        case "positives":
            return np.log1p(np.maximum(labels, 0.0))
        case "rows":
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


def suffix_of(window: float | None) -> str:
    """End of an output's name: nothing for all of the past, `_7d`, `_0p5d`."""
    return "" if window is None else f"_{window:g}d".replace(".", "p")


KIND = Kind(CounterFeature, CounterFeature, CounterEncoder)
