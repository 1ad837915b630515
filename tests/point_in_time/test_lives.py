"""Memories that forget, against loops over all events: cut at any moments, with late events, in every way of asking."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.point_in_time import lives
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.join import LookUps
from mmoe_rec.point_in_time.memory import NEVER, CounterMemory
from mmoe_rec.point_in_time.search import AnyLookUps, UnsortedLookUps
from mmoe_rec.point_in_time.together import CounterQuestion, CountersTogether

KEYS = np.array([0, 5, 2**40, 2**64 - 1], np.uint64)
WINDOW = 3
UNTIL = 45
Event = tuple[int, int, float]  # key, known, label or item


def life(events: list[Event], key: int, now: int, forget_after: int) -> list[Event]:
    """What a look-up sees, the last one first."""
    seen: list[Event] = []
    later = now
    for event in sorted((each for each in events if each[0] == key and each[1] <= now), reverse=True):
        if later - event[1] > forget_after:
            break
        seen.append(event)
        later = event[1]
    return seen


def counted(events: list[Event], key: int, now: int, forget_after: int) -> tuple[Any, ...]:
    """rows and sum of labels of all of the life, of the window, and the last positive event."""
    seen = life(events, key, now, forget_after)
    inside = [label for _, known, label in seen if known > now - WINDOW]
    labels = [label for _, _, label in seen]
    last = max((known for _, known, label in seen if label > 0), default=NEVER)
    return len(labels), math.fsum(labels), len(inside), math.fsum(inside), last


def told(memory: CounterMemory, asked: AnyLookUps, how: str, forget_after: int = 1) -> list[tuple[Any, ...]]:
    if how == "together":
        assert isinstance(asked, UnsortedLookUps)
        other = CounterMemory.empty(forget_after=forget_after).extended(KEYS, np.arange(4), np.ones(4, np.int8))
        questions = [CounterQuestion(each, asked, [None, WINDOW], True) for each in (other, memory, other)]
        found: Any = CountersTogether([other, memory]).answer(questions)[1]
    else:
        found = memory.found(asked)
    columns = (*found.totals(None), *found.totals(WINDOW), found.last_positive())
    return list(zip(*(each[asked.number].tolist() for each in columns), strict=True))


ASKING: dict[str, Callable[[np.ndarray, np.ndarray], AnyLookUps]] = {
    "joined": LookUps.sort,
    "searched": UnsortedLookUps,
    "together": UnsortedLookUps,
}


def drawn(seed: int, size: int) -> tuple[np.random.Generator, list[Event], np.ndarray]:
    """Events, and the moment at which each arrives: that at which it is known, or one up to so many later."""
    rng = np.random.default_rng(seed)
    key, known = rng.choice(KEYS[:3], size), rng.integers(0, 40, size)
    return rng, list(zip(key.tolist(), known.tolist(), rng.integers(0, 2, size).tolist(), strict=True)), known


def columns_of(events: list[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    key, known, value = zip(*events, strict=True) if events else ((), (), ())
    return np.array(key, np.uint64), np.array(known, np.int64), np.array(value)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    forget_after=st.integers(WINDOW, 9),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
    late=st.integers(0, 6),
    fractions=st.booleans(),
    how=st.sampled_from(sorted(ASKING)),
)
def test_a_counter_answers_as_a_loop_whatever_was_dropped_and_when(
    seed, size, forget_after, cuts, late, fractions, how
):
    rng, events, known = drawn(seed, size)
    if fractions:
        events = [(key, moment, label * 0.1) for key, moment, label in events]
        how = "searched" if how == "together" else how
    late = min(late, forget_after)
    arrives = known + rng.integers(0, late + 1, size)
    memory = CounterMemory.empty(fractions=fractions, forget_after=forget_after)
    whole = memory.extended(*columns_of(events))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lives, "_LATE", late)
        for start, end in pairwise([-1, *cuts, UNTIL]):
            come = [event for event, at in zip(events, arrives, strict=True) if start <= at < end]
            memory = memory.extended(*columns_of(come))
            here = [event for event, at in zip(events, arrives, strict=True) if at < end]
            keys, times = np.repeat(KEYS, end - start), np.tile(np.arange(start, end), len(KEYS))
            expected = [counted(here, *each, forget_after) for each in zip(keys.tolist(), times.tolist(), strict=True)]
            assert told(memory, ASKING[how](keys, times), how, forget_after) == expected
            memory = memory.compacted(end, WINDOW)
            memory = CounterMemory.from_columns(memory.to_columns(), end, fractions, forget_after)
        if late == 0:
            at_once = whole.compacted(UNTIL, WINDOW).to_columns()
            for name, column in memory.to_columns().items():
                np.testing.assert_array_equal(column, at_once[name], err_msg=name)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    forget_after=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
    length=st.integers(1, 4),
    how=st.sampled_from(["joined", "searched"]),
)
def test_a_history_lists_the_last_of_a_life_whatever_was_dropped_and_when(seed, size, forget_after, cuts, length, how):
    rng, events, known = drawn(seed, size)
    late = forget_after
    arrives = known + rng.integers(0, late + 1, size)
    memory = HistoryMemory.empty(forget_after)
    for start, end in pairwise([-1, *cuts, UNTIL]):
        memory = memory.extended(*columns_of([e for e, at in zip(events, arrives, strict=True) if start <= at < end]))
        here = [event for event, at in zip(events, arrives, strict=True) if at < end]
        keys, times = np.repeat(KEYS, end - start), np.tile(np.arange(start, end), len(KEYS))
        asked = ASKING[how](keys, times)
        found = memory.last(asked, length).take(asked.number)
        lists = [found.values[a:b].tolist() for a, b in pairwise(found.offsets.tolist())]
        expected = [
            life(here, *each, forget_after)[:length][::-1] for each in zip(keys.tolist(), times.tolist(), strict=True)
        ]
        assert lists == [[item for _, _, item in each] for each in expected]
        memory = HistoryMemory.from_columns(memory.compacted(end, length).to_columns(), end, forget_after)


def test_a_key_without_news_goes_from_memory_some_days_after_it_is_forgotten():
    day = 86_400_000_000
    for memory in (
        CounterMemory.empty(forget_after=30 * day).extended(KEYS[:1], np.zeros(1, np.int64), np.ones(1, np.int8)),
        HistoryMemory.empty(30 * day).extended(KEYS[:1], np.zeros(1, np.int64), np.ones(1, np.int64)),
    ):
        kept = 30 * day + lives.LATE_DAYS * day
        assert len(memory.compacted(kept, 1).events) == 1
        assert len(memory.compacted(kept + 1, 1).events) == 0


def test_without_a_limit_a_memory_forgets_nothing():
    memory = CounterMemory.empty().extended(KEYS[:1], np.zeros(1, np.int64), np.ones(1, np.int8))
    assert told(memory.compacted(2**60, 1), UnsortedLookUps(KEYS[:1], np.array([2**61])), "searched")[0][:2] == (1, 1)
