"""An observed-rule compares a column of any type with a value as exactly as Python does, or says that it can't."""

from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from tests.log.small_logs import DAY, START, log_rows, random_log, schema_of


def _observed(values: pa.Array, equals: Any) -> list[bool]:
    task = {"label": "click", "objective": "engagement", "observed_when": {"column": "seen", "equals": equals}}
    schema = schema_of({"item": {"kind": "id", "column": "item"}}, tasks={"click": task})
    log = random_log(0, len(values)).drop_columns(["click"])
    rows = log_rows(log.append_column("click", pa.array(np.ones(len(values)))).append_column("seen", values), schema)
    return (~np.isnan(rows.labels(schema.tasks["click"], START + 1000 * DAY))).tolist()


_INTEGERS = [4, None, 5, 2**53, 2**53 + 1, -(2**63), 2**63 - 1, 0, 1]
_NUMBERS = [4.5, None, 4.0, 2.0**70, -0.0, 1.0, 1e300]


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (pa.int64(), _INTEGERS, [4, 4.0, 5, True, False, 2**53, 2**53 + 1, float(2**53), -(2**63), 2**63 - 1]),
        (pa.float64(), _NUMBERS, [4.5, 4, 4.0, 2**70, 2.0**70, 0, True, 1e300]),
        (pa.float32(), [4.5, None, 1.0], [4.5, 1, True]),
        (pa.bool_(), [True, None, False], [True, False, 1, 0, 1.0]),
        (pa.decimal128(10, 2), [Decimal("4.50"), None, Decimal("0.10"), Decimal(4)], [4.5, 0.1, 4, 4.0]),
        (pa.decimal256(50, 1), [Decimal("4.5"), None], [4.5]),
        (pa.string(), ["4", None, "true", "é\n"], ["4", "true", "é\n"]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", None, "b"], ["a", "c"]),
        (pa.null(), [None, None], [1, "a", 4.5]),
    ],
)
def test_rules_compare_values_as_python_does(kind, values, wanted):
    for equals in wanted:
        found = _observed(pa.array(values, kind), equals)
        assert found == [value is not None and float(value) == equals if isinstance(value, Decimal) else value == equals
                         for value in values], equals  # fmt: skip


def test_whole_numbers_are_compared_with_text_as_they_are_written():
    assert _observed(pa.array(["4", "4.0", None]), 4) == [True, False, False]


@pytest.mark.parametrize(
    ("values", "equals", "message"),
    [
        ([4, None], 4.5, "which holds 64-bit integers, with 4.5, which is not one"),
        ([4, None], 2**70, "which holds 64-bit integers, with 1180591620717411303424, which is not one"),
        ([4, None], -(2**63) - 1, "which holds 64-bit integers, with -9223372036854775809, which is not one"),
        ([4, None], 1e300, "which holds 64-bit integers, with 1e\\+300, which is not one"),
        ([4.5, None], 2**53 + 1, "which holds 64-bit floating-point numbers, with 9007199254740993, which is not one"),
        pytest.param([4.5, None], 10**400, "which holds 64-bit floating-point numbers, with 10000", id="huge"),
        (["true", None], True, "which holds text, with true; write `equals` in quotes"),
        (["4.0", None], 4.0, "which holds text, with 4.0; write `equals` in quotes"),
        ([True, None], "true", "which holds numbers, with the string 'true'; write `equals` without quotes"),
    ],
)
def test_a_value_that_a_column_cannot_hold_is_told(values, equals, message):
    with pytest.raises(UserError, match=f"an `observed_when` compares column 'seen', {message}"):
        _observed(pa.array(values), equals)
