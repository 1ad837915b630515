"""Reloads under load, between two models at one address: no call is lost, and each is answered by one of both."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.load import Load
from tests.benchmarks.abuse.server import seconds_until, served
from tests.benchmarks.abuse.strategies import valid
from tests.benchmarks.abuse.wire import Sent
from tests.benchmarks.memory import tree_bytes
from tests.inference.other_weights import other_weights

TIMES = 100
CLIENTS = 3
_RELOAD = Sent(b"", "POST", "/reload", {})


def reloads(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts."""
    requests = [Sent(body) for body in valid(model)]
    address = folder / "model"
    models = [model, other_weights(model, folder / "other", 0.8, 1.2)]
    _point(address, models[0])
    statuses: Counter[int] = Counter()
    with served(address, folder) as running:
        expected = [[running.ask(each)] for each in requests]
        _point(address, models[1])
        running.ask(_RELOAD)
        running.until_ready()
        for each, request in zip(expected, requests, strict=True):
            each.append(_until_other(running, request, each[0]))
        load = Load(running, requests, expected)
        memory = []
        with load.going_on(CLIENTS):
            for number in range(TIMES):
                _point(address, models[number % 2])
                statuses[running.ask(_RELOAD).status] += 1
                memory.append(tree_bytes(running.process.pid))
        # The worker that was asked serves it; the others do so as soon as they have loaded it.
        last = expected[0][(TIMES - 1) % 2].body
        seconds = seconds_until(lambda: all(running.ask(requests[0]).body == last for _ in range(10)))
    return {
        "reloads": dict(statuses),
        "calls": dict(load.outcomes),
        "by_model": dict(load.used),
        "all_workers_have_the_last_after_seconds": round(seconds, 1),
        "memory_mib": [round(each / 2**20) for each in (memory[9], memory[TIMES // 2], max(memory), memory[-1])],
    }


def _until_other(running: Any, request: Sent, first: Any) -> Any:
    """The new model's reply, as soon as the worker that is asked has it."""
    while (reply := running.ask(request)).body == first.body:
        pass
    return reply


def _point(address: Path, model: Path) -> None:
    """A link to a model takes the place of another one at once."""
    made = address.with_name("link")
    made.symlink_to(model)
    os.replace(made, address)
