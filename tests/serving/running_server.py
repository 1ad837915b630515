"""`mlflow models serve` as a process that tests can ask."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_WITHIN_S = 120


@dataclass
class Server:
    """A running model server."""

    port: int
    process: subprocess.Popen
    log: Path

    def post(self, body: Any) -> tuple[int, Any]:
        """Status and decoded body; `body` is JSON values, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


@contextmanager
def running_server(address: str, uri: str, folder: Path) -> Iterator[Server]:
    """Serves the model at an address of the registry at `uri`, from `folder`, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    command = [str(programs / "mlflow"), "models", "serve", "-m", address]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--port", str(port)],
            # MLflow looks for uvicorn on PATH.
            env={**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = Server(port, process, log)
    try:
        end = time.monotonic() + START_WITHIN_S
        while not running.alive():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield running
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
