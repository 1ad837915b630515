"""Sorting events and finding the last one known, against naive loops; memories that are cut and extended."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.point_in_time.join import Lookups, MergeJoin, SearchJoin, SortedEvents

WAYS = ((MergeJoin, Lookups.sort), (SearchJoin, Lookups.sort), (SearchJoin, Lookups.one_per_row))
# Few keys and moments, so that ties are met; keys alike in their last bits and in all but these.
KEYS = np.array([0, 1, 2, 2**40, 2**40 + 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)


def _events(data, size: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = data.draw(st.integers(0, size))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    known = random.integers(-5, 15, number)
    if data.draw(st.booleans()):
        known = np.sort(known)
    return random.choice(KEYS, number), known, random.integers(0, 3, number).astype(np.float64)


@given(data=st.data(), rows=st.integers(0, 60), way=st.sampled_from(WAYS))
@pytest.mark.parametrize(("unit", "start"), [(1, 0), (1, 2**62 - 10**3), (1_000, 77_000), (1_000_000, -3_000_000)])
def test_the_last_known_event_is_that_of_a_loop(data, rows, way, unit, start):
    """unit: of times that are asked for; events become known at any moment. From 2^62 on there is no room for keys."""
    key, known, _ = _events(data)
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    known = start + known * unit + random.integers(-1, 2, len(known))
    if start > 2**61 and len(known):
        known[random.integers(len(known))] = -(2**62)
    order = np.lexsort((known, key))
    events = SortedEvents(key[order], known[order])
    keys, times = random.choice(KEYS, rows), start + unit * random.integers(-7, 17, rows)
    kind, ask = way
    asked = ask(keys, times)
    join = kind(events, asked)
    for earlier in (0, 3 * unit, unit // 1000, 6 * unit, 2 * unit):  # windows of several units share a join
        actual = join.last(earlier)[asked.inverse]
        for row in range(rows):
            before = np.flatnonzero((events.key == keys[row]) & (events.available_at <= times[row] - earlier))
            assert actual[row] == (before[-1] if len(before) else -1)
            if len(before):
                assert join.first[asked.inverse][row] == np.flatnonzero(events.key == keys[row])[0]
