"""Work of which several pieces run at a time, each in a process of its own, and on a card of its own where there are
some. What a piece prints goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from mmoe_rec.errors import StoppedError, StopRequest, UserError

Asked = TypeVar("Asked")
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class _Running:
    number: int
    slot: int
    process: BaseProcess
    told: Connection
    log: Path


def side_by_side(
    function: Callable[[Asked], str], asked: Sequence[Asked], logs: Sequence[Path], at_once: int
) -> Iterator[tuple[int, str]]:
    """What a picklable function gives of each, with its number, in the order in which they end.

    logs: files to which what each prints is added; at_once: how many run at a time. Where one fails, or a signal comes,
    the others get signals until they have ended: a function that saves what it has at the first one, by a
    `StopRequest`, is not disturbed by others.

    Raises UserError of one that failed, StoppedError where a signal came.
    """
    waiting, running = list(range(len(asked))), list[_Running]()
    with StopRequest() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    number, slots = waiting.pop(0), {each.slot for each in running}
                    slot = min(set(range(at_once)) - slots)
                    running.append(_started(function, asked[number], number, slot, logs[number]))
                ready = wait([each.told for each in running], _SECONDS_BETWEEN_LOOKS)
                if stop.signal is not None:
                    raise StoppedError(f"{stop.signal} came; what there was is saved, go on with --resume")
                for each in [one for one in running if one.told in ready]:
                    running.remove(each)
                    yield each.number, _result(each)
        finally:
            _end(running)


def _started(function: Callable[[Asked], str], asked: Asked, number: int, slot: int, log: Path) -> _Running:
    spawn = multiprocessing.get_context("spawn")  # not forked: torch has threads
    told, tells = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(tells, function, asked, slot, log))
    process.start()
    tells.close()
    return _Running(number, slot, process, told, log)


def _result(ended: _Running) -> str:
    """Raises as `side_by_side`."""
    try:
        kind, text = ended.told.recv()
    except EOFError:
        kind, text = "died", ""
    ended.process.join()
    if kind == "done":
        return str(text)
    if kind == "stopped":
        raise StoppedError(text)
    if kind == "refused":
        raise UserError(f"{text} ('{ended.log}' has what came before)")
    code = ended.process.exitcode or 0
    how = (
        f"was killed by signal {-code}, as where memory runs out (a lower --at-once takes less)"
        if code < 0
        else "failed"
    )
    raise UserError(f"a process {how}; its last words are in '{ended.log}', and --resume goes on")


def _end(running: Sequence[_Running]) -> None:
    """Waits until all have saved what they have. Where there is nothing to save, signals are ignored, so they come
    until all have ended."""
    while any(each.process.is_alive() for each in running):
        for each in running:
            each.process.terminate()
            each.process.join(_SECONDS_BETWEEN_LOOKS)


def _run(tells: Connection, function: Callable[[Asked], str], asked: Asked, slot: int, log: Path) -> None:
    """In a process of its own: tells what became of it, which may be nothing."""
    for each in (signal.SIGTERM, signal.SIGINT):
        # A `StopRequest` notes the first one, and then puts back what was before: a second one, as where both the
        # parent and a cluster send it, would else end the saving.
        signal.signal(each, signal.SIG_IGN)
    _end_with_parent()
    os.environ["LOCAL_RANK"] = str(slot)  # by which a training picks its card
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        tells.send(("done", function(asked)))
    except UserError as error:
        tells.send(("refused", str(error)))
    except StoppedError as stopped:
        tells.send(("stopped", str(stopped)))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """As the parent would, see `_end`."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    threading.Thread(target=end, name="end-with-parent", daemon=True).start()
