"""What only sockets, signals and processes can show. No number of seconds decides; a server that hangs is ended."""

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.server.options import bind_socket, listen
from tests.fork_server import Command, run_command
from tests.inference.other_weights import other_weights
from tests.inference.running_server import free_port, serving
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, is_running, until, workers
from tests.server.asking import element, logged

GOOD = {"inputs": [element()]}
BODY = json.dumps(GOOD).encode()
START = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass
class Running:
    """A server in a process of its own. again: how often `answered` sent something again."""

    port: int
    process: Command
    log: Path
    again: int = 0

    def send(self, body: Any, page: str = "/invocations", method: str = "POST", **headers: str) -> tuple[int, Any]:
        """Status and body of a reply."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = json.dumps(body).encode() if method == "POST" else None
            connection.request(method, page, data, {"Content-Type": "application/json", **headers})
            reply = connection.getresponse()
            actual = reply.read()
            return reply.status, actual.decode() if page == "/metrics" else json.loads(actual)
        finally:
            connection.close()

    def answered(self, body: Any, page: str, method: str = "POST") -> Any:
        """The reply to a call, which is sent again as by a caller whose connection breaks."""

        def reply() -> Any:
            with suppress(OSError, HTTPException, ValueError):
                status, tree = self.send(body, page, method)
                assert status == 200 or page == "/events", tree
                self.again += status != 200
                return tree if status == 200 else None
            self.again += 1
            return None

        return until(reply)

    def health(self) -> int:
        """The status of `/health`."""
        return self.send(None, "/health", "GET")[0]

    def connect(self) -> socket.socket:
        """A connection on which anything can be sent."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def refuses(self) -> bool:
        """Whether new connections are refused."""
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            return False
        return False

    def workers(self) -> set[int]:
        """The process ids of all workers."""
        return workers(self.process.pid)


@contextmanager
def served(
    folder: Path, scratch: Path, *arguments: str, program: str = "mmoe_rec", **variables: str
) -> Iterator[Running]:
    """A server of the model in a folder, with further variables in its environment."""
    port = free_port()
    words = [program, "serve", "--model", str(folder), "--port", str(port), *arguments]
    log = scratch / "server.log"
    process = Command(words, variables, log=log)
    with serving(process, f"http://127.0.0.1:{port}/health", log):
        yield Running(port, process, log)


# Signals


