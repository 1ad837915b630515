"""Sums of labels in whole units, against `fractions` and a loop over rows, and what is out of their range."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.kinds.counter import (
    LABEL_SCALE,
    MAX_LABEL_SUM,
    CounterEncoder,
    CounterStore,
    LookupTotals,
    round_labels,
)
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.point_in_time.join import Lookups
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import prepare
from tests.log.small_logs import (
    log_rows,
    random_log,
    schema_of,
    windows_of,
    with_column,
    write_log,
)

ITEM = {"kind": "id", "column": "item", "min_count": 1}
COUNTER = {"kind": "counter", "task": "spent", "by": ["brand"], "outputs": ["rate"], "window_days": [None, 1, 2.5]}
SCHEMA = schema_of({"item": ITEM, "spent_of_brand": COUNTER})
TOO_LARGE = "Counter 'spent_of_brand': a sum of labels of 'spent' exceeds 4.4e\\+12. Write the column in a larger unit"


def rounded(label: float) -> Fraction:
    """The multiple of 2^-20 that is nearest, of two the even one."""
    return Fraction(round(Fraction(label) * 2**20), 2**20)


def compute_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Of all sizes within the range, some of them opposites, some halfway between two units."""
    sizes = np.ldexp(rng.normal(size=size), rng.integers(-30, 28, size))
    halves = (rng.integers(-(2**20), 2**20, size) + 0.5) / LABEL_SCALE
    labels = np.choose(rng.integers(0, 3, size), [sizes, halves, np.round(rng.lognormal(3, 1, size), 2)])
    return np.where(rng.random(size) < 0.2, -rng.permutation(labels), labels)


@pytest.mark.parametrize("seed", range(20))
def test_a_sum_is_the_float_nearest_to_that_of_rounded_labels_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    key, known = rng.integers(0, 3, 400).astype(np.uint64), rng.integers(0, 100, 400)
    labels = compute_labels(rng, 400)
    exact = [rounded(label) for label in labels.tolist()]
    assert round_labels(labels).tolist() == [float(label) for label in exact]
    store, edges = CounterStore.empty(), np.sort(rng.integers(0, 400, 3))
    for part in np.split(rng.permutation(400), edges):
        store = store.extended(key[part], known[part], labels[part])
    at_once = CounterStore.empty().extended(key, known, labels)
    for name, column in store.to_columns().items():
        np.testing.assert_array_equal(column, at_once.to_columns()[name])
    keys, times = np.repeat(np.arange(3), 110).astype(np.uint64), np.tile(np.arange(-5, 105), 3)
    seen = LookupTotals(store, Lookups.one_per_row(keys, times))
    for window in (None, 10):
        inside = (key == keys[:, None]) & (known <= times[:, None])
        if window is not None:
            inside &= known > times[:, None] - window
        actual = seen.totals(window)
        assert actual[0].tolist() == inside.sum(axis=1).tolist()
        assert actual[1].tolist() == [float(sum(exact[row] for row in np.flatnonzero(rows))) for rows in inside]


def test_sums_up_to_the_range_are_exact_and_beyond_it_refused() -> None:
    largest = np.nextafter(MAX_LABEL_SUM, 0)
    key, known = np.zeros(3, np.uint64), np.arange(3)
    labels = np.array([largest, -largest, -1.0])
    store = CounterStore.empty().extended(key, known, labels)
    asked = Lookups.one_per_row(key, known)
    assert LookupTotals(store, asked).totals(None)[1].tolist() == [largest, 0.0, -1.0]
    for beyond in (
        [MAX_LABEL_SUM],
        [-MAX_LABEL_SUM],
        [np.inf],
        [MAX_LABEL_SUM / 2, MAX_LABEL_SUM / 2],
        [-MAX_LABEL_SUM / 2] * 3,
        [1e12] * 9,
        [1.0] * 8 + [largest],
    ):
        key = np.zeros(len(beyond), np.uint64)
        for known in (np.arange(len(beyond)), np.zeros(len(beyond), np.int64)):
            with pytest.raises(OverflowError):
                CounterStore.empty().extended(key, known, np.array(beyond))
    # The sum of a window may be twice as large as that of all of the past.
    store = CounterStore.empty().extended(np.zeros(3, np.uint64), np.arange(3), np.array([-4e12, 4e12, 4e12]))
    assert LookupTotals(store, Lookups.one_per_row(np.zeros(1, np.uint64), np.array([2]))).totals(2)[1] == [8e12]


def test_a_build_and_a_server_refuse_sums_beyond_the_range(tmp_path) -> None:
    table = random_log(0, 300)
    spent = np.full(300, 1e10)
    build = str(write_log(tmp_path / "log", with_column(table, "spent", pa.array(spent))))
    prepared = prepare(BuildInputs(build, SCHEMA, windows_of(3, 4), tmp_path / "work"))
    pipeline = FeaturePipeline.load(prepared.serving)
    largest = max(np.bincount(pa.compute.dictionary_encode(table["brand"].combine_chunks()).indices.drop_null()))
    assert largest * 1e10 < MAX_LABEL_SUM / 2

    def further(label: float, rows: int = 1, first: int = 0) -> dict:
        few = table.slice(first, rows)
        brand = with_column(few, "brand", pa.array(["a"] * rows))
        return {None: log_rows(with_column(brand, "spent", pa.array([label] * rows)), SCHEMA)}

    live = pipeline.live.extended(further(4e12))
    live = live.extended(further(-4e12, first=1)).extended(further(4e12, first=299))
    for too_much in (further(1e13), further(8e12), further(1e12, rows=9), further(5e12, first=298)):
        with pytest.raises(UserError, match=r"Counter .*: a sum of labels.* exceeds 4.4e\+12"):
            live.extended(too_much)
    assert isinstance(pipeline.encoders["spent_of_brand"], CounterEncoder)
    learnt = pipeline.with_live(live.extended(further(-4e12)))
    assert learnt.encode(log_rows(table, SCHEMA)).dense.shape[0] == 300
    for too_much in (1e13, 5e11):
        spent[:] = too_much
        source = str(write_log(tmp_path / f"{too_much:g}", with_column(table, "spent", pa.array(spent))))
        with pytest.raises(UserError, match=TOO_LARGE):
            prepare(BuildInputs(source, SCHEMA, windows_of(3, 4), tmp_path / "refused"))
