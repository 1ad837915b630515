"""HTTP that is wrong or rare gets a refusal like any other, costs little, and harms no other call."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from mmoe_rec.errors import LONGEST_QUOTE, quoted
from mmoe_rec.server import parsing
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.protocol import protocol
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE
from tests.server.asking import Answer, ask, element, reply
from tests.server.test_processes import GOOD, everything, served

LONG = "never seen again" * 12
BODY = json.dumps(GOOD).encode()


def call(*headers: str, body: bytes = BODY, start: str = "POST /invocations HTTP/1.1") -> bytes:
    """The bytes of a request."""
    return "\r\n".join([start, "Host: x", *headers, f"Content-Length: {len(body)}", "\r\n"]).encode() + body


def refusal_in(data: bytes, status: int) -> str:
    """The sentence of the only reply in what came."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/json" in head
    tree = json.loads(body)
    assert tree.keys() == {"error_code", "message"}
    return str(tree["message"])


@pytest.mark.skipif(sys.platform == "win32", reason="the helpers start a server as POSIX has it")
def test_what_only_sockets_can_send(small: SmallModel, tmp_path: Path) -> None:
    with served(small.folder, tmp_path, "--serving.max_body_mib", "1") as running:

        def answer(data: bytes) -> bytes:
            with running.connect() as connection:
                connection.sendall(data)
                return everything(connection)

        two_lengths = call("Content-Length: 3")
        for wrong in (two_lengths, call("Transfer-Encoding: chunked"), b"\x16\x03\x01\x02\x00" * 9):
            assert refusal_in(answer(wrong), 400) == "the request is not valid HTTP/1.1"

        together = answer(call() + b"no HTTP\r\n\r\n")
        assert together.count(b"HTTP/1.1 ") == together.count(b"HTTP/1.1 200 OK") == 1, "the call was right"
        assert json.loads(together.partition(b"\r\n\r\n")[2])["predictions"]

        upgrade = answer(call("Connection: Upgrade", "Upgrade: h2c"))  # which must end, as nothing more can be asked
        assert "leave the header Upgrade out" in refusal_in(upgrade, 400)

        endless = b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 12_000
        assert "more than 64 KiB" in refusal_in(answer(endless), 431)

        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
            connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            sent = 0
            with suppress(ConnectionError):
                while sent < 10**9:
                    sent += connection.send(b" " * 2**16)
        assert sent < 5 * 10**7, "a refused body is not read to its end"
        assert running.send(GOOD)[0] == 200


def test_headers_that_say_something_else_of_the_body(app: Application) -> None:
    for name, value, status in [
        ("Transfer-Encoding", "gzip, chunked", 415),
        ("Transfer-Encoding", "chunked", 200),
        ("Upgrade", "h2c", 400),
        ("X-Long", "y" * 2**16, 431),
        ("X-Long", "y" * 2**15, 200),
    ]:
        assert ask(app, BODY, headers={name: value}).status == status


def test_no_page_sends_elsewhere(app: Application) -> None:
    for page, method in (("/version/", "GET"), ("/invocations/", "POST")):
        answer = ask(app, BODY, page=page, method=method, headers={"Host": "elsewhere"})
        assert (answer.status, "location" in answer.headers) == (404, False)
        assert answer.message.startswith("there is no such page")


def test_nothing_is_ranked_for_a_caller_who_has_left(models: Models) -> None:
    app = Application(models, Limits())

    async def together() -> list[Answer]:
        left = asyncio.Event()
        left.set()
        return await asyncio.gather(reply(app, BODY), reply(app, BODY, left=left), reply(app, BODY))

    answers = asyncio.run(together())
    assert [each.status for each in answers] == [200, 499, 200]
    numbers = app.metrics.text().decode()
    assert "mmoe_rec_calls_per_pass_sum 2.0" in numbers
    assert 'mmoe_rec_refusals_total{reason="caller_gone"} 1.0' in numbers
    assert "mmoe_rec_calls 0.0" in numbers


@pytest.mark.parametrize(
    "body",
    [
        {LONG: 1},
        {"inputs": [element(**{LONG: 1})]},
        {"inputs": [element(top_k=LONG)]},
        {"inputs": [element(gate_top_k=10**300)]},
        {"inputs": [element(task_weights={LONG: 1})]},
        {"inputs": [element(task_weights={"click": LONG})]},
        {"inputs": [element(user={"user": 5, LONG: 1})]},
        {"inputs": [element(candidates={"item": [1], LONG: 1})]},
        {"inputs": [element(candidates={"item": [1], LONG: [1, 2]})]},
        {"inputs": [element(candidates={"item": [int("1234567890" * 30)]})]},
        {"inputs": [element(context={"time": LONG})]},
        {"inputs": [element()], "params": {"top_k": LONG}},
        {"inputs": [element()], "params": {LONG: 1}},
    ],
    ids=lambda body: json.dumps(body)[:60].replace(LONG[:16], "long"),
)
def test_sentences_quote_little(app: Application, body: dict[str, Any]) -> None:
    answer = ask(app, body)
    told = answer.body.decode()
    assert answer.status == (200 if LONG in body.get("params", {}) else 400)
    parts = (LONG, "1234567890" * 30)
    longest = max(size for size in range(300) for part in parts if part[:size] in told)
    assert longest <= LONGEST_QUOTE < 80


def test_quotes() -> None:
    assert quoted("a name") == "'a name'"
    assert quoted("two\nlines \ud800") == r"'two\nlines \ud800'"
    assert quoted(12) == "12"
    assert quoted("x" * 100) == f"'{'x' * LONGEST_QUOTE}...'"


def test_a_connection_that_comes_while_the_server_ends_gets_one_reply(app: Application) -> None:
    async def asked(data: bytes) -> bytes:
        kind = protocol(60, 2**20, lambda: True)
        config = uvicorn.Config(app, http=kind, ws="none", lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: kind(config=config, server_state=state, app_state={}), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(data)
            async with asyncio.timeout(PATIENCE):
                found = await reader.read()
            writer.close()
            return found

    assert asyncio.run(asked(b"")) == b""
    one = asyncio.run(asked(call()))
    assert one.count(b"HTTP/1.1 ") == one.count(b"HTTP/1.1 200 OK") == one.count(b"connection: close") == 1


def test_thousands_of_wrong_names_cost_what_one_costs(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    matches = parsing.get_close_matches
    monkeypatch.setattr(
        parsing, "get_close_matches", lambda *args, **more: compared.append(1) or matches(*args, **more)
    )
    params = {f"name{number}": 1 for number in range(3_000)}
    answer = ask(app, {"inputs": [element()], "params": params})
    assert len(answer.tree["predictions"][0]["warnings"]) == len(compared) == parsing.MOST_IGNORED
    answer = ask(app, {"inputs": [{**element(), "mask_experts": ["x"] * 3_000}]})
    assert (answer.status, len(answer.tree["message"]) < 100) == (400, True)
