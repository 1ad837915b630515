"""Engines give results in the order of the tasks and raise what a task raises."""

import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.preprocessing import engines
from mmoe_rec.preprocessing.engines import open_engine
from tests.processes import is_running, until


def _power(exponent: int, base: int) -> int:
    if base == 13:
        raise UserError("thirteen is not wanted")
    time.sleep(0.02 * (base % 3))
    return base**exponent


def _die(_: int) -> None:
    os._exit(9)


@pytest.fixture
def processes(monkeypatch):
    """Two workers are processes, as many are."""
    monkeypatch.setattr(engines, "THREADS_AT_MOST", 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(workers):
    with open_engine("local", workers) as engine:
        assert list(engine.map(partial(_power, 2), range(9))) == [base**2 for base in range(9)]
        assert list(engine.map(partial(_power, 2), [])) == []
        with pytest.raises(UserError, match="thirteen"):
            list(engine.map(partial(_power, 3), range(20)))


def test_processes_give_the_same(processes):
    test_results_come_in_order_and_errors_as_they_are(2)


_BOTH = threading.Barrier(2)


def _place(_: int) -> tuple[int, str]:
    return os.getpid(), threading.current_thread().name


def _place_beside_another(number: int) -> tuple[int, str]:
    """Waits until another thread is here too."""
    _BOTH.wait(timeout=240)
    return _place(number)


def test_few_workers_are_threads_and_many_are_processes(monkeypatch):
    monkeypatch.setattr(engines, "THREADS_AT_MOST", 2)
    with open_engine("local", 2) as engine:
        places = set(engine.map(_place_beside_another, range(4)))
    assert {pid for pid, _ in places} == {os.getpid()}
    assert len(places) == 2
    with open_engine("local", 3) as engine:
        assert os.getpid() not in {pid for pid, _ in engine.map(_place, range(6))}
    with open_engine("local", 3, processes=False) as engine:
        assert {pid for pid, _ in engine.map(_place, range(6))} == {os.getpid()}


def test_an_error_ends_threads_that_would_go_on():
    started = []

    def task(number: int) -> None:
        started.append(number)
        time.sleep(0.01)
        if number == 1:
            raise UserError("one is enough")

    with pytest.raises(UserError, match="one is enough"), open_engine("local", 2) as engine:
        list(engine.map(task, range(1000)))
    assert len(started) < 1000


def test_a_worker_that_is_killed_is_a_sentence(processes):
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
from mmoe_rec.preprocessing import engines
engines.THREADS_AT_MOST = 0
def work(seconds):
    print(os.getpid(), flush=True)
    time.sleep(seconds)
if __name__ == "__main__":
    with engines.open_engine("local", 2) as engine:
        list(engine.map(work, [3600, 3600]))
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
    until(lambda: not any(map(is_running, workers)), "workers outlive the process that started them")
