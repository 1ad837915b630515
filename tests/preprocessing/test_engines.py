"""What a build is run by: workers and their engines, rows that are sent to partitions, and answers that come back."""

import os
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.kinds.id import IdFeature
from mmoe_rec.features.vocabulary import Vocabulary
from mmoe_rec.point_in_time.arrays import DedupedRagged, Ragged
from mmoe_rec.preprocessing import build_steps as engines
from mmoe_rec.preprocessing import look_up
from mmoe_rec.preprocessing.build_steps import open_engine
from mmoe_rec.preprocessing.look_up import Exchange, ResultExchange, assign_partitions, key_range
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
    monkeypatch.setattr(engines, "MAX_THREADS", 0)


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
    monkeypatch.setattr(engines, "MAX_THREADS", 2)
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
from mmoe_rec.preprocessing import build_steps as engines
engines.THREADS_AT_MOST = 0
def work(seconds):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once, as the other one writes too
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
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    until(lambda: not any(map(is_running, workers)), "workers outlive the process that started them")


@pytest.mark.parametrize("partitions", [1, 7, 1000])
def test_partitions_are_ranges_of_keys(partitions):
    ranges = [key_range(number, partitions) for number in range(partitions)]
    firsts, lasts = [least for least, _ in ranges], [end - 1 for _, end in ranges]
    assert firsts == [0, *(last + 1 for last in lasts[:-1])]
    assert lasts[-1] == 2**64 - 1
    for keys in (firsts, lasts):
        assert assign_partitions(np.array(keys, np.uint64), partitions).tolist() == list(range(partitions))


def test_rows_arrive_by_sender_and_no_file_stays_once_it_is_removed(tmp_path):
    """Neither open nor on the disk."""
    exchange = Exchange(tmp_path / "rows", 2)
    for sender in (1, 0):
        exchange.send("rows", (sender, 0), pa.table({"row": 10 * sender + np.arange(3)}), np.array([0, 1, 0]))
    assert [table["row"].to_pylist() for table in exchange.receive("rows", 0)] == [[0, 2], [10, 12]]
    exchange.remove()
    assert not exchange.folder.exists()
    opened = (os.path.realpath(f"/proc/self/fd/{item}") for item in os.listdir("/proc/self/fd"))
    assert not [path for path in opened if f"{exchange.folder}/" in path]


def test_a_shared_list_is_sent_once_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(look_up, "ROWS_PER_BLOCK", 16)
    exchange, rows = ResultExchange(tmp_path, 32), np.arange(32)
    exchange.send("group", (0, 0), rows, {"list": DedupedRagged(Ragged(np.arange(7), np.array([7])), rows * 0)})
    for block in (0, 1):
        (table,) = exchange.exchange.receive("group", block)
        assert table["list"].to_pylist() == [list(range(7))] + [None] * 15


def test_threads_may_ask_a_vocabulary_at_once():
    known = pa.array(np.random.default_rng(0).permutation(300_000))
    expected = np.arange(300_000) + 2
    for _ in range(5):
        feature = IdFeature(kind="id", column="x", oov_buckets=1)
        vocabulary, wrong, start = Vocabulary("x", feature), [], threading.Barrier(4)
        vocabulary.set_ids(known)

        def ask(vocabulary=vocabulary, wrong=wrong, start=start) -> None:
            start.wait()
            wrong.append((vocabulary.encode(known) != expected).sum())

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [0, 0, 0, 0]
