"""Sorting events and finding the last one known, against naive loops; memories that are cut and extended."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.features import events as module
from mmoe_rec.features.events import KnownEvents, sort_events
from mmoe_rec.features.memory import NEVER, CounterMemory, HistoryMemory

# Few keys and moments, so that ties are met; keys alike in their last bits and in all but these.
KEYS = np.array([0, 1, 2, 2**40, 2**40 + 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)


def _events(data, size: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    number = data.draw(st.integers(0, size))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    known = random.integers(-5, 15, number)
    if data.draw(st.booleans()):
        known = np.sort(known)
    return random.choice(KEYS, number), known, random.integers(0, 3, number).astype(np.float64)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_order_of_events_is_that_of_a_sort(data):
    key, known, value = _events(data)
    order, arrival = sort_events(key, known, value)
    expected = sorted(zip(key.tolist(), known.tolist(), value.tolist(), strict=True))
    assert list(zip(key[order].tolist(), known[order].tolist(), value[order].tolist(), strict=True)) == expected
    np.testing.assert_array_equal(arrival.known, np.sort(known))
    np.testing.assert_array_equal(arrival.known[arrival.number], known[order])
    assert sorted(arrival.number) == list(range(len(key)))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rows=st.integers(0, 60), joined=st.booleans(), at_hand=st.booleans())
def test_the_last_known_event_is_that_of_a_loop(data, rows, joined, at_hand):
    key, known, _ = _events(data)
    order, arrival = sort_events(key, known, None)
    kept = np.ones(len(key), bool)
    kept[: data.draw(st.integers(0, len(key)))] = False
    key, known = key[order][kept], known[order][kept]
    events = KnownEvents(key, known, arrival.of(kept) if at_hand else None)
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    keys, times = random.choice(KEYS, rows), random.integers(-7, 17, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_OF_A_SEARCH", 10**6 if joined else 0)
        found = events.last(keys, times)
    for row in range(rows):
        before = np.flatnonzero((key == keys[row]) & (known <= times[row]))
        assert found[row] == (before[-1] if len(before) else -1)


def test_keys_that_are_alike_in_many_bits_are_kept_apart(monkeypatch):
    random = np.random.default_rng(0)
    # Of 64 bits, 50 or so are left beside the number of an event: these differ in the last two alone.
    key = (random.integers(0, 2**62, 200, dtype=np.uint64)[random.integers(0, 200, 5000)] << np.uint64(2)) | (
        random.integers(0, 3, 5000).astype(np.uint64)
    )
    known = np.sort(random.integers(0, 300, 5000))
    order, arrival = sort_events(key, known, None)
    np.testing.assert_array_equal(order, np.lexsort((np.arange(5000), known, key)))
    events = KnownEvents(key[order], known[order], arrival)
    keys, times = random.permutation(key), random.integers(-5, 310, 5000)
    assert events._joined(keys, times) is None
    found = events.last(keys, times)
    counts = [((key == k) & (known <= t)).sum() for k, t in zip(keys, times, strict=True)]
    starts = {int(k): i for i, k in reversed(list(enumerate(events.key)))}
    expected = [starts[int(k)] + n - 1 if n else -1 for k, n in zip(keys, counts, strict=True)]
    np.testing.assert_array_equal(found, expected)


def _counter(key, known, label) -> CounterMemory:
    return CounterMemory.empty().extended(key, known, label, fractions=False)


def _answers(memory: CounterMemory, keys, times, windows=(None, 4)) -> list:
    last = memory.events.last(keys, memory.as_of(times))
    found = [each.tolist() for each in memory.totals(last)]
    found.append([memory.last_positive[index] if index >= 0 else NEVER for index in last])
    before = memory.totals(memory.events.last(keys, memory.as_of(times) - 4))
    return [*found, *(each.tolist() for each in before)]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), moment=st.integers(-6, 16))
def test_a_counter_cut_and_extended_answers_later_requests_like_one_of_all_events(data, moment):
    key, known, label = _events(data)
    first = data.draw(st.integers(0, len(key)))
    whole = _counter(key, known, label)
    cut = _counter(key[:first], known[:first], label[:first]).compacted(moment, window=4)
    both = cut.extended(key[first:], known[first:], label[first:], fractions=False)
    keys, times = np.repeat(KEYS, 20), np.tile(np.arange(moment, moment + 20), len(KEYS))
    assert _answers(both, keys, times) == _answers(whole, keys, times)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), moment=st.integers(-6, 16), length=st.integers(1, 4))
def test_a_history_cut_and_extended_answers_later_requests_like_one_of_all_events(data, moment, length):
    key, known, items = _events(data)
    items = items.astype(np.int64)
    first = data.draw(st.integers(0, len(key)))
    whole = HistoryMemory.empty().extended(key, known, items)
    cut = HistoryMemory.empty().extended(key[:first], known[:first], items[:first]).compacted(moment, length)
    both = cut.extended(key[first:], known[first:], items[first:])
    keys, times = np.repeat(KEYS, 20), np.tile(np.arange(moment, moment + 20), len(KEYS))
    mine, theirs = both.last(keys, times, length), whole.last(keys, times, length)
    assert mine.lengths.tolist() == theirs.lengths.tolist()
    assert mine.values.tolist() == theirs.values.tolist()


def test_a_late_event_does_not_hide_a_later_positive_one():
    key = np.array([7, 7], np.uint64)
    memory = _counter(key, np.array([5, 10]), np.array([1.0, 0.0])).compacted(10, window=0)
    late = memory.extended(key[:1], np.array([7]), np.array([1.0]), fractions=False)
    assert late.last_positive[late.events.last(key[:1], np.array([10]))].tolist() == [7]
