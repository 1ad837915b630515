"""Memories with levels of later events against memories that were extended by them, which are the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.point_in_time import levels as module
from mmoe_rec.point_in_time import memory as memories
from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.join import LookUps
from mmoe_rec.point_in_time.layers import ForgetfulCounter, LayeredCounter, LayeredHistory
from mmoe_rec.point_in_time.levels import LEVELS, CounterLevel, CounterLevels, grown
from mmoe_rec.point_in_time.memory import CounterMemory
from mmoe_rec.point_in_time.search import UnsortedLookUps
from mmoe_rec.point_in_time.together import CounterQuestion, CountersTogether, add_levels, salt_of
from tests.point_in_time.test_memories import (
    KEYS,
    WINDOW,
    Event,
    columns_of,
    counter_of,
    drawn,
    extended,
    history_of,
    lists_of,
)

WINDOWS = (None, 0, 1, WINDOW)
ASKING = (LookUps.sort, UnsortedLookUps)
UNTIL = 60
LATE = 6  # the most that an event may come late, and count as if it had come on time


@pytest.fixture(autouse=True, scope="module")
def small_levels() -> Any:
    """So that a few dozen events fill several levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memories, "_LATE", LATE)
        for name, value in {"SMALLEST": 6, "_GROWTH": 2, "_MANY": 12}.items():
            patch.setattr(module, name, value)
        yield


def read_only(memory: Any) -> None:
    """As memories are that processes share."""
    for column in memory.to_columns().values():
        column.flags.writeable = False


def all_at(floor: int) -> tuple[np.ndarray, np.ndarray]:
    """All keys, at all moments that are interesting, some before the floor."""
    moments = np.arange(floor - 2, UNTIL)
    return np.repeat(KEYS, len(moments)), np.tile(moments, len(KEYS))


def assert_agree(one: Any, two: Any, windows: Sequence[int | None] = WINDOWS, recency: bool = True) -> None:
    assert one.time.tolist() == two.time.tolist()
    for window in windows:
        for a, b in zip(one.totals(window), two.totals(window), strict=True):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
            assert np.signbit(a).tolist() == np.signbit(b).tolist()
    if recency:
        assert one.last_positive().tolist() == two.last_positive().tolist()


def in_parts(random: np.random.Generator, events: list[Event], late: int, cuts: list[int]) -> list[list[Event]]:
    """The events before the first cut, then those between cuts, by the moments at which they arrive."""
    arrives = np.array([known for _, known, _ in events], int) + random.integers(0, late + 1, len(events))
    part = np.searchsorted(cuts, arrives, side="right")
    return [[e for e, at in zip(events, part, strict=True) if at == place] for place in range(len(cuts) + 1)]


LEVELLED = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(0, 60),
    "forget_after": st.none() | st.integers(WINDOW, 9),
    "cuts": st.lists(st.integers(0, 45), min_size=1, max_size=6).map(sorted),
    "late": st.sampled_from([0, 1, LATE, 40]),
    "compacted": st.booleans(),
}


@given(**LEVELLED, labels=st.sampled_from(["none", "whole", "fractions"]), salt=st.integers(0, 3))
def test_a_counter_with_levels_is_one_that_was_extended(seed, size, forget_after, cuts, late, compacted, labels, salt):
    random, events, _ = drawn(seed, size, labels)
    own, *further = in_parts(random, events, late, cuts)
    memory, floor, mixed = counter_of(own, labels, forget_after), 0, salt_of(salt)
    if compacted:
        floor = cuts[0]
        columns = memory.compacted(floor, WINDOW).to_columns()
        memory = CounterMemory.from_columns(columns, floor, labels == "fractions", forget_after)
    read_only(memory)
    before = {name: column.copy() for name, column in memory.to_columns().items()}
    expected, several = memory, tuple[Any, ...]()
    for some in further:
        expected = extended(expected, some)
        if forget_after is None:
            key, known, label = columns_of(some)
            level = CounterLevel.of(key ^ mixed, known, label if labels == "fractions" else label.astype(np.int8))
            several = grown(several, level, CounterLevel.merged)
            layered: Any = LayeredCounter(memory, several, mixed)
        else:
            if some:
                new = counter_of(some, labels, forget_after)
                several = grown(several, new, CounterMemory.merged, size=lambda each: len(each.events))
            layered = ForgetfulCounter(memory, several)
        assert len(several) <= LEVELS
        for asking in ASKING:
            look_ups = asking(*all_at(floor))
            assert_agree(expected.found(look_ups), layered.found(look_ups))
    for name, column in memory.to_columns().items():
        assert column.tolist() == before[name].tolist()


