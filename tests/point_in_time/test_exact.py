"""Exact sums, against `fractions` and `math.fsum`, and the counters that rest on them, against a loop over rows."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.point_in_time.counters import ExactSums
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.logs import BuildOptions
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import (
    DAY,
    START,
    random_log,
    remembered,
    schema_of,
    times_of,
    write_log,
)

# Outliers beside which small labels are lost, numbers of all bits, the least and largest ones, and exact opposites.
LABELS = np.array([1e17, -1e17, 1e-9, -1e-9, 0.1, 0.5, 3.0, -7.0, 5e-324, 2.0**53, 1.0 + 2.0**-52, 1e300, -1e300, 0.0])
WINDOW = 5


def any_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Some of one size, some of all, some of those above."""
    kinds = [rng.normal(size=size), np.ldexp(rng.normal(size=size), rng.integers(-1074, 900, size))]
    return np.choose(rng.integers(0, 3, size), [*kinds, rng.choice(LABELS, size)])


numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(values=st.lists(numbers, min_size=1, max_size=12), opposites=st.integers(0, 12))
def test_a_sum_is_the_float_nearest_to_the_true_one(values, opposites):
    array = np.array(values + [-value for value in values[:opposites]])
    exact = ExactSums.of(array)
    np.testing.assert_array_equal(exact.rounded(), array)
    total = exact.each(lambda limb: limb.sum(keepdims=True)).rounded()
    true = sum(map(Fraction, array.tolist()))
    try:
        expected = float(true)
    except OverflowError:
        expected = math.inf if true > 0 else -math.inf
    assert total.tolist() == [expected]


@pytest.mark.parametrize("seed", range(30))
def test_a_sum_of_many_is_as_exact(seed):
    rng = np.random.default_rng(seed)
    values = any_labels(rng, 1000) if seed % 2 else np.ldexp(rng.integers(-(2**53), 2**53, 1000), -1074)
    exact = ExactSums.of(values)
    order = rng.permutation(1000)
    running = exact.each(lambda limb: limb[order].cumsum())
    assert running.rounded()[-1] == math.fsum(values)
    difference = running.each(lambda limb: limb[900:] - limb[:100])
    assert difference.rounded().tolist() == [math.fsum(values[order][n + 1 : n + 901]) for n in range(100)]


def test_numbers_alike_need_few_units():
    assert ExactSums.of(np.array([5.0, 2.0**31, 0.0])).units == (0,)
    assert ExactSums.of(np.array([12.5, 99.75])).units == (-1, 0)
    assert ExactSums.of(np.round(np.random.default_rng(0).lognormal(3, 1, 1000), 2)).units == (-2, -1, 0)


FEATURES = {
    "item": {"kind": "id", "column": "item", "min_count": 1},
    "spent_of_brand": {
        "kind": "counter",
        "task": "spent",
        "by": ["brand"],
        "outputs": ["positives", "rate"],
        "window_days": [None, 1, 2.5],
    },
}
SCHEMA = schema_of(FEATURES)
WINDOWS = {
    "train": (START, START + 3 * DAY),
    "validation": (START + 3 * DAY, START + 4 * DAY),
    "test": (START + 4 * DAY, None),
}


def log_with_outliers(seed: int, rows: int = 400) -> pa.Table:
    """A random log whose `spent` is small but for a few rows."""
    rng, table = np.random.default_rng(seed), random_log(seed, rows)
    small = np.round(rng.lognormal(size=rows), 2) * rng.choice([1, 1, 1e-9], rows)
    spent = np.where(rng.random(rows) < 0.02, rng.choice([1e17, -1e17, 1e30], rows), small)
    column = pa.array(spent, mask=rng.random(rows) < 0.1)
    return table.set_column(table.column_names.index("spent"), "spent", column)


@pytest.mark.parametrize("rows_in_memory", [30, 10**6])
@pytest.mark.parametrize("seed", range(2))
def test_neither_order_nor_chunks_nor_added_days_change_sums(tmp_path, seed, rows_in_memory):
    table = log_with_outliers(seed)
    days = (times_of(table) - START) // DAY
    # The labels of the first days are whole numbers: later ones need further units.
    spent = table["spent"].to_numpy()
    spent = pa.array(np.where(days < 6, np.rint(spent), spent), from_pandas=True)
    table = table.set_column(table.column_names.index("spent"), "spent", spent)
    parts = [table.filter(pa.array(inside)) for inside in (days < 6, (days >= 6) & (days < 8), days >= 8)]
    options, folder = BuildOptions(rows_in_memory=rows_in_memory), tmp_path / "log"
    shuffled = parts[0].take(pa.array(np.random.default_rng(seed).permutation(len(parts[0]))))
    log = str(write_log(folder, shuffled.slice(0, 90), shuffled.slice(90)))
    grown = prepare(log, SCHEMA, WINDOWS, tmp_path / "two", options)
    at_first = prepare(str(write_log(tmp_path / "first", parts[0])), SCHEMA, WINDOWS, tmp_path / "one")
    order = [(name, "ascending") for name in ("time", "user", "candidate")]
    for split in WINDOWS:
        one, two = (pq.read_table(each.split(split)).sort_by(order) for each in (at_first, grown))
        assert one.equals(two)
    assert at_first.layout == grown.layout
    name = "serving/spent_of_brand.memory"
    before = remembered(grown.folder / name)
    assert before == remembered(at_first.folder / name)
    for number, part in enumerate(parts[1:], 5):
        pq.write_table(part, folder / f"{number}.parquet")
        assert extend(log, SCHEMA, WINDOWS, tmp_path / "two", options) is not None
    whole = prepare(str(write_log(tmp_path / "whole", table)), SCHEMA, WINDOWS, tmp_path / "three")
    after = remembered(grown.folder / name)
    assert after == remembered(whole.folder / name)
    assert set(before.column_names) < set(after.column_names)
