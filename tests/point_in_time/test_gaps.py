"""Gaps between positive events against a plain loop: cut at any moments, in memories and levels, with late events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.point_in_time import memory as module
from mmoe_rec.point_in_time.counters import CounterMemory, SeenTotals
from mmoe_rec.point_in_time.memory import grown
from tests.point_in_time.test_memories import ASKING, KEYS, WINDOW, Event, drawn, extended
from tests.reference import features

TICK = 700_000  # microseconds: some moments are in one second
LATE = 6 * TICK
UNTIL = 50 * TICK


@pytest.fixture(autouse=True, scope="module")
def small_levels() -> Iterator[None]:
    """So that a few dozen events fill several levels, and some come too late."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_LATE": LATE, "SMALLEST": 6, "_GROWTH": 2, "_MANY": 12}.items():
            patch.setattr(module, name, value)
        yield


def memory_of(events: list[Event], labels: str, floor: int | None = None) -> CounterMemory:
    empty = CounterMemory.empty(labels != "none", False, labels == "fractions", gaps=True)
    return extended(empty.with_columns(empty.to_columns(), floor), events)


def told(memory: CounterMemory, keys: np.ndarray, times: np.ndarray, asking: Any) -> list[tuple[Any, ...]]:
    look_ups = asking(keys, times)
    found = SeenTotals(memory, look_ups)
    gaps = found.gaps()
    values = gaps.moments, gaps.mean / features.DAY, gaps.deviation / features.DAY, (found.time - gaps.last) / gaps.mean
    columns = (np.asarray(each)[look_ups.number].tolist() for each in (*values, *found.totals(None)))
    return list(zip(*columns, strict=True))


def expected_of(events: list[Event], counted: list[Event], key: int, now: int) -> tuple[Any, ...]:
    """The same by the reference; `counted`: the events of which gaps know."""
    seen = features.visible_events(counted, key, now)
    moments = {known for _, known, label in seen if label > 0}
    found = [np.nan if value is None else value for value in features.gaps(seen, now).values()]
    return len(moments), *found, *features.totals(features.visible_events(events, key, now), now)


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    cuts=st.lists(st.integers(1, 45), min_size=1, max_size=6).map(sorted),
    late=st.sampled_from([0, 1, 6, 40]),
    compactions=st.integers(0, 3),
    labels=st.sampled_from(["whole", "none", "fractions"]),
)
def test_gaps_are_the_reference_in_memories_and_levels(seed, size, cuts, late, compactions, labels):
    random, events, known = drawn(seed, size, labels)
    events = [(key, at * TICK, label) for key, at, label in events]
    part = np.searchsorted(cuts, known + random.integers(0, late + 1, size), side="right")
    memory, several, floor = memory_of([], labels), tuple[CounterMemory, ...](), None
    arrived: list[Event] = []
    counted: list[Event] = []
    for turn, end in enumerate([*cuts, 100]):
        some = [event for event, place in zip(events, part, strict=True) if place == turn]
        arrived += some
        counted += [event for event in some if floor is None or event[1] > floor - LATE]
        learnt = extended(memory, some)  # by a build, which goes on with this memory, ...
        if some and turn > compactions:  # ... or by a server, beside what was saved before
            several = grown(several, memory_of(some, labels, floor), CounterMemory.merged)
        moments = np.arange(0 if floor is None else floor - 2 * TICK, UNTIL, TICK)
        keys, times = np.repeat(KEYS, len(moments)), np.tile(moments, len(KEYS))
        asked = zip(keys.tolist(), (times if floor is None else np.maximum(times, floor)).tolist(), strict=True)
        expected = [expected_of(arrived, counted, *each) for each in asked]
        for asking in ASKING:
            everything = learnt if turn <= compactions else memory.with_levels(several)
            np.testing.assert_allclose(told(everything, keys, times, asking), expected, rtol=1e-12, atol=1e-15)
        if turn < compactions:
            floor = end * TICK
            memory = learnt.with_columns(learnt.compacted(floor, WINDOW * TICK).to_columns(), floor)
        elif turn == compactions:
            memory = learnt


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 45), min_size=1, max_size=6).map(sorted))
def test_what_is_kept_of_gaps_does_not_depend_on_when_events_were_taken(seed, cuts):
    _, events, known = drawn(seed, 60)
    events = [(key, at * TICK, label) for key, at, label in events]
    memory = memory_of([], "whole")
    for turn, end in enumerate([*cuts, 46]):
        part = np.searchsorted(cuts, known, side="right") == turn
        memory = extended(memory, [event for event, here in zip(events, part, strict=True) if here])
        memory = memory.with_columns(memory.compacted(end * TICK, 0).to_columns(), end * TICK)
    at_once = memory_of(events, "whole").compacted(46 * TICK, 0).to_columns()
    assert len(at_once["key"]) < 60
    for name, column in memory.to_columns().items():
        np.testing.assert_array_equal(column, at_once[name], err_msg=name)


def test_a_gap_of_ages_adds_up() -> None:
    """A wrong time, the year 1, beside times of today: squares stay within 64 bits."""
    years = np.array([-62_135_596_800, 1_700_000_000, 1_700_086_400, 1_700_172_800]) * 1_000_000
    memory = memory_of([(5, int(at), 1.0) for at in years], "whole")
    (moments, mean, deviation, *_) = told(memory, KEYS[1:2], years[-1:], ASKING[0])[0]
    assert moments == 4
    assert mean == pytest.approx((years[-1] - years[0]) / 3 / features.DAY)
    assert deviation >= 0
