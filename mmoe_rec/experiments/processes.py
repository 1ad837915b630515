"""Runs in processes of their own, several side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import (
    EXIT_CODE,
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    StoppedError,
    StopRequest,
    UserError,
    exit_with_message,
)
from mmoe_rec.settings.sections import Settings

Task = TypeVar("Task")
_SECONDS_BETWEEN_LOOKS = 0.5


def share_threads(settings: Settings, jobs: int) -> Settings:
    """Return the settings of one of several runs side by side, which share the cores."""
    if jobs == 1 or settings.training.threads is not None:
        return settings
    training = settings.training.model_copy(update={"threads": max(1, usable_cores() // jobs)})
    return settings.model_copy(update={"training": training})


def run_side_by_side(
    function: Callable[[Task], object], tasks: Sequence[Task], logs: Sequence[Path], jobs: int
) -> Iterator[int]:
    """Call a picklable function on tasks, each in a process and on a GPU of its own. Yields their numbers as they end.

    Args:
        function: The function to call.
        tasks: Its arguments.
        logs: Files to which each process appends its output.
        jobs: Number of processes side by side.

    Raises:
        UserError: A process failed or was killed. The others are stopped.
        StoppedError: A signal came.
    """
    spawn = multiprocessing.get_context("spawn")  # A fork would copy torch's threads.
    waiting = list(range(len(tasks)))
    running: dict[int, tuple[int, BaseProcess]] = {}
    with StopRequest() as stop:
        try:
            while waiting or running:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        number = waiting.pop(0)
                        started = spawn.Process(target=_run, args=(function, tasks[number], slot, logs[number]))
                        started.start()
                        running[slot] = number, started
                wait([process.sentinel for _, process in running.values()], _SECONDS_BETWEEN_LOOKS)
                if stop.signal is not None:
                    raise StoppedError(f"{stop.signal} came")
                for slot, (number, process) in list(running.items()):
                    if process.exitcode is not None:
                        del running[slot]
                        _check_end(process.exitcode, logs[number])
                        yield number
        finally:  # Wait until all processes have ended: a new start must not meet them.
            while alive := [process for _, process in running.values() if process.is_alive()]:
                for process in alive:
                    process.terminate()
                    process.join(_SECONDS_BETWEEN_LOOKS)


def _check_end(code: int, log: Path) -> None:
    """Raise as `run_side_by_side` does, by the exit code of a process and its log."""
    if code in (EXIT_CODE, STOPPED_EXIT_CODE):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # Libraries may print more while the process ends.
        sentences = (line for line in reversed(lines) if line.startswith(("error: ", "stopped: ")))
        last = next(sentences, "").partition(": ")[2]
        raise UserError(f"{last} ('{log}' has the whole output)") if code == EXIT_CODE else StoppedError(last)
    if code:
        how = f"was killed by signal {-code}. A lower --jobs needs less memory" if code < 0 else "failed"
        raise UserError(f"a process {how}. Its output is in '{log}'. Repeat the command to go on.")


def _run(function: Callable[[Task], object], task: Task, slot: int, log: Path) -> None:
    """Call the function in this process, which ends as a command does."""
    for each in STOP_SIGNALS:
        # A second signal must not end the saving after the first one, which a `StopRequest` notes.
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(slot)  # by which a run picks its GPU
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    with exit_with_message():
        function(task)


def _end_with_parent() -> None:
    """Send the signals that the parent would send, once it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
