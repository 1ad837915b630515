"""What a command imports before it answers: the measure of "at once" that no busy or slow machine changes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "mlflow", "ray", "sklearn", "matplotlib", "jinja2", "optuna")
"""Packages that take a second or more to import."""

_CODE = """
import runpy, sys
heavy, sys.argv = sys.argv[1].split(","), sys.argv[2:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("imported:", *(name for name in heavy if name in sys.modules))
"""


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code, what it printed, and the heavy packages that it had imported by then."""

    code: int
    out: str
    err: str
    imported: tuple[str, ...]


def answer(module: str, *arguments: str) -> Answer:
    """Runs `python -m module arguments` in a process of its own."""
    command = [sys.executable, "-c", _CODE, ",".join(HEAVY), module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    out, told, names = done.stdout.rpartition("imported:")
    assert told, done.stderr
    return Answer(done.returncode, out, done.stderr, tuple(names.split()))
