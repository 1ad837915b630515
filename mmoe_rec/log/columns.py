"""Columns of a log in canonical Arrow types, with an error that names the column where that is impossible.

| what reads the column | canonical type |
|---|---|
| ids, keys of counters and crosses, user, candidate, request | int64 or string |
| lists of ids | list<int64> or list<string> |
| numbers, labels | float64 |
| vectors | list<float64> |
| times | timestamp[us, UTC] |

Hashes of columns are stable: the same on every machine and in every process.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.point_in_time.arrays import fill_nulls, one_array
from mmoe_rec.settings.log_columns import ColumnUse
from mmoe_rec.settings.schema import EventFeature, Schema

UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")

_CODED = pa.dictionary(pa.int32(), pa.string())
_DICTIONARY_KEPT = 1024  # words, though fewer may be in use

EXPECTED: dict[ColumnUse, str] = {
    "key": "integers or strings",
    "keys": "lists of integers or lists of strings",
    "number": "numbers",
    "vector": "lists of numbers",
    "time": "timestamps (or integers, with `columns.time_unit` set)",
    "any": "integers, numbers or strings",
}
"""What a column must hold, by what it is read as."""

_HINTS = {
    ("key", "double"): " (pandas makes this of integers with missing values: cast to Int64 before writing)",
    ("key", "binary"): " (write it as a string)",
    ("number", "string"): " (a feature of kind id reads strings)",
    ("time", "string"): " (parse it, say with pandas.to_datetime, before writing)",
}


def column_uses(schema: Schema) -> dict[str, ColumnUse]:
    """What each column that a log must have is read as. A key may also be read as a number; it stays a key.

    Raises UserError where two readers of a column contradict each other.
    """
    uses: dict[str, dict[ColumnUse, str]] = defaultdict(dict)

    def reads(reader: str, use: ColumnUse, *columns: str | None) -> None:
        for column in columns:
            if column is not None:
                uses[column].setdefault(use, reader)

    names = schema.columns
    keys = [name for name in (names.user, names.candidate, names.request) if name in names.names]
    reads("columns.user, candidate and request", "key", *keys)
    reads("columns.time", "time", names.time if names.has_time else None)
    reads("columns.sampling_rate", "number", names.sampling_rate)
    reads("columns.weight", "number", names.weight)
    reads("split.column", "key", None if schema.split is None else schema.split.column)
    for name, task in schema.tasks.items():
        reads(f"task '{name}'", "number", task.label)
        if task.observed_when is not None:
            reads(f"task '{name}'", "any", task.observed_when.column)
    for name, feature in schema.features.items():
        for column, use in feature.reads().items():
            reads(f"feature '{name}'", use, column)
    return {column: _one_use(column, found) for column, found in uses.items()}


def list_label_columns(schema: Schema) -> list[str]:
    """The columns that decide labels."""
    tasks = schema.tasks.values()
    conditions = [task.observed_when.column for task in tasks if task.observed_when]
    return list(dict.fromkeys([*(task.label for task in tasks), *conditions]))


def event_column_uses(schema: Schema, events: str) -> dict[str, ColumnUse]:
    """What each column that a log of events must have is read as; the time column goes by its name in that log. Raises
    UserError where it is a key as well."""
    time = schema.events[events].time
    uses: dict[str, ColumnUse] = {}
    for feature in schema.features.values():
        if isinstance(feature, EventFeature) and feature.events == events:
            uses |= feature.event_reads(schema)
    if time in uses:
        raise UserError(
            f"column '{time}' of events '{events}' is both the time and a key of counters or histories; add a column "
            "to that log"
        )
    return {time: "time", **uses}


def _one_use(column: str, found: dict[ColumnUse, str]) -> ColumnUse:
    if len(found) > 1:
        found = {use: reader for use, reader in found.items() if use != "any"}
    if set(found) == {"key", "number"}:
        return "key"
    if len(found) > 1:
        readings = " and as ".join(f"{EXPECTED[use]} by {reader}" for use, reader in found.items())
        raise UserError(f"column '{column}' is read as {readings}; choose one, or add a column")
    return next(iter(found))


def canonical_type(  # noqa: PLR0911 - one line a case reads best
    column: str, use: ColumnUse, found: pa.DataType, time_unit: str | None = None
) -> pa.DataType:
    """The canonical type of a column. Raises UserError when values of type `found` can't be read that way."""
    kind = found.value_type if pt.is_dictionary(found) else found
    if pt.is_null(kind):
        return pa.null()
    if use in ("key", "any"):
        if pt.is_integer(kind) or pt.is_boolean(kind):
            return pa.int64()
        if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
            return pa.string()
        if use == "any" and (pt.is_floating(kind) or pt.is_decimal(kind)):
            return pa.float64()
    if use == "number" and (_is_number(kind) or pt.is_boolean(kind)):
        return pa.float64()
    if use == "time" and (pt.is_timestamp(kind) or pt.is_date(kind) or (pt.is_integer(kind) and time_unit)):
        return UTC_MICROSECONDS
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        if use == "keys":
            inner = canonical_type(column, "key", kind.value_type)
            return inner if pt.is_null(inner) else pa.list_(inner)
        if use == "vector" and (_is_number(kind.value_type) or pt.is_null(kind.value_type)):
            return pa.list_(pa.float64())
    hint = _HINTS.get((use, str(kind)), "")
    raise UserError(f"column '{column}' must hold {EXPECTED[use]}, found {found}{hint}")


