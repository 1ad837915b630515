"""Exact means and deviations, against `fractions` and numpy."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.features.numbers import Moments
from tests.log.small_logs import DAY, START, fit, random_log, schema_of


def moments_of(*parts: np.ndarray) -> Moments:
    """Of parts that are taken one by one, and merged as they are after a round trip."""
    whole = Moments()
    for part in parts:
        moments = Moments()
        moments.add(part)
        whole.merge(Moments.from_table(moments.to_table()))
    return whole


@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9).map(float), min_size=1),
    cuts=st.lists(st.integers(0, 60), max_size=3).map(sorted),
    seed=st.integers(0, 99),
)
def test_mean_and_deviation_are_those_of_fractions(values, cuts, seed):
    shuffled = np.random.default_rng(seed).permutation(np.array(values))
    found = moments_of(*np.split(shuffled, cuts))
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    assert found.mean == float(mean)
    variance = sum((value - mean) ** 2 for value in exact) / len(exact)
    if variance * 2**98 <= mean**2:
        assert found.deviation == 1
    elif found.deviation > 1e-300:
        assert abs(Fraction(found.deviation) ** 2 / variance - 1) < Fraction(1, 2**50)


@pytest.mark.parametrize("offset", [0.0, 1e6, -3e5])
def test_an_offset_costs_no_digit(offset):
    values = np.random.default_rng(0).normal(size=2000) + offset
    found = moments_of(values[:700], np.append(values[700:], [np.nan, np.inf]))
    assert found.count == 2000
    assert found.mean == pytest.approx(values.mean(), rel=1e-14)
    assert found.deviation == pytest.approx(values.std(), rel=1e-9)


def test_labels_far_from_zero_are_scaled_by_their_spread():
    """Beside an offset, a mean of rounded labels would be many deviations off."""
    table = random_log(0)
    spent = 1e6 + np.random.default_rng(0).normal(size=300)
    table = table.set_column(table.column_names.index("spent"), "spent", pa.array(spent))
    schema = schema_of({"n": {"kind": "counter", "task": "spent", "by": ["item"]}})
    pipeline = fit(table, schema, START + 100 * DAY)
    mean, deviation = pipeline.label_scales["spent"]
    assert mean == pytest.approx(spent.mean(), rel=1e-15)
    assert deviation == pytest.approx(spent.std(), rel=1e-9)
    assert pipeline.encoders["n"].prior == mean
