"""Base classes of feature encoders, which are fitted to a log and then turn rows into model inputs."""

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
# Results of N rows by name, either (N,) float32 numbers or lists of ids.
LookupResults = Mapping[str, np.ndarray | DedupedRagged]


@dataclass(frozen=True)
class Inputs:
    """Model inputs of N rows.

    Attributes:
        ids: (N,) int64 ids or `Ragged` lists of ids by input name.
        dense: (N,) float32 values by input name.
        numbers: Pairs of (N,) float32 or float64 values that are not standardized yet, and their statistics.
    """

    ids: dict[str, np.ndarray | Ragged] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: list[tuple[np.ndarray, DenseNumber]] = field(default_factory=list)

    def add(self, inputs: Self) -> None:
        """Add the inputs of another feature."""
        self.ids.update(inputs.ids)
        self.dense.update(inputs.dense)
        self.numbers.extend(inputs.numbers)

    def standardized(self) -> "Inputs":
        """Return the same inputs with `numbers` standardized and moved to `dense`."""
        if not self.numbers:
            return self
        return Inputs(self.ids, self.dense | standardize(self.numbers))


@dataclass(frozen=True)
class State:
    """Fitted state of an encoder as plain data (JSON values and Arrow tables)."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """Inputs that an encoder writes.

    Attributes:
        tables: Embedding tables that the encoder owns.
        ids: Name, table and `is_list` (see `IdInput`) of each id input.
        dense: Dense inputs.
    """

    tables: tuple[TableSpec, ...] = ()
    ids: tuple[tuple[str, str, bool], ...] = ()
    dense: tuple[DenseInput, ...] = ()


@dataclass(frozen=True)
class EncoderContext:
    """Objects that the encoders of a pipeline share.

    Attributes:
        schema: Schema of the pipeline.
        vocabularies: Vocabularies by the name of the id feature that owns them.
    """

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]


class Encoder(ABC):
    """A feature that is fitted to a log and then encodes rows from any source.

    Attributes:
        counts: Statistics that `partial_fit` collects, such as `IdCounts`. Workers collect them from parts of a log
            and merge them in any order. None if the encoder needs none or uses another feature's vocabulary.
    """

    counts: Any = None

    def __init__(self, name: str, feature: Any, context: EncoderContext) -> None:
        """Create an encoder that is not fitted.

        Args:
            name: Name of the feature.
            feature: Settings of the feature.
            context: Objects that the encoders of the pipeline share.
        """
        self.name, self.feature = name, feature

    @abstractmethod
    def input_spec(self) -> InputSpec:
        """Return the inputs that `encode` writes."""

    @abstractmethod
    def encode(self, rows: LogRows) -> Inputs:
        """Return the model inputs of N rows."""

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:  # noqa: B027
        """Add training rows to `counts`.

        Args:
            rows: Training rows.
            label_cutoff: Time in microseconds. Labels that become available later don't count.
        """

    def finish_fit(self) -> None:  # noqa: B027
        """Compute the vocabulary, or the mean and standard deviation, from `counts`."""

    def state(self) -> State:
        """Return the fitted state."""
        return State()

    def restore(self, state: State) -> None:  # noqa: B027
        """Load the fitted `state` of an encoder with the same settings."""

    def max_tables(self) -> tuple[TableSpec, ...] | None:
        """Return the tables of `input_spec` at the largest size that a log can cause, None without a limit."""
        return self.input_spec().tables

    def column_types(self) -> Mapping[str, pa.DataType]:
        """Return the types that columns of a request must have, where fitting decides on one type (such as int64)."""
        return {}

    def example_value(self, use: ColumnUse) -> Any:
        """Return a typical value for an example request of the column that the feature reads as `use`, or None."""
        return None


class NumberEncoder(Encoder):
    """A number that is standardized. The mean and the standard deviation are the fitted state."""

    suffix = ""
    """Text after the feature's name in the name of the input."""

    def __init__(self, name: str, feature: Any, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.number = DenseNumber(name + self.suffix)
        self.counts = self.number.histogram

    @abstractmethod
    def values(self, rows: LogRows) -> np.ndarray:
        """Return the numbers in N rows, shape (N,) or (N, numbers per row), NaN if missing."""

    def numbers_to_fit(self, rows: LogRows) -> np.ndarray:
        """Return the numbers in training rows from which the mean and standard deviation are computed."""
        return self.values(rows)

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Add the numbers of training rows to the histogram.

        Args:
            rows: Training rows.
            label_cutoff: Not used.
        """
        self.number.histogram.add(self.numbers_to_fit(rows).ravel())

    def finish_fit(self) -> None:
        self.number.finish_fit()

    def state(self) -> State:
        return State(asdict(self.number.standardizer))

    def restore(self, state: State) -> None:
        self.number.standardizer = Standardizer(**state.values)


class PointInTimeEncoder(Encoder, Generic[StoreType]):
    """A feature of earlier events. A row sees only the events that were available before its request.

    Attributes:
        source: Name of the event log that the feature reads, None for the interaction log.
        task: Task that provides the labels.
        label_delay_us: Microseconds until a label is available.
        key_columns: Columns whose values form the key. A row sees the events with the same key.
        label: Name of the task whose labels turn rows of the interaction log into events, None without labels. Such a
            row is both a lookup and an event, so workers send it once, as a lookup with a label.
        numbers: Means and standard deviations of the results, by result name.
        store: Events that this process can look up.
    """

    label: str | None = None

    def __init__(self, name: str, feature: Any, context: EncoderContext, key_columns: tuple[str, ...]) -> None:
        """Create an encoder without events.

        Args:
            name: Name of the feature.
            feature: Settings of the feature.
            context: Objects that the encoders of the pipeline share.
            key_columns: Columns whose values form the key.
        """
        super().__init__(name, feature, context)
        self.key_columns, self.source = key_columns, feature.events
        # Every row of an event log counts as a positive row of the task `EVENT_TASK`.
        self.task = EVENT_TASK if feature.task is None else context.schema.tasks[feature.task]
        self.label_delay_us = label_delay(self.task, context.schema)
        self.numbers: dict[str, DenseNumber] = {}
        self.store = self.empty()

    @abstractmethod
    def empty(self) -> StoreType:
        """Return an event store without events."""

    @abstractmethod
    def events(self, rows: LogRows) -> pa.Table:
        """Return a table of events with key (uint64), available_at (int64 microseconds) and the kind's own columns."""

    def labels(self, rows: LogRows) -> np.ndarray:
        """Return the labels of the task `label`, shape (N,)."""
        raise AssertionError(f"'{self.name}' has no labels")

    def events_from_labels(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """Return the events of N rows in the order of the rows, without rows that are no events.

        Args:
            key: (N,) uint64 keys.
            times: (N,) int64 request times in microseconds.
            labels: (N,) values that `labels` returned.
        """
        raise AssertionError(f"'{self.name}' has no labels")

    @abstractmethod
    def extended(self, store: StoreType, events: pa.Table, is_sorted: bool = False) -> StoreType:
        """Return a store with additional events.

        Args:
            store: Store to extend. It is not modified.
            events: Table that `events` returned.
            is_sorted: Whether the events are sorted by key and `available_at`.
        """

    @abstractmethod
    def compacted(self, store: StoreType, moment: int) -> StoreType:
        """Return a store without the events that requests from `moment` on can't see.

        Args:
            store: Store to reduce. It is not modified.
            moment: Earliest time of later requests in microseconds.
        """

    @abstractmethod
    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        """Return the columns by which a request may send values of this feature, instead of a lookup in `store`.

        Returns:
            Name of each value that the feature computes -> how its column is read, and the column's Arrow type (None
            if unknown).
        """

    @abstractmethod
    def distinct_results(self, store: StoreType, lookups: Lookups) -> Mapping[str, np.ndarray | Ragged]:
        """Return (D,) float64 values or `Ragged` lists by result name for D distinct lookups.

        Args:
            store: Store of this kind of feature.
            lookups: Distinct lookups.
        """

    @abstractmethod
    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """Return the results of N rows by name for people to read, from columns of the request or from the store.

        Results are (N,) float64 before standardization (NaN if missing), or (N,) objects: lists of the log's ids or
        None.
        """

    def to_exchange_dtype(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return results as float32, the type that workers exchange and that encoded rows have.

        Args:
            name: Name of the result.
            values: (N,) values.
        """
        return values.astype(np.float32)

    def partial_fit_results(self, results: LookupResults) -> None:
        """Add the `results` of training rows to the histograms of `numbers`."""
        for name, number in self.numbers.items():
            values = results[name]
            assert isinstance(values, np.ndarray)
            number.histogram.add(values)

    def look_up(self, rows: LogRows) -> LookupResults:
        """Return the results that a worker attached to the rows, or else look them up in `store`."""
        names = self.result_columns().keys()
        if rows.results.keys() >= names:
            return {name: rows.results[name] for name in names}
        return self.results(self.store, rows.lookups(self.key_columns))

    def results(self, store: StoreType, lookups: Lookups) -> LookupResults:
        """Return the results of N rows by name.

        Args:
            store: Store of this kind of feature.
            lookups: Lookups of the rows.
        """
        return {
            name: DedupedRagged(result, lookups.inverse)
            if isinstance(result, Ragged)
            else self.to_exchange_dtype(name, result)[lookups.inverse]
            for name, result in self.distinct_results(store, lookups).items()
        }


@dataclass(frozen=True)
class FeatureKind:
    """A kind of feature. Each file in `mmoe_rec.features.kinds` ends with the definition of its kind.

    Attributes:
        feature: Class of the settings.
        encoder: Class of the encoder.
    """

    feature: type[Feature]
    encoder: type[Encoder]
