"""Workers that share the memory of one model, and the processes around them, each ended at any moment."""

import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.inference import artifact
from mmoe_rec.inference.artifact import EXAMPLE_FILE, MANIFEST_FILE, read_manifest
from mmoe_rec.server.workers import serve_by_workers
from tests.fork_server import Command, run_command
from tests.inference.running_server import free_port
from tests.inference.small_model import ITEMS, SmallModel
from tests.live.journals import postgresql
from tests.log.small_logs import DAY, START, log_rows
from tests.processes import PATIENCE, children, is_running, until
from tests.server.asking import as_json
from tests.server.test_events import asked, expected, later_log
from tests.server.test_processes import GOOD, Calling, Running, changed, model_count, opened, served

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture
def folder(small: SmallModel, tmp_path: Path) -> Path:
    """A model that a test may change."""
    shutil.copytree(small.folder, tmp_path / "model")
    return tmp_path / "model"


def hang_at_loading(folder: Path) -> None:
    """Makes whoever loads the model wait for ever, as one of its files is a pipe."""
    files = read_manifest(folder)
    files[EXAMPLE_FILE] = ""
    tree = {"sha256": artifact._checksum(files), "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(tree), encoding="utf-8")
    (folder / EXAMPLE_FILE).unlink()
    os.mkfifo(folder / EXAMPLE_FILE)


def test_workers_are_replaced_reloaded_and_counted_together(folder: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with served(folder, tmp_path, "--workers", "2", "--grace", "200", TMPDIR=str(temporary)) as running:
        until(lambda: model_count(running) == 2)
        before = version(running)
        first = running.workers()
        assert len(first) == 2
        os.kill(min(first), signal.SIGKILL)
        until(lambda: len(running.workers() - first) == 1)
        until(lambda: model_count(running) == 2)
        assert {version(running) for _ in range(9)} == {before}
        text = running.send(None, "/metrics", "GET")[1]
        assert 'mmoe_rec_replies_total{status="200"} 10.0' in text, "of all workers, ended ones among them"

        second = running.workers()
        assert running.send(None, "/reload")[0] == 200, "of the model that is served"
        assert "mmoe_rec_reloads_total{" not in running.send(None, "/metrics", "GET")[1]

        callers = [Calling(running, keeps, pause) for keeps in (False, True) for pause in (0.005, 0.4)]
        changed(folder, folder)
        status, message = running.send(None, "/reload")
        assert (status, message["reload_failure"]) == (200, None)
        after = message["artifact"]
        assert {version(running) for _ in range(9)} == {after} != {before}, "all workers have it before the answer"
        assert running.workers() == second, "which exchange it in place"
        seen = [len(caller.answers) for caller in callers]
        until(
            lambda: all(caller.failures or len(caller.answers) > n + 2 for caller, n in zip(callers, seen, strict=True))
        )
        for caller in callers:
            caller.has_ended = True
            caller.join(PATIENCE)
            assert not caller.failures
            assert set(caller.answers[-2:]) == {after}
            if caller.keeps:  # who comes to another worker may meet the old model for a moment more
                assert caller.answers == sorted(caller.answers, key=lambda answer: answer == after)
        text = running.send(None, "/metrics", "GET")[1]
        assert 'mmoe_rec_reloads_total{outcome="done"} 1.0' in text, "of all workers"

        os.kill(max(second), signal.SIGKILL)
        until(lambda: len(running.workers() - second) == 1)
        until(lambda: model_count(running) == 2)
        assert {version(running) for _ in range(9)} == {after}, "a replacement has the new model as well"
        shutil.rmtree(folder / "features")
        status, body = running.send(None, "/reload")
        assert (status, "the previous model is still served" in body["message"]) == (503, True)
        assert version(running) == after
        assert "features" in until(lambda: running.send(None, "/version", "GET")[1]["reload_failure"])
        failed = 'mmoe_rec_reloads_total{outcome="failed"} '
        assert f"{failed}1.0" in until(lambda: (text := running.send(None, "/metrics", "GET")[1]) * (failed in text))

        last = running.workers()
        assert len(last) == 2
        assert len(list(temporary.rglob("*.db"))) <= 3 * 3, "of each kind, of two workers and their parent"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
        until(lambda: not any(map(is_running, last)))


def version(running: Running) -> str:
    """The model that answers a call."""
    status, body = running.send(GOOD)
    assert status == 200
    return str(body["predictions"][0]["model"]["version"])


@pytest.mark.thorough
def test_workers_share_memory(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path, "--workers", "3") as running:
        until(lambda: model_count(running) == 3)
        for _ in range(30):
            running.send(GOOD)
        for worker in running.workers():
            own, shared = (memory(worker)[kind] for kind in ("Private_Dirty", "Shared_Dirty"))
            assert own < shared, f"{own} of {own + shared} kB are the worker's own"


def memory(process: int) -> Counter[str]:
    """kB of a process by kind."""
    actual = Counter[str]()
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes, _ = line.split()
        actual[name.removesuffix(":")] = int(kilobytes)
    return actual


@pytest.mark.thorough
def test_a_loading_that_is_killed_is_reported_and_the_model_before_goes_on(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads, served(folder, tmp_path, "--workers", "2") as running:
        until(lambda: model_count(running) == 2)
        workers, expected = running.workers(), version(running)
        hang_at_loading(folder)
        reload = threads.submit(running.send, None, "/reload")
        writing = until(lambda: opened(folder / EXAMPLE_FILE))
        assert version(running) == expected, "while another process loads"
        (loader,) = running.workers() - workers
        os.kill(loader, signal.SIGKILL)
        os.close(writing)
        status, body = reload.result(PATIENCE)
        assert (status, "was ended by SIGKILL" in body["message"]) == (503, True)
        os.kill(min(workers), signal.SIGKILL)
        until(lambda: len(running.workers() - workers) == 1)
        until(lambda: model_count(running) == 2)
        for _ in range(9):
            assert version(running) == expected
            message = running.send(None, "/version", "GET")[1]
            assert "was ended by SIGKILL" in message["reload_failure"], "by a new worker, too"


@pytest.mark.thorough
def test_all_ends_with_the_parent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    with served(folder, tmp_path, "--workers", "2", TMPDIR=str(tmp_path / "temporary")) as running:
        until(lambda: model_count(running) == 2)
        rest = running.workers() | children(running.process.pid, "forkserver")
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(PATIENCE)
        until(lambda: not any(map(is_running, rest)))
        assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.thorough
def test_sigterm_while_another_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads, served(folder, tmp_path, "--workers", "2", "--grace", "4") as running:
        until(lambda: model_count(running) == 2)
        hang_at_loading(folder)
        threads.submit(running.send, None, "/reload")
        writing = until(lambda: opened(folder / EXAMPLE_FILE))
        processes = running.workers()
        assert len(processes) == 3, "the loader is one of them"
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(PATIENCE)
        until(lambda: not any(map(is_running, processes)))
        os.close(writing)


def test_sigterm_before_the_first_model_is_there(folder: Path, tmp_path: Path) -> None:
    hang_at_loading(folder)
    words = ["mmoe_rec", "serve", "--model", str(folder), "--workers", "2", "--port", str(free_port())]
    (tmp_path / "temporary").mkdir()
    process = Command(words, {"TMPDIR": str(tmp_path / "temporary")})
    try:
        started = until(lambda: children(process.pid, "forkserver"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        until(lambda: not any(map(is_running, started)))
        assert not list((tmp_path / "temporary").iterdir())
        assert process.stderr == ""
    finally:
        process.kill()


def test_a_long_temporary_folder_serves(folder: Path, tmp_path: Path) -> None:
    """The path of a Unix socket has 107 characters at most."""
    (long := tmp_path / ("long" * 25)).mkdir()
    with served(folder, tmp_path, TMPDIR=str(long)) as running:
        assert running.health() == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
    assert not list(long.iterdir())


def test_a_temporary_folder_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    unused: Any = None
    with pytest.raises(UserError, match=r"can't be written to .*: set TMPDIR"):
        serve_by_workers(unused, None, unused, unused, unused, 0.0, 1)


def test_a_model_that_cannot_be_loaded_ends_the_start_in_one_sentence(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"short")
    done = run_command("mmoe_rec", "serve", "--model", str(folder), "--port", str(free_port()))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "weights.safetensors" in done.stderr


# Events through several workers, some of which are killed: what was acknowledged is known to all of them


TIME = START + 30 * DAY
ASKED = {"inputs": [asked(TIME, 5)], "params": {"explain": True}}


def _ready(running: Running) -> set[int]:
    """Both workers, once they serve."""
    until(lambda: len(running.workers()) == 2 and model_count(running) >= 2)
    return running.workers()


def _sent(running: Running, rows: list[dict[str, Any]]) -> str:
    """Sends rows until they are acknowledged; gives the position."""
    return str(running.answered({"events": rows}, "/events")["position"])


def _asked(running: Running, position: str) -> list[dict[str, Any]]:
    (ranking,) = running.answered(ASKED, f"/invocations?after={position}")["predictions"]
    by_item = dict(zip(ranking["candidates"], ranking["explanations"], strict=True))
    return [by_item[item] for item in ITEMS]


def _check(small: SmallModel, actual: list[dict[str, Any]], table: pa.Table) -> None:
    want = expected(small, log_rows(table, small.settings.schema_), TIME, 5)
    for mine, item in zip(actual, want, strict=True):
        assert mine["counters"] == item["counters"]
        assert mine["histories"] == item["histories"]


@pytest.mark.thorough
def test_what_was_acknowledged_survives_kills_of_workers_and_of_the_server(small: SmallModel, tmp_path: Path) -> None:
    table = later_log(21, rows=120)
    rows, journal = as_json(table), f"sqlite:///{tmp_path / 'journal.db'}"
    serving = ("--workers", "2", "--journal", journal)

    def said() -> str:
        return (tmp_path / "server.log").read_text(encoding="utf-8")

    with served(small.folder, tmp_path, *serving) as running:
        begun = re.search(r"journal '(.+)' \(([0-9a-f]{32})\) is empty\n", said())
        assert begun
        assert begun[1] == journal
        workers = _ready(running)
        for number, start in enumerate(range(0, 60, 6)):
            position = _sent(running, rows[start : start + 6])
            if number % 3 == 1:
                killed = sorted(workers)[number % 2]
                os.kill(killed, signal.SIGKILL)
                until(lambda killed=killed: not is_running(killed))
                workers = _ready(running)
        _check(small, _asked(running, position), table.slice(0, 60))
        whole = running.workers()
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        for worker in whole:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    with served(small.folder, tmp_path, *serving) as running:
        assert f"continuing journal '{journal}' ({begun[2]}) at position {position}\n" in said()
        assert "is empty" not in said()
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
        with served(small.folder, folders[0], *words) as left, served(small.folder, folders[1], *words) as right:
            for number, start in enumerate(range(0, 60, 6)):
                position = _sent((left, right)[number % 2], rows[start : start + 6])
                if number == 5:
                    database.kill()
                    database.start()
            for running in (left, right, left, right):
                _check(small, _asked(running, position), table)
