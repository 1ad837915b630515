"""The feature kind `ids`: a list of ids per row, whose embeddings are averaged."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pydantic import Field

from mmoe_rec.features.encoder import FeatureKind, Inputs
from mmoe_rec.features.kinds.id import IdEncoder
from mmoe_rec.features.vocabulary import VocabularyFeature
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EmbeddingChoices


class IdsFeature(VocabularyFeature, EmbeddingChoices):
    """A list of ids per row, embedded and averaged."""

    kind: Literal["ids"]
    max_length: int = Field(50, ge=1, description="maximum number of ids per row; further ids are dropped")

    def reads(self) -> Mapping[str, ColumnUse]:
        return {self.column: "keys"}


class IdsEncoder(IdEncoder):
    """Encoder of a list of ids per row. Null lists count as empty and null elements are skipped."""

    feature: IdsFeature
    is_list = True

    def _ids(self, rows: LogRows) -> pa.Array:
        return truncate_lists(rows.column(self.feature.column), self.feature.max_length)[0]

    def encode(self, rows: LogRows) -> Inputs:
        values, lengths = truncate_lists(rows.column(self.feature.column), self.feature.max_length)
        return Inputs({self.name: Ragged(self.vocabulary.encode(values), lengths)})

    def example_value(self, use: ColumnUse) -> Any:
        example = super().example_value(use)
        return None if example is None else [example]


def truncate_lists(lists: pa.Array, max_length: int, *, last: bool = False) -> tuple[pa.Array, np.ndarray]:
    """Drop null elements of N lists, then shorten the lists.

    Args:
        lists: List column of N rows.
        max_length: Maximum number of elements per list.
        last: Whether to keep the last elements instead of the first.

    Returns:
        Remaining elements of all lists in one array, and the (N,) int32 lengths of the shortened lists.
    """
    if pt.is_null(lists.type):
        return pa.array([], pa.null()), np.zeros(len(lists), np.int32)
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32)
    values = lists.flatten()
    row = np.repeat(np.arange(len(lengths)), lengths)
    row = row[values.is_valid().to_numpy(zero_copy_only=False)]
    lengths = np.bincount(row, minlength=len(lists))
    position = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    if last:
        position = lengths[row] - 1 - position
    return values.drop_null().filter(pa.array(position < max_length)), np.minimum(lengths, max_length).astype(np.int32)


KIND = FeatureKind(IdsFeature, IdsEncoder)
