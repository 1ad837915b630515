"""Options of the server, refusals of calls, and helpers for sockets and processes."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.live.request_log import RequestLogOptions
from mmoe_rec.settings.sections import Serving

MAX_MESSAGE_CHARACTERS = 400
MEBIBYTE = 2**20
BACKLOG = 1_024
INVALID_PARAMETER, INTERNAL_ERROR = "INVALID_PARAMETER_VALUE", "INTERNAL_ERROR"  # Error codes of MLflow's server.


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        limits: Limits of calls.
        setting_overrides: Settings that replace the settings of each served model.
        grace_seconds: Maximum seconds from closing the port until the server ends. Calls that take longer are dropped.
        token: Token that callers must send. If None, callers need no token.
        journal: URL of the journal. If None, the server accepts no events.
        request_log: Options of the request log. If None, requests are not logged.
        allowed_hosts: Allowed values of the header Host. If None, any value is allowed.
        drain_seconds: Seconds from SIGTERM until the port closes. In this time, health checks fail, so that a load
            balancer sends its calls to other servers.
    """

    limits: Serving = field(default_factory=Serving)
    setting_overrides: Mapping[str, Any] = field(default_factory=dict)
    grace_seconds: float = 10.0
    token: str | None = None
    journal: str | None = None
    request_log: RequestLogOptions | None = None
    allowed_hosts: frozenset[str] | None = None
    drain_seconds: float = 0.0


class RefusalReason(StrEnum):
    """Why a call is refused, as a label of metrics."""

    BODY = "body"
    ELEMENT = "element"
    MODEL = "model"
    NO_JSON = "no_json"
    TOO_SLOW = "too_slow"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    BUSY = "busy"
    BEHIND = "behind"
    DISK = "disk"
    FOREIGN = "foreign"
    UNAUTHORIZED = "unauthorized"
    NO_JOURNAL = "no_journal"
    PAGE = "page"
    RELOAD = "reload"
    INTERNAL = "internal"
    CALLER_GONE = "caller_gone"


@dataclass(eq=False)
class HttpError(Exception):
    """An error reply to a call.

    Attributes:
        status: HTTP status.
        message: One sentence for the caller.
        reason: Reason under which the metrics count the call.
        error_code: Error code that MLflow's server would reply with.
        retry_after: Seconds after which the same call may succeed. None if a retry is not worthwhile.
    """

    status: int
    message: str
    reason: RefusalReason
    error_code: str = INVALID_PARAMETER
    retry_after: int | None = None

    def body(self) -> dict[str, str]:
        """Return the reply in MLflow's format."""
        return {"error_code": self.error_code, "message": truncate(self.message)}


class CallLimiter:
    """Limit on the concurrent calls of one endpoint, such as /events (`max_concurrent_calls`)."""

    def __init__(self, limits: Serving, calls: str, on_change: Callable[[int], object] = lambda active: None) -> None:
        """Start without active calls.

        Args:
            limits: Limits of the server.
            calls: Name of the calls in messages, such as "calls of /events".
            on_change: Receives the number of active calls whenever it changes.
        """
        self._limits, self._calls, self._on_change = limits, calls, on_change
        self.active = 0

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """Count a call as active within the context, including the read of its body. Raise HttpError at the limit."""
        if self.active >= self._limits.max_concurrent_calls:
            sentence = f"{self.active} {self._calls} are active, the limit of this server"
            hint = "(setting `serving.max_concurrent_calls`); try again"
            raise HttpError(503, f"{sentence} {hint}", RefusalReason.BUSY, "RESOURCE_EXHAUSTED", 1)
        self.active += 1
        self._on_change(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self._on_change(self.active)


def truncate(sentence: str) -> str:
    """Cut a sentence to `MAX_MESSAGE_CHARACTERS`, because it may quote a value that is as long as the call's body."""
    return sentence if len(sentence) <= MAX_MESSAGE_CHARACTERS else f"{sentence[: MAX_MESSAGE_CHARACTERS - 3]}..."


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket without listening on it.

    Args:
        host: Host name or IP address of this machine.
        port: Port, 0 for a free one.

    Raises:
        UserError: The address is in use or not on this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise _listen_error(f"{host}:{port}", error) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Start to accept connections. Raise UserError if another program already listens on the port."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _listen_error(url_of(bound).removeprefix("http://"), error) from None


def _listen_error(address: str, error: OSError) -> UserError:
    return UserError(f"{address} can't be used for listening: {error.strerror or error}")


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """Log to stderr, one line per message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s [%(process)d] %(message)s", force=True)
    # uvicorn logs its start and end, which this server logs, too. It also warns about each request that isn't HTTP, so
    # a caller could fill the disk with warnings.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def error_message(error: BaseException) -> str:
    """Return the message of a UserError. For other errors, return the class and the message in one line."""
    return str(error) if isinstance(error, UserError) else one_line(error)


def end_process(code: int) -> NoReturn:
    """End the process at once. A normal exit could spend seconds on freeing a large model."""
    logging.shutdown()
    with suppress(OSError):  # The terminal may be closed.
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
