"""Memories with levels of later events against one memory that was extended by them, and against plain loops."""

from fractions import Fraction

import numpy as np
import pytest

from mmoe_rec.point_in_time.histories import HistoryMemory
from mmoe_rec.point_in_time.join import LookUps
from mmoe_rec.point_in_time.live import levels as module
from mmoe_rec.point_in_time.live.layers import LayeredCounter, LayeredHistory
from mmoe_rec.point_in_time.live.layers_together import add_levels
from mmoe_rec.point_in_time.live.levels import LEVELS, CounterLevel, CounterLevels, grown
from mmoe_rec.point_in_time.memory import NEVER, CounterMemory
from mmoe_rec.point_in_time.search import UnsortedLookUps
from mmoe_rec.point_in_time.together import CounterQuestion, CountersTogether, salt_of

KEYS = np.random.default_rng(0).integers(0, 2**64, 15, np.uint64)
WINDOWS = (None, 0, 5, 40)
MOMENTS = 100


@pytest.fixture(autouse=True)
def small_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few dozen events fill several levels."""
    monkeypatch.setattr(module, "SMALLEST", 8)
    monkeypatch.setattr(module, "_GROWTH", 3)
    monkeypatch.setattr(module, "_MANY", 24)


def drawn_events(random: np.random.Generator, fractions: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, moments, many of them equal, and labels."""
    count = int(random.choice([0, 1, 2, 7, 30]))
    labels = random.integers(0, 2, count).astype(np.int8)
    if fractions:
        drawn = random.choice([0.0, -0.0, 0.1, -0.3, 1e16, -1e16, 1e-300, 7.25], count)
        return random.choice(KEYS[:-3], count), random.integers(0, MOMENTS, count), drawn
    return random.choice(KEYS[:-3], count), random.integers(0, MOMENTS, count), labels


def read_only(memory: CounterMemory | HistoryMemory) -> None:
    """As memories are that processes share."""
    for column in memory.to_columns().values():
        column.flags.writeable = False


def asked(random: np.random.Generator, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    return random.choice(KEYS, rows), random.integers(-5, MOMENTS + 50, rows)


@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_a_counter_with_levels_is_one_that_was_extended(seed: int, fractions: bool) -> None:
    random = np.random.default_rng(seed)
    counts = not fractions and random.random() < 0.3  # as a log of events, each of which counts 1
    recency = bool(random.random() < 0.7)
    memory = CounterMemory.empty(not counts, recency, fractions)
    first = drawn_events(random, fractions)
    memory = memory.extended(first[0], first[1], None if counts else first[2])
    if random.random() < 0.7:
        memory = memory.compacted(int(random.integers(20, MOMENTS)), 40)
    read_only(memory)
    before = {name: column.copy() for name, column in memory.to_columns().items()}
    salt, several, expected = salt_of(int(random.integers(5))), tuple[CounterLevel, ...](), memory
    for _ in range(int(random.integers(1, 12))):
        key, known, label = drawn_events(random, fractions)
        expected = expected.extended(key, known, None if counts else label)
        several = grown(
            several, CounterLevel.of(key ^ salt, known, np.ones_like(label) if counts else label), CounterLevel.merged
        )
        assert 0 < len(several) <= LEVELS
        keys, times = asked(random)
        for look_ups in (LookUps.sort(keys, times), UnsortedLookUps(keys, times)):
            one, two = expected.found(look_ups), LayeredCounter(memory, several, salt).found(look_ups)
            assert one.time.tolist() == two.time.tolist()
            for window in WINDOWS:
                for a, b in zip(one.totals(window), two.totals(window), strict=True):
                    assert a.tolist() == b.tolist()
                    assert np.signbit(a).tolist() == np.signbit(b).tolist()
            if counts or recency:
                assert one.last_positive().tolist() == two.last_positive().tolist()
    for name, column in memory.to_columns().items():
        assert column.tolist() == before[name].tolist()


@pytest.mark.parametrize("seed", range(15))
def test_totals_are_those_of_a_loop_over_all_events(seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    memory, several, events = CounterMemory.empty(fractions=True), tuple[CounterLevel, ...](), []
    for number in range(8):
        key, known, label = drawn_events(random, fractions=True)
        events += list(zip(key.tolist(), known.tolist(), label.tolist(), strict=True))
        if number == 0:
            memory = memory.extended(key, known, label)
        else:
            several = grown(several, CounterLevel.of(key, known, label), CounterLevel.merged)
    keys, times = asked(random)
    found = LayeredCounter(memory, several, np.uint64(0)).found(UnsortedLookUps(keys, times))
    for window in WINDOWS:
        rows, labels = found.totals(window)
        for place, (asks, time) in enumerate(zip(keys.tolist(), times.tolist(), strict=True)):
            inside = [
                Fraction(label)
                for key, known, label in events
                if key == asks and known <= time and (window is None or known > time - window)
            ]
            assert (rows[place], labels[place]) == (len(inside), float(sum(inside)))
    positive = [
        max([known for key, known, label in events if key == asks and known <= time and label > 0], default=NEVER)
        for asks, time in zip(keys.tolist(), times.tolist(), strict=True)
    ]
    assert found.last_positive().tolist() == positive


@pytest.mark.parametrize("seed", range(25))
def test_a_history_with_levels_is_one_that_was_extended(seed: int) -> None:
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 6))
    key, known, _ = drawn_events(random)
    memory = HistoryMemory.empty().extended(key, known, random.integers(0, 4, len(key)))
    if random.random() < 0.7:
        memory = memory.compacted(int(random.integers(20, MOMENTS)), length)
    read_only(memory)
    several, expected = tuple[HistoryMemory, ...](), memory
    for _ in range(int(random.integers(1, 12))):
        key, known, _ = drawn_events(random)
        items = random.integers(0, 4, len(key))
        expected = expected.extended(key, known, items)
        several = grown(
            several,
            HistoryMemory.empty().extended(key, known, items),
            lambda one, two: one.extended(two.events.key, two.events.known, two.items),
            size=lambda each: len(each.events),
        )
        keys, times = asked(random)
        for look_ups in (LookUps.sort(keys, times), UnsortedLookUps(keys, times)):
            one, two = expected.last(look_ups, length), LayeredHistory(memory, several).last(look_ups, length)
            assert one.lengths.tolist() == two.lengths.tolist()
            assert one.values.tolist() == two.values.tolist()
            assert (two.values.dtype, two.lengths.dtype) == (one.values.dtype, one.lengths.dtype)


