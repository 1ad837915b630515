"""Folders that one process writes, or that several read."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from mmoe_rec import locks
from mmoe_rec.errors import UserError
from mmoe_rec.locks import lock_file, read_lock, write_lock

HOLD = """
import sys, time
from pathlib import Path
from mmoe_rec.locks import write_lock
with write_lock(Path(sys.argv[1]), "a training", "wait"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_TIMEOUT_SECONDS", 0.3)


def test_a_second_writer_learns_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with write_lock(folder, "a training", "wait"):
        with pytest.raises(UserError) as refused, write_lock(folder, "an edit", "name another folder with --out"):
            pass
        with write_lock(tmp_path / "other", "an edit", "wait"):
            pass
    said = str(refused.value)
    who = f"a training (process {os.getpid()} on {socket.gethostname()}, since 2"
    assert said.startswith(f"'{folder}' is in use by {who}")
    assert said.endswith("). Wait until it has ended, or name another folder with --out.")
    with write_lock(folder, "an edit", "wait"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "model"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        sentence = rf"in use by a training \(process {process.pid} on "
        with pytest.raises(UserError, match=sentence), write_lock(folder, "another", "wait"):
            pass
        process.send_signal(signal.SIGKILL)
    assert lock_file(folder).is_file()
    with read_lock(folder, "a reader"):
        assert [file.suffix for file in folder.parent.iterdir()] == [".lock"]
    with write_lock(folder, "another", "wait"):
        pass
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize("name", ["may", "may[1]"])
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path, name: str) -> None:
    left, others = tmp_path / f".{name}.0123456789ab.tmp", tmp_path / f".{name}.v2.0123456789ab.tmp"
    for item in (left, others):
        item.mkdir()
    with write_lock(tmp_path / name, "an evaluation", "wait"):
        assert (left.exists(), others.exists()) == (False, True)


def test_many_read_and_nobody_writes_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    with ExitStack() as readers:
        readers.enter_context(read_lock(folder, "a training"))
        last = pytest.raises(UserError, match=r"in use by an evaluation \(")
        with read_lock(folder, "an evaluation"), last, write_lock(folder, "a build", "wait", wait=True):
            pass
        with pytest.raises(UserError, match="in use by"), write_lock(folder, "a build", "wait", wait=True):
            pass
        readers.enter_context(read_lock(folder, "a training"))
    with write_lock(folder, "a build", "wait"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("next_one", [read_lock, lambda *words: write_lock(*words, "wait", wait=True)])
def test_whoever_waits_for_a_writer_comes_after_it(tmp_path: Path, next_one, capsys: pytest.CaptureFixture) -> None:
    folder, order = tmp_path / "features", []

    def come() -> None:
        with next_one(folder, "the next"):
            order.append("next")

    with write_lock(folder, "a build", "wait"):
        thread = threading.Thread(target=come)
        thread.start()
        thread.join(1)  # longer than a writer is given to let go
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "next"]
    message = [line for line in capsys.readouterr().err.splitlines() if "waiting for a build (process " in line]
    assert len(message) == 1


def test_writers_never_meet(tmp_path: Path) -> None:
    """Lock files are removed and made again all the time."""
    folder, inside, met = tmp_path / "features", [0], []

    def write() -> None:
        for _ in range(20):
            with write_lock(folder, "a build", "wait", wait=True):
                inside[0] += 1
                met.append(inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [1] * 80


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import errno

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with write_lock(tmp_path / "model", "a training", "wait"):
        pass
    assert not list(tmp_path.iterdir())
    assert re.search("note: the file system of .*model' has no locks", capsys.readouterr().err.replace("\n", " "))


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root may write anywhere
    with read_lock(tmp_path / "features", "an evaluation"):
        assert not list(tmp_path.iterdir())
