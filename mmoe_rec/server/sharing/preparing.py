"""A process that loads a model, writes it into a file that workers map, and ends, with the memory that loading takes.

The file lies in the temporary folder and has no name, so nothing of it is left behind, whoever ends and however, and
nobody clears it away while it is used: parent, preparing process and workers pass its handle on. What they say over
the pipe: the parent the handle, the process `("prepared",)`, `("failed", sentence)` or `("behind", sentence)`. This
module itself imports nothing heavy.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, BinaryIO

from mmoe_rec.errors import UserError, one_line
from mmoe_rec.server.options import Options, end_process, ignore_interrupts, log_to_stderr
from mmoe_rec.server.reloading import Source
from mmoe_rec.server.sharing.starting import started


@dataclass(frozen=True)
class Prepared:
    """A model in a file, for workers that map it."""

    source: Source
    file: BinaryIO

    def send(self, process: BaseProcess, pipe: Connection) -> None:
        """Passes the file to a process, which takes it by `received`."""
        assert process.pid is not None
        send_handle(pipe, self.file.fileno(), process.pid)


def received(pipe: Connection) -> BinaryIO:
    """The file that another process sends."""
    return os.fdopen(recv_handle(pipe), "r+b")


class Preparing:
    """A model that a process prepares. Raises UserError where the temporary folder takes no file."""

    def __init__(self, source: Source, options: Options, is_stopping: Callable[[], bool]) -> None:
        try:
            file = tempfile.TemporaryFile(prefix="mmoe-rec-")  # noqa: SIM115 - it is open as long as workers need it
        except OSError as error:
            raise UserError(no_room(error, tempfile.gettempdir())) from None
        self._prepared = Prepared(source, file)
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = started(prepare, (source, options, theirs, tempfile.gettempdir()), is_stopping)
        theirs.close()
        if self.process is not None:
            with suppress(OSError):  # it has ended
                self._prepared.send(self.process, self.pipe)

    @property
    def waited_for(self) -> list[Any]:
        """What `multiprocessing.connection.wait` tells of once there may be a result."""
        return [] if self.process is None else [self.pipe, self.process.sentinel]

    def has_ended(self) -> bool:
        """Whether there is a result."""
        return self.process is not None and (self.pipe.poll() or not self.process.is_alive())

    def result(self) -> Prepared:
        """The model, once it has ended. Raises UserError for one that can't be loaded, or written to the folder."""
        told: Any = None
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                told = self.pipe.recv()
        self._end()
        if told == ("prepared",):
            return self._prepared
        self._prepared.file.close()
        raise UserError(told[1] if told else self._how_it_ended())

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        if self.process is not None:
            self.process.kill()
        self._end()
        self._prepared.file.close()

    def _end(self) -> None:
        if self.process is not None:
            self.process.join()
        self.pipe.close()

    def _how_it_ended(self) -> str:
        code = (self.process and self.process.exitcode) or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = ", as the system does where memory is short" if how == "SIGKILL" else "; its own lines above say why"
        return f"the process that loads the model at '{self._prepared.source.address}' was ended by {how}{hint}"


def prepare(source: Source, options: Options, pipe: Connection, folder: str) -> None:
    """Loads a model, which answers its example and learns the journal, and writes it into the file of a folder."""
    ignore_interrupts()
    log_to_stderr()
    try:
        file = received(pipe)
    except (EOFError, OSError):  # the parent has ended
        end_process(1)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        _write(source, options, file, folder)
    except UserError as error:
        pipe.send(("failed", str(error)))
    else:
        pipe.send(("prepared",))
    end_process(0)  # without closing a file that could not be written


def _write(source: Source, options: Options, file: BinaryIO, folder: str) -> None:
    import torch

    from mmoe_rec.server.models import Models
    from mmoe_rec.server.sharing.arrays import write

    torch.set_num_threads(1)  # as in workers, for which it measures what multiplies faster
    served = Models(options.limits, options.journal).load(source)
    try:
        write(served, file)
    except OSError as error:
        raise UserError(no_room(error, folder)) from error
    except Exception as error:
        raise UserError(
            f"the model at '{source.address}' can't be shared by several workers ({one_line(error)})"
        ) from error


def _end_with_parent(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()
    end_process(1)


def no_room(error: OSError, folder: str) -> str:
    """What is told where the temporary folder takes no file, or not all of one."""
    return (
        f"the temporary folder '{folder}' can't take the model that workers share "
        f"({error.strerror or error}): set TMPDIR to a folder with room for it, or take --workers 1"
    )
