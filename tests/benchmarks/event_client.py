"""Sends events to a server over HTTP, and sends them again where it does not answer for a while."""

from __future__ import annotations

import http.client
import json
import time
from queue import SimpleQueue
from typing import Self

import pyarrow as pa

PATIENCE_S = 300.0
"""Seconds that a server may be away, as while it is started again."""
CONNECTIONS = 16
_PAUSE_S = 0.1
_COME_AGAIN = {502, 503, 504}


class Client:
    """Talks to the server at a port of this machine, over several connections in turn.

    Each lies with one of the server's workers, so that all of them are asked. again: how often something was sent
    again.
    """

    def __init__(self, port: int) -> None:
        self.again = 0
        self._connections: SimpleQueue[http.client.HTTPConnection] = SimpleQueue()
        for _ in range(CONNECTIONS):
            self._connections.put(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._connections.empty():
            self._connections.get().close()

    def position(self) -> int:
        """Up to which position of its journal the worker that is asked knows events."""
        return int(json.loads(self._ask("GET", "/version"))["position"])

    def send(self, table: pa.Table) -> int:
        """Sends events of the interaction log until the server has said that it has them; gives their position.

        Raises RuntimeError where it refuses them.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return int(json.loads(self._ask("POST", "/events", sink.getvalue().to_pybytes()))["position"])

    def _ask(self, method: str, page: str, body: bytes = b"") -> bytes:
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                status, reply = self._once(method, page, body)
                if status == 200:
                    return reply
                failure = f"{status}: {reply[:300]!r}"
                if status not in _COME_AGAIN:
                    raise RuntimeError(failure)
            except (OSError, http.client.HTTPException) as error:
                failure = str(error)
            if time.monotonic() > give_up:
                raise RuntimeError(f"the server has not answered for {PATIENCE_S:,.0f} s ({failure})")
            self.again += 1
            time.sleep(_PAUSE_S)

    def _once(self, method: str, page: str, body: bytes) -> tuple[int, bytes]:
        connection = self._connections.get()
        try:
            connection.request(method, page, body, {"Content-Type": "application/vnd.apache.arrow.stream"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            connection.close()  # and opened by the next request
            raise
        finally:
            self._connections.put(connection)