def test_health_fails_before_the_port_closes(small: SmallModel, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  of its own\n", encoding="utf-8")
    words = ("--grace", "200", "--drain-seconds", "900", "--workers", "2", "--token-file", str(tmp_path / "token"))
    with served(small.folder, tmp_path, *words) as running:
        first = running.workers()
        assert running.health() == 200
        running.process.send_signal(signal.SIGTERM)
        until(lambda: running.health() == 503)
        os.kill(min(first), signal.SIGKILL)
        until(lambda: len(running.workers()) == 2 and min(first) not in running.workers())
        for _ in range(5):
            assert running.send(GOOD, Authorization="Bearer of its own")[0] == 200, "on a new connection"
            assert running.send(GOOD)[0] == 401
            assert running.health() == 503, "also of a new worker"
            assert running.send(None, "/ping", "GET")[0] == 200, "the process is well"
        running.process.kill()  # sooner than the drain ends


@contextmanager
def half_sent(running: Running) -> Iterator[socket.socket]:
    """A call under way, whose last byte is to come."""
    with running.connect() as connection:
        connection.sendall(call()[:-1])
        # Its worker answers others meanwhile, and has read what came before them.
        until(lambda: "mmoe_rec_calls 1.0" in running.send(None, "/metrics", "GET")[1])
        yield connection


@pytest.mark.parametrize("workers", ["1", "2"])
def test_signals_that_come_twice_lose_no_call(small: SmallModel, tmp_path: Path, workers: str) -> None:
    """As where `uv run` passes on a signal that its group has had already, or a terminal closes."""
    (temporary := tmp_path / "temporary").mkdir()
    log = ("--log-requests", str(tmp_path / "log"), "--log-fraction", "1", "--log-seconds", "80000")
    words = (
        "--workers",
        workers,
        "--grace",
        "200",
        "--drain-seconds",
        "1",
        "--serving.read_timeout_seconds",
        "200",
        *log,
    )
    with served(small.folder, tmp_path, *words, TMPDIR=str(temporary)) as running:
        for _ in range(4):
            assert running.send(GOOD)[0] == 200
        processes = running.workers()
        with half_sent(running) as caller, running.connect() as idle:
            os.killpg(running.process.pid, signal.SIGHUP)
            until(lambda: running.health() == 503)
            running.process.send_signal(signal.SIGTERM)
            until(running.refuses)
            os.killpg(running.process.pid, signal.SIGHUP)
            running.process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""
            caller.sendall(BODY[-1:])
            assert everything(caller).startswith(b"HTTP/1.1 200 ")
        assert running.process.wait(PATIENCE) == 0
        assert not any(map(is_running, processes))
    assert len(set(logged(tmp_path / "log")["served_request"].to_pylist())) == 5
    assert not list(temporary.iterdir())


@pytest.mark.thorough
def test_sigterm_ends_a_server_whose_call_hangs(small: SmallModel, tmp_path: Path) -> None:
    words = ("--grace", "1", "--workers", "2")
    with served(small.folder, tmp_path, *words) as running, running.connect() as half:
        half.sendall(START + b"Content-Length: 9\r\n\r\n{")
        started = running.workers()
        assert len(started) == 2
        os.kill(min(started), signal.SIGSTOP)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 1
        assert not any(map(is_running, started))


def test_sighup_stays_ignored_if_it_was(small: SmallModel, tmp_path: Path) -> None:
    with served(small.folder, tmp_path, program="tests.server.without_hangup") as running:
        os.killpg(running.process.pid, signal.SIGHUP)
        for _ in range(9):
            assert running.send(GOOD)[0] == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0


@pytest.fixture(scope="module")
def impatient(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for nobody, and takes small bodies; a test leaves it as it was."""
    folder = tmp_path_factory.mktemp("impatient")
    words = ("--serving.read_timeout_seconds", "3", "--serving.max_body_mib", "1", "--allow-host", "shop.example")
    with served(small.folder, folder, *words) as running:
        yield running


@pytest.fixture
def sender(impatient: Running) -> Iterator[socket.socket]:
    """A connection to it, after which it answers others."""
    with impatient.connect() as connection:
        yield connection
    assert impatient.send(GOOD)[0] == 200


def test_connections_that_stay_unfinished_are_closed(impatient: Running, sender: socket.socket) -> None:
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    starts = [b"", b"POST /invo", health[:-2] + b"X-Name: ", health + health[:-2]]
    with ExitStack() as connections:
        halves = [connections.enter_context(impatient.connect()) for _ in starts]
        for half, start in zip(halves, starts, strict=True):
            half.sendall(start)
        sender.sendall(START + b"Content-Length: 900\r\n\r\n" + b"{" * 10)
        assert impatient.send(None, "/health", "GET")[0] == 200
        replies = [everything(half) for half in halves]
        assert replies[:3] == [b""] * 3
        assert replies[3].count(b"HTTP/1.1 200 OK") == 1
        message = everything(sender)
        assert message.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 3 seconds" in message


def call(*headers: str, body: bytes = BODY) -> bytes:
    """The bytes of a request."""
    return START + "\r\n".join([*headers, f"Content-Length: {len(body)}", "\r\n"]).encode() + body


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (call("Content-Length: 3"), "Invalid HTTP request received"),
        (call("Transfer-Encoding: chunked"), "Invalid HTTP request received"),
        (b"\x16\x03\x01\x02\x00" * 9, "Invalid HTTP request received"),
        (call("Connection: Upgrade", "Upgrade: h2c"), "leave the header Upgrade out"),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 12_000, "more than 64 KiB"),
    ],
    ids=["two lengths", "length of what is chunked", "TLS", "upgrade", "many headers"],
)
def test_what_only_sockets_can_send(sender: socket.socket, data: bytes, sentence: str) -> None:
    sender.sendall(data)
    reply = everything(sender)
    assert [line[9:12] for line in reply.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")] == [b"400"]
    assert sentence in reply.decode()


def send_for_ever(connection: socket.socket, data: bytes, pause: float = 0.0) -> None:
    """Sends and takes nothing. Raises ConnectionError once the server has cut it off."""
    while True:
        connection.sendall(data)
        time.sleep(pause)


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes a connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


ENDLESS = START + b"Connection: close\r\nContent-Length: 1000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "data", "pause"),
    [
        (b"", b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20, 0.005),
        (b"GET /health HTTP/1.1\r\nX: ", b"x" * 2**16, 0.0),
        (ENDLESS, b" " * 2**16, 0.0),
        (ENDLESS, b" ", 0.05),
    ],
    ids=["takes no reply", "large headers", "goes on after the refusal", "slowly so"],
)
def test_a_caller_is_cut_off(sender: socket.socket, start: bytes, data: bytes, pause: float) -> None:
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sender.sendall(start)
    with pytest.raises(ConnectionError):
        send_for_ever(sender, data, pause)


def test_only_names_of_this_machine_and_allowed_ones_are_answered(impatient: Running) -> None:
    own = (f"127.0.0.1:{impatient.port}", "localhost", "Shop.Example", "shop.example:443")
    for name, status in (*((name, 200) for name in own), ("elsewhere.example", 403), ("10.0.0.1", 403)):
        assert impatient.send(GOOD, Host=name)[0] == status
        assert impatient.send(None, "/version", "GET", Host=name)[0] == status
        assert impatient.send(None, "/health", "GET", Host=name)[0] == 200, "as probes have any"
    with impatient.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.0\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200 ")


def test_whoever_lets_all_in_is_warned() -> None:
    words = ["mmoe_rec", "serve", "--model", "no/model", "--port", str(free_port()), "--host"]
    for host, token, warnings in (("0.0.0.0", {}, 1), ("0.0.0.0", {"MMOE_REC_TOKEN": "x"}, 0), ("127.0.0.1", {}, 0)):
        message = run_command(*words, host, env=token).stderr
        assert "'no/model' holds no model" in message
        assert message.count("send events and reload. Set MMOE_REC_TOKEN.") == warnings


# Another model


def changed(folder: Path, target: Path) -> None:
    """A model with other weights takes the place of one, as a training's does."""
    made = target.with_name("made")
    other_weights(folder, made, 0.2, 3)
    replaced(made, target)


def replaced(made: Path, target: Path) -> None:
    """One folder for another; newer, whatever the clock's steps are."""
    newer = (target / "model.json").stat().st_mtime_ns + 10**9
    os.utime(made / "model.json", ns=(newer, newer))
    target.rename(target.with_name("old"))
    made.rename(target)
    shutil.rmtree(target.with_name("old"))


class Calling(threading.Thread):
    """A caller who sends calls one after the other, on connections of their own or on one that it keeps."""

    def __init__(self, running: Running, keeps: bool, pause: float) -> None:
        super().__init__(daemon=True)
        self._running, self.keeps, self._pause = running, keeps, pause
        self.has_ended = False
        self.answers: list[str] = []
        self.failures: list[object] = []
        self.start()

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._running.port, timeout=PATIENCE)
        while not self.has_ended and not self.failures:
            try:
                connection.request("POST", "/invocations", json.dumps(GOOD), {"Content-Type": "application/json"})
                reply = connection.getresponse()
                if reply.status != 200:
                    self.failures.append(reply.status)
                self.answers.append(json.loads(reply.read())["predictions"][0]["model"]["version"])
            except (OSError, ValueError) as error:
                self.failures.append(error)
            if not self.keeps:
                connection.close()
            time.sleep(self._pause)


@pytest.mark.thorough
def test_a_new_model_takes_over_without_a_lost_call(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small.folder, folder)
    with served(folder, tmp_path, "--poll", "0.1") as running:
        caller = Calling(running, False, 0.0)
        until(lambda: caller.answers)
        changed(small.folder, folder)
        until(lambda: caller.answers[-1] != caller.answers[0])
        caller.has_ended = True
        caller.join(PATIENCE)
        assert not caller.failures
        after = caller.answers[-1]
        assert caller.answers == sorted(caller.answers, key=lambda answer: answer == after), "once changed, it stays so"


def model_count(running: Running) -> float:
    """How many workers serve a model, as the metrics have it."""
    try:
        text = running.send(None, "/metrics", "GET")[1]
    except OSError:  # of a worker that was killed
        return 0.0
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("mmoe_rec_model_info{"))


