"""How to serve: what is common to a server of one process and of several, without anything heavy."""

from __future__ import annotations

import logging
import os
import socket
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mmoe_rec.errors import UserError
from mmoe_rec.live.request_log import LogOptions
from mmoe_rec.server.limits import Limits


@dataclass(frozen=True)
class Options:
    """How to serve.

    grace: seconds from SIGTERM to the end; token: which callers have to show, None lets all in; journal: address
    of the journal of events, None takes none; log: how requests are logged, None does not log them.
    """

    limits: Limits
    grace: float = 10.0
    token: str | None = None
    journal: str | None = None
    log: LogOptions | None = None


BACKLOG = 1_024
TOKEN_VARIABLE = "MMOE_REC_TOKEN"


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. port: 0 takes a free one.

    Raises UserError for an address that is taken, on Linux also by a server that is still loading its model, or that is
    not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        if sys.platform == "linux":
            _reserve(bound)
    except OSError as error:
        raise _taken(f"{host}:{port}", error) from None
    return bound


def _reserve(bound: socket.socket) -> None:
    """Raises OSError where another server has bound a socket to the same address, which it does not listen on yet.

    SO_REUSEADDR, which a server needs that starts soon after another one has ended, lets both bind. So each also binds
    a Unix socket to a name without a file, of which there is one for a network namespace, as long as its own exists.
    """
    reserved = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    weakref.finalize(bound, reserved.close)
    reserved.bind(f"\0mmoe-rec {address_of(bound)}")


def listen(bound: socket.socket) -> None:
    """Takes connections. Raises UserError where another program has come first, on the same port of all addresses."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _taken(address_of(bound).removeprefix("http://"), error) from None


def _taken(address: str, error: OSError) -> UserError:
    return UserError(f"{address} can't be listened on: {error.strerror or error}")


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


def end_process(code: int) -> NoReturn:
    """Ends at once. Python would first take models apart, which for a large one takes seconds."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_token(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token in a file, else in the environment; None where there is neither.

    It is no argument of the command, as any user of the machine can list those. Raises UserError for a file that can't
    be read, and for an empty token.
    """
    if file is None:
        token, where = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        where = f"'{file}'"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the token file '{file}' can't be read: {error}") from None
    if token is not None and not token.strip():
        raise UserError(f"the token in {where} is empty; give one, or leave it out to let everybody in")
    return None if token is None else token.strip()
