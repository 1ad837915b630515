"""Clients that ask valid requests one after the other, and what became of each."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException

from tests.benchmarks.abuse.judging import same
from tests.benchmarks.abuse.server import Running
from tests.benchmarks.abuse.wire import Reply, Sent, Wire

PAUSE = 0.02


class Load:
    """So many clients, each with a connection that it keeps, until `stop`.

    expected: for each of the requests the replies of which one must come. Outcomes are `answered`; `another reply`; the
    status of a refusal; `refused`, a connection that was not made; and `cut off`, a call without a reply. `on_cut` is
    called for the latter with the connection's own port. A client goes on with a new connection.
    """

    def __init__(self, running: Running, requests: Sequence[Sent], expected: Sequence[Sequence[Reply]]) -> None:
        self.running, self.requests, self.expected = running, requests, expected
        self.outcomes: Counter[str] = Counter()
        self.cut: list[tuple[float, int, int]] = []  # when the call began, and the connection's port and replies so far
        self.used: Counter[int] = Counter()  # which of the expected replies came
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._refused = threading.Event()

    @contextmanager
    def going_on(self, clients: int) -> Iterator[None]:
        """Asks as long as the block lasts."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        wire, asked, replies = Wire(self.running.port), number, 0
        while not self._ended.is_set():
            at = asked % len(self.requests)
            asked += 1
            start, port = time.monotonic(), 0
            try:
                replies = replies if wire.is_open else 0
                port = wire.socket.getsockname()[1]
            except OSError:
                self._count("refused")
                time.sleep(PAUSE)
                continue
            try:
                reply = wire.ask(self.requests[at])
            except (OSError, HTTPException):
                self._count("cut off")
                with self._lock:
                    self.cut.append((start, port, replies))
                continue
            replies += 1
            self._count(self._outcome(at, reply))
            if reply.status == 503:
                time.sleep(PAUSE)

    def _outcome(self, at: int, reply: Reply) -> str:
        if reply.status != 200:
            return str(reply.status)
        for which, expected in enumerate(self.expected[at]):
            if same(expected, reply):
                self.used[which] += 1
                return "answered"
        return "another reply"

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
