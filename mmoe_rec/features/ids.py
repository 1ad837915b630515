"""Encoders that end in embedding rows: `id`, `ids` and `cross`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Encoder, Inputs, Outline, State
from mmoe_rec.features.layout import Table
from mmoe_rec.features.vocabulary import IdCounts, Vocabulary
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.lists import Ragged
from mmoe_rec.schema import MAX_TABLE_ROWS, CrossFeature, IdFeature, IdsFeature


class VocabularyOwner:
    """The vocabulary and table of an id feature; other features may share it."""

    def __init__(self, name: str, feature: IdFeature | IdsFeature) -> None:
        self.name = name
        self.feature = feature
        self.counts = IdCounts()
        self.vocabulary = Vocabulary(pa.array([], pa.int64()), feature.oov_buckets)

    def finish(self) -> None:
        """Turns counts into the vocabulary. Raises UserError where it is too large for a table."""
        feature = self.feature
        self.vocabulary = self.counts.vocabulary(feature.min_count, feature.max_size, feature.oov_buckets)
        self._check_size()

    def grow(self) -> int:
        """Gives ids that the counts now have often enough rows at the end; gives their number. Raises as `finish`."""
        before, feature = len(self.vocabulary.known), self.feature
        self.vocabulary = self.vocabulary.grown(self.counts, feature.min_count, feature.max_size)
        self._check_size()
        return len(self.vocabulary.known) - before

    def _check_size(self) -> None:
        if self.vocabulary.rows > MAX_TABLE_ROWS:
            raise UserError(
                f"feature '{self.name}' has {len(self.vocabulary.known):,} ids and {self.feature.oov_buckets:,} "
                f"`oov_buckets`; a table has at most {MAX_TABLE_ROWS:,} rows: set `max_size`, or raise `min_count`"
            )

    def encode(self, values: pa.Array) -> np.ndarray:
        """(N,) int64 table rows. Raises UserError naming the feature for ids of another type than trained on."""
        try:
            return self.vocabulary.encode(values)
        except UserError as error:
            raise UserError(f"feature '{self.name}' (column '{self.feature.column}'): {error}") from None

    def table(self) -> Table:
        """The embedding table."""
        return Table(self.name, self.vocabulary.rows)

    def state(self) -> State:
        """Known ids in the order of their rows."""
        known = pa.table({"id": self.vocabulary.known})
        return State({"oov_buckets": self.vocabulary.oov_buckets}, {"vocabulary": known})

    def restore(self, state: State) -> None:
        """Takes a saved vocabulary."""
        known = state.tables["vocabulary"]["id"].combine_chunks()
        self.vocabulary = Vocabulary(known, state.values["oov_buckets"])


class IdEncoder(Encoder):
    """One id a row."""

    def __init__(self, name: str, feature: IdFeature, owner: VocabularyOwner) -> None:
        self.name, self.feature, self.owner = name, feature, owner
        self._owns = owner.name == name
        self.counts = owner.counts if self._owns else None

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the training rows' ids."""
        if self._owns:
            self.owner.counts.add(rows.coded(self.feature.column))

    def finish(self) -> None:
        """Makes the vocabulary."""
        if self._owns:
            self.owner.finish()

    def outline(self) -> Outline:
        """One id input."""
        tables = (self.owner.table(),) if self._owns else ()
        return Outline(tables, ((self.name, self.owner.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        """Rows of the table."""
        return Inputs({self.name: self.owner.encode(rows.coded(self.feature.column))})

    def state(self) -> State:
        """The vocabulary, if it is this feature's own."""
        return self.owner.state() if self._owns else State()

    def restore(self, state: State) -> None:
        """Takes a saved vocabulary."""
        if self._owns:
            self.owner.restore(state)


class IdsEncoder(IdEncoder):
    """A list of ids a row; null lists are empty and null elements are left out."""

    feature: IdsFeature  # type: ignore[assignment]

    def __init__(self, name: str, feature: IdsFeature, owner: VocabularyOwner) -> None:
        super().__init__(name, feature, owner)  # type: ignore[arg-type]

    def learn(self, rows: LogRows, known_by: int) -> None:
        """Counts the elements of the training rows' lists."""
        if self._owns:
            values, _ = ragged(rows.column(self.feature.column), self.feature.max_length)
            self.owner.counts.add(values)

    def outline(self) -> Outline:
        """One id input with many ids a row."""
        tables = (self.owner.table(),) if self._owns else ()
        return Outline(tables, ((self.name, self.owner.name, True),))

    def encode(self, rows: LogRows) -> Inputs:
        """Rows of the table, any number a row."""
        values, lengths = ragged(rows.column(self.feature.column), self.feature.max_length)
        return Inputs({self.name: Ragged(self.owner.encode(values), lengths)})


def ragged(lists: pa.Array, max_length: int, *, last: bool = False) -> tuple[pa.Array, np.ndarray]:
    """Elements and (N,) int32 lengths of a list column: nulls left out, at most `max_length` first (or last) a row."""
    if pt.is_null(lists.type):
        return pa.array([], pa.null()), np.zeros(len(lists), np.int32)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32)
    values = lists.flatten()
    row = np.repeat(np.arange(len(lengths)), lengths)
    keep = values.is_valid().to_numpy(zero_copy_only=False)
    # Position of each kept element among the kept ones of its row.
    before = np.cumsum(keep) - keep
    first = np.zeros(len(lengths), np.int64)
    starts = np.cumsum(lengths) - lengths
    filled = lengths > 0
    first[filled] = before[starts[filled]]
    place = before - first[row]
    if last:
        place = np.bincount(row[keep], minlength=len(lengths))[row] - 1 - place
    keep &= place < max_length
    return values.filter(pa.array(keep)), np.bincount(row[keep], minlength=len(lengths)).astype(np.int32)


class CrossEncoder(Encoder):
    """The combination of columns, hashed."""

    def __init__(self, name: str, feature: CrossFeature) -> None:
        self.name, self.feature = name, feature

    def outline(self) -> Outline:
        """One id input with a table of `buckets` rows."""
        table = Table(self.name, self.feature.buckets)
        return Outline((table,), ((self.name, self.name, False),))

    def encode(self, rows: LogRows) -> Inputs:
        """Hashed rows of the table."""
        hashes = rows.hashes(self.feature.columns)
        return Inputs({self.name: (hashes % np.uint64(self.feature.buckets)).astype(np.int64)})
