"""Servers with two workers that take events beside requests: how soon they are visible, what they cost requests.

Requests are sent by this process at a steady rate, events by processes of their own, on the cores that the server has.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.http_load import Client
from tests.benchmarks.serving_models import Bodies
from tests.live.own_server import Client as EventClient
from tests.live.own_server import OwnServer

REQUESTS_PER_S, CANDIDATES = 20, 500
EVENTS_PER_S, BATCHES, LARGE_BATCH = 2_000, (100, 500), 1_000
CONNECTIONS, PROBES, SECONDS_BETWEEN_PROBES, PAUSE_S = 8, 4, 0.25, 0.01
SENDERS = 2
TURN_SECONDS, SETTLING_SECONDS = 1.0, 0.3
SERVERS, RESAMPLES = 4, 1_000
STEP, ASKED = 400, 300


def live_events(model: Path, events: pa.Table, time_column: str, scratch: Path, seconds: float) -> dict[str, Any]:
    """Figures of servers of an artifact whose tables end where rows of the interaction log, the events, begin.

    Each request is of the time of the event that is sent at that moment. seconds: of requests alone, and of requests
    beside events in batches of each size, for each of `SERVERS` servers, one after the other: processes of the same
    code differ, and so does the machine's mood. Raises RuntimeError where there are too few events for so many seconds.
    """
    file = scratch / "events.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, events.schema) as writer:
        writer.write_table(events)
    times = events.column(time_column).cast(pa.timestamp("ms")).to_numpy()
    body = json.loads(Bodies(model).ids(CANDIDATES))
    turns = {batch: Turns() for batch in BATCHES}
    paced, probed, most = Sent(), Sent(), Sent()
    for number in range(SERVERS):
        with OwnServer(model, scratch / f"journal{number}", scratch / f"server{number}.log", workers=2) as server:
            senders = _Senders(server.port, file, len(events))

            def body_now(senders: _Senders = senders) -> bytes:
                body["inputs"][0]["context"][time_column] = f"{times[senders.row]}Z"
                return json.dumps(body).encode()

            asker = _Asker(server.port, body_now)
            asker.ask(3.0)
            for batch in BATCHES:
                _take_turns(asker, senders, batch, seconds, paced, turns[batch])
            with senders.sending(EVENTS_PER_S, BATCHES[0], 1, probed, probes=True):
                asker.ask(seconds / 2)
            with senders.sending(None, LARGE_BATCH, SENDERS, most):
                asker.ask(10 * TURN_SECONDS)
    visible = np.array(probed.visible)
    print(f"visible after {np.median(visible):.3f} s (median of {len(visible):,})", file=sys.stderr)
    return {
        "visible_s_p99": round(float(np.percentile(visible, 99)), 3),
        "p50_added_ms": turns[BATCHES[0]].added_ms(),
        "p50_added_ms_95": turns[BATCHES[0]].interval_ms(),
        f"p50_added_ms_in_calls_of_{BATCHES[1]}": turns[BATCHES[1]].added_ms(),
        "paced_events_per_s": round(paced.rate),
        "events_per_s": round(most.rate),
    }


@dataclass
class Turns:
    """Seconds that requests took, turn by turn: without events, and beside them."""

    quiet: list[list[float]] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)

    def added_ms(self, start: int = 0) -> float:
        """Milliseconds that the median of requests is longer beside events. start: the first turn that counts."""
        return round((_median(self.busy[start:]) - _median(self.quiet[start:])) * 1e3, 3)

    def interval_ms(self) -> list[float]:
        """Of the same, which holds it with 95% (percentiles of a bootstrap; a turn without events and the one after it
        are drawn together)."""
        random, count = np.random.default_rng(0), len(self.quiet)
        drawn = random.integers(count, size=(RESAMPLES, count))
        found = [
            _median([self.busy[turn] for turn in turns]) - _median([self.quiet[turn] for turn in turns])
            for turns in drawn
        ]
        return [round(float(each) * 1e3, 3) for each in np.percentile(found, [2.5, 97.5])]


def _median(turns: list[list[float]]) -> float:
    return float(np.median(np.concatenate(turns)))


def _take_turns(asker: _Asker, senders: _Senders, batch: int, seconds: float, paced: Sent, turns: Turns) -> None:
    """Requests without events and beside them in such batches, in turns so short that whatever else the machine does
    falls on both alike. paced, turns: to be added to."""
    start = len(turns.quiet)
    with senders.sending(EVENTS_PER_S, batch, 1, paced) as paused:
        for turn in range(2 * round(seconds / TURN_SECONDS)):
            (paused.clear if turn % 2 else paused.set)()
            asker.ask(SETTLING_SECONDS)
            (turns.busy if turn % 2 else turns.quiet).append(asker.ask(TURN_SECONDS))
    taken = [np.concatenate(each[start:]) for each in (turns.quiet, turns.busy)]
    told = [", ".join(f"{each * 1e3:.2f}" for each in np.percentile(times, [50, 90])) for times in taken]
    print(
        f"p50 and p90 {told[0]} ms without events, {told[1]} ms beside {EVENTS_PER_S:,} a second in calls of {batch} "
        f"({len(taken[1]):,} requests each): {turns.added_ms(start)} ms",
        file=sys.stderr,
    )


def learnt_ms(model: Path, time_column: str, events: pa.Table) -> float:
    """Milliseconds that a request of `CANDIDATES` takes longer, the median, once events were learnt. Each request is of
    the time of the last event."""
    from mmoe_rec.devices import limit_threads
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.inference.reader import read_requests
    from mmoe_rec.log.rows import LogRows

    rankers = plain, learnt = Ranker.load(model), Ranker.load(model)
    elements = Bodies(model).elements(CANDIDATES, 1)
    last = events.column(time_column)[-1].cast(pa.timestamp("ms")).as_py()
    elements[0]["context"][time_column] = f"{last.isoformat()}Z"
    taken: dict[Ranker, list[float]] = {plain: [], learnt: []}
    with limit_threads(1):
        for start in range(0, len(events), STEP):
            rows = LogRows(events.slice(start, STEP), learnt.pipeline.schema)
            learnt.take(learnt.prepare({None: rows}))
        for _ in range(ASKED):
            for ranker in rankers:
                start_s = time.perf_counter()
                ranker.rank_many(read_requests(elements, {}))
                taken[ranker].append(time.perf_counter() - start_s)
    return round(float(np.median(np.subtract(taken[learnt], taken[plain]))) * 1e3, 3)


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
    """Sends requests over several connections in turn, each at a moment of its own within equal shares of the time: at
    a steady rhythm, batches of events would come at the same moment of all requests of a turn, or of none."""

    def __init__(self, port: int, body: Callable[[], bytes]) -> None:
        self._port, self._body = port, body
        self._random = np.random.default_rng(0)

    def ask(self, seconds: float) -> list[float]:
        """Seconds that each request takes."""
        clients = [Client(self._port) for _ in range(CONNECTIONS)]
        begun, taken = time.perf_counter(), []
        for number in range(int(seconds * REQUESTS_PER_S)):
            body = self._body()
            _sleep_until(begun + (number + self._random.random()) / REQUESTS_PER_S)
            start = time.perf_counter()
            clients[number % CONNECTIONS].ask(body)
            taken.append(time.perf_counter() - start)
        return taken


@dataclass(frozen=True)
class _Order:
    """What a sender is to send: rows of a file from `start` to `end`, in batches, at a rate (rows a second) or as fast
    as they are accepted; probes: whether to look when they are visible."""

    port: int
    file: Path
    rate: float | None
    batch: int
    start: int
    end: int
    probes: bool


class _Senders:
    """Processes that send rows of a file, each of which once."""

    def __init__(self, port: int, file: Path, rows: int) -> None:
        self._port, self._file, self._rows, self._next = port, file, rows, 0
        self._spawn = multiprocessing.get_context("spawn")
        self._count = self._spawn.Value("q", 0)

    @property
    def row(self) -> int:
        """The row that is sent next."""
        return int(min(self._count.value, self._rows - 1))

    @contextmanager
    def sending(self, rate: float | None, batch: int, count: int, sent: Sent, probes: bool = False) -> Iterator[Any]:
        """Sends batches until the block ends, but not while the event that it gives is set. sent: to be added to."""
        paused, stop, found = self._spawn.Event(), self._spawn.Event(), self._spawn.Queue()
        share = (self._rows - self._next) // count
        if share < batch:
            raise RuntimeError(f"{self._rows:,} events are too few for so many seconds")
        begins = [self._next + number * share for number in range(count)]
        orders = [_Order(self._port, self._file, rate, batch, each, each + share, probes) for each in begins]
        shared = paused, stop, self._count, found
        processes = [self._spawn.Process(target=_send, args=(order, *shared)) for order in orders]
        for process in processes:
            process.start()
        for _ in processes:
            assert found.get() == "ready"
        try:
            yield paused
        finally:
            stop.set()
            several = [found.get() for _ in processes]
            for process in processes:
                process.join()
        self._next += sum(each.events for each in several)
        sent.events += sum(each.events for each in several)
        sent.seconds += max(each.seconds for each in several)
        sent.visible += [value for each in several for value in each.visible]


def _send(order: _Order, paused: Any, stop: Any, count: Any, found: Any) -> None:
    """Sends what is ordered, in a process of its own. count: of all rows that were sent, to be added to."""
    with pa.memory_map(str(order.file)) as source:
        table = pa.ipc.open_file(source).read_all()
    sent, waiting, probed, start = Sent(), [], 0.0, order.start
    client = EventClient(order.port)
    with ThreadPoolExecutor(PROBES) as prober:
        found.put("ready")
        begun = time.perf_counter()  # later by all pauses
        while not stop.is_set() and start < order.end:
            if paused.is_set():
                since = time.perf_counter()
                time.sleep(PAUSE_S)
                begun += time.perf_counter() - since
                continue
            rows = table.slice(start, min(order.batch, order.end - start))
            position = client.send(rows)
            acknowledged = time.perf_counter()
            start, sent.events = start + len(rows), sent.events + len(rows)
            with count.get_lock():
                count.value += len(rows)
            if order.probes and acknowledged - probed >= SECONDS_BETWEEN_PROBES:
                probed = acknowledged
                waiting.append(prober.submit(_visible, order.port, position, acknowledged))
            if order.rate is not None:
                _sleep_until(begun + sent.events / order.rate)
        sent.seconds = time.perf_counter() - begun
        sent.visible = [each.result() for each in waiting]
    found.put(sent)


def _visible(port: int, position: int, since: float) -> float:
    """Seconds from a moment until all of several connections, which lie with all workers, say that their worker knows a
    position; nothing that waits for it makes a worker hurry."""
    client = EventClient(port)
    for _ in range(CONNECTIONS):
        while client.position() < position:
            time.sleep(PAUSE_S)
    return time.perf_counter() - since


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)
