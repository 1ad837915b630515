"""How a server's processes start: forked from one that has imported what is heavy, once for all of them.

By itself each process takes seconds, and hundreds of MB, to import torch, pyarrow and pandas. A fork is safe where no
other thread runs, so the process that they are forked from, Python's fork server, starts none: it only imports
(`mmoe_rec.server.sharing.imported`), with the threads switched off that NumPy's OpenBLAS and Arrow's jemalloc would
start when they are loaded. torch starts its own with the first product, of which there is none before the fork.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

IMPORTED = "mmoe_rec.server.sharing.imported"
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_TICK_SECONDS = 0.1

_log = logging.getLogger(__name__)


@contextmanager
def forking(folder: str, variables: dict[str, str]) -> Iterator[None]:
    """Makes ready for processes to start within the block, with further variables in their environment.

    folder: of the server's own, for the socket by which they are asked for.
    """
    variables = variables | NO_THREADS
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    # Where `multiprocessing` puts sockets; a folder of its own would stay behind a process that ends by `os._exit`.
    places: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    sockets, places["tempdir"] = places.get("tempdir"), folder
    try:
        yield
    finally:
        places["tempdir"] = sockets
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def started(
    target: Callable[..., None], arguments: tuple[Any, ...], is_stopping: Callable[[], bool]
) -> BaseProcess | None:
    """A process that runs a function; None where the server is told to stop meanwhile, as the first start takes long.

    One that was not waited for ends by itself, as the other end of its pipe is closed. Raises OSError.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([IMPORTED])
        for last in (False, True):  # the fork server may be killed while it is asked; the next one asks another
            process: BaseProcess = context.Process(target=target, args=arguments)
            try:
                return process if _is_started(process, is_stopping) else None
            except (OSError, EOFError) as error:  # such as a path of the socket that is too long
                if last:
                    _log.warning("a process can't be forked, and takes more memory: %s", error or "no answer")
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def _is_started(process: BaseProcess, is_stopping: Callable[[], bool]) -> bool:
    failure: list[OSError | EOFError] = []

    def start() -> None:
        try:
            process.start()
        except (OSError, EOFError) as error:
            failure.append(error)

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    while starting.is_alive():
        starting.join(_TICK_SECONDS)
        if is_stopping():
            return False
    if failure:
        raise failure[0]
    return True
