"""Replays through a server of two processes, which are killed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.live.replay import ReplayOptions, replay
from mmoe_rec.live.replay_server import OwnServer
from tests.commands import run
from tests.inference.small_model import SmallModel
from tests.live.replayed_log import FROM, TO, model_of
from tests.log.small_logs import DAY
from tests.processes import is_running, until, workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return model_of(tmp_path_factory.mktemp("replayed"))


def _kill_a_worker(server: OwnServer) -> None:
    """Kills one of two workers, and waits until another one has taken its place."""
    assert server.process is not None
    process = server.process.pid
    before = until(lambda: len(both := workers(process)) == 2 and both, "workers are missing")
    os.kill(killed := min(before), signal.SIGKILL)
    until(lambda: len(workers(process) - {killed}) == 2, "the worker was not replaced")


@pytest.mark.thorough
def test_nothing_is_lost_or_counted_twice_where_processes_are_killed(small: SmallModel) -> None:
    """Requests that a killed process had not logged yet are missing, and all others are equal."""
    killed: list[str] = []

    def between(request: int, server: OwnServer) -> None:
        if request in (8, 30):
            _kill_a_worker(server)
            killed.append("worker")
        elif request in (20, 45):
            server.kill()
            server.start()
            killed.append("server")

    report = replay(small.settings, ReplayOptions(FROM, TO, str(small.folder)), between)
    assert killed == ["worker", "server", "worker", "server"]
    assert report["mismatches"] == 0
    assert report["rows"] > report["logged_rows"] > 50


def test_the_command_by_itself(small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text(small.settings.to_yaml(), encoding="utf-8")
    words = ["--config", str(tmp_path / "settings.yaml"), "--model", str(small.folder), "--keep", str(tmp_path)]
    run("replay", *words, "--from", "2023-11-20T22:13:20", "--to", "2023-11-21T22:13:20")
    report = json.loads((tmp_path / "replay.json").read_text())
    assert report["mismatches"] == 0
    assert report["logged_rows"] == report["rows"] > 20
    assert "features are equal to the last bit" in capsys.readouterr().out
    assert not (Path(small.settings.data.work) / "replay").exists()
    # Attributes that the server takes from its tables are not those of each row.
    with pytest.raises(SystemExit) as ended:
        run("replay", *words, "--from", "2023-11-20T22:13:20", "--to", "2023-11-21T04:13:20", "--ids-only", "--values")
    assert ended.value.code == 1
    assert "feature 'user_brand_liked' differs in " in capsys.readouterr().out


def test_a_server_that_ends_is_told_with_its_last_words(small: SmallModel) -> None:
    ended: list[int] = []

    def between(request: int, server: OwnServer) -> None:
        if request == 3:
            assert server.process is not None
            ended.append(server.process.pid)
            server.end()

    with pytest.raises(UserError, match=r"the replay's server has ended with code 0; it said: "):
        replay(small.settings, ReplayOptions(FROM, FROM + DAY, str(small.folder)), between)
    assert not is_running(ended[0])


def test_a_server_that_cannot_start_is_told(small: SmallModel, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "model")
    (tmp_path / "model" / "layout.json").write_text("{}", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"has ended with code 2; it said: .*layout.json"),
        OwnServer(tmp_path / "model", tmp_path / "journal", tmp_path / "server.log", workers=1),
    ):
        pass
