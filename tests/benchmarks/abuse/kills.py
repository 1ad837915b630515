"""A worker is killed under load: another one takes its place, and only the calls that it held are cut off."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.load import Load
from tests.benchmarks.abuse.server import WORKERS, Running, seconds_until, served
from tests.benchmarks.abuse.strategies import valid
from tests.benchmarks.abuse.wire import Sent
from tests.benchmarks.memory import PROC

TIMES = 10
CLIENTS = 6


def kills(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts. Cut calls are told apart by whose connection they came on, which the system knows of the
    connections that had a reply before.
    """
    requests = [Sent(body) for body in valid(model)]
    cut: Counter[str] = Counter()
    seconds = []
    with served(model, folder) as running:
        load = Load(running, requests, [[running.ask(each)] for each in requests])
        with load.going_on(CLIENTS):
            for number in range(TIMES):
                time.sleep(1)
                workers = running.workers()
                victim = random.Random(number).choice(sorted(workers))
                held = _ports(running, victim)
                others = {port for worker in workers - {victim} for port in _ports(running, worker)}
                load.cut.clear()
                os.kill(victim, signal.SIGKILL)
                seconds.append(_until_replaced(running, workers))
                running.until_ready()
                for _, port, _ in load.cut:
                    cut["held" if port in held else "of another worker" if port in others else "new connection"] += 1
        outcomes = dict(load.outcomes)
        at_the_end = len(running.workers())
    return {
        "kills": TIMES,
        "calls": outcomes,
        "cut_off": dict(cut),
        "slowest_new_process_seconds": round(max(seconds), 2),
        "workers_at_the_end": f"{at_the_end} of {WORKERS}",
    }


def _until_replaced(running: Running, before: set[int]) -> float:
    return seconds_until(lambda: len(running.workers() - before) == 1)


def _ports(running: Running, worker: int) -> set[int]:
    """The callers' ports of the connections that a worker holds."""
    inodes = set()
    for file in (PROC / str(worker) / "fd").iterdir():
        try:
            target = os.readlink(file)
        except OSError:
            continue
        inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in (PROC / "net" / "tcp").read_text().splitlines()[1:]]
    own = f":{running.port:04X}"
    return {int(row[2].rpartition(":")[2], 16) for row in rows if row[1].endswith(own) and row[9] in inodes}
