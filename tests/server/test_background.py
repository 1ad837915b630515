"""Threads in the background leave the processor to others, and end with what they work for."""

import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmoe_rec.server.live.background import step_back
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, START
from tests.processes import until
from tests.server.asking import ask
from tests.server.test_after import positions, server
from tests.server.test_events import asked


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_thread_steps_back_alone() -> None:
    before = _priority()
    with ThreadPoolExecutor(1, initializer=step_back) as threads:
        assert threads.submit(_priority).result() == min(before + 10, 19)
    assert _priority() == before


def test_threads_end_with_their_server(small: SmallModel, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    app = server(small, tmp_path)
    positions(app, 3)
    assert ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}).status == 200
    threads = set(threading.enumerate()) - before
    assert {"following", "ranking"} <= {each.name for each in threads}
    del app

    def have_ended() -> bool:
        gc.collect()
        return not any(each.is_alive() for each in threads)

    until(have_ended, f"one of {threads} goes on")
