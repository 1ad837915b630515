"""python -m tests.benchmarks.serving --model DIR [--beside CHECKOUT]

Measure our server on one machine, with requests drawn from the users and candidates of a model:

p50_ms, p99_ms   latency of one client, by the number of candidates;
rate             HTTP requests a second of 64 clients with 5 candidates each;
cpu_ms           processor time of an HTTP request with 500 candidates.

`--beside` also starts the server of another checkout, such as an earlier commit. Both are asked in turns, so that a
noisy machine disturbs both alike. The last line is JSON.
"""

import argparse
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from tests.inference.running_server import free_port, running_program

COUNTS = (5, 100, 500)
CLIENTS = 64
TURNS = 6


class Client:
    """A persistent connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, body: bytes) -> bytes:
        """Return the reply. Raises RuntimeError for any status but 200."""
        self._connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        reply = self._connection.getresponse()
        content = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {content[:300]!r}")
        return content


class Bodies:
    """Requests drawn from the users and candidates that a model knows."""

    def __init__(self, model: Path) -> None:
        self._example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
        self._random = np.random.default_rng(0)
        (self._user,), (self._candidate,) = self._example["user"], self._example["candidates"]
        self._users, self._candidates = (
            pq.read_table(model / "features" / f"latest.{role}.parquet", columns=[column])[column]
            for role, column in (("user", self._user), ("candidate", self._candidate))
        )

    def draw(self, count: int) -> bytes:
        """Draw the body of an HTTP request with one list of `count` candidates."""
        user = self._users[int(self._random.integers(len(self._users)))].as_py()
        candidates = self._candidates.take(self._random.integers(0, len(self._candidates), count)).to_pylist()
        request = {**self._example, "user": {self._user: user}, "candidates": {self._candidate: candidates}}
        return json.dumps({"inputs": [request]}).encode()


def latencies(client: Client, body: bytes, seconds: float) -> list[float]:
    """Milliseconds of the HTTP requests that fit into a time, less the first one."""
    client.ask(body)
    taken, end = [], time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        client.ask(body)
        taken.append(1e3 * (time.perf_counter() - started))
    return taken


def rate(port: int, body: bytes, clients: int, seconds: float) -> float:
    """HTTP requests a second of several clients, each of which waits for its reply."""
    counts, started = [0] * clients, time.perf_counter()

    def ask(number: int) -> None:
        client = Client(port)
        while time.perf_counter() < started + seconds:
            client.ask(body)
            counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


def processor_seconds(server: int) -> float:
    """Return the processor time that a server and its workers have spent so far."""
    main = psutil.Process(server)
    times = [item.cpu_times() for item in (main, *main.children(recursive=True))]
    return sum(item.user + item.system for item in times)


@contextmanager
def served(checkout: Path, model: Path, workers: int, folder: Path) -> Iterator[tuple[int, int]]:
    """Start the server of a checkout with its own environment. Gives the port and the process ID."""
    port, python = free_port(), checkout / ".venv" / "bin" / "python"
    words = [str(python if python.exists() else sys.executable), "-m", "mmoe_rec", "serve", "--model", str(model)]
    words += ["--port", str(port), "--workers", str(workers)]
    page, log = f"http://127.0.0.1:{port}/ping", folder / f"{port}.log"
    with running_program(words, page, log, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}) as process:
        yield port, process.pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an artifact folder")
    parser.add_argument("--beside", type=Path, help="another checkout, with an environment in .venv")
    parser.add_argument("--beside-model", type=Path, help="the other checkout's model (default: --model)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each measurement in a turn (default: %(default)s)"
    )
    options = parser.parse_args()
    actual: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkouts = {"ours": (Path.cwd(), options.model.resolve())}
        if options.beside:
            model = (options.beside_model or options.model).resolve()
            checkouts["beside"] = (options.beside.resolve(), model)
        servers = {
            name: stack.enter_context(served(*checkout, options.workers, folder))
            for name, checkout in checkouts.items()
        }
        bodies = Bodies(options.model)
        drawn = {count: bodies.draw(count) for count in COUNTS}
        for _ in range(TURNS):
            for name, (port, process) in servers.items():
                figures, client = actual.setdefault(name, {}), Client(port)
                for count, body in drawn.items():
                    taken = latencies(client, body, options.seconds)
                    figures.setdefault(f"p50_ms_{count}", []).append(float(np.percentile(taken, 50)))
                    figures.setdefault(f"p99_ms_{count}", []).append(float(np.percentile(taken, 99)))
                before = processor_seconds(process)
                for _ in range(40):
                    client.ask(drawn[COUNTS[-1]])
                spent = (processor_seconds(process) - before) / 40
                figures.setdefault(f"cpu_ms_{COUNTS[-1]}", []).append(1e3 * spent)
                figures.setdefault("rate", []).append(rate(port, drawn[5], CLIENTS, 2 * options.seconds))
    medians = {name: {key: float(np.median(values)) for key, values in item.items()} for name, item in actual.items()}
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
