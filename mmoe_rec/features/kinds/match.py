"""The feature kind `match`: comparisons of a column of the user or context with a column of the candidate.

A network learns slowly from separate embeddings that two IDs are equal, so this kind computes the comparison.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pydantic import BeforeValidator, Field, model_validator

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import EncoderContext, FeatureKind, Inputs, StatisticsEncoder
from mmoe_rec.features.kinds.ids import truncate_lists
from mmoe_rec.features.kinds.vector import read_vectors
from mmoe_rec.features.numeric_statistics import DenseNumber
from mmoe_rec.log.columns import EXPECTED, element_type, hash_column
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY, LogRows, RequestRows
from mmoe_rec.point_in_time.join import find_keys
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import Feature, InputSemantics, Schema, Unique

_Output = Literal[
    "equal", "contains", "overlap", "coverage", "jaccard", "difference", "ratio", "time_difference", "cosine"
]
_USES: dict[_Output, tuple[ColumnUse, ColumnUse]] = {
    "equal": ("key", "key"),
    "contains": ("keys", "key"),
    "overlap": ("keys", "keys"),
    "coverage": ("keys", "keys"),
    "jaccard": ("keys", "keys"),
    "difference": ("number", "number"),
    "ratio": ("number", "number"),
    "time_difference": ("time", "time"),
    "cosine": ("vector", "vector"),
}
# IDs are compared in chunks of rows, which limits memory. The 64-bit key of an ID has 10 bits for the row in the chunk,
# and then the first 54 bits of the hash of the ID.
_CHUNK_ROWS, _HASH_BITS = 1024, np.uint64(54)
_AsTuple = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


class MatchFeature(Feature):
    """Comparisons of a column of the user or context with a column of the candidate, as standardized numbers."""

    kind: Literal["match"]
    columns: Annotated[tuple[str, ...], Unique] = Field(
        description="a column of the candidate, and one of the user or context"
    )
    compare: Annotated[tuple[_Output, ...], _AsTuple, Unique] = Field(
        min_length=1,
        description="one or more outputs; equal: 1 if two IDs are equal, else 0; contains: 1 if the list in the first "
        "column contains the ID in the second, else 0; overlap: number of distinct IDs that two lists share; coverage: "
        "overlap / distinct IDs of the candidate's list; jaccard: overlap / distinct IDs of both lists; difference: "
        "second number - first; ratio: log of (1 + |second|) / (1 + |first|); time_difference: days from the first "
        "time to the second; cosine: cosine similarity of two vectors",
    )
    size: int | None = Field(None, ge=1, description="length of the vectors (only for cosine)")

    @model_validator(mode="after")
    def _check_compare(self) -> Self:
        if len({_USES[output] for output in self.compare}) > 1:
            reads = ", ".join(f"{o} reads {' and '.join(EXPECTED[use] for use in _USES[o])}" for o in self.compare)
            raise ValueError(f"`compare` mixes outputs of different types: {reads}. Write a feature for each type.")
        if (self.size is None) == (self.compare == ("cosine",)):
            raise ValueError("`compare: cosine` needs `size`, the length of the vectors. Other outputs have no `size`.")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        return dict(zip(self.columns, _USES[self.compare[0]], strict=False))

    @property
    def list_lengths(self) -> Mapping[str, int]:
        return {} if self.size is None else dict.fromkeys(self.columns, self.size)

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError unless one column describes the candidate and the other column the user or context."""
        schema.role_of(name)  # Reports a column without a role.
        roles = {column: schema.column_roles.get(column, "no role") for column in self.columns}
        if sorted(role.replace("context", "user") for role in roles.values()) != ["candidate", "user"]:
            found = ", ".join(f"'{column}' ({role})" for column, role in roles.items())
            problem = f"needs one column of the candidate and one of the user or context, found {found}"
            raise ValueError(f"feature '{name}' {problem}. Change `columns`, or the roles of these columns.")

    def semantics(self, schema: Schema) -> InputSemantics:
        return InputSemantics(self.columns)


