"""What every kind of feature has in common: it learns from a log, then turns rows into model inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.features.encoded import Ragged
from mmoe_rec.features.layout import DenseInput, Table
from mmoe_rec.features.rows import LogRows


@dataclass(frozen=True)
class Inputs:
    """Model inputs of N rows. ids: name -> (N,) int64 or `Ragged`; dense: name -> (N,) float32."""

    ids: dict[str, np.ndarray | Ragged] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What an encoder has learnt, as plain data: JSON values and Arrow tables."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """Names of an encoder's inputs: its own embedding table if it has one, (name, table, many) of its id inputs,
    and its dense inputs."""

    tables: tuple[Table, ...] = ()
    ids: tuple[tuple[str, str, bool], ...] = ()
    dense: tuple[DenseInput, ...] = ()


class Encoder:
    """A feature that is fitted to a log and then encodes rows of any origin; what a kind has no use for does nothing.

    source: name of the log of events that the feature remembers, None for the interaction log itself.
    """

    source: str | None = None

    def learn(self, rows: LogRows, known_by: int) -> None:
        """First pass, over training rows: vocabularies, means, quantiles. Later labels than `known_by` don't count."""

    def finish(self) -> None:
        """Called once after the first pass."""

    def remember(self, rows: LogRows) -> None:
        """First pass, over the whole log that the feature remembers: events that later requests may ask for."""

    def finish_memory(self) -> None:
        """Called once after the whole log was remembered, when every vocabulary is complete."""

    def learn_numbers(self, rows: LogRows) -> None:
        """Second pass, over training rows, for statistics of inputs that the first pass makes possible."""

    def finish_numbers(self) -> None:
        """Called once after the second pass."""

    def outline(self) -> Outline:
        """The inputs that `encode` gives."""
        return Outline()

    def encode(self, rows: LogRows) -> Inputs:
        """Inputs of N rows."""
        return Inputs()

    def state(self) -> State:
        """What was learnt."""
        return State()

    def restore(self, state: State) -> None:
        """Takes what another encoder of the same settings has learnt."""

    def latest(self, moment: int) -> State:
        """The part of the state that requests at `moment` (microseconds) or later can ask for."""
        return self.state()
