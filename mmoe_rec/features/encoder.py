"""What every kind of feature has in common: it learns from a log, then turns rows into model inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

from mmoe_rec.features.layout import DenseInput, Table
from mmoe_rec.features.numbers import DenseNumber, Standardiser, standardise
from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.point_in_time.arrays import Ragged, SharedRagged
from mmoe_rec.point_in_time.join import LookUps, Memory
from mmoe_rec.settings.log_columns import EVENT, Use
from mmoe_rec.settings.schema import Feature, Schema

MemoryKind = TypeVar("MemoryKind", bound=Memory)
# Of N rows, by name: (N,) float32, the precision in which they are exchanged and encoded, or lists of ids.
Results = Mapping[str, np.ndarray | SharedRagged]


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

    def standardised(self) -> "Inputs":
        """The same with all numbers among the dense inputs."""
        if not self.numbers:
            return self
        return Inputs(self.ids, self.dense | standardise(self.numbers))


@dataclass(frozen=True)
class State:
    """What an encoder was fitted with, as plain data: JSON values and Arrow tables."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """Names of an encoder's inputs: its own embedding table if it has one, (name, table, many) of its id inputs,
    and its dense inputs."""

    tables: tuple[Table, ...] = ()
    ids: tuple[tuple[str, str, bool], ...] = ()
    dense: tuple[DenseInput, ...] = ()


@dataclass(frozen=True)
class Shared:
    """What the encoders of a pipeline have in common. vocabularies: by the names of the id features that own them."""

    schema: Schema
    vocabularies: Mapping[str, Vocabulary]


class Encoder(ABC):
    """A feature that is fitted to a log and then encodes rows of any origin.

    counts: what it is fitted from, such as `IdCounts`, a partial fit: those of parts of a log, merged in any order, are
    that of the whole; None where it shares another feature's vocabulary or learns nothing.
    """

    counts: Any = None

    def __init__(self, name: str, feature: Any, shared: Shared) -> None:
        self.name, self.feature = name, feature

    @abstractmethod
    def outline(self) -> Outline:
        """The inputs that `encode` gives."""

    @abstractmethod
    def encode(self, rows: LogRows) -> Inputs:
        """Inputs of N rows."""

    def learn(self, rows: LogRows, known_by: int) -> None:  # noqa: B027
        """Adds training rows to `counts`. Labels that become known later than `known_by` (microseconds) don't count."""

    def finish(self) -> None:  # noqa: B027
        """Makes vocabulary or statistics from `counts`."""

    def state(self) -> State:
        """What was fitted."""
        return State()

    def restore(self, state: State) -> None:  # noqa: B027
        """Takes what another encoder of the same settings was fitted with."""

    def largest_tables(self) -> tuple[Table, ...] | None:
        """The tables of `outline` with the most rows that any log can give them; None if nothing bounds them."""
        return self.outline().tables

    def column_types(self) -> Mapping[str, pa.DataType]:
        """Types in which a request must give columns, where fitting narrows them further than `reads`."""
        return {}

    def typical(self, use: Use) -> Any:
        """A typical value of the feature's column, which is read as `use`, for an example; None where there is none."""
        return None


class NumberEncoder(Encoder):
    """A feature that is standardised with one mean and deviation, all that it learns. suffix: of its input's name."""

    suffix = ""

    def __init__(self, name: str, feature: Any, shared: Shared) -> None:
        super().__init__(name, feature, shared)
        self.number = DenseNumber(name + self.suffix)
        self.counts = self.number.histogram

    @abstractmethod
    def values(self, rows: LogRows) -> np.ndarray:
        """The numbers of rows, any number a row, NaN where missing."""

    def learn(self, rows: LogRows, known_by: int) -> None:
        self.number.histogram.add(self.values(rows).ravel())

    def finish(self) -> None:
        self.number.finish()

    def state(self) -> State:
        return State(asdict(self.number.standardiser))

    def restore(self, state: State) -> None:
        self.number.standardiser = Standardiser(**state.values)


