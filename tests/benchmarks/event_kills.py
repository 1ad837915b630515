"""python -m tests.benchmarks.event_kills [--kills 50] [--journal sqlite|postgresql]

Is an acknowledged event ever lost? Several callers send batches of rows to a server with two workers, each batch until
it is acknowledged, while SIGKILL hits a worker, or the server with all workers, at random moments. In the end the
journal has to hold each row of the acknowledged batches once, no later than at the position that the acknowledgement
named. A server that is started on it has to know all of it.

killed, of which whole   kills, and how many of them were of the server with all workers;
acknowledged, sent_again batches, and how often one was sent again, as its connection broke;
lost                     acknowledged batches of which the journal lacks a row;
twice                    rows that the journal holds more than once.

The last line is JSON.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.live.journal import Journal
from tests.fork_server import FOLDER, Command
from tests.inference.running_server import free_port
from tests.inference.small_model import SmallModel
from tests.live.journals import every_batch, postgresql
from tests.processes import until
from tests.server.asking import as_json
from tests.server.test_events import later_log
from tests.server.test_processes import Running

CALLERS, WORKERS, BATCH = 4, 2, 20
BATCHES = 20_000
"""Different ones, which are sent again from the first one on when all were sent."""
MOST_SECONDS = 1.0
"""Until the next kill, once all workers are there again."""


class _Caller(threading.Thread):
    """Sends every fourth batch; acknowledged: by which position, and its number, of each that was."""

    def __init__(self, number: int, server: Running, table: pa.Table) -> None:
        super().__init__(daemon=True)
        self._next, self._table, self.server = number, table, replace(server)
        self.ending = threading.Event()
        self.acknowledged: set[tuple[int, int]] = set()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                number = self._next % BATCHES
                events = as_json(_batch(self._table, number))
                answer = self.server.answered({"events": events}, "/events")
                self.acknowledged.add((int(answer["position"]), number))
                self._next += CALLERS
        except Exception as error:
            self.error = error


def _batch(table: pa.Table, number: int) -> pa.Table:
    return table.slice(number * BATCH, BATCH)


def _workers(server: Running) -> list[int]:
    """The process ids of all workers, once they are there."""
    until(lambda: len(server.workers()) == WORKERS, "workers are missing")
    return sorted(server.workers())


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """The user, candidate and time of each row, as which a row counts once."""
    return list(zip(*(table[name].to_pylist() for name in ("user", "item", "time")), strict=True))


def _check(journal: str, table: pa.Table, acknowledged: set[tuple[int, int]]) -> dict[str, int]:
    """Batches of which a row is not in the journal up to the acknowledged position, and rows that are there twice."""
    first, twice = dict[tuple[Any, ...], int](), 0
    for batch in every_batch(Journal(journal, create=False)):
        for row in _rows(batch.table):
            twice += row in first
            first.setdefault(row, batch.position)
    lost = 0
    for position, number in acknowledged:
        lost += any(first.get(row, position + 1) > position for row in _rows(_batch(table, number)))
    return {"lost": lost, "twice": twice}


def event_kills(scratch: Path, journal: str, kills: int, seed: int) -> dict[str, Any]:
    """All figures."""
    random = np.random.default_rng(seed)
    model, table = SmallModel(scratch).folder, later_log(seed + 1, rows=BATCH * BATCHES)
    whole, port = 0, free_port()
    words = ["mmoe_rec", "serve", "--model", str(model), "--port", str(port), "--workers", str(WORKERS)]
    words += ["--journal", journal]
    server = Running(port, Command(words, log=scratch / "server.log"), scratch / "server.log")
    try:
        callers = [_Caller(number, server, table) for number in range(CALLERS)]
        for caller in callers:
            caller.start()
        for number in range(kills):
            mine = _workers(server)
            time.sleep(random.random() * MOST_SECONDS)
            is_whole = bool(random.random() < 0.5)
            if is_whole:
                server.process.kill()
                server.process = Command(words, log=server.log)
            else:
                os.kill(int(random.choice(mine)), signal.SIGKILL)
            whole += is_whole
            print(f"kill {number + 1}: {'all' if is_whole else 'a worker'}", file=sys.stderr, flush=True)
        for caller in callers:
            caller.ending.set()
        for caller in callers:
            caller.join()
            if caller.error is not None:
                raise caller.error
        server.process.kill()
        server.process = Command(words, log=server.log)
        acknowledged = set().union(*(item.acknowledged for item in callers))
        last = max(position for position, _ in acknowledged)
        until(lambda: int(server.answered(None, "/version", "GET")["position"]) >= last, "the server does not know all")
    finally:
        server.process.kill()
    return {
        "killed": kills + 1,
        "of_which_whole": whole + 1,
        "acknowledged": len(acknowledged),
        "sent_again": sum(item.server.again for item in callers),
        **_check(journal, table, acknowledged),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--journal", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ[FOLDER] = folder
        address = f"sqlite:///{folder}/journal.db"
        if arguments.journal == "postgresql":
            address = stack.enter_context(postgresql()).new_address()
        print(json.dumps(event_kills(Path(folder), address, arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
