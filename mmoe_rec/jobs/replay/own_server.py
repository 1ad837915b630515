"""A server of a replay's own: a process on this machine's loopback, which ends with the replay."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

from mmoe_rec.errors import UserError

HOST = "127.0.0.1"
START_WITHIN_S = 600.0
_END_WITHIN_S = 60.0
_PAUSE_S = 0.1
_LINES_TOLD = 3


class OwnServer:
    """`serve` with a journal, in a process of its own, from the beginning of the context to its end.

    model: an artifact folder; journal: a folder; log: a file that gets what the server prints. It is not started again
    when it ends, unless somebody calls `start`.
    """

    def __init__(self, model: Path, journal: Path, log: Path, workers: int, overrides: tuple[str, ...] = ()) -> None:
        self.port = _free_port()
        self.log = log
        self._words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--host", HOST]
        self._words += ["--port", str(self.port), "--workers", str(workers), "--journal", str(journal), *overrides]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def start(self) -> None:
        """Starts it, and waits until it answers. Raises UserError where it ends instead."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        give_up = time.monotonic() + START_WITHIN_S
        while not self._answers():
            self.check()
            if time.monotonic() > give_up:
                raise UserError(f"the replay's server did not answer within {START_WITHIN_S:,.0f} s; {self.told()}")
            time.sleep(_PAUSE_S)

    def check(self) -> None:
        """Raises UserError where it has ended."""
        if self.process is not None and (code := self.process.poll()) is not None:
            raise UserError(f"the replay's server has ended with code {code}; {self.told()}")

    def end(self) -> None:
        """Ends it, at the latest after a minute."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once, without a chance to write anything; its workers notice and end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=30) as reply:
            return bool(reply.status == 200)
        return False

    def told(self) -> str:
        """The end of what it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split(os.linesep)
        last = " / ".join([line for line in lines if line.strip()][-_LINES_TOLD:])
        return f"it said: {last}" if last else "it said nothing"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])
