"""A server with two workers that takes events beside requests: how soon they are visible, what they cost requests.

Requests are sent by this process at a steady rate, events by processes of their own, on the cores that the server has.
"""

from __future__ import annotations

import http.client
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.jobs.replay.client import Client, place

REQUESTS_PER_S, CANDIDATES = 20, 500
EVENTS_PER_S, BATCH, LARGE_BATCH = 2_000, 100, 1_000
CONNECTIONS, PROBES, SECONDS_BETWEEN_PROBES, PAUSE_S = 8, 4, 0.25, 0.01
SENDERS = 2
TURNS = 4


def live_events(model: Path, events: pa.Table, scratch: Path, seconds: float) -> dict[str, float]:
    """Figures of a server of an artifact whose tables end where rows of the interaction log, the events, begin.

    seconds: of requests alone, and of requests beside events.
    """
    from mmoe_rec.jobs.replay.own_server import OwnServer
    from tests.benchmarks.serving_bodies import Bodies

    file = scratch / "events.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, events.schema) as writer:
        writer.write_table(events)
    bodies = Bodies(model)
    with OwnServer(model, scratch / "journal", scratch / "server.log", workers=2) as server:
        senders = _Senders(server.url, file, len(events))
        asker = _Asker(server.port, bodies.ids(CANDIDATES))
        asker.ask(3.0)
        quiet: list[float] = []
        busy: list[float] = []
        paced, probed, most = Sent(), Sent(), Sent()
        for _ in range(TURNS):
            quiet += asker.ask(seconds / TURNS)
            with senders.sending(EVENTS_PER_S, BATCH, 1, paced):
                busy += asker.ask(seconds / TURNS)
        with senders.sending(EVENTS_PER_S, BATCH, 1, probed, probes=True):
            asker.ask(seconds / 2)
        with senders.sending(None, LARGE_BATCH, SENDERS, most):
            asker.ask(seconds / TURNS)
    visible = np.array(probed.visible)
    print(
        f"p50 {np.median(quiet) * 1e3:.2f} ms without events, {np.median(busy) * 1e3:.2f} ms beside "
        f"{paced.rate:,.0f} a second; visible after {np.median(visible):.3f} s (median of {len(visible):,})",
        file=sys.stderr,
    )
    return {
        "visible_s_p99": round(float(np.percentile(visible, 99)), 3),
        "p50_added_ms": round(float(np.median(busy) - np.median(quiet)) * 1e3, 3),
        "paced_events_per_s": round(paced.rate),
        "events_per_s": round(most.rate),
    }


@dataclass
class Sent:
    """events that were accepted within so many seconds; visible: seconds from acknowledgements until all workers knew
    them."""

    events: int = 0
    seconds: float = 0.0
    visible: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds


class _Asker:
    """Sends requests at a steady rate, over several connections in turn."""

    def __init__(self, port: int, body: bytes) -> None:
        self._port, self._body = port, body

    def ask(self, seconds: float) -> list[float]:
        """Seconds that each request takes."""
        pages = [_Page(self._port) for _ in range(CONNECTIONS)]
        begun, taken = time.perf_counter(), []
        for number in range(int(seconds * REQUESTS_PER_S)):
            _sleep_until(begun + number / REQUESTS_PER_S)
            start = time.perf_counter()
            pages[number % CONNECTIONS].ask("/invocations", self._body)
            taken.append(time.perf_counter() - start)
        return taken


class _Senders:
    """Processes that send rows of a file, each of which once."""

    def __init__(self, url: str, file: Path, rows: int) -> None:
        self._asked = url, file
        self._rows, self._next = rows, 0

    @contextmanager
    def sending(self, rate: float | None, batch: int, count: int, sent: Sent, probes: bool = False) -> Iterator[None]:
        """Sends batches at a rate, or as fast as they are accepted, until the block ends.

        sent: to be added to; probes: whether to look when they are visible.
        """
        spawn = multiprocessing.get_context("spawn")
        stop, found = spawn.Event(), spawn.Queue()
        share = (self._rows - self._next) // count
        begins = [self._next + number * share for number in range(count)]
        processes = [
            spawn.Process(target=_send, args=(*self._asked, rate, batch, begin, begin + share, probes, stop, found))
            for begin in begins
        ]
        for process in processes:
            process.start()
        for _ in processes:
            assert found.get() == "ready"
        try:
            yield
        finally:
            stop.set()
            several = [found.get() for _ in processes]
            for process in processes:
                process.join()
        self._next += sum(each.events for each in several)
        sent.events += sum(each.events for each in several)
        sent.seconds += max(each.seconds for each in several)
        sent.visible += [value for each in several for value in each.visible]


def _send(
    url: str,
    file: Path,
    rate: float | None,
    batch: int,
    start: int,
    end: int,
    probes: bool,
    stop: Any,
    found: Any,
) -> None:
    """Sends rows from number `start` on, at the latest until `end`; runs in a process of its own."""
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    sent, waiting, probed = Sent(), [], 0.0
    with Client(url) as client, ThreadPoolExecutor(PROBES) as prober:
        found.put("ready")
        begun = time.perf_counter()
        while not stop.is_set() and start < end:
            rows = table.slice(start, min(batch, end - start))
            position = client.send(rows, None)["position"]
            acknowledged = time.perf_counter()
            start, sent.events = start + len(rows), sent.events + len(rows)
            if probes and acknowledged - probed >= SECONDS_BETWEEN_PROBES:
                probed = acknowledged
                waiting.append(prober.submit(_visible, url, position, acknowledged))
            if rate is not None:
                _sleep_until(begun + sent.events / rate)
        sent.seconds = time.perf_counter() - begun
        sent.visible = [each.result() for each in waiting]
    found.put(sent)


def _visible(url: str, position: str, since: float) -> float:
    """Seconds from a moment until all of several connections, which lie with all workers, say that their worker knows a
    position; nothing that waits for it makes a worker hurry."""
    with Client(url) as client:
        for _ in range(CONNECTIONS):
            while place(client.version()["position"]) < place(position):
                time.sleep(PAUSE_S)
    return time.perf_counter() - since


class _Page:
    """A connection that is kept, and that is opened again where the server has closed it meanwhile."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, page: str, body: bytes) -> None:
        """Raises RuntimeError for anything but an answer."""
        try:
            status, found = self._once(page, body)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            status, found = self._once(page, body)
        if status != 200:
            raise RuntimeError(f"{status}: {found[:300]!r}")

    def _once(self, page: str, body: bytes) -> tuple[int, bytes]:
        self._connection.request("POST", page, body, {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        return reply.status, reply.read()


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)
