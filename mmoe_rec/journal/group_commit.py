"""Threads append together: while one waits for the disk, the others' batches gather for the next record."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import Batch

_MOST_ROWS = 65_536
"""Rows of a record that several threads make together; a batch is never divided."""


@dataclass(eq=False)
class _Waiting:
    """A thread's batch, and what became of it."""

    batch: Batch
    done: threading.Event = field(default_factory=threading.Event)
    position: Position | None = None
    error: BaseException | None = None


class GroupCommit:
    """Appends the batches of many threads with as few flushes to disk as their number at a time allows."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._queue: list[_Waiting] = []
        self._guard, self._writer = threading.Lock(), threading.Lock()

    def append(self, batch: Batch) -> Position:
        """As `Journal.append`; an error of one batch is not that of the others."""
        if self._process != os.getpid():
            self._start()  # a forked child: the parent's threads are not here
        mine = _Waiting(batch)
        with self._guard:
            self._queue.append(mine)
        while not mine.done.is_set():
            with self._writer:
                if not mine.done.is_set():
                    self._write(self._next())
        if mine.error is not None:
            raise mine.error
        assert mine.position is not None
        return mine.position

    def _next(self) -> list[_Waiting]:
        with self._guard:
            taken, rows = 0, 0
            while taken < len(self._queue) and (not taken or rows + len(self._queue[taken].batch) <= _MOST_ROWS):
                rows += len(self._queue[taken].batch)
                taken += 1
            found, self._queue = self._queue[:taken], self._queue[taken:]
            return found

    def _write(self, together: list[_Waiting]) -> None:
        try:
            position = self.journal.append(*(each.batch for each in together))
            for each in together:
                each.position = position
        except BaseException as error:
            if len(together) == 1:
                together[0].error = error
            else:
                for each in together:
                    self._alone(each)
        finally:
            for each in together:
                each.done.set()

    def _alone(self, waiting: _Waiting) -> None:
        try:
            waiting.position = self.journal.append(waiting.batch)
        except BaseException as error:
            waiting.error = error
