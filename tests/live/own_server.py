"""`serve` with a journal, in processes that may be killed, and calls that are sent until they are answered."""

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from tests.inference.running_server import free_port
from tests.processes import PATIENCE
from tests.server.asking import as_json


class Client:
    """Talks to a server on this machine; each call is a connection of its own, so that all workers are asked.

    again: how often something was sent again, as the server was away.
    """

    def __init__(self, port: int) -> None:
        self.port, self.again = port, 0

    def position(self) -> int:
        """Up to which position of its journal the worker that is asked knows events."""
        return int(self._ask("GET", "/version")["position"])

    def send(self, table: pa.Table) -> int:
        """Sends events of the interaction log until they are there; gives their position."""
        body = json.dumps({"events": as_json(table)}).encode()
        return int(self._ask("POST", "/events", body)["position"])

    def _ask(self, method: str, page: str, body: bytes | None = None) -> dict[str, Any]:
        address, headers = f"http://127.0.0.1:{self.port}{page}", {"Content-Type": "application/json"}
        call = urllib.request.Request(address, body, headers, method=method)
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(call, timeout=PATIENCE) as reply:
                    return dict(json.load(reply))
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code not in (502, 503, 504):
                    raise AssertionError(error.read()) from None
                if time.monotonic() > give_up:
                    raise
            self.again += 1
            time.sleep(0.1)


class OwnServer(Client):
    """A server from the beginning of the context to its end. log: a file that gets what it prints."""

    def __init__(self, model: Path, journal: str | Path, log: Path, workers: int, *words: str) -> None:
        super().__init__(free_port())
        self.log = log
        self._words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--host", "127.0.0.1"]
        self._words += ["--port", str(self.port), "--workers", str(workers), "--journal", str(journal), *words]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            self.position()
        except BaseException:
            self.process.kill()
            raise

    def kill(self) -> None:
        """Ends it at once, without a chance to write anything; its workers notice and end."""
        self.process.kill()
        self.process.wait()
