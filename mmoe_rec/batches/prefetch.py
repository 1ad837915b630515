"""Gives the items of an iterator: made ahead of their consumer, in a background thread, or when it asks for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Prefetch(Generic[T]):
    """Iterates over `source` once, with up to `depth` items being made or ready ahead of the one in use.

    An exception of the source is raised in the consumer, after the items before it. When the consumer stops early (its
    loop ends, or the iterator is closed or dropped) the thread ends after the item it is making, and closes a source
    that is a generator. No thread runs before the first item is asked for. `waited`: seconds the consumer waited.
    """

    def __init__(self, source: Iterator[T], depth: int = 4) -> None:
        assert depth >= 1
        self.waited = 0.0
        self._source = source
        self._ready: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()
        # The producer takes a place before it makes an item, so that what is being made counts as ahead too.
        self._places = threading.Semaphore(depth)
        self._stopped = threading.Event()

    def __iter__(self) -> Generator[T, None, None]:
        thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        thread.start()
        try:
            while isinstance(item := self._next(), _Item):
                yield item.value
            if item.error is not None:
                raise item.error
        finally:
            self._stopped.set()
            self._places.release()
            thread.join()

    def _next(self) -> _Item[T] | _End:
        start = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - start
        self._places.release()
        return item

    def _produce(self) -> None:
        try:
            while self._take_place():
                self._ready.put(_Item(next(self._source)))
        except StopIteration:
            self._ready.put(_End())
        except BaseException as error:
            self._ready.put(_End(error))
        finally:
            _close(self._source)

    def _take_place(self) -> bool:
        self._places.acquire()
        return not self._stopped.is_set()


class OnDemand(Generic[T]):
    """Iterates over `source` once, making each item when it is asked for; else as `Prefetch`.

    Faster than that where items are quickly made by Python, whose lock two threads would hand to and fro, and the
    consumer computes on the same processor (measured on two cores). `waited`: seconds in which items were made.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self.waited = 0.0
        self._source = source

    def __iter__(self) -> Generator[T, None, None]:
        try:
            while True:
                start = time.perf_counter()
                try:
                    item = next(self._source)
                except StopIteration:
                    return
                finally:
                    self.waited += time.perf_counter() - start
                yield item
        finally:
            _close(self._source)


def _close(source: Iterator[T]) -> None:
    """Ends a source that is a generator."""
    close = getattr(source, "close", None)
    if close is not None:
        close()
