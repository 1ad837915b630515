"""SIGTERM under load: the server ends in time, and everything that it accepted is answered.

Whether it accepted a call shows in `100 Continue`, which comes when the server begins to read the body. Other calls may
be on their way when the server closes their connection; those are counted as cut off.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.load import Load
from tests.benchmarks.abuse.server import Running, served
from tests.benchmarks.abuse.strategies import valid
from tests.benchmarks.abuse.wire import JSON, Sent

TIMES = 10
CLIENTS = 4
ASKING_FIRST = 4
MOST_SECONDS = 10.0


def sigterm(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts."""
    requests = [Sent(body) for body in valid(model)]
    outcomes: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    seconds, codes = [], []
    for number in range(TIMES):
        with served(model, folder) as running:
            expected = [[running.ask(each)] for each in requests]
            load = Load(running, requests, expected)
            ended = threading.Event()
            others = [
                threading.Thread(target=_ask_first, args=(running, each, ended, accepted))
                for each in requests[:ASKING_FIRST]
            ]
            for other in others:
                other.start()
            with load.going_on(CLIENTS):
                time.sleep(random.Random(number).uniform(0.3, 1.5))
                took, code = running.terminate()
                ended.set()
            for other in others:
                other.join()
            load.outcomes.pop("refused", None)  # as often as clients could try
            outcomes += load.outcomes
            seconds.append(took)
            codes.append(code)
    return {
        "ends": TIMES,
        "in_time": sum(each <= MOST_SECONDS for each in seconds),
        "slowest_seconds": round(max(seconds), 2),
        "exit_codes": dict(Counter(codes)),
        "calls": dict(outcomes),
        "accepted_calls": dict(accepted),
    }


def _ask_first(running: Running, sent: Sent, ended: threading.Event, counts: Counter[str]) -> None:
    """Sends headers, and the body once the server asks for it, on a new connection each time."""
    head, _, body = Sent(sent.body, headers={**JSON, "Expect": "100-continue"}).data().partition(b"\r\n\r\n")
    while not ended.is_set():
        wire = running.wire()
        try:
            wire.socket.sendall(head + b"\r\n\r\n")
            is_accepted = wire.socket.recv(25, 256) == b"HTTP/1.1 100 Continue\r\n\r\n"  # MSG_WAITALL
        except OSError:
            wire.close()
            continue
        if is_accepted:
            try:
                wire.socket.sendall(body)
                counts[str(wire.reply().status)] += 1
            except (OSError, HTTPException) as error:
                counts[f"lost: {type(error).__name__}"] += 1
        wire.close()
