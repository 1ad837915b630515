"""Signals that ask a command to stop, in processes of their own, and consoles without a terminal."""

import io
import subprocess
import sys

import pytest

from mmoe_rec import progress

LOOP = """
import os, signal, sys
from mmoe_rec.errors import StopRequest
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
with StopRequest() as stop:
    for name in sys.argv[2:]:
        os.kill(os.getpid(), getattr(signal, name))
        print(name, stop.signal, flush=True)
print("saved")
"""


@pytest.mark.parametrize(
    ("start", "signals", "printed", "code"),
    [
        ("shell", "SIGHUP", "SIGHUP SIGHUP,saved", 0),
        ("shell", "SIGHUP SIGHUP", "SIGHUP SIGHUP,SIGHUP SIGHUP,saved", 0),  # of the kernel, and of the shell
        ("shell", "SIGTERM SIGHUP", "SIGTERM SIGTERM,SIGHUP SIGTERM,saved", 0),
        ("shell", "SIGHUP SIGTERM", "SIGHUP SIGHUP", -15),  # a second signal acts at once
        ("nohup", "SIGHUP", "SIGHUP None,saved", 0),
        ("nohup", "SIGHUP SIGTERM SIGHUP", "SIGHUP None,SIGTERM SIGTERM,SIGHUP SIGTERM,saved", 0),
    ],
)
def test_which_signals_ask_to_stop(start: str, signals: str, printed: str, code: int) -> None:
    words = [sys.executable, "-c", LOOP, start, *signals.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines(), done.returncode, done.stderr) == (printed.split(","), code, "")


def test_without_a_terminal_lines_are_wide_and_a_closed_stream_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for stream in (io.StringIO(), None):  # None as Python has it after `2>&-`
        monkeypatch.setattr("sys.stderr", stream)
        console = progress.open_console(stderr=True)
        console.print("x" * 150)
        assert console.width == 160