# Refusals of the command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/model"], "'no/model' holds no model"),
        (["--model", "{model}", "--serving.max_elemnts", "1"], "Did you mean '--serving.max_elements'?"),
        (["--model", "{model}", "--training.epochs", "1"], "'--training.epochs' is neither an option"),
        (["--model", "{model}", "--token-file", "no/file"], "the token file 'no/file' can't be read"),
        (["--model", "{model}", "--host", "203.0.113.1"], "203.0.113.1:8000 can't be used for listening"),
    ],
    ids=str,
)
def test_mistakes_are_reported_in_one_sentence(small: SmallModel, arguments: list[str], sentence: str) -> None:
    words = [argument.replace("{model}", str(small.folder)) for argument in arguments]
    done = run_command("mmoe_rec", "serve", *words)
    assert done.returncode == 2, done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: ")
    assert sentence in message


# An address is one server's


TAKEN = "can't be used for listening: Address already in use"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_that_a_server_listens_at_is_taken(host: str) -> None:
    try:
        first = bind_socket(host, 0)
    except UserError:
        pytest.skip("this machine has no IPv6")
    listen(first)
    port = first.getsockname()[1]
    with pytest.raises(UserError, match=f"{port} {TAKEN}"):
        bind_socket(host, port)
    first.close()
    bind_socket(host, port).close()


def opened(pipe: Path) -> int | None:
    """A pipe that somebody reads, to be written to."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
