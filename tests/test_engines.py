"""Engines give results in the order of the tasks and raise what a task raises."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest

from mmoe_rec.engines import open_engine
from mmoe_rec.errors import UserError


def _power(exponent: int, base: int) -> int:
    if base == 13:
        raise UserError("thirteen is not wanted")
    time.sleep(0.02 * (base % 3))
    return base**exponent


def _die(_: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(workers):
    with open_engine("local", workers) as engine:
        assert list(engine.map(partial(_power, 2), range(9))) == [base**2 for base in range(9)]
        assert list(engine.map(partial(_power, 2), [])) == []
        with pytest.raises(UserError, match="thirteen"):
            list(engine.map(partial(_power, 3), range(20)))


def test_a_worker_that_is_killed_is_a_sentence():
    with (
        pytest.raises(UserError, match=r"a worker process was killed.*data\.workers or data\.rows_in_memory"),
        open_engine("local", 2) as engine,
    ):
        list(engine.map(_die, range(3)))


def test_ray_that_is_not_installed_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="extra `ray`"), open_engine("ray", 1):
        pass


_PARENT = """
import os, sys, time
from mmoe_rec.engines import open_engine
def work(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)
if __name__ == "__main__":
    with open_engine("local", 2) as engine:
        list(engine.map(work, [60, 60]))
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "parent.py").write_text(_PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)