class MatchEncoder(StatisticsEncoder):
    """Encoder of comparisons of two columns. Each output has its own mean and standard deviation.

    Attributes:
        numbers: Mean and standard deviation by output.
    """

    feature: MatchFeature

    def __init__(self, name: str, feature: MatchFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.numbers = {output: DenseNumber(f"{name}_{output}") for output in feature.compare}
        self.counts = {f".{output}": number.histogram for output, number in self.numbers.items()}
        roles = context.schema.column_roles
        self._other, self._candidate = sorted(feature.columns, key=lambda column: roles[column] == "candidate")

    def partial_fit(self, rows: LogRows, label_cutoff: int) -> None:
        """Add the outputs of training rows to their histograms.

        Args:
            rows: Training rows.
            label_cutoff: Not used.

        Raises:
            UserError: One column has integers and the other strings.
        """
        kinds = [str(element_type(rows.raw_column(column).type)) for column in self.feature.columns]
        if kinds.count("string") == 1 and "null" not in kinds:
            found = " and ".join(map("column '{}' holds {}".format, self.feature.columns, kinds))
            raise UserError(f"feature '{self.name}': {found}, which are never equal. Write both columns with one type.")
        for values, number in self.encode(rows).numbers:
            number.histogram.add(values)

    def finish_fit(self) -> None:
        self.finish_fit_results()

    def encode(self, rows: LogRows) -> Inputs:
        values = self._compare(rows)
        return Inputs(numbers=[(values[output], number) for output, number in self.numbers.items()])

    @np.errstate(invalid="ignore", divide="ignore", over="ignore")
    def _compare(self, rows: LogRows) -> dict[str, np.ndarray]:
        """Return all outputs that compare columns of these types, each (N,) float64, NaN if missing."""
        first, second = self.feature.columns
        match _USES[self.feature.compare[0]]:
            case ("key", "key"):
                x, y, null = rows.hashes([first]), rows.hashes([second]), hash_column(pa.nulls(1))
                return {"equal": np.where((x == null) | (y == null), np.nan, x == y)}
            case ("number", _):
                x, y = rows.numbers(first), rows.numbers(second)
                return {"difference": y - x, "ratio": np.log1p(np.abs(y)) - np.log1p(np.abs(x))}
            case ("time", _):
                x, y = rows.times(first), rows.times(second)
                missing = np.minimum(x, y) == np.iinfo(np.int64).min
                return {"time_difference": np.where(missing, np.nan, (y - x) / MICROSECONDS_PER_DAY)}
            case ("vector", _):
                x, y = (read_vectors(rows, self.name, column, self.feature.size or 0) for column in (first, second))
                norm = np.sqrt(np.square(x).sum(axis=1)) * np.sqrt(np.square(y).sum(axis=1))
                return {"cosine": (x * y).sum(axis=1) / norm}
        shared, own, other = self._count_shared(rows)
        shared = np.where(np.minimum(own, other) == 0, np.nan, shared)
        contains, jaccard = np.minimum(shared, 1), shared / (own + other - shared)
        return {"contains": contains, "overlap": shared, "coverage": shared / own, "jaccard": jaccard}

    def _count_shared(self, rows: LogRows) -> np.ndarray:
        """Count distinct IDs, (3, N) int64: shared IDs, IDs of the candidate's list, and IDs of the other list."""
        source, index = rows, np.arange(len(rows))
        if isinstance(rows, RequestRows):  # All candidates of a request share one list, so read it once.
            source, index = rows.shared, rows.request_index
        own, others = rows.column(self._candidate), source.column(self._other)
        counts = np.empty((3, len(rows)), np.int64)
        for start in range(0, len(rows), _CHUNK_ROWS):
            other_row = index[start : start + _CHUNK_ROWS] - index[start]
            size, other_size = len(other_row), int(other_row[-1]) + 1
            keys, other_keys = _distinct(own.slice(start, size)), _distinct(others.slice(index[start], other_size))
            row, row_in_others = ((part >> _HASH_BITS).astype(np.int64) for part in (keys, other_keys))
            to_other_row = (other_row - np.arange(size)).astype(np.uint64) << _HASH_BITS
            shared, _ = find_keys(other_keys, keys + to_other_row[row])
            counts[:, start : start + size] = (
                np.bincount(row[shared], minlength=size),
                np.bincount(row, minlength=size),
                np.bincount(row_in_others, minlength=other_size)[other_row],
            )
        return counts


def _distinct(lists: pa.Array) -> np.ndarray:
    """Return the distinct IDs of up to `_CHUNK_ROWS` lists, as ascending uint64 keys of the row and the ID's hash."""
    if not pt.is_list(lists.type):  # A single id is a list of one.
        lists = pa.ListArray.from_arrays(np.arange(len(lists) + 1, dtype=np.int32), lists)
    ids, lengths = truncate_lists(lists, 2**62)
    row = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    keys = np.sort(row << _HASH_BITS | hash_column(ids) >> (np.uint64(64) - _HASH_BITS))
    return keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]


KIND = FeatureKind(MatchFeature, MatchEncoder)
