"""How to serve: what is common to a server of one process and of several, without anything heavy."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

from mmoe_rec.errors import UserError
from mmoe_rec.server.limits import Limits


@dataclass(frozen=True)
class Options:
    """How to serve. grace: seconds from SIGTERM to the end; token: which callers have to show, None lets all in."""

    limits: Limits
    grace: float = 10.0
    token: str | None = None


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. port: 0 takes a free one.

    Raises UserError for an address that is taken, or not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"{host}:{port} can't be listened on: {error.strerror or error}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The http:// address of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr() -> None:
    """What the server says goes to stderr, a line each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s [%(process)d] %(message)s")
    # uvicorn's lines about its own start and end say nothing that ours do not; its warnings are one line for each
    # request that is no HTTP, so that a caller could fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def ignore_interrupts() -> None:
    """Leaves Ctrl-C, which reaches all processes of a terminal, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_process(code: int) -> NoReturn:
    """Ends at once. Python would first take models apart, which for a large one takes seconds."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
