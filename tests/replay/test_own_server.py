"""Replays through a server of two processes, which are killed meanwhile, and through one that serves something else."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.commands.live.replay import main
from mmoe_rec.jobs.refreshing.new_tables import tables_from_log
from mmoe_rec.jobs.replay.own_server import OwnServer
from mmoe_rec.jobs.replay.run import Asked, replay
from mmoe_rec.settings.sections import Settings
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY
from tests.processes import children, fork_server, is_running, until
from tests.replay.replayed_log import FROM, TO, model_of
from tests.replay.test_comparing import PREDICTED, wrong

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and journals of POSIX")


def _kill_a_worker(server: OwnServer) -> None:
    """Kills one of two workers, and waits until another one has taken its place."""
    assert server.process is not None
    forks = fork_server(server.process.pid)
    assert forks is not None
    workers = children(forks, "")
    assert len(workers) == 2
    killed = min(workers)
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(children(forks, "") - {killed}) == 2, "the worker was not replaced")


def test_nothing_is_lost_or_counted_twice_where_processes_are_killed(small: SmallModel) -> None:
    killed: list[str] = []

    def between(step: int, server: OwnServer | None) -> None:
        assert server is not None
        if step in (8, 30):
            _kill_a_worker(server)
            killed.append("worker")
        elif step in (20, 45):
            server.kill()
            server.start()
            killed.append("server")

    found = replay(small.settings, Asked(FROM, TO, str(small.folder)), between)
    assert killed == ["worker", "server", "worker", "server"]
    assert wrong(found) == {}
    assert found["rows"] > 150
    assert found["compared"] == found["rows"] * len(found["values"])
    assert found["sent"]["accepted"] == found["rows"] + sum(found["events"].values())
    assert not (Path(small.settings.data.work) / "replay").exists()


def test_calls_that_break_are_sent_again_and_count_once(small: SmallModel, tmp_path: Path) -> None:
    """Here the server ends in the midst of a call, with or without having written the events."""
    with _serving(small.settings, small, tmp_path) as server:
        kills: list[threading.Thread] = []

        def again() -> None:
            server.kill()
            server.start()

        def between(step: int, own: OwnServer | None) -> None:
            assert own is None
            if step in (5, 15, 25, 35):
                while kills and kills[-1].is_alive():
                    kills[-1].join(1)
                kills.append(threading.Thread(target=again))
                kills[-1].start()

        found = replay(small.settings, Asked(FROM, TO, str(small.folder), url=server.url), between)
        for each in kills:
            each.join()
    assert len(kills) == 4
    assert wrong(found) == {}
    assert found["sent_again"] > 0


@contextmanager
def _serving(settings: Settings, small: SmallModel, scratch: Path) -> Iterator[OwnServer]:
    """A server whose tables, as of the first day, are made of the settings' logs."""
    tables_from_log(small.folder, settings, FROM, scratch / "model")
    with OwnServer(scratch / "model", scratch / "journal", scratch / "server.log", workers=2) as server:
        yield server


def test_an_event_that_the_tables_lack_is_found_and_where(small: SmallModel, tmp_path: Path) -> None:
    (tmp_path / "carts").mkdir()
    for file in Path(small.settings.data.events["carts"].path).iterdir():
        table = pq.read_table(file)
        before = [each for each, time in enumerate(table["time"].cast("int64").to_pylist()) if time < FROM]
        last = max(before, key=lambda row: table["time"][row].value)
        pq.write_table(table.take([each for each in range(len(table)) if each != last]), tmp_path / "carts" / file.name)
    other = small.settings.data.events["carts"].model_copy(update={"path": str(tmp_path / "carts")})
    events = {**small.settings.data.events, "carts": other}
    data = small.settings.data.model_copy(update={"events": events})
    with _serving(small.settings.model_copy(update={"data": data}), small, tmp_path) as server:
        found = replay(small.settings, Asked(FROM, FROM + DAY, str(small.folder), url=server.url))
    assert {"carts_positives_1d", "carts_recency"} & wrong(found).keys()
    assert wrong(found).keys() <= {"carts_positives_1d", "carts_recency", *PREDICTED}
    assert not (Path(small.settings.data.work) / "replay").exists()


def test_a_running_server_is_replayed_to_twice(small: SmallModel, tmp_path: Path) -> None:
    """The second time it has all events, which come again and count once."""
    with _serving(small.settings, small, tmp_path) as server:
        asked = Asked(FROM, FROM + DAY, str(small.folder), url=server.url)
        one, other = replay(small.settings, asked), replay(small.settings, asked)
    assert wrong(one) == wrong(other) == {}


def test_ids_alone_show_attributes_that_differ(small: SmallModel, capsys: pytest.CaptureFixture[str]) -> None:
    """A candidate's brand in the log is another one in each row, so that the latest one is mostly not the row's."""
    found = wrong(replay(small.settings, Asked(FROM, FROM + DAY, str(small.folder), ids_only=True)))
    assert "user_brand_liked_rows" in found
    assert not {"item_click_rows", "clicked", "seen", "carts_recency"} & found.keys()
    assert " rows column 'brand' holds another value than in the row of the same item before" in capsys.readouterr().err


def test_the_command_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = model_of(tmp_path)
    (tmp_path / "settings.yaml").write_text(small.settings.to_yaml(), encoding="utf-8")
    words = [
        "--config",
        str(tmp_path / "settings.yaml"),
        "--model",
        str(small.folder),
        "--keep",
        str(tmp_path / "kept"),
    ]
    main([*words, "--from", "2023-11-21T22:13:20", "--to", "2023-11-22T22:13:20"])
    out = capsys.readouterr().out
    assert " 0 mismatches" in out
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"replay.json", "mismatches.parquet"}


def test_a_server_that_ends_is_told_with_what_it_said(small: SmallModel) -> None:
    ended: list[int] = []

    def between(step: int, server: OwnServer | None) -> None:
        if step == 3:
            assert server is not None
            assert server.process is not None
            ended.append(server.process.pid)
            server.end()

    with pytest.raises(UserError, match=r"the replay's server has ended with code 0; it said: "):
        replay(small.settings, Asked(FROM, TO, str(small.folder)), between)
    assert not is_running(ended[0])


def test_a_server_that_cannot_start_is_told(small: SmallModel, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "model")
    (tmp_path / "model" / "layout.json").write_text("{}", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"has ended with code 2; it said: .*layout.json"),
        OwnServer(tmp_path / "model", tmp_path / "journal", tmp_path / "server.log", workers=1),
    ):
        pass
