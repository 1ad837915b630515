"""Memories with levels of later events against memories that were extended by them, which are the reference's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.features.kinds.counter import CounterMemory, SeenTotals
from mmoe_rec.features.kinds.history import HistoryMemory
from mmoe_rec.point_in_time import join as module
from mmoe_rec.point_in_time.join import LEVELS, LookUps, grown
from tests.point_in_time.test_memories import (
    ASKING,
    KEYS,
    Event,
    attribute_of,
    columns_of,
    counter_of,
    drawn,
    extended,
    history_of,
    lists_of,
)

UNTIL = 60
LATE = 6  # the most that an event may come late, and count as if it had come on time


@pytest.fixture(autouse=True, scope="module")
def small_levels() -> Any:
    """So that a few dozen events fill several levels."""
    with pytest.MonkeyPatch.context() as patch:
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


def assert_agree(one: Any, two: Any, windows: Sequence[int | None]) -> None:
    assert one.time.tolist() == two.time.tolist()
    for window in windows:
        for a, b in zip(one.totals(window), two.totals(window), strict=True):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
            assert np.signbit(a).tolist() == np.signbit(b).tolist()
    assert one.last_positive().tolist() == two.last_positive().tolist()


def in_parts(random: np.random.Generator, events: list[Event], late: int, cuts: list[int]) -> list[list[Event]]:
    """The events before the first cut, then those between cuts, by the moments at which they arrive."""
    arrives = np.array([known for _, known, _ in events], int) + random.integers(0, late + 1, len(events))
    part = np.searchsorted(cuts, arrives, side="right")
    return [[e for e, at in zip(events, part, strict=True) if at == place] for place in range(len(cuts) + 1)]


LEVELLED = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(0, 60),
    "cuts": st.lists(st.integers(0, 45), min_size=1, max_size=6).map(sorted),
    "late": st.sampled_from([0, 1, LATE, 40]),
    "compacted": st.booleans(),
}


@given(**LEVELLED, length=st.integers(1, 5))
def test_a_history_with_levels_is_one_that_was_extended(seed, size, cuts, late, compacted, length):
    random, events, _ = drawn(seed, size)
    own, *further = in_parts(random, events, late, cuts)
    memory, floor = history_of(own), 0
    if compacted:
        floor = cuts[0]
        memory = memory.with_columns(memory.compacted(floor, length).to_columns(), floor)
    read_only(memory)
    expected, several = memory, tuple[HistoryMemory, ...]()
    for some in further:
        if some:
            key, known, item = columns_of(some)
            expected = expected.extended(key, known, item.astype(np.int64), attribute_of(known))
            several = grown(several, history_of(some), HistoryMemory.merged)
        for asking in ASKING:
            look_ups = asking(*all_at(floor))
            assert lists_of(memory.with_levels(several), look_ups, length) == lists_of(expected, look_ups, length)


@pytest.mark.parametrize("seed", range(30))
def test_a_counter_with_levels_is_one_that_was_extended(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = ["none", "whole", "fractions"][seed % 3]
    memory = counter_of(drawn(int(random.integers(10**6)), 20, labels)[1], labels)
    memory = memory.compacted(int(random.integers(20, 40)), 40, True) if random.random() < 0.5 else memory
    read_only(memory)
    before = {name: column.copy() for name, column in memory.to_columns().items()}
    expected, levels = memory, tuple[CounterMemory, ...]()
    for _ in range(int(random.integers(2, 8))):
        some = drawn(int(random.integers(10**6)), int(random.choice([1, 2, 7, 60])), labels)[1]
        expected = extended(expected, some)
        levels = grown(levels, counter_of(some, labels), CounterMemory.merged)
    asked = LookUps.of_each(random.choice(KEYS, 30), random.integers(-5, 90, 30))
    windows = [None, *(each for each in (0, 5, 40) if random.random() < 0.6)]
    assert_agree(SeenTotals(expected, asked), SeenTotals(memory.with_levels(levels), asked), windows)
    for name, column in memory.to_columns().items():
        assert column.tolist() == before[name].tolist()


def test_what_is_computed_of_all_events_of_a_memory_is_computed_once() -> None:
    memory, level = (history_of(drawn(seed, 30)[1]) for seed in (0, 1))
    one, two = memory.with_levels([level]), memory.with_levels([level, level])
    assert one.events is two.events
    assert "distinct" in vars(one.events), "no request has to wait for it"


def test_an_event_is_copied_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALLEST": 64, "_GROWTH": 8, "_MANY": 2048}.items():
        monkeypatch.setattr(module, name, value)
    copied, several, most = 0, tuple[range, ...](), 0

    def merged(one: range, other: range) -> range:
        nonlocal copied
        copied += len(one) + len(other)
        return range(len(one) + len(other))

    for _ in range(4096):
        several = grown(several, range(4), merged)
        most = max(most, len(several))
    sizes = list(map(len, several))
    assert sum(sizes) == 4 * 4096
    assert most == LEVELS
    assert sizes == sorted(sizes, reverse=True)
    assert copied < 60 * 4 * 4096  # of one level it would be 2,048 times
