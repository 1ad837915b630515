"""Latest values that move on with rows, against a loop over all rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.latest_values import LatestValues
from mmoe_rec.log.columns import hash_rows
from mmoe_rec.log.rows import CachedValues
from tests.log.small_logs import DAY, START, at_times, log_rows, random_log, schema_of, times_of

FEATURES: dict[str, Any] = {
    "item": {"kind": "id", "column": "item"},
    "brand": {"kind": "id", "column": "brand"},
    "price": {"kind": "numeric", "column": "price"},
    "tags": {"kind": "ids", "column": "tags"},
    "age": {"kind": "id", "column": "age"},
}
SCHEMA = schema_of(FEATURES)
ATTRIBUTES = {"user": ["user", "age"], "candidate": ["item", "brand", "price", "tags"]}


def latest_of(table: pa.Table, columns: list[str]) -> dict[Any, tuple[Any, ...]]:
    actual: dict[Any, tuple[tuple[int, int], tuple[Any, ...]]] = {}
    hashes = hash_rows(log_rows(table, SCHEMA).table.select(columns))
    for row, *rank in zip(table.to_pylist(), times_of(table).tolist(), hashes.tolist(), strict=True):
        values = tuple(row[name] for name in columns)
        if values[0] not in actual or tuple(rank) >= actual[values[0]][0]:
            actual[values[0]] = tuple(rank), values
    return {key: values for key, (_, values) in actual.items()}


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("role", ["user", "candidate"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_in_any_batches_are_as_all_rows_at_once(seed: int, role: Any, strings: bool, tmp_path) -> None:
    rng, columns = np.random.default_rng(seed), ATTRIBUTES[role]
    table = random_log(seed, rows=250, strings=strings)
    table = at_times(table, np.minimum(times_of(table), START + (5 + 3 * (seed % 2)) * DAY))  # many rows of one instant
    early = (times_of(table) <= START + 5 * DAY) & (rng.random(250) < 0.5)  # other rows of the past come late
    before, after = table.filter(pa.array(early)), table.filter(pa.array(~early))
    after = after.take(pa.array(rng.permutation(len(after))))
    LatestValues.from_rows(log_rows(before, SCHEMA), role).save(tmp_path, role)
    recent, start = LatestValues.load(tmp_path, role, columns[0]), 0
    all_of_them = [(recent, before)]  # each stays as it is
    while start < len(after):
        size = int(rng.integers(1, 30))
        recent = recent.extended(log_rows(after.slice(start, size), SCHEMA), role)
        start += size
        all_of_them.append((recent, pa.concat_tables([before, after.slice(0, start)])))
    keys = table[columns[0]].unique()
    asked = pa.concat_arrays([keys, keys.slice(0, 3)])
    for values, rows in (*all_of_them, all_of_them[0]):
        want, actual = latest_of(rows, columns), values.fill_missing_columns({columns[0]: asked})
        for place, name in enumerate(columns[1:], 1):
            column = actual[name]
            assert isinstance(column, CachedValues)
            expected = [want[key][place] if key in want else None for key in asked.to_pylist()]
            assert column.array().to_pylist() == expected, name
            assert column.apply(sizes).tolist() == sizes(column.array()).tolist(), "also of what was made before"
        key_column = actual[columns[0]]
        assert isinstance(key_column, CachedValues)
        assert key_column.unseen.tolist() == [key not in want for key in asked.to_pylist()]
    whole = LatestValues.merge_all([LatestValues.from_rows(log_rows(item, SCHEMA), role) for item in (after, before)])
    expected = sorted(latest_of(table, columns).values(), key=lambda values: values[0])
    assert [tuple(row.values()) for row in whole.table.to_pylist()] == expected


def test_rows_of_one_instant_that_differ_in_a_list_have_no_order() -> None:
    first = at_times(random_log(0, rows=1), np.array([START]))
    place = first.schema.get_field_index("tags")
    parts = [
        first.set_column(place, first.schema.field(place), pa.array([tags], first["tags"].type))
        for tags in (["a"], ["b", "c"])
    ]
    values = [LatestValues.from_rows(log_rows(part, SCHEMA), "candidate") for part in parts]
    forwards, backwards = LatestValues.merge_all(values), LatestValues.merge_all(values[::-1])
    assert forwards.table.equals(backwards.table)


def sizes(values: pa.Array) -> np.ndarray:
    return np.array([-1 if value is None else len(str(value)) for value in values.to_pylist()])
