"""Signals that ask a command to stop, in processes of their own."""

import subprocess
import sys

import pytest

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
        ("shell", "SIGTERM", "SIGTERM SIGTERM,saved", 0),
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
