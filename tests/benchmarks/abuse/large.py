"""Bodies of 1 GB, which must be refused before they are sent."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.server import Running, served
from tests.benchmarks.abuse.strategies import valid
from tests.benchmarks.abuse.wire import Sent
from tests.benchmarks.memory import tree_bytes

SIZE = 10**9
_PIECE = b" " * 2**16
_START = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def large(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts: MiB that a client could send which reads no reply before it has sent all, and the status that
    one gets which waits for a reply to the headers.
    """
    good = Sent(valid(model)[0])
    kinds = {"by_length": b"Content-Length: %d\r\n\r\n" % SIZE, "chunked": b"Transfer-Encoding: chunked\r\n\r\n"}
    found: dict[str, Any] = {}
    with served(model, folder) as running:
        before = tree_bytes(running.process.pid)
        for name, rest in kinds.items():
            found[f"{name}_mib_sent"] = [
                round(_sent(running, _START + rest, name == "chunked") / 2**20, 1) for _ in range(5)
            ]
        with running.wire().socket as waiting:
            waiting.sendall(_START + kinds["by_length"])
            found["status_before_the_body"] = int(waiting.recv(4_096).split()[1])
        found["memory_grown_mib"] = round((tree_bytes(running.process.pid) - before) / 2**20)
        found["answers_afterwards"] = running.ask(good).status == 200
    return found


def _sent(running: Running, start: bytes, chunked: bool) -> int:
    piece = b"%x\r\n%s\r\n" % (len(_PIECE), _PIECE) if chunked else _PIECE
    sent = 0
    with running.wire().socket as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # what waits there counts as sent
        connection.sendall(start)
        try:
            while sent < SIZE:
                connection.sendall(piece)
                sent += len(_PIECE)
        except ConnectionError:
            pass
    return sent
