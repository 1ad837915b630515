"""Processes that begin with torch, torchrec and MLflow already imported.

A command that is started anew spends ten seconds and more on imports. One server imports them once for all workers of
pytest, and forks a process for each command. This has the arguments, folder, environment and session that a new one
would have, and can be killed.
"""

import base64
import fcntl
import gc
import json
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.mlflow_stores import copy_new_stores

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "MMOE_REC_TESTS"
"""The variable that names a folder which all processes of a test run share."""
_PRELOADED = (
    "torch",
    "pandas",
    "pyarrow.dataset",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "sklearn.ensemble",
    "matplotlib.pyplot",
    "torchrec",
    "torch.distributed.elastic.multiprocessing.errors",
)


class Command:
    """A command that runs, in a session of its own; what it prints goes to files."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT, log: Path | None = None
    ) -> None:
        """words: `MODULE ARGUMENT ...`, as after `python -m`, or `FILE.py ARGUMENT ...`; env: more variables; log: a
        file that gets all that it prints."""
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (log or Path(self._folder.name) / name for name in ("out", "err"))
        self._socket = _connect(Path(os.environ[FOLDER]))
        request = {
            "words": list(map(str, words)),
            "env": {**os.environ, **(env or {})},
            "cwd": str(cwd),
            "files": [str(self._out), str(self._err)],
            "path": sys.path,
        }
        self._answers = self._socket.makefile("rw", encoding="utf-8")
        self._answers.write(json.dumps(request) + "\n")
        self._answers.flush()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self._socket.settimeout(0.0)
            with suppress(BlockingIOError, TimeoutError):
                self._read()
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        """The exit code. Raises TimeoutError."""
        if self.returncode is None:
            self._socket.settimeout(timeout)
            self._read()
        assert self.returncode is not None
        return self.returncode

    def _read(self) -> None:
        data = self._socket.recv(64)
        self.returncode = int(data) if data else -signal.SIGKILL

    def send_signal(self, number: int) -> None:
        """To the command alone, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends all of its session at once."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._out.read_text(encoding="utf-8") if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        """What it has printed to stderr."""
        return self._err.read_text(encoding="utf-8")


def run_command(*words: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Command:
    """Runs `python -m words` to its end."""
    command = Command(words, env, cwd)
    command.wait()
    return command


def call(function: Callable[..., None], *arguments: object, env: Mapping[str, str] | None = None) -> Command:
    """Calls a function of a module in a process of its own."""
    text = base64.b64encode(pickle.dumps((function, arguments))).decode()
    return Command(["tests.fork_server", "--call", text], env)


def _connect(folder: Path) -> socket.socket:
    """A connection to the server, which the first caller of all processes starts."""
    address = str(folder / "socket")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = socket.socket(socket.AF_UNIX)
        if not os.path.exists(address):
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
            waits = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # as `mmoe_rec` sets them
            env = {**os.environ, **threads, **waits, "PYTHONPATH": str(ROOT)}
            words = [sys.executable, "-m", "tests.fork_server", str(folder)]
            subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        while True:
            try:
                connection.connect(address)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)


def _serve(folder: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)  # callers wait while modules are imported
    for name in _PRELOADED:
        try:
            __import__(name)
        except ImportError:  # not everything is installed everywhere
            traceback.print_exc()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    copy_new_stores()
    gc.freeze()  # children need not look through what was imported
    while folder.exists():
        if select.select([listener], [], [], 1.0)[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the test process may ignore
                listener.close()
                _keep(connection)
                return
            connection.close()


def _keep(connection: socket.socket) -> None:
    """Runs one command and tells how it ended."""
    request = json.loads(connection.makefile("r", encoding="utf-8").readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(**request)
        return
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # perhaps nobody waits for it
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(words: list[str], env: dict[str, str], cwd: str, files: list[str], path: list[str]) -> None:
    """The process goes on as the command."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), number)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # so that TMPDIR of this command counts
    time.tzset()
    os.chdir(cwd)
    sys.argv, sys.path[:] = words, [cwd, *path]
    sys.modules["torch"].set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    if words[1:2] == ["--call"]:
        function, arguments = pickle.loads(base64.b64decode(words[2]))
        function(*arguments)
    elif words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
