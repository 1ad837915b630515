"""What memories answer against the reference: cut at any moments, with late events, in every way of asking."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.features.kinds.counter import CounterStore, LookupTotals, round_labels
from mmoe_rec.features.kinds.history import HistoryStore
from mmoe_rec.point_in_time import join
from mmoe_rec.point_in_time.join import MAX_LEVELS, NEVER, Lookups, add_level
from tests.reference.features import Event, last_positive, totals, visible_events

KEYS = np.array([0, 5, 2**40, 2**64 - 1], np.uint64)
WINDOW, UNTIL = 3, 45
# Outliers beside small labels, exact opposites, and the smallest label.
FRACTIONS = round_labels(np.array([1e11, -1e11, 1e-5, 0.1, -0.3, 3.0, 2.0**-20, 2.0**30 + 2.0**-19, 0.0]))
ASKING: tuple[Callable[[np.ndarray, np.ndarray], Lookups], ...] = (Lookups.sort, Lookups.one_per_row)


def drawn(seed: int, size: int, labels: str = "whole") -> tuple[np.random.Generator, list[Event], np.ndarray]:
    """Events, and the moment at which each is known. labels: whole, fractions, or none (each counts 1)."""
    random = np.random.default_rng(seed)
    known, whole = random.integers(0, 40, size), random.integers(0, 2, size).astype(float)
    label = {"whole": whole, "none": np.ones(size), "fractions": random.choice(FRACTIONS, size)}[labels]
    return random, list(zip(random.choice(KEYS[:3], size).tolist(), known.tolist(), label.tolist(), strict=True)), known


def columns_of(events: list[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    key, known, value = zip(*events, strict=True) if events else ((), (), ())
    return np.array(key, np.uint64), np.array(known, np.int64), np.array(value)


def counter_of(events: list[Event], labels: str = "whole") -> CounterStore:
    return extended(CounterStore.empty(labels != "none"), events)


def extended(store: CounterStore, events: list[Event]) -> CounterStore:
    key, known, label = columns_of(events)
    return store.extended(key, known, None if store.label_sum is None else label)


def history_of(events: list[Event]) -> HistoryStore:
    key, known, item = columns_of(events)
    return HistoryStore.empty(1).extended(key, known, item.astype(np.int64), attribute_of(known))


def attribute_of(known: np.ndarray) -> np.ndarray:
    """(E,) int64, some other number for each moment."""
    return known * 7 % 11


def counted(events: list[Event], key: int, now: int) -> tuple[Any, ...]:
    """Rows and sum of labels of the window, of all that is remembered, and the last positive event."""
    seen = visible_events(events, key, now)
    return *totals(seen, now, WINDOW), *totals(seen, now), last_positive(seen, NEVER)


def answers(store: CounterStore, asked: Lookups) -> list[tuple[Any, ...]]:
    actual = LookupTotals(store, asked)
    columns = *actual.totals(WINDOW), *actual.totals(None), actual.last_positive()
    return list(zip(*(column[asked.inverse].tolist() for column in columns), strict=True))


def lists_of(store: Any, asked: Lookups, length: int) -> list[list[tuple[int, ...]]]:
    """Items and their attributes."""
    parts = store.last_events(asked, length)
    for part in parts:
        assert (part.values.dtype, part.lengths.dtype) == (np.int64, np.int32)
        assert part.lengths.tolist() == parts[0].lengths.tolist()
    parts = [part.take(asked.inverse) for part in parts]
    events = list(zip(*(part.values.tolist() for part in parts), strict=True))
    return [events[a:b] for a, b in pairwise(parts[0].offsets.tolist())]


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    forever=st.booleans(),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
    late=st.integers(0, 6),
    labels=st.sampled_from(["whole", "fractions", "none"]),
    asking=st.sampled_from(ASKING),
)
def test_a_counter_is_the_reference_whatever_was_dropped_and_when(seed, size, forever, cuts, late, labels, asking):
    random, events, known = drawn(seed, size, labels)
    arrives = known + random.integers(0, late + 1, size)
    store, asked_for = counter_of([], labels), slice(None if forever else 2)
    for start, end in pairwise([-1, *cuts, UNTIL]):
        store = extended(store, [e for e, at in zip(events, arrives, strict=True) if start <= at < end])
        here = [event for event, at in zip(events, arrives, strict=True) if at < end]
        keys, times = np.repeat(KEYS, end - start), np.tile(np.arange(start, end), len(KEYS))
        expected = [counted(here, *item)[asked_for] for item in zip(keys.tolist(), times.tolist(), strict=True)]
        assert [answer[asked_for] for answer in answers(store, asking(keys, times))] == expected
        store = store.with_columns(store.compacted(end, WINDOW, forever).to_columns(), end)
        last = {key: max(moment for second, moment, _ in here if second == key) for key, _, _ in here}
        remembered = {key for key, moment in last.items() if forever or moment > end - WINDOW}
        assert set(store.events.key.tolist()) == remembered
    if late == 0 and forever:
        at_once = counter_of(events, labels).compacted(UNTIL, WINDOW, forever).to_columns()
        for name, column in store.to_columns().items():
            np.testing.assert_array_equal(column, at_once[name], err_msg=name)


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
    length=st.integers(1, 4),
    asking=st.sampled_from(ASKING),
)
def test_a_history_is_the_reference_whatever_was_dropped_and_when(seed, size, cuts, length, asking):
    random, events, known = drawn(seed, size)
    arrives = known + random.integers(0, 7, size)
    store = HistoryStore.empty(1)
    for start, end in pairwise([-1, *cuts, UNTIL]):
        key, moments, item = columns_of([e for e, at in zip(events, arrives, strict=True) if start <= at < end])
        store = store.extended(key, moments, item.astype(np.int64), attribute_of(moments))
        here = [event for event, at in zip(events, arrives, strict=True) if at < end]
        keys, times = np.repeat(KEYS, end - start), np.tile(np.arange(start, end), len(KEYS))
        asked = zip(keys.tolist(), times.tolist(), strict=True)
        seen = [visible_events(here, *entry)[-length:] for entry in asked]
        expected = [[(item, int(attribute_of(known))) for _, known, item in events] for events in seen]
        assert lists_of(store, asking(keys, times), length) == expected
        store = store.with_columns(store.compacted(end, length).to_columns(), end)


def test_what_is_computed_of_all_events_of_a_memory_is_computed_once() -> None:
    store, level = (history_of(drawn(seed, 30)[1]) for seed in (0, 1))
    first, two = store.with_levels([level]), store.with_levels([level, level])
    assert first.events is two.events
    assert "unique_keys" in vars(first.events), "no request has to wait for it"


def test_an_event_is_copied_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MIN_LEVEL_SIZE": 64, "_GROWTH": 8, "_LARGE_LEVEL_SIZE": 2048}.items():
        monkeypatch.setattr(join, name, value)
    copied, several, most = 0, tuple[range, ...](), 0

    def merged(first: range, second: range) -> range:
        nonlocal copied
        copied += len(first) + len(second)
        return range(len(first) + len(second))

    for _ in range(4096):
        several = add_level(several, range(4), merged)
        most = max(most, len(several))
    sizes = list(map(len, several))
    assert sum(sizes) == 4 * 4096
    assert most == MAX_LEVELS
    assert sizes == sorted(sizes, reverse=True)
    assert copied < 60 * 4 * 4096  # of one level it would be 2,048 times
