"""Our server with two workers, connections on which anything can be sent to it, and their replies."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.inference.running_server import free_port, running_program
from tests.processes import until, workers

ROOT = Path(__file__).parents[3]
WORKERS = 2
PATIENCE = 120.0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Sent:
    """A request. target: path and query, as they stand in its first line."""

    body: bytes
    method: str = "POST"
    target: str = "/invocations"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)

    def data(self) -> bytes:
        """The bytes to send, with the body's length."""
        length = {} if self.method in ("GET", "HEAD") and not self.body else {"Content-Length": str(len(self.body))}
        lines = [f"{name}: {value}\r\n" for name, value in {"Host": "localhost", **length, **self.headers}.items()]
        return f"{self.method} {self.target} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1") + self.body


@dataclass(frozen=True)
class Reply:
    """A reply; names of headers are in lower case. closes: the server ends the connection after it."""

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool


class Wire:
    """A connection to the server on this machine."""

    def __init__(self, port: int, patience: float = PATIENCE) -> None:
        self._port, self._patience = port, patience
        self._socket: socket.socket | None = None

    @property
    def socket(self) -> socket.socket:
        """The connection, opened when it is first asked for."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), self._patience)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    @property
    def is_open(self) -> bool:
        """Whether an earlier request's connection is kept."""
        return self._socket is not None

    def ask(self, sent: Sent) -> Reply:
        """The reply to a request. Raises OSError or HTTPException where there is none."""
        try:
            self.socket.sendall(sent.data())
            return self.reply(sent.method)
        except (OSError, http.client.HTTPException):
            self.close()
            raise

    def reply(self, method: str = "POST") -> Reply:
        """The next reply. Raises OSError or HTTPException where there is none."""
        response = http.client.HTTPResponse(self.socket, method=method)
        response.begin()
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.will_close:
            self.close()
        return Reply(response.status, headers, body, response.will_close)

    def close(self) -> None:
        """Ends the connection; the next request opens another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def everything(connection: socket.socket, patience: float = PATIENCE) -> tuple[bytes, str]:
    """What comes until the server ends a connection, and how it ended: `closed`, `reset`, or `open` after a time."""
    found = b""
    end = time.monotonic() + patience
    while True:
        try:
            connection.settimeout(max(end - time.monotonic(), 0.01))
            part = connection.recv(2**16)
        except TimeoutError:
            return found, "open"
        except OSError:
            return found, "reset"
        if not part:
            return found, "closed"
        found += part


def replies_in(data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of the replies in what came, each of a known length."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        status = int(lines[0].split()[1])
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
        length = int(fields.get(b"content-length", b"0"))
        if status >= 200:
            found.append((status, data[:length]))
        data = data[length:] if status >= 200 else data
    return found


@dataclass(frozen=True)
class Running:
    """A server and where it can be asked."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def wire(self) -> Wire:
        """A new connection."""
        return Wire(self.port)

    def ask(self, sent: Sent) -> Reply:
        """The reply to a request on a connection of its own."""
        wire = self.wire()
        try:
            return wire.ask(sent)
        finally:
            wire.close()

    def workers(self) -> set[int]:
        """Process ids of the workers."""
        return workers(self.process.pid)

    def ready_workers(self) -> int:
        """How many workers serve a model, as the metrics have it."""
        try:
            text = self.ask(Sent(b"", "GET", "/metrics", {})).body.decode()
        except OSError:
            return 0
        lines = (line for line in text.splitlines() if line.startswith("mmoe_rec_model_info{"))
        return int(sum(float(line.split()[-1]) for line in lines))

    def until_ready(self) -> None:
        """Waits until all workers serve."""
        until(lambda: self.ready_workers() == WORKERS)


@contextmanager
def served(model: Path, folder: Path) -> Iterator[Running]:
    """A server of a model with two workers, until the block ends. folder: gets what it prints."""
    port = free_port()
    words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--port", str(port)]
    words += ["--workers", str(WORKERS)]
    env = {name: value for name, value in os.environ.items() if name != "MMOE_REC_TOKEN"}
    log = folder / f"server_{port}.log"
    page = f"http://127.0.0.1:{port}/health"
    with running_program(words, page, log, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}) as process:
        running = Running(port, process, log)
        running.until_ready()
        yield running
