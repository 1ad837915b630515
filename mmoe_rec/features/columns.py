"""Columns of a log in canonical Arrow types, with an error that names the column where that is impossible.

| what reads the column | canonical type |
|---|---|
| ids, keys of counters and crosses, user, candidate, request | int64 or string |
| lists of ids | list<int64> or list<string> |
| numbers, labels | float64 |
| vectors | list<float32> |
| times | timestamp[us, UTC] |
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.schema import (
    CounterFeature,
    CrossFeature,
    IdFeature,
    IdsFeature,
    NumericFeature,
    Schema,
    TimeFeature,
    VectorFeature,
)

Use = Literal["key", "keys", "number", "vector", "time", "any"]
UTC_MICROSECONDS = pa.timestamp("us", tz="UTC")

_EXPECTED: dict[Use, str] = {
    "key": "integers or strings",
    "keys": "lists of integers or lists of strings",
    "number": "numbers",
    "vector": "lists of numbers",
    "time": "timestamps (or integers, with `columns.time_unit` set)",
    "any": "integers, numbers or strings",
}


def column_uses(schema: Schema) -> dict[str, Use]:
    """What each column that a log must have is read as. A key may also be read as a number; it stays a key.

    Raises UserError where two readers of a column contradict each other.
    """
    uses: dict[str, set[Use]] = defaultdict(set)
    for column in (schema.columns.user, schema.columns.candidate, schema.columns.request):
        if column is not None:
            uses[column].add("key")
    uses[schema.columns.time].add("time")
    if schema.columns.sampling_rate is not None:
        uses[schema.columns.sampling_rate].add("number")
    for task in schema.tasks.values():
        uses[task.label].add("number")
        if task.observed_when is not None:
            uses[task.observed_when.column].add("any")
    for feature in schema.features.values():
        match feature:
            case IdFeature():
                uses[feature.column].add("key")
            case IdsFeature():
                uses[feature.column].add("keys")
            case NumericFeature():
                uses[feature.column].add("number")
            case VectorFeature():
                uses[feature.column].add("vector")
            case TimeFeature() if feature.column is not None:
                uses[feature.column].add("time")
            case CrossFeature():
                for column in feature.columns:
                    uses[column].add("key")
            case CounterFeature():
                for column in feature.by:
                    uses[column].add("key")
    return {column: _one_use(column, found) for column, found in uses.items()}


def _one_use(column: str, found: set[Use]) -> Use:
    if len(found) > 1:
        found = found - {"any"}
    if found == {"key", "number"}:
        return "key"
    if len(found) > 1:
        raise UserError(
            f"column '{column}' is read in two ways that contradict each other: {' and '.join(sorted(found))}"
        )
    return next(iter(found))


def canonical_type(column: str, use: Use, found: pa.DataType, time_unit: str | None = None) -> pa.DataType:
    """The canonical type of a column. Raises UserError when values of type `found` can't be read that way."""
    kind = found.value_type if pt.is_dictionary(found) else found
    if pt.is_null(kind):
        return pa.null()
    if use in ("key", "any"):
        if pt.is_integer(kind) or pt.is_boolean(kind):
            return pa.int64()
        if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
            return pa.string()
        if use == "any" and pt.is_floating(kind):
            return pa.float64()
    if use == "number" and (pt.is_integer(kind) or pt.is_boolean(kind) or pt.is_floating(kind) or pt.is_decimal(kind)):
        return pa.float64()
    if use == "time" and (pt.is_timestamp(kind) or pt.is_date(kind) or (pt.is_integer(kind) and time_unit)):
        return UTC_MICROSECONDS
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        if pt.is_null(kind.value_type):
            return pa.null()
        if use == "keys":
            return pa.list_(canonical_type(column, "key", kind.value_type))
        if use == "vector" and (pt.is_floating(kind.value_type) or pt.is_integer(kind.value_type)):
            return pa.list_(pa.float32())
    raise UserError(f"column '{column}' must hold {_EXPECTED[use]}, found {found}")


def canonical(column: str, use: Use, values: pa.ChunkedArray, time_unit: str | None = None) -> pa.Array:
    """Values in the canonical type; an all-null column stays of type null. Raises UserError naming the column."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    target = canonical_type(column, use, array.type, time_unit)
    try:
        if target == UTC_MICROSECONDS and pt.is_integer(array.type):
            array = array.cast(pa.int64()).cast(pa.timestamp(time_unit or "us", tz="UTC"))
        if target == UTC_MICROSECONDS and pt.is_timestamp(array.type) and array.type.unit == "ns":
            # Truncation to microseconds is no loss that a log means.
            return pc.cast(array, target, safe=False)
        return array if array.type == target else array.cast(target)
    except pa.ArrowInvalid as error:
        raise UserError(f"column '{column}' cannot be read as {target}: {error}") from None
