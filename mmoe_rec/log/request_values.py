"""Convert columns of a request or of events, from JSON or Python, to canonical Arrow arrays."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.errors import RequestError, UserError, quoted
from mmoe_rec.log.columns import EXPECTED, UTC_MICROSECONDS, canonicalize, element_type, type_name
from mmoe_rec.settings.log_columns import ColumnUse

_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_INT64 = range(-(2**63), 2**63)
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}
_NUMBERS = {list, bool, int, float, type(None)}
_JSON = {*_NUMBERS, str, dict}
# Outside these years, some time zone databases have no hour and weekday.
_YEARS = (1700, 2200)
_NOT_ARROW = (pa.ArrowException, TypeError, ValueError, OverflowError)

_WANTED: dict[str, str] = {
    "int64": "integers",
    "string": "strings",
    "list<int64>": "lists of integers",
    "list<string>": "lists of strings",
}
_WANTED_USE = {**EXPECTED, "time": "times (ISO 8601 strings or integers)"}


def to_python_list(values: Any) -> Any:
    """Convert an Arrow array, a pandas Series or a numpy array to a list. Return other `values` unchanged.

    Missing values of pandas become None. NaN in a numpy array stays NaN.
    """
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.to_pylist()
    if isinstance(values, np.ndarray):
        if values.dtype.kind == "M":  # tolist() turns nanoseconds into integers
            values = values.astype("datetime64[us]")
        return values.tolist()
    if hasattr(values, "isna") and hasattr(values, "tolist"):
        return [None if missing else value for value, missing in zip(values.tolist(), values.isna(), strict=True)]
    return values


def numpy_to_python(value: Any) -> Any:
    """Convert numpy numbers and arrays in `value`, also nested ones, to Python numbers and lists."""
    if isinstance(value, Mapping):
        return {name: numpy_to_python(nested) for name, nested in value.items()}
    if isinstance(value, list | tuple):
        return [numpy_to_python(element) for element in value]
    # tolist() would turn times into integers.
    is_plain = not isinstance(value, np.generic | np.ndarray) or value.dtype.kind in "mM"
    return value if is_plain else value.tolist()


def to_arrow(
    column: str,
    values: Sequence[Any],
    use: ColumnUse,
    log_type: pa.DataType | None = None,
    time_unit: str | None = None,
    allow_booleans: bool = False,
) -> pa.Array:
    """Convert values to an Arrow array of the column's canonical type, or of the null type if all values are null.

    With `log_type`, each value must fit this type. Without `log_type`, all values must have one common type.

    Args:
        column: Name of the column, for messages.
        values: Values of the column.
        use: Use of the column.
        log_type: Canonical type of the column in the log, None if unknown.
        time_unit: Unit of integers in a time column. None if the log has timestamps, so that integers have no unit.
        allow_booleans: Whether to accept true and false as 1 and 0.

    Raises:
        RequestError: A value has another type, or is NaN, infinite or out of range. The error names the column.
    """
    if use == "time":
        return pa.array([_microseconds_or_none(column, value, time_unit) for value in values], UTC_MICROSECONDS)
    is_list, wanted = use in ("keys", "vector"), _wanted(use, log_type)
    if (types := _types(values)) - _JSON:
        values = [numpy_to_python(to_python_list(value)) for value in values]
        types = _types(values)
    if bool in types and not allow_booleans:
        raise _mismatch(column, values, wanted)
    try:
        # JSON doesn't distinguish floats from integers. Arrow rejects large integers mixed with fractions, and true
        # mixed with numbers.
        if types <= _NUMBERS and (use in ("number", "vector") or (use == "any" and float in types)):
            values = [_convert(value, float) for value in values]
        elif bool in types:
            values = [_convert(value, int) for value in values]
        array = pa.array(values)
        if is_list and pt.is_list(array.type) and pt.is_null(array.type.value_type) and log_type is not None:
            array = array.cast(log_type)  # all lists are empty
        array = canonicalize(column, use, array)
    except (*_NOT_ARROW, UserError):
        raise _mismatch(column, values, wanted) from None
    _check_finite(column, array)
    if log_type is not None and not pt.is_null(array.type) and element_type(array.type) != element_type(log_type):
        raise _mismatch(column, values, wanted)
    return array


def _types(values: Sequence[Any]) -> set[type]:
    """Return the types of `values` and, if values are lists, of their elements."""
    types = set(map(type, values))
    if list in types:
        types |= set(map(type, chain.from_iterable(value for value in values if isinstance(value, list))))
    return types


def _convert(value: Any, kind: type[int | float]) -> Any:
    """Convert a value, or the elements of a list. The kind float converts all numbers, the kind int only booleans."""
    if isinstance(value, list):
        return [_convert(element, kind) for element in value]
    return kind(value) if value is not None and (kind is float or isinstance(value, bool)) else value


def find_duplicate(names: Iterable[Any]) -> str | None:
    """Return a name that occurs more than once in `names` (compared as strings), or None."""
    return next((name for name, count in Counter(map(str, names)).items() if count > 1), None)


def _wanted(use: ColumnUse, log_type: pa.DataType | None) -> str:
    if log_type is not None and (name := type_name(log_type)) in _WANTED:
        return f"{_WANTED[name]}, as in the log"
    return _WANTED_USE[use]


def _mismatch(column: str, values: Sequence[Any], wanted: str) -> RequestError:
    for value in chain.from_iterable(value if isinstance(value, list) else (value,) for value in values):
        if isinstance(value, int) and value not in _INT64:
            return RequestError(f"column '{column}' holds {quoted(value)}, which does not fit into 64 bits")
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            return RequestError(f"column '{column}' holds a string that is not valid Unicode")
    kinds = list(dict.fromkeys(_kind(value) for value in values if value is not None))
    return RequestError(f"column '{column}' must hold {wanted}; found {' and '.join(kinds)}")


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "integers", float: "numbers with a fraction", str: "strings", dict: "objects"}
    if isinstance(value, list):
        element_kinds = dict.fromkeys(_kind(element) for element in value if element is not None)
        return f"lists of {' and '.join(element_kinds)}" if element_kinds else "lists"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinity"
    return names.get(type(value), type(value).__name__)


def _check_finite(column: str, array: pa.Array) -> None:
    """Raise RequestError for NaN or infinity in a column, and for null within a list of floats."""
    numbers = array.flatten() if pt.is_list(array.type) else array
    if pt.is_floating(numbers.type) and not np.isfinite(numbers.drop_null().to_numpy(zero_copy_only=False)).all():
        raise RequestError(f"column '{column}' holds NaN or infinity. Use null for a missing number.")
    if pt.is_list(array.type) and pt.is_floating(numbers.type) and numbers.null_count:
        raise RequestError(f"column '{column}' holds null inside a list. Use null in place of the whole list.")


def _microseconds_or_none(column: str, value: Any, unit: str | None) -> int | None:
    if isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
        if isinstance(value, int):  # outside the years of Python's datetime
            unit = "us"
    elif isinstance(value, np.integer):
        value = value.item()
    elif isinstance(value, datetime) and math.isnan(value.year):  # pandas.NaT
        value = None
    return None if value is None else parse_microseconds(column, value, unit)


def parse_time(text: str) -> int:
    """Parse an ISO 8601 `text` (UTC without an offset) to microseconds since 1970 UTC.

    Raises:
        UserError: The text is not a time.
    """
    try:
        return parse_microseconds("time", text)
    except RequestError:
        raise UserError(f"'{text}' is not a time. Write it like 2017-09-04 or 2017-09-04T04:00:00+00:00.") from None


def parse_microseconds(column: str, value: Any, unit: str | None = None) -> int:
    """Convert a time to microseconds since 1970 UTC.

    Args:
        column: Name of the column, for messages.
        value: A datetime or ISO 8601 string (UTC unless it has an offset), or an integer in `unit`.
        unit: Unit of integers. None rejects integers.

    Raises:
        RequestError: The value is not a time, or its year is outside 1700 to 2199.
    """
    if isinstance(value, str | datetime):
        try:
            moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        except ValueError:
            raise RequestError(f"column '{column}' holds {quoted(value)}, which is not an ISO 8601 time") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        inside = _YEARS[0] <= moment.year < _YEARS[1]
        result = (moment - _EPOCH) // _MICROSECOND
    elif isinstance(value, int) and not isinstance(value, bool):
        if unit is None:
            raise RequestError(
                f"column '{column}' holds the integer {quoted(value)}, but the log has timestamps, so the integer's "
                "unit is unknown. Use an ISO 8601 string such as 2024-01-31T12:00:00Z."
            )
        result = value // 1_000 if unit == "ns" else value * _PER_UNIT[unit]
        low, high = ((datetime(year, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND for year in _YEARS)
        inside = low <= result < high
    else:
        raise RequestError(f"column '{column}' must hold {_WANTED_USE['time']}; found {_kind(value)}")
    if not inside:
        raise RequestError(
            f"column '{column}' holds {quoted(value)}, a time outside the years {_YEARS[0]} to {_YEARS[1] - 1}"
        )
    return result


def iso_time(microseconds: int) -> str:
    """Format `microseconds` since 1970 UTC as ISO 8601."""
    return (_EPOCH + microseconds * _MICROSECOND).isoformat()
