"""Other processes, as tests look at them and wait for them."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE = 300.0
"""Seconds to wait for what takes a moment, before a test that would hang ends; a machine may be very busy."""


def until(
    condition: Callable[[], Found], why: str = "it never happened", pause: float = 0.02, within: float = PATIENCE
) -> Found:
    """The first true value of a condition, looked at every `pause` seconds.

    Raises TimeoutError, with `why`, after so many seconds instead of hanging for ever.
    """
    end = time.monotonic() + within
    while not (actual := condition()):
        if time.monotonic() > end:
            raise TimeoutError(why)
        time.sleep(pause)
    return actual


def children(parent: int | None, word: str) -> set[int]:
    """The process ids of those children that have a word in their command."""
    actual = set()
    words = ["ps", "-ww", "-eo", "pid,ppid,args"]
    for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, of, command = line.split(None, 2)
        if of == str(parent) and word in command:
            actual.add(int(pid))
    return actual


def workers(server: int) -> set[int]:
    """The process ids of a server's workers: children of its fork server."""
    return {worker for forking in children(server, "forkserver") for worker in children(forking, "forkserver")}


def is_running(process: int | None) -> bool:
    """Whether there is a process of this id, which has not ended."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] not in ("", "Z")