class MemoryEncoder(Encoder, Generic[MemoryKind]):
    """A feature that looks up, for each row, what was known of earlier events before its request.

    source: name of the log of events that it remembers, None for the interaction log itself; task: whose labels;
    matures_after: microseconds after which a label is known; by: the columns that make the key; label: the task whose
    labels make rows of the interaction log events, if any: they are sent once, with the label, as look-ups; numbers:
    results that are standardised; memory: the events, where they are held in this process.
    """

    label: str | None = None

    def __init__(self, name: str, feature: Any, shared: Shared, by: tuple[str, ...]) -> None:
        super().__init__(name, feature, shared)
        self.by, self.source = by, feature.events
        # Every row of a log of events counts as one of the task `EVENT`.
        self.task = EVENT if feature.task is None else shared.schema.tasks[feature.task]
        self.matures_after = maturity(self.task, shared.schema)
        self.numbers: dict[str, DenseNumber] = {}
        self.memory = self.empty()

    @abstractmethod
    def empty(self) -> MemoryKind:
        """A memory of nothing."""

    @abstractmethod
    def events(self, rows: LogRows) -> pa.Table:
        """Those of the rows that later requests may ask for: key (uint64), known (int64 microseconds), value."""

    def labels(self, rows: LogRows) -> np.ndarray:
        """(N,) labels of the task `label`."""
        raise AssertionError(f"'{self.name}' has no labels")

    def labelled(self, key: np.ndarray, times: np.ndarray, labels: np.ndarray) -> pa.Table:
        """The events of rows by their keys, request times and `labels`, in their order."""
        raise AssertionError(f"'{self.name}' has no labels")

    @abstractmethod
    def extended(self, memory: MemoryKind, events: pa.Table, in_order: bool = False) -> MemoryKind:
        """A memory with further events, as `events` gives them; `in_order`: sorted by key and known time."""

    @abstractmethod
    def compacted(self, memory: MemoryKind, moment: int) -> MemoryKind:
        """What requests at `moment` (microseconds) or later can ask of a memory."""

    @abstractmethod
    def result_columns(self) -> Mapping[str, tuple[Use, pa.DataType | None]]:
        """Names of results, under which a request may give them instead: how each is read, and its type if known."""

    @abstractmethod
    def distinct_results(self, memory: MemoryKind, asked: LookUps) -> Mapping[str, np.ndarray | Ragged]:
        """What a memory of this kind knew at D distinct look-ups: name -> (D,) float64 or `Ragged`."""

    @abstractmethod
    def explain(self, rows: LogRows) -> Mapping[str, np.ndarray]:
        """What rows were given, or the memory says of them, in words of the log.

        Result -> (N,) float64 before it is standardised, NaN where missing; or (N,) objects, lists of ids or None.
        """

    def exchanged(self, name: str, values: np.ndarray) -> np.ndarray:
        """(N,) float32 results as they are exchanged and encoded."""
        return values.astype(np.float32)

    def learn_results(self, results: Results) -> None:
        """Adds the results of training rows to the histograms of `numbers`."""
        for name, number in self.numbers.items():
            values = results[name]
            assert isinstance(values, np.ndarray)
            number.histogram.add(values)

    def look_up(self, rows: LogRows) -> Results:
        """The rows' results: those that came with them, or from this process's memory."""
        names = self.result_columns().keys()
        if rows.results.keys() >= names:
            return {name: rows.results[name] for name in names}
        return self.results(self.memory, rows.look_ups(self.by))

    def results(self, memory: MemoryKind, asked: LookUps) -> Results:
        """What a memory of this kind knew at the look-ups of N rows."""
        return {
            name: SharedRagged(each, asked.number)
            if isinstance(each, Ragged)
            else self.exchanged(name, each)[asked.number]
            for name, each in self.distinct_results(memory, asked).items()
        }


@dataclass(frozen=True)
class Kind:
    """A kind is one file of `mmoe_rec.features.kinds`, which ends with its `Kind`.

    feature: its settings, with the columns that they read and what the health report says; encoder: its partial fit,
    inputs, sizes, state, and what a request may give.
    """

    feature: type[Feature]
    encoder: type[Encoder]
