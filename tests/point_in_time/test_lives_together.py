"""Memories that forget, with levels of later events, against memories that were extended by them and against loops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.point_in_time import lives
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.join import LookUps
from mmoe_rec.point_in_time.live import levels
from mmoe_rec.point_in_time.live.layers import ForgetfulCounter, LayeredHistory
from mmoe_rec.point_in_time.live.levels import grown
from mmoe_rec.point_in_time.memory import CounterMemory
from mmoe_rec.point_in_time.search import AnyLookUps, UnsortedLookUps
from tests.point_in_time.test_lives import KEYS, WINDOW, Event, columns_of, counted, drawn, life

WINDOWS = (None, 0, 1, WINDOW)
ASKING = (LookUps.sort, UnsortedLookUps)
UNTIL = 60
LATE = 6  # the most that an event may come late, and count as if it had come on time


def small_levels(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALLEST": 6, "_GROWTH": 2, "_MANY": 12}.items():
        patch.setattr(levels, name, value)


def taken_in(
    memories: Sequence[Any], new: CounterMemory | HistoryMemory
) -> tuple[CounterMemory, ...] | tuple[HistoryMemory, ...]:
    def merged(one: Any, other: Any) -> Any:
        if isinstance(one, CounterMemory):
            return one.merged(other)
        return one.extended(other.events.key, other.events.known, other.items)

    return grown(memories, new, merged, size=lambda memory: len(memory.events)) if len(new.events) else tuple(memories)


def asked_from(floor: int) -> tuple[np.ndarray, np.ndarray]:
    """All keys, at all moments that are interesting, some before the floor."""
    moments = np.arange(floor - 2, UNTIL)
    return np.repeat(KEYS, len(moments)), np.tile(moments, len(KEYS))


def counters_agree(one: Any, two: Any, recency: bool = True) -> None:
    assert one.time.tolist() == two.time.tolist()
    for window in WINDOWS:
        for a, b in zip(one.totals(window), two.totals(window), strict=True):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
            assert np.signbit(a).tolist() == np.signbit(b).tolist()
    if recency:
        assert one.last_positive().tolist() == two.last_positive().tolist()


def lists_of(memory: HistoryMemory | LayeredHistory, asked: AnyLookUps, length: int) -> list[list[int]]:
    found = memory.last(asked, length)
    assert (found.values.dtype, found.lengths.dtype) == (np.int64, np.int32)
    found = found.take(asked.number)
    return [found.values[a:b].tolist() for a, b in pairwise(found.offsets.tolist())]


def parts_of(events: list[Event], arrives: np.ndarray, cuts: list[int]) -> list[list[Event]]:
    edges = [-1, *cuts, UNTIL + LATE]
    return [[e for e, at in zip(events, arrives, strict=True) if a <= at < b] for a, b in pairwise(edges)]


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    forget_after=st.integers(WINDOW, 9),
    cuts=st.lists(st.integers(0, 45), min_size=1, max_size=6).map(sorted),
    late=st.sampled_from([0, 1, 6, 40]),
    compacted=st.booleans(),
    labels=st.sampled_from(["none", "whole", "fractions"]),
)
def test_a_counter_forgets_over_levels_as_one_that_was_extended(
    seed, size, forget_after, cuts, late, compacted, labels
):
    random, events, known = drawn(seed, size)
    if labels == "fractions":
        sizes = random.choice([0.0, -0.0, 0.1, -0.3, 1e16, -1e16, 1e-300], size)
        events = [(key, moment, value) for (key, moment, _), value in zip(events, sizes.tolist(), strict=True)]
    if labels == "none":
        events = [(key, moment, 1) for key, moment, _ in events]
    late = late if late > LATE else min(late, forget_after)
    arrives = known + random.integers(0, late + 1, size)
    own, *further = parts_of(events, arrives, cuts)
    empty = CounterMemory.empty(labels != "none", True, labels == "fractions", forget_after)

    def with_events(memory: CounterMemory, some: list[Event]) -> CounterMemory:
        key, moments, label = columns_of(some)
        return memory.extended(key, moments, None if labels == "none" else label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lives, "_LATE", LATE)
        small_levels(patch)
        memory, floor, several, here = with_events(empty, own), 0, tuple[CounterMemory, ...](), list(own)
        if compacted:
            floor = cuts[0]
            columns = memory.compacted(floor, WINDOW).to_columns()
            for column in columns.values():
                column.flags.writeable = False  # as of memories that processes share
            memory = CounterMemory.from_columns(columns, floor, labels == "fractions", forget_after)
        expected = memory
        for some in further:
            several = taken_in(several, with_events(empty, some))
            expected, here = with_events(expected, some), here + some
            keys, times = asked_from(floor)
            for asking in ASKING:
                asked = asking(keys, times)
                found = ForgetfulCounter(memory, several).found(asked)
                counters_agree(expected.found(asked), found)
            if late > LATE or labels == "fractions":  # what comes so late is not what a loop sees
                continue
            (all_rows, all_labels), (rows, inside) = found.totals(None), found.totals(WINDOW)
            columns = all_rows, all_labels, rows, inside, found.last_positive()
            told = list(zip(*(each.tolist() for each in columns), strict=True))
            moments = np.maximum(times, floor) if compacted else times
            every = zip(keys.tolist(), moments.tolist(), strict=True)
            assert told == [counted(here, *each, forget_after) for each in every]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    forget_after=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 45), min_size=1, max_size=6).map(sorted),
    late=st.sampled_from([0, 1, 6, 40]),
    length=st.integers(1, 5),
    compacted=st.booleans(),
)
def test_a_history_forgets_over_levels_as_one_that_was_extended(
    seed, size, forget_after, cuts, late, length, compacted
):
    random, events, known = drawn(seed, size)
    late = late if late > LATE else min(late, forget_after)
    own, *further = parts_of(events, known + random.integers(0, late + 1, size), cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lives, "_LATE", LATE)
        small_levels(patch)
        memory, floor = HistoryMemory.empty(forget_after).extended(*columns_of(own)), 0
        if compacted:
            floor = cuts[0]
            columns = memory.compacted(floor, length).to_columns()
            memory = HistoryMemory.from_columns(columns, floor, forget_after)
        expected, several, here = memory, tuple[HistoryMemory, ...](), list(own)
        for some in further:
            several = taken_in(several, HistoryMemory.empty(forget_after).extended(*columns_of(some)))
            expected, here = expected.extended(*columns_of(some)), here + some
            keys, times = asked_from(floor)
            for asking in ASKING:
                asked = asking(keys, times)
                found = lists_of(LayeredHistory(memory, several), asked, length)
                assert found == lists_of(expected, asked, length)
            if late > LATE:
                continue
            moments = np.maximum(times, floor) if compacted else times
            every = zip(keys.tolist(), moments.tolist(), strict=True)
            lists = [[item for _, _, item in life(here, *each, forget_after)[:length][::-1]] for each in every]
            assert found == lists


SECOND = 1_000_000


@pytest.mark.parametrize(
    ("own", "further", "asked", "seen"),
    [
        # One goes on with a life exactly `forget_after` later, and not a microsecond after that.
        ([0], [10 * SECOND], 10 * SECOND, 2),
        ([0], [10 * SECOND + 1], 10 * SECOND + 1, 1),
        # A late one joins two lives, or just fails to.
        ([0, 20 * SECOND], [10 * SECOND], 20 * SECOND, 3),
        ([0, 20 * SECOND], [10 * SECOND - 1], 20 * SECOND, 1),
        ([0, 20 * SECOND], [10 * SECOND + 1], 20 * SECOND, 2),
        # One goes on with a life that had ended, which is forgotten all the same after as long again.
        ([0], [10 * SECOND], 20 * SECOND, 2),
        ([0], [10 * SECOND], 20 * SECOND + 1, 0),
        # Lives go back and forth between the parts.
        ([0, 16 * SECOND, 32 * SECOND], [8 * SECOND, 24 * SECOND], 42 * SECOND, 5),
        ([0, 16 * SECOND, 32 * SECOND], [5 * SECOND, 24 * SECOND], 42 * SECOND, 3),
        # Of one moment; and what is not known yet.
        ([5, 5], [5, 5], 5, 4),
        ([0], [5], 4, 1),
        ([], [5], 5, 1),
        ([7], [3 - 10 * SECOND], 7, 1),
    ],
)
def test_lives_of_several_parts_by_hand(own, further, asked, seen):
    def memory(times: list[int]) -> CounterMemory:
        key = np.full(len(times), KEYS[1])
        return CounterMemory.empty(forget_after=10 * SECOND).extended(key, np.array(times, int), np.ones(len(times)))

    def items(times: list[int]) -> HistoryMemory:
        return HistoryMemory.empty(10 * SECOND).extended(
            np.full(len(times), KEYS[1]), np.array(times, int), np.array(times, int)
        )

    every = sorted(each for each in own + further if each <= asked)
    for one, other in ((own, further), (further, own)):
        look_ups = UnsortedLookUps(KEYS[1:2], np.array([asked]))
        found = ForgetfulCounter(memory(one), [memory(other)]).found(look_ups)
        assert found.totals(None)[0].tolist() == [seen]
        history = LayeredHistory(items(one), [items(other)]).last(look_ups, 20)
        assert history.values.tolist() == every[len(every) - seen :]
