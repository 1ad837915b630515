"""Our server in processes of its own, as both parts of the benchmark start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.abuse.wire import Reply, Sent, Wire
from tests.inference.running_server import free_port, running_program
from tests.processes import until, workers

ROOT = Path(__file__).parents[3]
WORKERS = 2


@dataclass(frozen=True)
class Running:
    """A server and where it can be asked."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def wire(self) -> Wire:
        """A new connection."""
        return Wire(self.port)

    def ask(self, sent: Sent) -> Reply:
        """The reply to a request on a connection of its own."""
        wire = self.wire()
        try:
            return wire.ask(sent)
        finally:
            wire.close()

    def workers(self) -> set[int]:
        """Process ids of the workers."""
        return workers(self.process.pid)

    def ready_workers(self) -> int:
        """How many workers serve a model, as the metrics have it."""
        try:
            text = self.ask(Sent(b"", "GET", "/metrics", {})).body.decode()
        except OSError:
            return 0
        lines = (line for line in text.splitlines() if line.startswith("mmoe_rec_model_info{"))
        return int(sum(float(line.split()[-1]) for line in lines))

    def until_ready(self) -> None:
        """Waits until all workers serve."""
        until(lambda: self.ready_workers() == WORKERS)


@contextmanager
def served(model: Path, folder: Path) -> Iterator[Running]:
    """A server of a model with two workers, until the block ends. folder: gets what it prints."""
    port = free_port()
    words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--port", str(port)]
    words += ["--workers", str(WORKERS)]
    env = {name: value for name, value in os.environ.items() if name != "MMOE_REC_TOKEN"}
    log = folder / f"server_{port}.log"
    page = f"http://127.0.0.1:{port}/health"
    with running_program(words, page, log, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}) as process:
        running = Running(port, process, log)
        running.until_ready()
        yield running
