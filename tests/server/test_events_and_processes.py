"""Events through several workers, some of which are killed: what was acknowledged is known to all of them."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.inference.small_model import ITEMS, SmallModel
from tests.live.journals import postgresql
from tests.log.small_logs import DAY, START, log_rows
from tests.processes import until
from tests.server.test_events import as_json, asked, expected, later_log
from tests.server.test_processes import Running, served

pytestmark = [pytest.mark.thorough, pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")]
TIME = START + 30 * DAY
ASKED = {"inputs": [asked(TIME, 5)], "params": {"explain": True}}


def _ready(running: Running, workers: int = 2) -> set[int]:
    """The workers, once there are so many that serve."""

    def both() -> set[int]:
        found = running.workers()
        shown = running.send(None, "/metrics", "GET")[1]
        counts = [line.rsplit(" ", 1)[1] for line in shown.splitlines() if line.startswith("mmoe_rec_model_info{")]
        return found if len(found) == workers and sum(map(float, counts)) >= workers else set()

    return until(both)


def _sent(running: Running, rows: list[dict[str, Any]]) -> str:
    """Sends rows until they are acknowledged, as a caller does whose connection breaks; gives the position."""
    answer: tuple[int, Any] = (0, None)

    def acknowledged() -> bool:
        nonlocal answer
        with suppress(OSError, HTTPException, ValueError):
            answer = running.send({"events": rows}, "/events")
        return answer[0] == 200

    until(acknowledged)
    return str(answer[1]["position"])


def _asked(running: Running, position: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def answered() -> bool:
        with suppress(OSError, HTTPException, ValueError):
            status, reply = running.send(ASKED, f"/invocations?after={position}")
            assert status == 200, reply
            ranking = reply["predictions"][0]
            by_item = dict(zip(ranking["candidates"], ranking["explanations"], strict=True))
            found[:] = [by_item[item] for item in ITEMS]
        return bool(found)

    until(answered)
    return found


def _check(small: SmallModel, found: list[dict[str, Any]], table: pa.Table) -> None:
    want = expected(small, log_rows(table, small.settings.schema_), TIME, 5)
    for mine, each in zip(found, want, strict=True):
        assert mine["counters"] == each["counters"]
        assert mine["histories"] == each["histories"]


def test_what_was_acknowledged_survives_kills_of_workers_and_of_the_server(small: SmallModel, tmp_path: Path) -> None:
    table = later_log(21, rows=120)
    rows, journal = as_json(table), f"sqlite:///{tmp_path / 'journal.db'}"
    serving = ("--workers", "2", "--journal", journal)

    def said() -> str:
        return (tmp_path / "server.log").read_text(encoding="utf-8")

    with served(small.folder, tmp_path, *serving) as running:
        begun = re.search(r"the journal '(.+)', ([0-9a-f]{32}), is empty: it begins now\n", said())
        assert begun
        assert begun[1] == journal
        workers = _ready(running)
        for number, start in enumerate(range(0, 60, 6)):
            position = _sent(running, rows[start : start + 6])
            if number % 3 == 1:
                os.kill(sorted(workers)[number % 2], signal.SIGKILL)
                workers = _ready(running)
        _check(small, _asked(running, position), table.slice(0, 60))
        whole = running.workers()
        running.process.kill()
        running.process.wait()
        for worker in whole:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    with served(small.folder, tmp_path, *serving) as running:
        assert f"going on with the journal '{journal}', {begun[2]}, at position {position}\n" in said()
        assert "it begins now" not in said()
        _ready(running)
        # Both workers know all of it, whichever of them answers.
        for _ in range(6):
            _check(small, _asked(running, position), table.slice(0, 60))
        position = _sent(running, [*rows[50:60], *rows[60:]])
        for _ in range(6):
            _check(small, _asked(running, position), table)
        assert running.send({}, "/reload")[0] == 200
        for _ in range(6):
            _check(small, _asked(running, position), table)


@pytest.mark.thorough
def test_servers_of_two_machines_know_the_same_after_the_same_position(small: SmallModel, tmp_path: Path) -> None:
    """They share a PostgreSQL, which crashes once."""
    table = later_log(23, rows=60)
    rows, folders = as_json(table), [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with postgresql() as database:
        words = ("--workers", "2", "--journal", database.new_address())
        with served(small.folder, folders[0], *words) as one, served(small.folder, folders[1], *words) as other:
            for number, start in enumerate(range(0, 60, 6)):
                position = _sent((one, other)[number % 2], rows[start : start + 6])
                if number == 5:
                    database.kill()
                    database.start()
            for running in (one, other, one, other):
                _check(small, _asked(running, position), table)
