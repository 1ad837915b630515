"""MLflow's tracking server as a process, behind a door that tests can shut: nobody answers then."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.inference.running_server import free_port, running_program


class Door:
    """Passes connections on to a port of this machine while it is open."""

    def __init__(self, behind: int) -> None:
        self.behind, self.port = behind, free_port()
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def open(self) -> None:
        """Connections are taken."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """Connections are refused, and those that are open break off."""
        assert self._listener is not None
        for each in [self._listener, *self._open]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _take(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.behind))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


class TrackingServer:
    """A server that runs. uri: by the door."""

    def __init__(self, folder: Path, door: Door) -> None:
        self.folder, self.door, self.uri = folder, door, f"http://127.0.0.1:{door.port}"

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """Of its database."""
        with sqlite3.connect(self.folder / "store.db") as store:
            return store.execute(text, values).fetchall()


@contextmanager
def tracking_server(folder: Path) -> Iterator[TrackingServer]:
    """MLflow's server with its database and files in a folder, the door open."""
    port = free_port()
    programs = Path(sys.executable).parent
    words = [str(programs / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{folder / 'store.db'}"]
    words += ["--artifacts-destination", str(folder / "files"), "--port", str(port), "--workers", "1"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    # Without its workers for jobs, which nobody here needs.
    env = {**own, "PATH": f"{programs}{os.pathsep}{own['PATH']}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running_program(words, f"http://127.0.0.1:{port}/health", folder / "server.log", cwd=folder, env=env):
        door = Door(port)
        door.open()
        try:
            yield TrackingServer(folder, door)
        finally:
            with suppress(AssertionError, OSError):
                door.shut()
