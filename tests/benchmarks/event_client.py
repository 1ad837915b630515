"""Sends events and requests to a server over HTTP, and sends them again where it does not answer for a while."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self
from urllib.parse import quote, urlsplit

import pyarrow as pa

from mmoe_rec.errors import UserError, one_line

ARROW = "application/vnd.apache.arrow.stream"
PATIENCE_S = 300.0
"""Seconds that a server may be away, as while it is started again."""
CONNECTIONS = 16
_PAUSE_S = 0.1
_COME_AGAIN = {502, 503, 504}


@dataclass
class Client:
    """Talks to the server at an address such as http://127.0.0.1:8000, over several connections in turn.

    Each lies with one of the server's workers, so that all of them are asked. check: called where the server does not
    answer, and raises where it never will; again: how often something was sent again.
    """

    url: str
    token: str | None = None
    patience_s: float = PATIENCE_S
    check: Callable[[], None] | None = None
    again: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"'{self.url}' is no address of a server; give one such as http://127.0.0.1:8000")
        self._path = parts.path.rstrip("/")
        self._has_answered = False
        of = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connections: SimpleQueue[http.client.HTTPConnection] = SimpleQueue()
        for _ in range(CONNECTIONS):
            self._connections.put(of(parts.hostname, parts.port, timeout=self.patience_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._connections.empty():
            self._connections.get().close()

    def version(self) -> dict[str, Any]:
        """What the server says of its model."""
        found: dict[str, Any] = json.loads(self._asked("GET", "/version", b"", "application/json"))
        return found

    def send(self, table: pa.Table, log: str | None) -> dict[str, Any]:
        """Sends events of the interaction log (None), or of a named log; gives the server's reply.

        The same batch is sent again until the server has said that it has it. Raises UserError where it refuses it.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        page = "/events" if log is None else f"/events?log={quote(log, safe='')}"
        found: dict[str, Any] = json.loads(self._asked("POST", page, sink.getvalue().to_pybytes(), ARROW))
        return found

    def rank(self, request: Mapping[str, Any], after: str | None) -> dict[str, Any]:
        """The ranking of one request, once the server has learnt all events up to a position.

        Raises UserError where the server refuses the request.
        """
        page = "/invocations" if after is None else f"/invocations?after={quote(after, safe='')}"
        body = json.dumps({"inputs": [request], "params": {"explain": True}}).encode()
        reply = json.loads(self._asked("POST", page, body, "application/json"))
        ranking: dict[str, Any] = reply["predictions"][0]
        return ranking

    def _asked(self, method: str, page: str, body: bytes, kind: str) -> bytes:
        """The body of the reply with status 200."""
        give_up = time.monotonic() + self.patience_s
        while True:
            try:
                status, found = self._once(method, page, body, kind)
                self._has_answered = True
                if status == 200:
                    return found
                told = f"it answers {status}: {_sentence(found)}"
                if status not in _COME_AGAIN:
                    raise UserError(f"the server at {self.url} does not take what is sent to {page}; {told}")
            except (OSError, http.client.HTTPException) as error:
                told = one_line(error)
            if self.check is not None:
                self.check()
            elif not self._has_answered:
                raise UserError(f"there is no server at {self.url} ({told})")
            if time.monotonic() > give_up:
                raise UserError(f"the server at {self.url} has not answered for {self.patience_s:,.0f} s ({told})")
            self.again += 1
            time.sleep(_PAUSE_S)

    def _once(self, method: str, page: str, body: bytes, kind: str) -> tuple[int, bytes]:
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        connection = self._connections.get()
        try:
            connection.request(method, f"{self._path}{page}", body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            connection.close()  # and opened by the next request
            raise
        finally:
            self._connections.put(connection)


def place(position: str) -> int:
    """By what positions in a journal are ordered."""
    return int(position)


def _sentence(body: bytes) -> str:
    """What a refusal says."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
