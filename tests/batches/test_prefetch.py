import time
from collections.abc import Callable, Generator

import pytest

from mmoe_rec.batches import reader
from mmoe_rec.batches.reader import Prefetch
from tests.batches.encoded_files import background_threads


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds, or after two minutes."""
    end = time.monotonic() + 120
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


class Counter:
    """Counts up without end; knows how many items it made and whether it was closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = False

    def items(self) -> Generator[int, None, None]:
        try:
            while True:
                self.made += 1
                yield self.made
        finally:
            self.closed = True


def test_items_in_order_then_no_thread() -> None:
    assert list(Prefetch((each for each in range(1000)), depth=3)) == list(range(1000))
    assert list(Prefetch(each for each in ())) == []
    assert not background_threads()


@pytest.mark.parametrize("depth", [1, 4])
def test_makes_no_more_than_depth_items_ahead(depth: int) -> None:
    counter = Counter()
    for item in Prefetch(counter.items(), depth):
        wait_until(lambda item=item: counter.made == item + depth)
        time.sleep(0.005)
        assert counter.made == item + depth
        if item == 5:
            break


def test_close_ends_the_thread_and_the_source() -> None:
    counter = Counter()
    items = iter(Prefetch(counter.items()))
    next(items)
    assert background_threads()
    items.close()
    assert counter.closed
    assert not background_threads()


def test_error_of_the_source_comes_after_its_items() -> None:
    def source() -> Generator[int, None, None]:
        yield from (1, 2)
        raise KeyError("source")

    items = iter(Prefetch(source()))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="source"):
        next(items)
    assert not background_threads()


class Clock:
    """Stands in for the module `time` of the code under test: its time goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0

    def perf_counter(self) -> float:
        self.reads += 1
        return self.now


def test_waited_is_the_time_without_items(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(reader, "time", clock)

    def slow() -> Generator[int, None, None]:
        for item in range(3):
            wait_until(lambda item=item: clock.reads == 2 * item + 1)  # the consumer has begun to wait
            clock.now += 3
            yield item

    waiting = Prefetch(slow())
    for _ in waiting:
        clock.now += 100  # the consumer is busy
    assert waiting.waited == 3 * 3

    counter = Counter()
    ready = Prefetch(counter.items(), depth=3)
    items = iter(ready)
    next(items)
    wait_until(lambda: counter.made == 4)
    before = ready.waited
    clock.now += 50
    next(items)
    assert ready.waited == before
    items.close()
