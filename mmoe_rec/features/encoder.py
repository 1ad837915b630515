"""What every kind of feature has in common: it learns from a log, then turns rows into model inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import DenseInput, TableSpec
from mmoe_rec.features.numeric_statistics import DenseNumber, Standardizer, standardize
from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.log.rows import LogRows, label_delay
from mmoe_rec.point_in_time.arrays import DedupedRagged, Ragged
from mmoe_rec.point_in_time.join import EventStore, Lookups
from mmoe_rec.settings.log_columns import EVENT_TASK, ColumnUse
from mmoe_rec.settings.schema import Feature, Schema

StoreType = TypeVar("StoreType", bound=EventStore)
# Of N rows, by name: (N,) float32, the precision in which they are exchanged and encoded, or lists of ids.
LookupResults = Mapping[str, np.ndarray | DedupedRagged]


@dataclass(frozen=True)
class Inputs:
    """Model inputs of N rows.

    ids: name -> (N,) int64 or `Ragged`; dense: name -> (N,) float32; numbers: (N,) float32 or float64 that are still to
    be standardised, and what does it.
    """

    ids: dict[str, np.ndarray | Ragged] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: list[tuple[np.ndarray, DenseNumber]] = field(default_factory=list)

    def add(self, other: Self) -> None:
        self.ids.update(other.ids)
        self.dense.update(other.dense)
        self.numbers.extend(other.numbers)

    def standardized(self) -> "Inputs":
        """The same with all numbers among the dense inputs."""
        if not self.numbers:
            return self
        return Inputs(self.ids, self.dense | standardize(self.numbers))


@dataclass(frozen=True)
class State:
    """What an encoder was fitted with, as plain data: JSON values and Arrow tables."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """Names of an encoder's inputs: its own embedding table if it has one, (name, table, many) of its id inputs,
    and its dense inputs."""

    tables: tuple[TableSpec, ...] = ()
    ids: tuple[tuple[str, str, bool], ...] = ()
    dense: tuple[DenseInput, ...] = ()


@dataclass(frozen=True)
class EncoderContext:
    """What the encoders of a pipeline have in common. vocabularies: by the names of the id features that own them."""

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]


class Encoder(ABC):
    """A feature that is fitted to a log and then encodes rows of any origin.

    counts: what it is fitted from, such as `IdCounts`, a partial fit: those of parts of a log, merged in any order, are
    that of the whole; None where it shares another feature's vocabulary or learns nothing.
    """

    counts: Any = None

    def __init__(self, name: str, feature: Any, shared: EncoderContext) -> None:
        self.name, self.feature = name, feature

    @abstractmethod
    def input_spec(self) -> InputSpec:
        """The inputs that `encode` gives."""

    @abstractmethod
    def encode(self, rows: LogRows) -> Inputs:
        """Inputs of N rows."""

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:  # noqa: B027
        """Adds training rows to `counts`. Labels that become known later than `label_cutoff` (microseconds) don't
        count."""

    def finish_fit(self) -> None:  # noqa: B027
        """Makes vocabulary or statistics from `counts`."""

    def state(self) -> State:
        """What was fitted."""
        return State()

    def restore(self, state: State) -> None:  # noqa: B027
        """Takes what another encoder of the same settings was fitted with."""

    def max_tables(self) -> tuple[TableSpec, ...] | None:
        """The tables of `input_spec` with the most rows that any log can give them; None if nothing bounds them."""
        return self.input_spec().tables

    def column_types(self) -> Mapping[str, pa.DataType]:
        """Types in which a request must give columns, where fitting narrows them further than `reads`."""
        return {}

    def example_value(self, use: ColumnUse) -> Any:
        """A typical value of the feature's column, which is read as `use`, for an example; None where there is none."""
        return None


class NumberEncoder(Encoder):
    """A feature that is standardised with one mean and deviation, all that it learns. suffix: of its input's name."""

    suffix = ""

    def __init__(self, name: str, feature: Any, shared: EncoderContext) -> None:
        super().__init__(name, feature, shared)
        self.number = DenseNumber(name + self.suffix)
        self.counts = self.number.histogram

    @abstractmethod
    def values(self, rows: LogRows) -> np.ndarray:
        """The numbers of rows, any number a row, NaN where missing."""

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        self.number.histogram.add(self.values(rows).ravel())

    def finish_fit(self) -> None:
        self.number.finish_fit()

    def state(self) -> State:
        return State(asdict(self.number.standardizer))

    def restore(self, state: State) -> None:
        self.number.standardizer = Standardizer(**state.values)


