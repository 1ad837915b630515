"""Sorting events and finding the last one known, against naive loops; memories that are cut and extended."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.index import KeyIndex
from mmoe_rec.point_in_time.join import Join, KnownEvents, LookUps
from mmoe_rec.point_in_time.memory import CounterMemory
from mmoe_rec.point_in_time.search import Search, UnsortedLookUps
from mmoe_rec.point_in_time.sorting import sorted_order

WAYS = ((Join, LookUps.sort), (Search, LookUps.sort), (Search, UnsortedLookUps))
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
@given(data=st.data(), whole=st.booleans())
def test_the_order_of_events_is_that_of_a_sort(data, whole):
    key, known, value = _events(data)
    value = value.astype(np.int64) if whole else value - 1.5
    order = sorted_order(key, known, value)
    expected = sorted(zip(key.tolist(), known.tolist(), value.tolist(), strict=True))
    assert list(zip(key[order].tolist(), known[order].tolist(), value[order].tolist(), strict=True)) == expected
    # Without values, what came first stays first.
    np.testing.assert_array_equal(sorted_order(key, known), np.lexsort((np.arange(len(key)), known, key)))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rows=st.integers(0, 60), way=st.sampled_from(WAYS), earlier=st.sampled_from([0, 3]))
@pytest.mark.parametrize(("unit", "start"), [(1, 0), (1, 2**62 - 10**3), (1_000, 77_000), (1_000_000, -3_000_000)])
def test_the_last_known_event_is_that_of_a_loop(data, rows, way, earlier, unit, start):
    """unit: of times that are asked for; events become known at any moment. From 2^62 on there is no room for keys."""
    key, known, _ = _events(data)
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    known = start + known * unit + random.integers(-1, 2, len(known))
    if start > 2**61 and len(known):
        known[random.integers(len(known))] = -(2**62)
    order = sorted_order(key, known)
    events = KnownEvents(key[order], known[order])
    keys, times = random.choice(KEYS, rows), start + unit * random.integers(-7, 17, rows)
    kind, ask = way
    asked = ask(keys, times)
    join = kind(events, asked)
    found = join.last(earlier * unit)[asked.number]
    for row in range(rows):
        before = np.flatnonzero((events.key == keys[row]) & (events.known <= times[row] - earlier * unit))
        assert found[row] == (before[-1] if len(before) else -1)
        if len(before):
            assert join.first[asked.number][row] == np.flatnonzero(events.key == keys[row])[0]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(0, 300), crowded=st.booleans())
def test_an_index_finds_each_key(data, size, crowded):
    """crowded: keys that are alike in their first bits, so that they share a bucket."""
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    some = random.integers(0, 1000 if crowded else 2**64, size, np.uint64)
    keys, asked = np.unique(np.append(some, KEYS[:3])), np.append(random.choice(np.append(some, KEYS[:1]), 50), KEYS)
    found, number = KeyIndex(keys[: len(keys) if size else 0]).find(asked)
    known = keys.tolist() if size else []
    assert found.tolist() == [place for place, each in enumerate(asked.tolist()) if each in known]
    assert number.tolist() == [known.index(each) for each in asked.tolist() if each in known]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(1, 60), crowded=st.booleans())
def test_windows_that_share_a_join_find_what_each_finds_alone(data, rows, crowded):
    """crowded: times so far apart that there is no room for keys beside them."""
    key, known, _ = _events(data)
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    known = known * 1_000_000
    if crowded and len(known):
        known[0] = -(2**62)
    order = sorted_order(key, known)
    events = KnownEvents(key[order], known[order])
    asked = LookUps.sort(random.choice(KEYS, rows), 1_000_000 * random.integers(-7, 17, rows))
    join = Join(events, asked)
    for earlier in (0, 3_000_000, 1_000, 6_000, 2_000_000):  # multiples of several units
        np.testing.assert_array_equal(join.last(earlier), Join(events, asked).last(earlier))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(0, 60))
def test_rows_that_ask_the_same_share_a_look_up(data, rows):
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    keys, times, wanted = random.choice(KEYS, rows), random.integers(0, 3, rows), random.random(rows) < 0.5
    for asked, inside in (
        (LookUps.sort(keys, times), np.ones(rows, bool)),
        (LookUps.sort(keys, times).where(wanted), wanted),
    ):
        pairs = list(zip(asked.groups.key.tolist(), asked.time.tolist(), strict=True))
        assert pairs == sorted(set(zip(keys[inside].tolist(), times[inside].tolist(), strict=True)))
        np.testing.assert_array_equal(asked.groups.key[asked.number], keys[inside])
        np.testing.assert_array_equal(asked.time[asked.number], times[inside])


def test_keys_that_are_alike_in_many_bits_are_kept_apart():
    random = np.random.default_rng(0)
    # The sort looks at 32 bits: these differ in the last two alone.
    key = (random.integers(0, 2**62, 200, dtype=np.uint64)[random.integers(0, 200, 5000)] << np.uint64(2)) | (
        random.integers(0, 3, 5000).astype(np.uint64)
    )
    known = np.sort(random.integers(0, 300, 5000))
    np.testing.assert_array_equal(sorted_order(key, known), np.lexsort((np.arange(5000), known, key)))


def _counter(key, known, label) -> CounterMemory:
    return CounterMemory.empty(labels=label is not None).extended(key, known, label)


def _answers(memory: CounterMemory, keys, times) -> list:
    asked = LookUps.sort(keys, times)
    join = memory.joined(asked)
    last, before = join.last()[asked.number], join.last(4)[asked.number]
    found = [*memory.totals(last), memory.last_positive_at(last), *memory.totals(before)]
    return [each.tolist() for each in found]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), moment=st.integers(-6, 16), labels=st.booleans())
def test_a_counter_cut_and_extended_answers_later_requests_like_one_of_all_events(data, moment, labels):
    key, known, label = _events(data)
    first = data.draw(st.integers(0, len(key)))
    whole = _counter(key, known, label if labels else None)
    cut = _counter(key[:first], known[:first], label[:first] if labels else None).compacted(moment, window=4)
    both = cut.extended(key[first:], known[first:], label[first:] if labels else None)
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
    asked = LookUps.sort(keys, times)
    mine, theirs = both.last(asked, length), whole.last(asked, length)
    assert mine.lengths.tolist() == theirs.lengths.tolist()
    assert mine.values.tolist() == theirs.values.tolist()


def test_events_without_labels_count_as_ones():
    random = np.random.default_rng(1)
    key, known = random.choice(KEYS, 300), random.integers(0, 40, 300)
    keys, times = np.repeat(KEYS, 50), np.tile(np.arange(-5, 45), len(KEYS))
    assert _answers(_counter(key, known, None), keys, times) == _answers(
        _counter(key, known, np.ones(300)), keys, times
    )


def test_a_late_event_does_not_hide_a_later_positive_one():
    key = np.array([7, 7], np.uint64)
    memory = _counter(key, np.array([5, 10]), np.array([1.0, 0.0])).compacted(10, window=0)
    late = memory.extended(key[:1], np.array([7]), np.array([1.0]))
    last = late.joined(LookUps.sort(key[:1], np.array([10]))).last()
    assert late.last_positive_at(last).tolist() == [7]