@pytest.mark.parametrize("seed", range(25))
def test_levels_of_many_counters_add_to_what_their_memories_answer(seed: int) -> None:
    """One table holds the events of all counters; the memories' own arrays stay as they are."""
    random = np.random.default_rng(seed)
    memories, salts = [], [salt_of(place) for place in range(4)]
    for _ in salts:
        labels = bool(random.random() < 0.7)
        key, known, label = drawn_events(random)
        memory = CounterMemory.empty(labels, recency=True).extended(key, known, label if labels else None)
        memories.append(memory.compacted(int(random.integers(20, 60)), 40) if random.random() < 0.5 else memory)
    extended, several = list(memories), CounterLevels()
    together = CountersTogether(memories)
    for memory in memories:
        read_only(memory)
    for _ in range(int(random.integers(1, 8))):
        events = []
        for place, memory in enumerate(memories):
            key, known, label = drawn_events(random)
            label = label if memory.label_sum is not None else np.ones_like(label)
            extended[place] = extended[place].extended(key, known, None if memory.label_sum is None else label)
            events.append((key ^ salts[place], known, label))
        several = several.extended(CounterLevel.of(*map(np.concatenate, zip(*events, strict=True))))
    questions, places = [], [place for place in range(4) if random.random() < 0.8]
    for place in places:
        rows = int(random.choice([0, 1, 30]))
        windows = [each for each in WINDOWS if random.random() < 0.6]
        look_ups = UnsortedLookUps(*asked(random, rows))
        questions.append(CounterQuestion(memories[place], look_ups, windows, bool(random.random() < 0.6)))
    answers = together.answer(questions)
    add_levels(several, questions, [salts[place] for place in places], answers)
    for place, question, answer in zip(places, questions, answers, strict=True):
        expected = extended[place].found(question.asked)
        assert answer.time.tolist() == expected.time.tolist()
        for window in question.windows:
            for a, b in zip(answer.totals(window), expected.totals(window), strict=True):
                assert a.tolist() == b.tolist()
        if question.recency:
            assert answer.last_positive().tolist() == expected.last_positive().tolist()


def test_an_event_is_copied_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 64)
    monkeypatch.setattr(module, "_GROWTH", 8)
    monkeypatch.setattr(module, "_MANY", 2048)
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