class PointInTimeEncoder(Encoder, Generic[StoreType]):
    """A feature that looks up, for each row, what was known of earlier events before its request.

    source: name of the log of events that it remembers, None for the interaction log itself; task: whose labels;
    label_delay_us: microseconds after which a label is known; by: the columns that make the key; label: the task whose
    labels make rows of the interaction log events, if any: they are sent once, with the label, as look-ups; numbers:
    results that are standardised; memory: the events, where they are held in this process.
    """

    label: str | None = None

    def __init__(self, name: str, feature: Any, shared: EncoderContext, key_columns: tuple[str, ...]) -> None:
        super().__init__(name, feature, shared)
        self.key_columns, self.source = key_columns, feature.events
        # Every row of a log of events counts as one of the task `EVENT_TASK`.
        self.task = EVENT_TASK if feature.task is None else shared.schema.tasks[feature.task]
        self.label_delay_us = label_delay(self.task, shared.schema)
        self.numbers: dict[str, DenseNumber] = {}
        self.store = self.empty()

    @abstractmethod
    def empty(self) -> StoreType:
        """A memory of nothing."""

    @abstractmethod
    def events(self, rows: LogRows) -> pa.Table:
        """Those of the rows that later requests may ask for: key (uint64), known (int64 microseconds), value."""

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels of the task `label`."""
        raise AssertionError(f"'{self.name}' has no labels")

    def events_from_labels(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The events of rows by their keys, request times and `labels`, in their order."""
        raise AssertionError(f"'{self.name}' has no labels")

    @abstractmethod
    def extended(self, store: StoreType, events: pa.Table, is_sorted: bool = False) -> StoreType:
        """A memory with further events, as `events` gives them; `is_sorted`: sorted by key and known time."""

    @abstractmethod
    def compacted(self, store: StoreType, moment: int) -> StoreType:
        """What requests at `moment` (microseconds) or later can ask of a memory."""

    @abstractmethod
    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        """Names of results, under which a request may give them instead: how each is read, and its type if known."""

    @abstractmethod
    def distinct_results(self, store: StoreType, lookups: Lookups) -> Mapping[str, np.ndarray | Ragged]:
        """What a memory of this kind knew at D distinct look-ups: name -> (D,) float64 or `Ragged`."""

    @abstractmethod
    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """What rows were given, or the memory says of them, in words of the log.

        Result -> (N,) float64 before it is standardised, NaN where missing; or (N,) objects, lists of ids or None.
        """

    def to_exchange_dtype(self, name: str, values: np.ndarray) -> np.ndarray:
        """(N,) float32 results as they are exchanged and encoded."""
        return values.astype(np.float32)

    def partial_fit_results(self, results: LookupResults) -> None:
        """Adds the results of training rows to the histograms of `numbers`."""
        for name, number in self.numbers.items():
            values = results[name]
            assert isinstance(values, np.ndarray)
            number.histogram.add(values)

    def look_up(self, rows: LogRows) -> LookupResults:
        """The rows' results: those that came with them, or from this process's memory."""
        names = self.result_columns().keys()
        if rows.results.keys() >= names:
            return {name: rows.results[name] for name in names}
        return self.results(self.store, rows.lookups(self.key_columns))

    def results(self, store: StoreType, lookups: Lookups) -> LookupResults:
        """What a memory of this kind knew at the look-ups of N rows."""
        return {
            name: DedupedRagged(each, lookups.inverse)
            if isinstance(each, Ragged)
            else self.to_exchange_dtype(name, each)[lookups.inverse]
            for name, each in self.distinct_results(store, lookups).items()
        }


@dataclass(frozen=True)
class FeatureKind:
    """A kind is one file of `mmoe_rec.features.kinds`, which ends with its `FeatureKind`.

    feature: its settings, with the columns that they read and what the health report says; encoder: its partial fit,
    inputs, sizes, state, and what a request may give.
    """

    feature: type[Feature]
    encoder: type[Encoder]
