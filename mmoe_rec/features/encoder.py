"""Base classes of feature encoders, which are fitted to a log and then turn rows into model inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
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
# Results of N rows by name, either (N,) float32 statistics or lists of table rows.
LookupResults = Mapping[str, np.ndarray | DedupedRagged]


@dataclass(frozen=True)
class Inputs:
    """Model inputs of N rows.

    Attributes:
        ids: (N,) int64 rows of an embedding table, or `Ragged` lists of such rows, by input name.
        dense: (N,) float32 values by input name.
        numbers: Pairs of (N,) float32 or float64 values to standardize, and the fitted mean and standard deviation.
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
        """Return the inputs with `numbers` standardized and moved to `dense`."""
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
        counts: Statistics that `partial_fit` collects, such as `IdCounts`, by the end of their name. The end is "" if
            there is one statistic. Workers collect statistics from parts of a log and merge them in any order. Empty
            if the encoder needs no statistics or uses another feature's vocabulary.
    """

    counts: Mapping[str, Any] = MappingProxyType({})

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
        """Return the tables of `input_spec` with the most rows that any log can give them, None without a limit."""
        return self.input_spec().tables

    def example_value(self, use: ColumnUse) -> Any:
        """Return a typical value of the feature's only column for an example request, None if unknown.

        Args:
            use: Type that the column is read as, which another feature may decide.
        """
        return None


class NumberEncoder(Encoder):
    """A feature of one or more numbers that are standardized with the same fitted mean and standard deviation."""

    suffix = ""
    """Text after the feature's name in the name of the input."""

    def __init__(self, name: str, feature: Any, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.number = DenseNumber(name + self.suffix)
        self.counts = {"": self.number.histogram}

    @abstractmethod
    def values(self, rows: LogRows) -> np.ndarray:
        """Return the numbers in N rows, shape (N,) or (N, numbers per row), NaN if missing."""

    def numbers_to_fit(self, rows: LogRows) -> np.ndarray:
        """Return the numbers of training rows that `partial_fit` counts, by default `values`."""
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


class StatisticsEncoder(Encoder):
    """A feature of several numbers, each standardized with a mean and standard deviation of its own.

    Attributes:
        numbers: Mean and standard deviation of each number, by the name of the number.
    """

    def __init__(self, name: str, feature: Any, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.numbers: dict[str, DenseNumber] = {}

    def input_spec(self) -> InputSpec:
        return InputSpec(dense=tuple(dense for number in self.numbers.values() for dense in number.inputs()))

    def partial_fit_results(self, results: LookupResults) -> None:
        """Count the numbers in `results`, which a build step computed for training rows."""
        for name, number in self.numbers.items():
            values = results[name]
            assert isinstance(values, np.ndarray)
            number.histogram.add(values)

    def finish_fit_results(self) -> None:
        """Compute the mean and standard deviation of each number."""
        for number in self.numbers.values():
            number.finish_fit()

    def state(self) -> State:
        return State({"numbers": {name: asdict(number.standardizer) for name, number in self.numbers.items()}})

    def restore(self, state: State) -> None:
        for name, values in state.values.get("numbers", {}).items():
            self.numbers[name].standardizer = Standardizer(**values)


class PointInTimeEncoder(StatisticsEncoder, Generic[StoreType]):
    """A feature of earlier events, such as a counter. A row sees only the events that were available at its request.

    The values that the feature computes for a row are its results: statistics such as counts, or lists of a history.
    This class encodes statistics. A history overrides these methods.

    Attributes:
        source: Name of the event log that the feature reads, None for the interaction log.
        task: Task that provides the labels, `EVENT_TASK` for an event log.
        label_delay_us: Microseconds from a request until its label is final.
        key_columns: Columns whose values form the key. A row sees the events with the same key.
        label: Name of the task if a lookup and its label are enough to build the event. Workers then send a row once,
            as a lookup with a label. None if workers send lookups and events separately.
        needs_all_keys: Whether a lookup reads events of any key, such as the events of all users. Each worker then gets
            all events.
        store: Event store in which `look_up` searches.
    """

    label: str | None = None
    needs_all_keys = False

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
        self.store = self.empty()

    @abstractmethod
    def empty(self) -> StoreType:
        """Return an event store without events."""

    @abstractmethod
    def events(self, rows: LogRows) -> pa.Table:
        """Return the events in `rows`: key (uint64), available_at (int64 microseconds) and columns of the kind."""

    def labels(self, rows: LogRows) -> np.ndarray:
        """Return the labels of the task `label`, shape (N,)."""
        raise AssertionError(f"'{self.name}' has no labels")

    def events_from_labels(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """Return the events of N rows in the order of the rows. Rows with an unobserved label are no events.

        Args:
            key: (N,) uint64 keys.
            times: (N,) int64 request times in microseconds.
            labels: (N,) values that `labels` returned.
        """
        raise AssertionError(f"'{self.name}' has no labels")

    def keys(self, rows: LogRows) -> np.ndarray:
        """Return the keys of the lookups of N rows, (N,) uint64."""
        return rows.hashes(self.key_columns)

    def lookups(self, rows: LogRows) -> Lookups:
        """Return the lookups of N rows."""
        return rows.lookups(self.key_columns)

    @abstractmethod
    def extended(self, store: StoreType, events: pa.Table, is_sorted: bool = False) -> StoreType:
        """Return a store with additional events.

        Args:
            store: Store to extend. It is not modified.
            events: Table that `events` returned.
            is_sorted: Whether the events are sorted by key and `available_at`.
        """

    def live_level(self, store: StoreType, events: pa.Table) -> StoreType:
        """Return a level of additional events for a store, see `EventStore.levels`.

        Args:
            store: Store with all earlier events and levels.
            events: Table that `events` returned.
        """
        return self.extended(self.empty(), events)

    @abstractmethod
    def compacted(self, store: StoreType, moment: int) -> StoreType:
        """Return a store without the events that requests from `moment` on can't see.

        Args:
            store: Store to reduce. It is not modified.
            moment: Earliest time of later requests in microseconds.
        """

    def result_columns(self) -> Mapping[str, tuple[ColumnUse, pa.DataType | None]]:
        """Return the columns by which a request may send values of this feature, instead of a lookup in `store`.

        Returns:
            Name of each result, such as `user_brand_rate`, which is also the name of the column -> how the column is
            read, and its Arrow type (None if unknown).
        """
        return dict.fromkeys(self.numbers, ("number", pa.float64()))

    @abstractmethod
    def distinct_results(self, store: StoreType, lookups: Lookups) -> Mapping[str, np.ndarray | Ragged]:
        """Return the results of D lookups by name: (D,) float64 statistics, or `Ragged` lists of table rows.

        Args:
            store: Event store to search.
            lookups: D lookups, which several rows can share.
        """

    def encode(self, rows: LogRows) -> Inputs:
        """Return the statistics as `Inputs.numbers`, and add them to `rows.results` for other features.

        A request's column with a statistic's name takes precedence.
        """
        given = {name: self.centered(name, rows.numbers(name)) for name in self.numbers if rows.has_column(name)}
        results = given if len(given) == len(self.numbers) else {**self.look_up(rows), **given}
        rows.results.update(results)
        return Inputs(numbers=[(np.asarray(results[name]), number) for name, number in self.numbers.items()])

    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """Return readable results of N rows by name, from columns of the request, or else from `store`.

        Statistics are (N,) float64 and not standardized, with NaN if missing. Lists are (N,) objects, each a list of
        ids as in the log, or None if it is empty.
        """
        lookups = self.lookups(rows)
        return {
            name: rows.numbers(name)
            if rows.has_column(name)
            else np.asarray(values).astype(np.float64)[lookups.inverse]
            for name, values in self.distinct_results(self.store, lookups).items()
        }

    def centered(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a statistic minus the number that a kind subtracts for precision, by default 0.

        Args:
            name: Name of the result.
            values: (N,) values of the statistic.
        """
        return values

    def look_up(self, rows: LogRows) -> LookupResults:
        """Return the results that a worker attached to the rows, or else look them up in `store`."""
        names = self.result_columns().keys()
        if rows.results.keys() >= names:
            return {name: rows.results[name] for name in names}
        return self.results(self.store, self.lookups(rows))

    def results(self, store: StoreType, lookups: Lookups) -> LookupResults:
        """Return the results of N rows by name. Statistics are `centered`, in float32, the type that workers exchange.

        Args:
            store: Event store to search.
            lookups: Lookups of the rows.
        """
        return {
            name: DedupedRagged(result, lookups.inverse)
            if isinstance(result, Ragged)
            else self.centered(name, result).astype(np.float32)[lookups.inverse]
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
