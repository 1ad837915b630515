"""python -m tests.benchmarks.memory -- mmoe-rec train --config configs/synthetic.yaml

Run a command and print, as JSON, how long it took and the peak memory of it and all that it started: the sum of their
proportional set sizes (PSS: a page that n processes share counts 1/n in each), read five times a second. Linux only.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.2
PROC = Path("/proc")


@dataclass(frozen=True)
class Measured:
    """What a command took; `output` is its stdout, empty unless it was captured."""

    seconds: float
    peak_gib: float
    exit_code: int
    output: str


def measure(command: Sequence[str], *, capture: bool = False, env: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end, watching the memory of its process tree."""
    started = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True, env=env) as process:
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(EVERY_S)
        seconds = time.perf_counter() - started
        # A line or two, far less than a pipe holds.
        output = process.stdout.read() if process.stdout is not None else ""
    return Measured(seconds, peak / 2**30, process.returncode, output)


def tree_bytes(root: int) -> int:
    """Sum of the PSS of a process and its descendants; one that ends meanwhile counts as nothing."""
    lines = (line for pid in _tree(root) for line in _read(PROC / str(pid) / "smaps_rollup").splitlines())
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def tree_processor_seconds(root: int) -> float:
    """Processor time that a process and its descendants have spent so far, those that have ended left out."""
    spent = [_stat(pid)[11:13] for pid in _tree(root)]  # by itself, and by the kernel for it
    return sum(int(ticks) for each in spent for ticks in each) / os.sysconf("SC_CLK_TCK")


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for pid in (int(name) for name in os.listdir(PROC) if name.isdecimal()):
        if fields := _stat(pid):
            children[int(fields[1])].append(pid)
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1]]
    return found


def _stat(pid: int) -> list[str]:
    """The fields of a process's state that follow its name, which stands in parentheses and may hold spaces."""
    return _read(PROC / str(pid) / "stat").rpartition(")")[2].split()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main() -> None:
    """Run the command; what follows `--` is the command to watch, whose exit code is passed on."""
    command = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return
    measured = measure(command)
    print(json.dumps({"peak_gib": round(measured.peak_gib, 3), "seconds": round(measured.seconds, 1)}))
    sys.exit(measured.exit_code)


if __name__ == "__main__":
    main()
