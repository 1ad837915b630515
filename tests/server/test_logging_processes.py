"""Several workers, signals and kills: what is logged appears whole, and nothing of it twice."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmoe_rec.live.request_log import is_logged
from tests.inference.small_model import ITEMS, SmallModel
from tests.processes import PATIENCE, until
from tests.server.asking import element
from tests.server.logging_server import logged
from tests.server.test_processes import Running, served

pytestmark = [pytest.mark.thorough, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]


def ids_of(running: Running, calls: int) -> set[str]:
    """The ids of requests that were answered."""
    found = set()
    for _ in range(calls):
        status, tree = running.send({"inputs": [element(), element()]})
        assert status == 200
        found |= {each["request_id"] for each in tree["predictions"]}
    return found


def test_workers_write_one_folder_and_all_of_it_at_sigterm(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    words = ["--workers", "2", "--log-requests", str(folder), "--log-share", "0.5"]
    with served(small.folder, tmp_path, *words) as running:
        ids = ids_of(running, 30)
        assert not [*folder.iterdir()]
        expected = {each for each in ids if is_logged(each, 0.5)}
        until(lambda: f'request_log_total{{outcome="unsampled"}} {60 - len(expected)}.0' in _metrics(running))
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
    table = logged(folder)
    assert set(table["served_request"].to_pylist()) == expected
    assert len(table) == len(expected) * len(ITEMS)
    assert {each.suffix for each in folder.iterdir()} == {".parquet"}


def test_a_worker_that_is_killed_loses_what_it_has_not_written(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    words = ["--workers", "2", "--log-requests", str(folder), "--log-share", "1", "--log-seconds", "1"]
    with served(small.folder, tmp_path, *words) as running:
        ids = ids_of(running, 10)
        until(lambda: 'request_log_total{outcome="written"} 20.0' in _metrics(running))
        before = {each.name for each in folder.iterdir()}
        for worker in running.workers():
            os.kill(worker, signal.SIGKILL)
        until(lambda: "another one takes its place" in running.log.read_text())
        until(lambda: _answers(running))
        later = ids_of(running, 5)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
    assert before <= {each.name for each in folder.iterdir()}
    found = logged(folder)["served_request"].to_pylist()
    assert ids | later <= set(found)
    assert all(found.count(each) == len(ITEMS) for each in set(found))
    for file in folder.glob("*.parquet"):
        pq.read_table(file)


def _metrics(running: Running) -> str:
    return str(running.send(None, "/metrics", "GET")[1])


def _answers(running: Running) -> bool:
    try:
        return running.send({"inputs": [element()]})[0] == 200
    except (OSError, ValueError):
        return False


def test_options_without_a_folder_are_refused() -> None:
    from tests.commands import run

    with pytest.raises(SystemExit) as end:
        run("serve", "--model", "nowhere", "--log-share", "0.5")
    assert end.value.code == 2
