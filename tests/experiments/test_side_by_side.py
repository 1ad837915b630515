"""Work in processes side by side: signals, failures and deaths."""

import atexit
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mmoe_rec.errors import StoppedError, StopRequest, UserError
from mmoe_rec.experiments import processes
from mmoe_rec.experiments.processes import run_side_by_side
from tests.fork_server import MULTIPROCESSING

pytestmark = pytest.mark.thorough


def save(folder: str) -> None:
    """Works until a signal comes, and saves for longer than signals are apart."""
    with StopRequest() as stop:
        Path(folder, f"{os.getpid()}.begun").touch()
        while stop.signal is None:
            time.sleep(0.01)
        time.sleep(1.2)
        Path(folder, f"{os.getpid()}.saved").touch()
        raise StoppedError(f"{stop.signal} came")


FAIL = ("wrong", "broken", "killed")


def obey(word: str) -> None:
    """Does what the word says."""
    print(f"{word} on card {os.environ['LOCAL_RANK']}", flush=True)
    if word in FAIL:
        while not list(Path(os.environ["TMP_OF_TEST"]).glob("*.begun")):
            time.sleep(0.02)
    if word == "wrong":
        atexit.register(print, "a library says goodbye", flush=True)
        raise UserError("the word is wrong")
    if word == "broken":
        raise ZeroDivisionError("by a word")
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if "/" in word:
        save(word)


def run(words: list[str], folder: Path, jobs: int = 2) -> list[int]:
    return list(run_side_by_side(obey, words, [folder / f"{number}.log" for number in range(len(words))], jobs))


def test_each_runs_on_a_card_and_prints_to_its_file(tmp_path: Path) -> None:
    assert sorted(run(["a", "b", "c", "d", "e"], tmp_path)) == [0, 1, 2, 3, 4]
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(5)]
    assert [each[0] for each in logs] == ["a", "b", "c", "d", "e"]
    assert {each[1:] for each in logs} == {" on card 0\n", " on card 1\n"}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("wrong", "the word is wrong"),
        ("broken", r"a process failed\. Its output is in '.*1\.log'\. Repeat the command to go on\."),
        ("killed", r"a process was killed by signal 9\. A lower --jobs needs less memory\."),
    ],
)
def test_one_that_fails_ends_the_others_who_save(
    tmp_path: Path, word: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMP_OF_TEST", str(tmp_path))
    monkeypatch.setattr(processes, "multiprocessing", MULTIPROCESSING)
    with pytest.raises(UserError, match=says):
        run([f"{tmp_path}/", word, "never begun"], tmp_path)
    assert len(list(tmp_path.glob("*.saved"))) == 1
    assert not (tmp_path / "2.log").exists()
    assert ("ZeroDivisionError" in (tmp_path / "1.log").read_text()) == (word == "broken")


SCRIPT = """
import sys
from pathlib import Path
from mmoe_rec.errors import exit_with_message
from tests.experiments.test_side_by_side import run
if __name__ == "__main__":
    with exit_with_message():
        run([sys.argv[1] + "/"] * 2, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("way", ["command", "all", "killed"])
def test_a_signal_lets_all_save(tmp_path: Path, way: str) -> None:
    """Whether it comes to the command, to all of its processes (as from a cluster), or kills the command alone."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        while len(list(tmp_path.glob("*.begun"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        if way == "command":
            process.terminate()
        elif way == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        process.wait()
        if way != "killed":
            assert process.returncode == 75
            assert "stopped: SIG" in process.stderr.read()
    if way == "killed":
        while len(list(tmp_path.glob("*.saved"))) < 2:
            time.sleep(0.05)
    assert len(list(tmp_path.glob("*.saved"))) == 2
    for begun in tmp_path.glob("*.begun"):
        _wait_for_end(int(begun.stem))


def _wait_for_end(number: int) -> None:
    """Until there is no process of that number: a test that hangs here has found one that stays."""
    with suppress(FileNotFoundError, ProcessLookupError):
        while "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
            time.sleep(0.05)
