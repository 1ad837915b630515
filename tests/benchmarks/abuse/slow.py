"""Connections that send too little or too slowly, or take no reply; valid requests go on beside them."""

from __future__ import annotations

import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.load import Load
from tests.benchmarks.abuse.server import Running, served
from tests.benchmarks.abuse.strategies import valid
from tests.benchmarks.abuse.wire import Sent

CONNECTIONS = 200
CLIENTS = 2
LONGEST_SECONDS = 60.0
_HEADERS = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n"
_PAGE = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"

KINDS: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "half_headers": (_HEADERS, b""),
    "trickled_headers": (_HEADERS, b"X: y\r\n"),
    "half_body": (_HEADERS + b"\r\n" + b"{" * 99, b""),
    "trickled_body": (_HEADERS + b"\r\n", b"["),
    "half_open": (_HEADERS + b"\r\n", b""),
    "no_reply_taken": (_PAGE * 100, b""),
    "idle_after_a_call": (_PAGE, b""),
}
"""What a connection sends at first, and then every half second."""


def slow(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts by kind."""
    requests = [Sent(body) for body in valid(model)]
    found: dict[str, Any] = {}
    with served(model, folder) as running:
        expected = [[running.ask(each)] for each in requests]
        for name, (start, later) in KINDS.items():
            load = Load(running, requests, expected)
            with load.going_on(CLIENTS):
                ends, seconds = _held(running, name, start, later)
            found[name] = {"ended": dict(ends), "last_after_seconds": round(seconds, 1), "beside": dict(load.outcomes)}
        found["tracebacks"] = running.log.read_text().count("Traceback")
    return found


def _held(running: Running, name: str, start: bytes, later: bytes) -> tuple[Counter[str], float]:
    """How connections end, and when the last one does."""
    ends: Counter[str] = Counter()
    waiting = selectors.DefaultSelector()
    for _ in range(CONNECTIONS):
        connection = _opened(running, name, start)
        waiting.register(connection, selectors.EVENT_READ)
    began = sent = time.monotonic()
    while waiting.get_map() and time.monotonic() - began < LONGEST_SECONDS:
        takes = name != "no_reply_taken" or time.monotonic() - began > LONGEST_SECONDS / 2
        for key, _ in waiting.select(0.2) if takes else ():
            _received(waiting, key.fileobj, ends)
        if not takes:
            time.sleep(0.2)
        if later and time.monotonic() - sent > 0.5:
            sent = time.monotonic()
            for key in list(waiting.get_map().values()):
                _quietly(lambda connection=key.fileobj: connection.sendall(later))
    seconds = time.monotonic() - began
    for key in list(waiting.get_map().values()):
        ends["still open"] += 1
        key.fileobj.close()  # type: ignore[union-attr]
    return ends, seconds


def _opened(running: Running, name: str, start: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", running.port))
    _quietly(lambda: connection.sendall(start))
    if name == "half_open":
        connection.shutdown(socket.SHUT_WR)
    return connection


def _received(waiting: selectors.DefaultSelector, connection: Any, ends: Counter[str]) -> None:
    try:
        part = connection.recv(2**16)
    except OSError:
        part, how = b"", "reset"
    else:
        how = "closed"
    if part.startswith(b"HTTP/1.1 "):
        ends[f"replies {part[9:12].decode()}"] += 1
    if not part:
        ends[how] += 1
        waiting.unregister(connection)
        connection.close()


def _quietly(work: Callable[[], None]) -> None:
    with suppress(OSError):  # what it was comes out where the connection is read
        work()
