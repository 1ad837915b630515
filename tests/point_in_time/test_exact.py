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
    windows_of,
    with_column,
    write_log,
)

# Outliers beside which small labels are lost, numbers of all bits, the least and largest ones, and exact opposites.
LABELS = np.array([1e17, -1e17, 1e-9, -1e-9, 0.1, 0.5, 3.0, -7.0, 5e-324, 2.0**53, 1.0 + 2.0**-52, 1e300, -1e300, 0.0])


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


@pytest.mark.parametrize("rows_in_memory", [30, 10**6])
def test_neither_order_nor_chunks_nor_added_days_change_sums(tmp_path, rows_in_memory):
    """A log whose labels are small but for a few; those of the first days are whole numbers, later ones need further
    units."""
    rng, table = np.random.default_rng(0), random_log(0, 400)
    days, small = (times_of(table) - START) // DAY, np.round(rng.lognormal(size=400), 2) * rng.choice([1, 1, 1e-9], 400)
    spent = np.where(rng.random(400) < 0.02, rng.choice([1e17, -1e17, 1e30], 400), small)
    table = with_column(table, "spent", pa.array(np.where(days < 6, np.rint(spent), spent), mask=rng.random(400) < 0.1))
    item = {"kind": "id", "column": "item", "min_count": 1}
    counter = {"kind": "counter", "task": "spent", "by": ["brand"], "outputs": ["rate"], "window_days": [None, 1, 2.5]}
    schema, windows = schema_of({"item": item, "spent_of_brand": counter}), windows_of(3, 4)
    first, *added = (table.filter(pa.array(inside)) for inside in (days < 6, (days >= 6) & (days < 8), days >= 8))
    shuffled = first.take(pa.array(rng.permutation(len(first))))
    options, log = BuildOptions(rows_in_memory=rows_in_memory), tmp_path / "log"
    write_log(log, shuffled.slice(0, 90), shuffled.slice(90))
    grown = prepare(str(log), schema, windows, tmp_path / "grown", options).folder / "serving/spent_of_brand.memory"
    before = remembered(grown)
    for number, part in enumerate(added, 5):
        pq.write_table(part, log / f"{number}.parquet")
        assert extend(str(log), schema, windows, tmp_path / "grown", options) is not None
    whole = prepare(str(write_log(tmp_path / "whole", table)), schema, windows, tmp_path / "at_once")
    after = remembered(grown)
    assert after == remembered(whole.serving / "spent_of_brand.memory")
    assert set(before.column_names) < set(after.column_names)
