"""The order of rows by key and time, against `np.lexsort`."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.point_in_time.sorting import sorted_order


@given(
    rows=st.integers(0, 300),
    distinct=st.integers(1, 40),
    spread=st.integers(0, 63),
    neighbours=st.integers(1, 4),
    in_time=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_ordered_by_key_then_time_then_value_then_place(rows, distinct, spread, neighbours, in_time, seed):
    rng = np.random.default_rng(seed)
    # Neighbours differ in their last bits alone, so that they share those that are sorted first.
    key = rng.integers(0, 2**63, distinct, np.uint64)[rng.integers(0, distinct, rows)] >> np.uint64(spread)
    key += rng.integers(0, neighbours, rows).astype(np.uint64)
    time, value = rng.integers(-9, 9, rows), rng.integers(-1, 2, rows)
    if in_time:
        time.sort()
    assert sorted_order(key, time).tolist() == np.lexsort((time, key)).tolist()
    assert sorted_order(key, time, value).tolist() == np.lexsort((value, time, key)).tolist()
