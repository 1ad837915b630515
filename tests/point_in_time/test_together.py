"""What many memories answer together against a loop over all events."""

import numpy as np
import pytest

from mmoe_rec.point_in_time.memory import NEVER, CounterMemory
from mmoe_rec.point_in_time.search import UnsortedLookUps
from mmoe_rec.point_in_time.together import CounterQuestion, CountersTogether, TogetherIndex

Event = tuple[int, int, int]  # key, known, label
WINDOWS = (None, 0, 5, 40)
KEYS = np.random.default_rng(0).integers(0, 2**64, 15, np.uint64)


def drawn_memory(random: np.random.Generator) -> tuple[CounterMemory, list[Event], int | None]:
    """A memory, the events that it was given, and the moment as of which it was compacted, if it was."""
    labels = bool(random.random() < 0.7)
    memory = CounterMemory.empty(labels, recency=bool(random.random() < 0.7))
    count = int(random.choice([0, 1, 60]))
    key = random.choice(KEYS[:-3], count)
    known, label = random.integers(0, 100, count), random.integers(0, 2, count).astype(np.int8)
    memory = memory.extended(key, known, label if labels else None)
    events = list(zip(key.tolist(), known.tolist(), label.tolist() if labels else [1] * count, strict=True))
    floor = None
    if random.random() < 0.3:
        floor = int(random.integers(50, 100))
        memory = memory.compacted(floor, max(filter(None, WINDOWS)))
    return memory, events, floor


def expected(events: list[Event], key: int, time: int, window: int | None) -> tuple[int, int]:
    inside = [
        label
        for each, known, label in events
        if each == key and known <= time and (window is None or known > time - window)
    ]
    return len(inside), sum(inside)


@pytest.mark.parametrize("seed", range(20))
def test_many_memories_answer_as_each_of_them(seed):
    random = np.random.default_rng(seed)
    drawn = [drawn_memory(random) for _ in range(int(random.integers(1, 6)))]
    memories = [memory for memory, _, _ in drawn]
    together, index = CountersTogether(memories), TogetherIndex([memory.events for memory in memories])
    for _ in range(2):  # the arrays of the first answer must not be those of the second
        questions, told = [], []
        for memory, events, floor in drawn:
            if random.random() < 0.2:
                continue
            rows = int(random.choice([0, 1, 30]))
            asked = UnsortedLookUps(random.choice(KEYS, rows), random.integers(0, 130, rows))
            windows = [each for each in WINDOWS if random.random() < 0.6]
            recency = memory.label_sum is None or memory.last_positive is not None
            questions.append(CounterQuestion(memory, asked, windows, recency))
            told.append((events, floor))
        if random.random() < 0.7:  # keys may have been found before
            index.find([(each.memory.events, each.asked) for each in questions])
        answers = together.answer(questions)
        assert len(answers) == len(questions)
        for question, answer, (events, floor) in zip(questions, answers, told, strict=True):
            times = np.maximum(question.asked.time, floor) if floor is not None else question.asked.time
            assert answer.time.tolist() == times.tolist()
            asked = list(zip(question.asked.key.tolist(), times.tolist(), strict=True))
            for window in question.windows:
                rows, labels = answer.totals(window)
                assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == [
                    expected(events, key, time, window) for key, time in asked
                ]
            if question.recency:
                moments = [
                    max(
                        [known for each, known, label in events if each == key and known <= time and label],
                        default=NEVER,
                    )
                    for key, time in asked
                ]
                assert answer.last_positive().tolist() == moments


def test_memories_share_their_times_with_what_answers():
    memories = [
        CounterMemory.empty().extended(np.arange(5, dtype=np.uint64), np.arange(5), np.ones(5, np.int8))
        for _ in range(3)
    ]
    together = CountersTogether(memories)
    assert all(np.shares_memory(memory.events.known, together._known) for memory in memories)
