"""Convert columns of a log to canonical Arrow types.

| use of the column | canonical type |
|---|---|
| `key`: ids, keys of counters and crosses, user, candidate, request, split | int64 or string |
| `keys`: lists of ids | list<int64> or list<string> |
| `number`: numbers, labels, weights, sampling rates | float64 |
| `vector`: lists of numbers | list<float64> |
| `time`: times | timestamp[us, UTC] |
| `any`: conditions for labels (`observed_when`) | int64, string or float64 |

Hashes of columns are the same on every machine and in every process.
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
# A dictionary-coded column is decoded if its dictionary is longer than the column and has more strings than this.
_DICTIONARY_KEPT = 1024
EXPECTED: dict[ColumnUse, str] = {
    "key": "integers or strings",
    "keys": "lists of integers or lists of strings",
    "number": "numbers",
    "vector": "lists of numbers",
    "time": "timestamps (or integers, with `columns.time_unit` set)",
    "any": "integers, numbers or strings",
}
"""Description of the accepted values by use of the column."""

_HINTS = {
    ("key", "double"): " (pandas stores integers with missing values as floats, so cast to Int64 before writing)",
    ("key", "binary"): " (write it as a string)",
    ("number", "string"): " (a feature of kind id reads strings)",
    ("time", "string"): " (parse it, say with pandas.to_datetime, before writing)",
}


def column_uses(schema: Schema) -> dict[str, ColumnUse]:
    """Return how `schema` uses each column of an interaction log. A column used as key and as number is a key.

    Raises:
        UserError: A column has uses that need different types.
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
    return {column: _one_use(column, column_readers) for column, column_readers in uses.items()}


def list_label_columns(schema: Schema) -> list[str]:
    """Return the columns that determine labels: the labels of the tasks and their `observed_when` columns."""
    tasks = schema.tasks.values()
    conditions = [task.observed_when.column for task in tasks if task.observed_when]
    return list(dict.fromkeys([*(task.label for task in tasks), *conditions]))


def event_column_uses(schema: Schema, events: str) -> dict[str, ColumnUse]:
    """Return how the schema uses each column that it reads from an event log.

    Args:
        schema: Schema of the log.
        events: Name of the event log.

    Raises:
        UserError: The time column is also the key of a counter or history.
    """
    time = schema.events[events].time
    uses: dict[str, ColumnUse] = {}
    for feature in schema.features.values():
        if isinstance(feature, EventFeature) and feature.events == events:
            uses |= feature.event_reads(schema)
    if time in uses:
        raise UserError(
            f"data.events.{events}: column '{time}' is both the time and a key of a counter or history. Store the "
            "time in a separate column."
        )
    return {time: "time", **uses}


def _one_use(column: str, readers: dict[ColumnUse, str]) -> ColumnUse:
    if len(readers) > 1:
        readers = {use: reader for use, reader in readers.items() if use != "any"}
    if set(readers) == {"key", "number"}:
        return "key"
    if len(readers) > 1:
        readings = " and as ".join(f"{EXPECTED[use]} by {reader}" for use, reader in readers.items())
        raise UserError(f"column '{column}' is read as {readings}. Use one type, or add a second column.")
    return next(iter(readers))


def canonical_type(  # noqa: PLR0911 - one line a case reads best
    column: str, use: ColumnUse, dtype: pa.DataType, time_unit: str | None = None
) -> pa.DataType:
    """Return the canonical type of a column.

    Args:
        column: Name of the column.
        use: Use of the column.
        dtype: Type in the file.
        time_unit: Unit of integer times, None if times are timestamps.

    Raises:
        UserError: A column of type `dtype` can't have this use.
    """
    kind = dtype.value_type if pt.is_dictionary(dtype) else dtype
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
    raise UserError(f"column '{column}' must hold {EXPECTED[use]}, found {dtype}{_HINTS.get((use, str(kind)), '')}")


def element_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the elements of a list, or of the values of a dictionary-coded column. Otherwise `kind`."""
    has_inner = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_dictionary)
    return kind.value_type if any(is_type(kind) for is_type in has_inner) else kind


def type_name(kind: pa.DataType) -> str | None:
    """Return the name of the canonical type `kind`, None for the null type."""
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    if pt.is_list(kind):  # Leave out the field name of the elements, which depends on the program that wrote the file.
        return f"list<{kind.value_type}>"
    return None if pt.is_null(kind) else str(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)


def canonicalize(
    column: str, use: ColumnUse, values: pa.ChunkedArray, time_unit: str | None = None, encode_strings: bool = False
) -> pa.Array:
    """Convert a column to its canonical type. A column of nulls gets the null type.

    Args:
        column: Name of the column, for messages.
        use: Use of the column.
        values: Values of the column.
        time_unit: Unit of integer times, None if times are timestamps.
        encode_strings: Whether to dictionary-encode strings. Lists of strings are never encoded.

    Raises:
        UserError: The values can't be converted.
    """
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
            # Truncate nanoseconds, because no feature depends on them.
            return pc.cast(array, target, safe=False)
        # Accept the float64 nearest to an integer, also beyond 2^53, where several integers share one float64.
        array = array if array.type == target else array.cast(target, safe=use not in ("number", "vector"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{column}' can't be converted to {target}: {error}") from None
    return array.dictionary_encode() if encode_strings and target == pa.string() else array


_MISSING = np.uint64(0x9AE16A3B2F90404F)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Scramble (N,) uint64 `values` bijectively (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_column(column: pa.Array) -> np.ndarray:
    """Return (N,) uint64 hashes of int64 or string values, dictionary-coded or not. All nulls get the same hash."""
    if pt.is_null(column.type):
        return np.full(len(column), _MISSING)
    if pt.is_string(column.type) or pt.is_dictionary(column.type):
        encoded = column.dictionary_encode()
        words = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
        import pandas as pd  # imported here to keep --help fast

        table = np.append(pd.util.hash_array(words, categorize=False).astype(np.uint64), _MISSING)
        return table[fill_nulls(encoded.indices, len(words)).to_numpy()]
    values = fill_nulls(column, 0).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    hashes = splitmix64(values.view(np.uint64))
    if column.null_count:
        hashes[column.is_null().to_numpy(zero_copy_only=False)] = _MISSING
    return hashes


def combine_hashes(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """Combine the `hashes` of several columns, each (N,) uint64, to one hash for each row. Their order matters."""
    result = hashes[0]
    with np.errstate(over="ignore"):
        for column_hashes in hashes[1:]:
            result = splitmix64(result * np.uint64(3) + column_hashes)
    return result


def hash_rows(table: pa.Table) -> np.ndarray:
    """Return one hash for each of the N rows of `table`, (N,) uint64. A list is converted to text and hashed."""
    hashes = list[np.ndarray]()
    for column in map(one_array, table.columns):
        if pt.is_floating(column.type):
            numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False) + 0.0  # -0.0 becomes 0.0
            hashes.append(np.where(np.isnan(numbers), _MISSING, splitmix64(numbers.view(np.uint64))))
        elif pt.is_timestamp(column.type):
            hashes.append(hash_column(column.cast(pa.int64())))
        elif pt.is_nested(column.type):
            hashes.append(hash_column(pa.array(map(repr, column.to_pylist()), pa.string())))
        else:
            hashes.append(hash_column(column))
    return combine_hashes(hashes)
