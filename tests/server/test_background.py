"""Threads in the background leave the processor to others."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmoe_rec.server.live.background import step_back


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_thread_steps_back_alone() -> None:
    before = _priority()
    with ThreadPoolExecutor(1, initializer=step_back) as threads:
        assert threads.submit(_priority).result() == min(before + 10, 19)
    assert _priority() == before
