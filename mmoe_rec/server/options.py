"""How to serve, and how a call is refused: what is common to a server of one process and of several."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.live.request_log import RequestLogOptions
from mmoe_rec.settings.sections import Serving

MAX_MESSAGE_CHARACTERS = 400
MEBIBYTE = 2**20
BACKLOG = 1_024
INVALID_PARAMETER, INTERNAL_ERROR = "INVALID_PARAMETER_VALUE", "INTERNAL_ERROR"  # as MLflow's server says


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        limits: Limits of calls.
        setting_overrides: Settings that replace those of each served model.
        grace_seconds: Seconds from SIGTERM, or from the end of the drain, to the end of the process.
        token: Token that callers have to show. None lets all in.
        journal: Address of the journal of events. None takes no events.
        log: Options of the request log. None logs no requests.
        allowed_hosts: Names of the server that the header Host may hold. None allows any.
        drain_seconds: Seconds from SIGTERM until the port closes. Health checks fail meanwhile.
    """

    limits: Serving = field(default_factory=Serving)
    setting_overrides: Mapping[str, Any] = field(default_factory=dict)
    grace_seconds: float = 10.0
    token: str | None = None
    journal: str | None = None
    request_log: RequestLogOptions | None = None
    allowed_hosts: frozenset[str] | None = None
    drain_seconds: float = 0.0


@dataclass(eq=False)
class HttpError(Exception):
    """A call that gets no rankings: an HTTP status and one sentence for the caller.

    reason: one of few words, for the metrics; retry_after: seconds after which the same call may succeed.
    """

    status: int
    message: str
    reason: str
    error_code: str = INVALID_PARAMETER
    retry_after: int | None = None

    def body(self) -> dict[str, str]:
        """The reply, in MLflow's form."""
        return {"error_code": self.error_code, "message": truncate(self.message)}


class CallLimiter:
    """So many calls of a page are let in at a time as a worker takes (`max_concurrent_calls`); each page has its
    own."""

    def __init__(self, limits: Serving, calls: str, on_change: Callable[[int], object] = lambda active: None) -> None:
        """calls: what they are, for people; show: is told whenever another number of places is taken."""
        self._limits, self._calls, self._on_change = limits, calls, on_change
        self.active = 0

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """A place for a call, from its headers on: its body takes memory long before it is answered. Raises Refused."""
        if self.active >= self._limits.max_concurrent_calls:
            sentence = f"{self.active} {self._calls} are under way, as many as this server takes at a time"
            hint = "(setting `serving.max_concurrent_calls`); come again"
            raise HttpError(503, f"{sentence} {hint}", "busy", "RESOURCE_EXHAUSTED", 1)
        self.active += 1
        self._on_change(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self._on_change(self.active)


def truncate(sentence: str) -> str:
    """A sentence of bounded length: it may quote a value or name of the caller's, which can be as long as the body."""
    return sentence if len(sentence) <= MAX_MESSAGE_CHARACTERS else f"{sentence[: MAX_MESSAGE_CHARACTERS - 3]}..."


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. port: 0 takes a free one.

    Raises UserError for an address that a server listens at, or that is not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise _taken(f"{host}:{port}", error) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Takes connections. Raises UserError where another program has come first, on the same port of all addresses."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _taken(url_of(bound).removeprefix("http://"), error) from None


def _taken(address: str, error: OSError) -> UserError:
    return UserError(f"{address} can't be listened on: {error.strerror or error}")


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """What the server says goes to stderr, a line each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s [%(process)d] %(message)s", force=True)
    # uvicorn's lines about its own start and end say nothing that ours do not; its warnings are one line for each
    # request that is no HTTP, so that a caller could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def error_message(error: BaseException) -> str:
    """A sentence that was written for people, or else an error's kind and text in one line."""
    return str(error) if isinstance(error, UserError) else one_line(error)


def end_process(code: int) -> NoReturn:
    """Ends at once. Python would first take models apart, which for a large one takes seconds."""
    logging.shutdown()
    with suppress(OSError):  # The terminal may have gone.
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