@given(**LEVELLED, length=st.integers(1, 5))
def test_a_history_with_levels_is_one_that_was_extended(seed, size, forget_after, cuts, late, compacted, length):
    random, events, _ = drawn(seed, size)
    own, *further = in_parts(random, events, late, cuts)
    memory, floor = history_of(own, forget_after), 0
    if compacted:
        floor = cuts[0]
        memory = HistoryMemory.from_columns(memory.compacted(floor, length).to_columns(), floor, forget_after)
    read_only(memory)
    expected, several = memory, tuple[HistoryMemory, ...]()
    for some in further:
        if some:
            key, known, item = columns_of(some)
            expected = expected.extended(key, known, item.astype(np.int64))
            several = grown(
                several,
                history_of(some, forget_after),
                lambda one, two: one.extended(two.events.key, two.events.known, two.items),
                size=lambda each: len(each.events),
            )
        for asking in ASKING:
            look_ups = asking(*all_at(floor))
            assert lists_of(LayeredHistory(memory, several), look_ups, length) == lists_of(expected, look_ups, length)


@pytest.mark.parametrize("seed", range(15))
def test_levels_of_many_counters_add_to_what_their_memories_answer(seed: int) -> None:
    """One table holds the events of all counters; the memories' own arrays stay as they are."""
    random = np.random.default_rng(seed)
    kinds = ["none" if random.random() < 0.3 else "whole" for _ in range(4)]
    memories, salts = [], [salt_of(place) for place in range(4)]
    for labels in kinds:
        memory = counter_of(drawn(int(random.integers(10**6)), 20, labels)[1], labels)
        memories.append(memory.compacted(int(random.integers(20, 40)), 40) if random.random() < 0.5 else memory)
    expected, several, together = list(memories), CounterLevels(), CountersTogether(memories)
    for memory in memories:
        read_only(memory)
    for _ in range(int(random.integers(1, 8))):
        added = []
        for place, labels in enumerate(kinds):
            some = drawn(int(random.integers(10**6)), int(random.choice([0, 1, 2, 7, 30])), labels)[1]
            expected[place] = extended(expected[place], some)
            key, known, label = columns_of(some)
            added.append((key ^ salts[place], known, label.astype(np.int8)))
        several = several.extended(CounterLevel.of(*map(np.concatenate, zip(*added, strict=True))))
    questions, places = [], [place for place in range(4) if random.random() < 0.8]
    for place in places:
        rows = int(random.choice([0, 1, 30]))
        look_ups = UnsortedLookUps(random.choice(KEYS, rows), random.integers(-5, 90, rows))
        windows = [each for each in (None, 0, 5, 40) if random.random() < 0.6]
        questions.append(CounterQuestion(memories[place], look_ups, windows, bool(random.random() < 0.6)))
    answers = together.answer(questions)
    add_levels(several, questions, [salts[place] for place in places], answers)
    for place, question, answer in zip(places, questions, answers, strict=True):
        one = expected[place].found(question.asked)
        assert answer.time.tolist() == one.time.tolist()
        for window in question.windows:
            for a, b in zip(answer.totals(window), one.totals(window), strict=True):
                assert a.tolist() == b.tolist()
        if question.recency:
            assert answer.last_positive().tolist() == one.last_positive().tolist()


def test_an_event_is_copied_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALLEST": 64, "_GROWTH": 8, "_MANY": 2048}.items():
        monkeypatch.setattr(module, name, value)
    copied, several, most = 0, tuple[int, ...](), 0

    def merged(one: int, other: int) -> int:
        nonlocal copied
        copied += one + other
        return one + other

    for _ in range(4096):
        several = grown(several, 4, merged, size=int)
        most = max(most, len(several))
    assert sum(several) == 4 * 4096
    assert most == LEVELS
    assert list(several) == sorted(several, reverse=True)
    assert copied < 60 * 4 * 4096  # of one level it would be 2,048 times


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
        # Lives go back and forth between the parts.
        ([0, 16 * SECOND, 32 * SECOND], [8 * SECOND, 24 * SECOND], 42 * SECOND, 5),
        ([0, 16 * SECOND, 32 * SECOND], [5 * SECOND, 24 * SECOND], 42 * SECOND, 3),
        # Of one moment; and what is not known yet.
        ([5, 5], [5, 5], 5, 4),
        ([0], [5], 4, 1),
        ([], [5], 5, 1),
    ],
)
def test_lives_of_several_parts_by_hand(own, further, asked, seen):
    def both(times: list[int]) -> tuple[CounterMemory, HistoryMemory]:
        events = [(int(KEYS[1]), time, float(time)) for time in times]
        return counter_of(events, forget_after=10 * SECOND), history_of(events, 10 * SECOND)

    every = sorted(each for each in own + further if each <= asked)
    for one, other in ((own, further), (further, own)):
        (counter, history), (later, items) = both(one), both(other)
        look_ups = UnsortedLookUps(KEYS[1:2], np.array([asked]))
        assert ForgetfulCounter(counter, [later]).found(look_ups).totals(None)[0].tolist() == [seen]
        assert LayeredHistory(history, [items]).last(look_ups, 20).values.tolist() == every[len(every) - seen :]
