"""A server of a replay's own, and a period of the log fed to it in the order of time.

The server is a process on this machine's loopback and ends with the replay. Before a request is sent, all events that
happened earlier have been, and the server waits until it has learnt them. What is of the same instant comes later:
nothing sees its own instant. A row of the interaction log is sent with all its labels, though some mature later: the
server has to hide them until then.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.inference.reader import PARTS
from mmoe_rec.live.replay_period import LogEvents, Period
from mmoe_rec.progress import bar

HOST = "127.0.0.1"
PATIENCE_S = 600.0
"""Seconds that a server may be away, as while it is started, or started again."""
ROWS_AT_A_TIME, BYTES_AT_A_TIME = 2_000, 2 * 2**20
"""Events of a batch, at most."""
CANDIDATES_AT_A_TIME = 500
"""Candidates of a call, at most; what is said of one does not depend on the others."""
_END_WITHIN_S = 60.0
_PAUSE_S = 0.1
_LAST_LINES = 3


class Client:
    """Talks to a server on this machine; each call is a connection of its own, so that all workers are asked.

    again: how often something was sent again, as the server was away.
    """

    def __init__(self, port: int) -> None:
        self.port, self.again = port, 0

    def check(self) -> None:
        """Raises UserError where the server will never answer."""

    def position(self) -> int:
        """Up to which position of its journal the worker that is asked knows events."""
        return int(self._ask("GET", "/version")["position"])

    def send(self, table: pa.Table, log: str | None = None) -> int:
        """Sends events of the interaction log (None), or of a named log, again and again until the server has said that
        it has them; gives their position. Raises UserError where it refuses them."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        page = "/events" if log is None else f"/events?log={quote(log, safe='')}"
        body = sink.getvalue().to_pybytes()
        return int(self._ask("POST", page, body, "application/vnd.apache.arrow.stream")["position"])

    def rank(self, request: dict[str, Any], after: int | None, explain: bool) -> dict[str, Any]:
        """The ranking of one request, once the server has learnt all events up to a position (None: at once)."""
        page = "/invocations" if after is None else f"/invocations?after={after}"
        body = json.dumps({"inputs": [request], "params": {"explain": explain}}).encode()
        ranking: dict[str, Any] = self._ask("POST", page, body)["predictions"][0]
        return ranking

    def _ask(self, method: str, page: str, body: bytes | None = None, kind: str = "application/json") -> dict[str, Any]:
        """A reply's body, asked for again and again while the server is away."""
        call = urllib.request.Request(f"http://{HOST}:{self.port}{page}", body, {"Content-Type": kind}, method=method)
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(call, timeout=PATIENCE_S) as reply:
                    tree: dict[str, Any] = json.load(reply)
                    return tree
            except urllib.error.HTTPError as error:
                if error.code not in (502, 503, 504):
                    refusal = error.read().decode(errors="replace")
                    raise UserError(f"the server refuses what is sent to {page}: {refusal}") from None
                why = f"it answers {error.code}"
            except (OSError, http.client.HTTPException) as error:
                why = one_line(error)
            self.check()
            if time.monotonic() > give_up:
                raise UserError(f"the server has not answered for {PATIENCE_S:,.0f} s ({why})")
            self.again += 1
            time.sleep(_PAUSE_S)


class OwnServer(Client):
    """`serve` with a journal, in a process of its own, from the beginning of the context to its end.

    model: an artifact folder; journal: its address; log: a file that gets what the server prints; words: further
    arguments of `serve`. It is not started again when it ends, unless somebody calls `start`.
    """

    def __init__(self, model: Path, journal: str | Path, log: Path, workers: int, words: tuple[str, ...] = ()) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            super().__init__(free.getsockname()[1])
        self.log = log
        self._words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--host", HOST]
        self._words += ["--port", str(self.port), "--workers", str(workers), "--journal", str(journal), *words]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def start(self) -> None:
        """Starts it, and waits until it answers. Raises UserError where it ends instead."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.position()

    def check(self) -> None:
        """Raises UserError where it has ended."""
        if self.process is not None and (code := self.process.poll()) is not None:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split(os.linesep)
            last = " / ".join([line for line in lines if line.strip()][-_LAST_LINES:])
            raise UserError(f"the replay's server has ended with code {code}; it said: {last or 'nothing'}")

    def end(self) -> None:
        """Ends it, at the latest after a minute; what it logs of requests is written."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once, without a chance to write anything; its workers notice and end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def feed(
    period: Period,
    server: Client,
    most: int,
    ids_only: bool = False,
    explain: bool = False,
    between: Callable[[int], None] = lambda request: None,
) -> dict[int, dict[str, Any]]:
    """Sends a period's events and requests to a server, and gives the explanations of its rows, by their numbers.

    Args:
        most: candidates of a call.
        ids_only: leave out attributes of users and candidates, so that the server takes the latest that it knows.
        explain: ask for explanations; else none are given.
        between: called before each request with its number; tests kill there.

    Raises:
        UserError: the server has ended, or refuses something.
    """
    explanations: dict[int, dict[str, Any]] = {}
    sent, position = [0] * len(period.logs), None
    with bar() as progress:
        task = progress.add_task("replaying", total=len(period.rows))
        for request, instant in enumerate(period.times.tolist()):
            between(request)
            for place, log in enumerate(period.logs):
                until = int(np.searchsorted(log.times, instant))
                for table in _cut(log, sent[place], until):
                    position = server.send(table, log.name)
                sent[place] = until
            first, end = period.starts[request : request + 2].tolist()
            for start in range(first, end, most):
                body = _build_request(period, start, min(start + most, end), ids_only)
                ranking = server.rank(body, position, explain)
                if explain:
                    rows = (start + each for each in ranking["order"])
                    explanations.update(zip(rows, ranking["explanations"], strict=True))
            progress.advance(task, end - first)
    return explanations


def _cut(log: LogEvents, start: int, end: int) -> Iterator[pa.Table]:
    """Events from one number to another, in batches."""
    table = log.table.slice(start, end - start)
    rows = max(1, min(ROWS_AT_A_TIME, BYTES_AT_A_TIME * len(table) // max(table.nbytes, 1)))
    yield from (table.slice(each, rows) for each in range(0, len(table), rows))


def _build_request(period: Period, start: int, end: int, ids_only: bool) -> dict[str, Any]:
    """A request for the rows of a period from one number to another; user and context are those of the first."""
    schema, table = period.rows.schema, period.rows.table
    ids = {schema.columns.user, schema.columns.candidate}
    parts: dict[str, dict[str, Any]] = {part: {} for part in PARTS.values()}
    for name, role in schema.input_columns().items():
        if role in PARTS and (not ids_only or role == "context" or name in ids):
            rows = table[name].slice(start, end - start if role == "candidate" else 1)
            values = [_to_json(each) for each in rows.to_pylist()]
            parts[PARTS[role]][name] = values if role == "candidate" else values[0]
    if schema.columns.request is not None:
        parts["context"][schema.columns.request] = table[schema.columns.request][start].as_py()
    return parts


def _to_json(value: Any) -> Any:
    """Times as ISO 8601, what is no number as null."""
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value
