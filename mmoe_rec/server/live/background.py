"""Threads that leave the processor to those that answer requests."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

_NICER = 10


def step_back() -> None:
    """The calling thread gets less of a processor than others while more threads want one than there are.

    On Linux alone, where threads have priorities of their own.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + _NICER, 19))