def element_type(kind: pa.DataType) -> pa.DataType:
    """The type of a list's elements; any other type as it is."""
    return kind.value_type if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def canonicalize(
    column: str, use: ColumnUse, values: pa.ChunkedArray, time_unit: str | None = None, encode_strings: bool = False
) -> pa.Array:
    """Values in the canonical type; an all-null column stays of type null. coded: whether strings, but not lists of
    them, are given dictionary-coded. Raises UserError naming the column."""
    array = one_array(values) if isinstance(values, pa.ChunkedArray) else values
    target = canonical_type(column, use, array.type, time_unit)
    if pt.is_null(target):
        return pa.nulls(len(array))
    if encode_strings and array.type == _CODED and len(array.dictionary) <= max(len(array), _DICTIONARY_KEPT):
        return array
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        if target == UTC_MICROSECONDS and pt.is_integer(array.type):
            array = array.cast(pa.int64()).cast(pa.timestamp(time_unit or "us", tz="UTC"))
        if target == UTC_MICROSECONDS and pt.is_timestamp(array.type) and array.type.unit == "ns":
            # Nothing in a log depends on nanoseconds.
            return pc.cast(array, target, safe=False)
        # The float64 nearest to an integer will do, also beyond 2^53, where not every integer has its own.
        array = array if array.type == target else array.cast(target, safe=use not in ("number", "vector"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{column}' cannot be read as {target}: {error}") from None
    return array.dictionary_encode() if encode_strings and target == pa.string() else array


_MISSING = np.uint64(0x9AE16A3B2F90404F)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Bijective scrambling of (N,) uint64 (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_column(column: pa.Array) -> np.ndarray:
    """(N,) uint64 hashes of a column of int64 or strings, dictionary-coded or not; nulls share one hash."""
    if pt.is_null(column.type):
        return np.full(len(column), _MISSING)
    if pt.is_string(column.type) or pt.is_dictionary(column.type):
        encoded = column.dictionary_encode()
        words = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
        import pandas as pd  # which --help does not need

        table = np.append(pd.util.hash_array(words, categorize=False).astype(np.uint64), _MISSING)
        return table[fill_nulls(encoded.indices, len(words)).to_numpy()]
    hashes = splitmix64(
        fill_nulls(column, 0).to_numpy(zero_copy_only=False).astype(np.int64, copy=False).view(np.uint64)
    )
    if column.null_count:
        hashes[column.is_null().to_numpy(zero_copy_only=False)] = _MISSING
    return hashes


def combine_hashes(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) uint64 hash of the ordered combination of several (N,) hashes."""
    result = hashes[0]
    with np.errstate(over="ignore"):
        for each in hashes[1:]:
            result = splitmix64(result * np.uint64(3) + each)
    return result


def hash_rows(table: pa.Table) -> np.ndarray:
    """(N,) uint64 hash of the values of each row, of lists by their text."""
    hashes = list[np.ndarray]()
    for column in map(one_array, table.columns):
        if pt.is_floating(column.type):
            numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False) + 0.0  # one zero
            hashes.append(np.where(np.isnan(numbers), _MISSING, splitmix64(numbers.view(np.uint64))))
        elif pt.is_timestamp(column.type):
            hashes.append(hash_column(column.cast(pa.int64())))
        elif pt.is_nested(column.type):
            hashes.append(hash_column(pa.array(map(repr, column.to_pylist()), pa.string())))
        else:
            hashes.append(hash_column(column))
    return combine_hashes(hashes)
