"""`mlflow models serve` as a process that tests can ask."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fork_server import Command
from tests.processes import until

START_WITHIN_S = 600
ANSWER_WITHIN_S = 300


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
            with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@contextmanager
def running_server(address: str, uri: str, folder: Path) -> Iterator[Server]:
    """Serves the model at an address of the registry at `uri`, from `folder`, until the block ends."""
    port = free_port()
    programs = Path(sys.executable).parent
    words = [str(programs / "mlflow"), "models", "serve", "-m", address, "--env-manager", "local", "--port", str(port)]
    # MLflow leaves the addresses that this process used in its environment, and looks for uvicorn on PATH.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    own["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = str(ANSWER_WITHIN_S)
    env = {**own, "MLFLOW_TRACKING_URI": uri, "PATH": f"{programs}{os.pathsep}{own['PATH']}"}
    log = folder / "server.log"
    with running_program(words, f"http://127.0.0.1:{port}/ping", log, cwd=folder, env=env) as process:
        yield Server(port, process, log)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running_program(
    words: Sequence[str], page: str, log: Path, *, cwd: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that serves `page`, from when that answers until the block ends; what it prints goes to `log`."""
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)
    with serving(process, page, log):
        yield process


@contextmanager
def serving(process: subprocess.Popen[bytes] | Command, page: str, log: Path) -> Iterator[None]:
    """From when the page of a process answers, which leads a session, until the block ends."""
    try:
        until(
            lambda: process.poll() is not None or answers(page),
            f"nothing answers at {page}",
            pause=0.2,
            within=START_WITHIN_S,
        )
        assert process.poll() is None, log.read_text()
        yield
    finally:
        # All that it started ends with it; it may have ended by itself.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(300)


def answers(page: str) -> bool:
    """Whether a page is served."""
    try:
        with urllib.request.urlopen(page, timeout=30) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
