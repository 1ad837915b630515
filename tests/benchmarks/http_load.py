"""Requests to a server on this machine, one after the other or by several clients, and the processor time they cost."""

import http.client
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tests.benchmarks.memory import tree_processor_seconds


@dataclass(frozen=True)
class Latencies:
    """Seconds that each request took, in order."""

    seconds: np.ndarray

    def ms(self, percentile: float) -> float:
        """A percentile in milliseconds."""
        return round(float(np.percentile(self.seconds, percentile)) * 1e3, 3)


class Client:
    """A connection that is kept, and that is opened again where the server has closed it meanwhile."""

    def __init__(self, port: int, page: str = "/invocations") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._page = page

    def ask(self, body: bytes | None) -> bytes:
        """The reply to a body, or to a GET without one. Raises RuntimeError for an error."""
        try:
            status, content = self._once(body)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            status, content = self._once(body)
        if status != 200:
            raise RuntimeError(f"{status}: {content[:300]!r}")
        return content

    def _once(self, body: bytes | None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        self._connection.request("GET" if body is None else "POST", self._page, body, headers)
        reply = self._connection.getresponse()
        return reply.status, reply.read()


def latencies(clients: Mapping[str, Client], body: bytes | None, seconds: float, turns: int) -> dict[str, Latencies]:
    """As many requests of each client as fit into a time, at least one a turn.

    Clients take turns, so that a machine that is now faster, now slower, is so for all of them; the first request of a
    turn is not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(turns):
        for name, client in clients.items():
            client.ask(body)
            end = time.perf_counter() + seconds / turns
            while True:
                start = time.perf_counter()
                client.ask(body)
                now = time.perf_counter()
                taken[name].append(now - start)
                if now >= end:
                    break
    return {name: Latencies(np.array(each)) for name, each in taken.items()}


def requests_a_second(connect: Callable[[], Client], body: bytes, clients: int, seconds: float) -> float:
    """How many requests several clients get answered, each asking again once it has its answer."""
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def ask(number: int) -> None:
        client = connect()
        while time.perf_counter() < end:
            client.ask(body)
            counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def processor_seconds(process: int, client: Client, body: bytes, requests: int) -> float:
    """Processor time that a request costs a server, of its process and all that it started."""
    client.ask(body)
    before = tree_processor_seconds(process)
    for _ in range(requests):
        client.ask(body)
    return (tree_processor_seconds(process) - before) / requests
