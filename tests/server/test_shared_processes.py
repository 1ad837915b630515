"""Workers that share a model's memory, and the processes that load models and start workers, ended at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mmoe_rec.inference import artifact
from mmoe_rec.inference.artifact import MANIFEST, StoredFile, read_manifest
from mmoe_rec.inference.example import EXAMPLE
from mmoe_rec.server.sharing import starting
from tests.inference.running_server import free_port
from tests.inference.small_model import SmallModel
from tests.pipelines.imports import ROOT
from tests.processes import PATIENCE, children, fork_server, is_running, until
from tests.server.test_processes import GOOD, Running, Sending, changed, model_count, served

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder for a server, with a path short enough for a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(small: SmallModel, tmp_path: Path) -> Path:
    """A model that a test may change."""
    shutil.copytree(small.folder, tmp_path / "model")
    return tmp_path / "model"


def shared_file(process: int, temporary: Path) -> set[str]:
    """Device and inode of the files without a name that a process maps from a temporary folder."""
    found = set()
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if f" {temporary}" in line and line.endswith(" (deleted)"):
            found.add(" ".join(line.split()[3:5]))
    return found


def mapped_alone(running: Running, temporary: Path, before: frozenset[str]) -> set[frozenset[str]]:
    """The files that the workers map, if all have let go of those before."""
    running.send(GOOD)
    found = {frozenset(shared_file(each, temporary)) for each in running.workers()}
    return found if not any(each & before for each in found) else set()


def hang_at_loading(folder: Path) -> None:
    """Makes whoever loads the model wait for ever, as one of its files, an empty one by the manifest, is a pipe."""
    files = read_manifest(folder)
    files[EXAMPLE] = StoredFile(0, "")
    tree = {"sha256": artifact._sum(files), "files": {name: asdict(file) for name, file in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(tree), encoding="utf-8")
    (folder / EXAMPLE).unlink()
    os.mkfifo(folder / EXAMPLE)


def test_workers_map_one_file_and_a_new_model_another(folder: Path, tmp_path: Path, temporary: Path) -> None:
    with served(folder, tmp_path, "--workers", "3", TMPDIR=str(temporary)) as running:
        until(lambda: model_count(running) == 3)
        first = running.workers()
        assert len(first) == 3
        (before,) = {frozenset(shared_file(each, temporary)) for each in first}
        assert len(before) == 1
        server = fork_server(running.process.pid)
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1, "with other threads, forks may hang"
        assert "can't be forked" not in running.log.read_text()

        expected = running.send(GOOD)
        os.kill(min(first), signal.SIGKILL)
        until(lambda: len(running.workers() - first) == 1)
        until(lambda: model_count(running) == 3)
        assert {frozenset(shared_file(each, temporary)) for each in running.workers()} == {before}
        assert [running.send(GOOD) for _ in range(9)] == [expected] * 9

        changed(folder, folder)
        assert running.send(None, "/reload")[0] == 200
        until(lambda: all(running.send(GOOD) != expected for _ in range(10)))
        (now,) = until(lambda: mapped_alone(running, temporary, before))
        assert len(now) == 1, "the model before is gone from memory"

        ended = {*running.workers(), server}
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
        until(lambda: not any(map(is_running, ended)))
        assert not list(temporary.iterdir())


def test_a_loading_that_is_killed_is_told_and_the_model_before_goes_on(
    folder: Path, tmp_path: Path, temporary: Path
) -> None:
    with served(folder, tmp_path, "--workers", "2", TMPDIR=str(temporary)) as running:
        until(lambda: model_count(running) == 2)
        workers, expected = running.workers(), running.send(GOOD)
        hang_at_loading(folder)
        reload = Reloading(running)
        (loading,) = until(lambda: running.workers() - workers)

        os.kill(min(workers), signal.SIGKILL)
        until(lambda: running.workers() - workers - {loading})
        until(lambda: model_count(running) == 2)
        assert loading in running.workers()
        assert running.send(GOOD) == expected
        os.kill(loading, signal.SIGKILL)
        until(lambda: "was ended by SIGKILL" in str(running.send(None, "/version", "GET")[1]["reload_failure"]))
        reload.join(PATIENCE)
        if not isinstance(reload.found, Exception):  # else its worker was the one that was killed
            status, body = reload.found
            assert status == 503
            assert "the process that loads the model at '" in body["message"]
        assert [running.send(GOOD) for _ in range(9)] == [expected] * 9
        assert running.log.read_text().count("was ended by SIGKILL") == 1


class Reloading(Sending):
    """A reload that is asked for now."""

    def __init__(self, running: Running) -> None:
        super().__init__(running, None)

    def run(self) -> None:
        try:
            self.found = self.running.send(None, "/reload")
        except (OSError, ValueError) as error:
            self.found = error


def test_sigterm_while_a_model_is_loaded(folder: Path, tmp_path: Path, temporary: Path) -> None:
    with served(folder, tmp_path, "--workers", "2", TMPDIR=str(temporary)) as running:
        until(lambda: model_count(running) == 2)
        workers, server = running.workers(), fork_server(running.process.pid)
        hang_at_loading(folder)
        Reloading(running)
        (loading,) = until(lambda: running.workers() - workers)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(PATIENCE)
        until(lambda: not any(map(is_running, {*workers, loading, server})))
        assert not list(temporary.iterdir())


@pytest.mark.parametrize("moment", ["imports", "loading"])
def test_sigterm_before_the_first_model_is_there(folder: Path, tmp_path: Path, temporary: Path, moment: str) -> None:
    hang_at_loading(folder)
    words = [sys.executable, "-m", "pipelines.serve", "--model", str(folder), "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*words, "--port", str(free_port())], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        (server,) = until(lambda: children(process.pid, "forkserver"))
        started = set()
        if moment == "loading":
            started = until(lambda: len(found := children(server, "forkserver")) == 3 and found)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        until(lambda: not any(map(is_running, {server, *started})))
        assert not list(temporary.iterdir())
        assert (tmp_path / "log").read_text() == ""
    finally:
        process.kill()


def test_a_killed_fork_server_is_replaced_with_all_workers(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path, "--workers", "2", "--grace", "200") as running:
        until(lambda: model_count(running) == 2)
        expected = running.send(GOOD)
        first, server = running.workers(), fork_server(running.process.pid)
        assert server is not None
        os.kill(server, signal.SIGTERM)
        assert is_running(server), "what ends a whole service leaves it until the workers have ended"
        os.kill(server, signal.SIGKILL)
        until(lambda: not any(map(is_running, first)))
        # The counters of the first ones stay until the parent has noticed that they ended.
        until(lambda: len(running.workers()) == 2 and model_count(running) == 2)
        assert running.send(GOOD) == expected


def test_workers_that_cannot_be_forked_serve_all_the_same(folder: Path, tmp_path: Path, temporary: Path) -> None:
    long = temporary / ("x" * 100)
    long.mkdir()
    with served(folder, tmp_path, "--workers", "2", TMPDIR=str(long)) as running:
        until(lambda: model_count(running) == 2)
        assert running.send(GOOD)[0] == 200
        workers = children(running.process.pid, "spawn_main")
        assert len(workers) == 2
        assert len({frozenset(shared_file(each, temporary)) for each in workers}) == 1
        assert "a process can't be forked" in running.log.read_text()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
        assert not list(long.iterdir())


def test_a_model_that_cannot_be_loaded_ends_the_start_in_one_sentence(folder: Path, temporary: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"short")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    told = []
    for workers in ("1", "2"):
        words = [sys.executable, "-m", "pipelines.serve", "--model", str(folder), "--workers", workers]
        words += ["--port", str(free_port())]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=PATIENCE)
        told.append((done.returncode, done.stdout, done.stderr))
    assert told[0] == told[1], "the same words as from one process"
    assert told[1][2].count("\n") == 1
    assert "weights.safetensors" in told[1][2]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(("fails", "way"), [(0, "forkserver"), (1, "forkserver"), (2, "spawn")])
def test_a_fork_server_that_ends_while_it_is_asked_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, fails: int, way: str
) -> None:
    asked: list[BaseProcess] = []

    def start(self: BaseProcess) -> None:
        asked.append(self)
        if len(asked) <= fails:
            raise EOFError("unexpected EOF")

    monkeypatch.setattr(BaseProcess, "start", start)
    process = starting.started(os.getpid, (), lambda: False)
    assert process is asked[-1]
    assert len(asked) == fails + 1
    assert process._start_method == way  # type: ignore[attr-defined]
