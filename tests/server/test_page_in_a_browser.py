"""The page at `/`: in a browser without a window, where there is one, and what every browser is told about it."""

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.types import ASGIApp

from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from tests.inference.small_model import SmallModel
from tests.server.asking import application, ask
from tests.server.browser import Browser, browser

TOKEN = "open sesame"
HTML = "<img src=x onerror=\"document.title='taken'\"><b>7</b>"
LARGE = -(10**17) - 1  # which no double can hold
CELLS = """
    const text = (cell) => (cell.querySelector("button") ?? cell).textContent;
    return [...document.querySelector(arguments[0]).rows].map(row => [...row.cells].map(text))"""
STATISTICS = {"log_sum": ("", " 3.5d", " 2d", " 1d"), "log_count": ("", " 3.5d", " 2d", " 1d")}
STATISTICS |= {"rate": ("", " 3.5d", " 2d", " 1d"), "recency": ("",)}
ROWS = "return document.querySelectorAll('#ranking tbody tr').length"


def test_the_page_is_bound_to_what_it_was_written_with(app: Application) -> None:
    answer = ask(app, b"", page="/", method="GET")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    text = answer.body.decode()
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{checksum}'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http:", "https:", "src="):
        assert forbidden not in text


def test_everybody_may_see_the_page_and_nobody_the_model(models: ModelManager) -> None:
    app = application(models, token=TOKEN)
    assert ask(app, b"", page="/", method="GET").status == 200
    assert ask(app, b"", page="/model", method="GET").status == 401
    actual = ask(app, b"", page="/model", method="GET", headers={"Authorization": f"Bearer {TOKEN}"}).tree
    assert [task["name"] for task in actual["tasks"]] == ["click", "liked", "spent"]


# In a browser


@contextmanager
def serving(small: SmallModel, token: str | None) -> Iterator[str]:
    """The address of a running server."""
    app = Application(ModelManager(ServerOptions(token=token), ResolvedModel(small.folder, "models:/small/7", "a_run")))
    with running(app) as address:
        yield address


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """The address at which an application answers."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def address(small: SmallModel) -> Iterator[str]:
    with serving(small, TOKEN) as actual:
        yield actual


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(opened: Browser, address: str) -> Browser:
    """The page with the model's example, after the token was given by keyboard."""
    opened.size(1200, 900)
    opened.open(address)
    opened.wait("return document.activeElement.id === 'token'")
    assert opened.texts("#error") == ["this server requires a token: send the header Authorization: Bearer TOKEN"]
    opened.run("document.activeElement.value = arguments[0]", TOKEN)
    opened.press("\ue007")
    opened.wait(ROWS)
    assert opened.texts("#error") == []
    opened.complaints()  # of the refusal, and of the model asked for without the token
    return opened


def send(page: Browser, call: Any) -> None:
    """Sends a call by keyboard; a text as it is."""
    text = call if isinstance(call, str) else json.dumps(call)
    page.run(
        "const text = document.querySelector('#text'); text.value = arguments[0]; text.focus();"
        "text.dispatchEvent(new Event('input')); document.querySelector('#reply').hidden = true;",
        text,
    )
    page.press("\ue009", "\ue007")  # Ctrl+Enter
    page.wait("return !document.querySelector('#send').disabled")


def move(page: Browser, label: str, value: float) -> None:
    """Moves the slider that has this label."""
    script = """
        const label = [...document.querySelectorAll('#sliders label')].find(each => each.textContent === arguments[0]);
        const input = document.getElementById(label.htmlFor);
        input.value = arguments[1]; input.dispatchEvent(new Event('input')); return Number(input.value)"""
    assert page.run(script, label, value) == pytest.approx(value)


def columns(page: Browser) -> dict[str, list[str]]:
    """The ranking as it is seen: name of the column -> texts."""
    head, *rows = page.run(CELLS, "#ranking")
    return dict(zip((item.replace("\u200b", "") for item in head), map(list, zip(*rows, strict=True)), strict=True))


def expected(small: SmallModel, call: Any) -> Ranking:
    from mmoe_rec.inference.ranker import Ranker

    return Ranker.load(small.folder).rank(**call["inputs"][0], explain=True)


def call_of(items: list[Any], **options: Any) -> dict[str, Any]:
    context = {"time": "2023-11-29T12:00:00+01:00"}
    return {"inputs": [{"user": {"user": 5}, "context": context, "candidates": {"item": items}}], **options}


ITEMS = [10**17 * number for number in range(-4, 8)]


def test_the_example_is_there_and_is_ranked_at_once(page: Browser, small: SmallModel) -> None:
    assert page.texts("h1") == ["small, version 7"]
    example = json.loads((small.folder / "example_request.json").read_text())
    assert json.loads(page.run("return document.querySelector('#text').value")) == example
    ranking = expected(small, example)
    actual = columns(page)
    assert actual["candidate"] == [str(candidate) for candidate in ranking.candidates]
    for name, values in ranking.predictions.items():
        np.testing.assert_allclose([float(item) for item in actual[name]], values, rtol=1e-3)
    assert set(actual["moved"]) == {"\u2013"}
    assert page.complaints() == []


def test_weights_reorder_at_once_as_the_server_would(page: Browser, small: SmallModel) -> None:
    call = call_of(ITEMS)
    send(page, call)
    before = columns(page)["candidate"]
    weights = {"click": 0.0, "liked": 3.0, "spent": 0.5}
    for name, weight in weights.items():
        move(page, f"weight of {name}", weight)
    call["inputs"][0]["task_weights"] = weights
    ranking, actual = expected(small, call), columns(page)
    assert actual["candidate"] == [str(candidate) for candidate in ranking.candidates]
    assert actual["candidate"] != before
    np.testing.assert_allclose([float(item) for item in actual["score"]], ranking.scores, rtol=1e-3)
    for place, (name, moved) in enumerate(zip(actual["candidate"], actual["moved"], strict=True)):
        steps = before.index(name) - place
        assert moved == ("\u2013" if steps == 0 else f"{'▲' if steps > 0 else '▼'} {abs(steps)}")
    move(page, "top k to show", 3)
    page.run("document.querySelector('#reset').click()")
    assert columns(page)["candidate"] == before[:3]


def test_what_a_candidate_rests_on(page: Browser, small: SmallModel) -> None:
    call = call_of(ITEMS, params={"top_k": 4})
    send(page, call)
    assert page.run(ROWS) == 4
    page.run("document.querySelectorAll('#ranking button')[2].focus()")
    page.press("\ue007")
    ranking = expected(small, call_of(ITEMS))
    why = ranking.explanations[2]
    assert page.texts("#detail-title") == [f"Candidate {ranking.candidates[2]}"]
    message = page.run("return [...document.querySelectorAll('.bars')].map(each => each.ariaLabel)")
    means = {
        name: np.mean([explanation.gates[name] for explanation in ranking.explanations], axis=0) for name in why.gates
    }
    for text, (name, weights) in zip(message, why.gates.items(), strict=True):
        assert text.startswith(f"{name}: ")
        shown = [int(item) for item in re.findall(r"(\d+)%", text)]
        np.testing.assert_allclose(shown, 100 * np.stack([weights, means[name]]).T.ravel(), atol=0.51)
    (_, *statistics), *rows = page.run(CELLS, "#counters")
    assert statistics == [f"{kind}{days}" for kind, windows in STATISTICS.items() for days in windows]
    table = {row[0].replace("\u200b", ""): dict(zip(statistics, row[1:], strict=True)) for row in rows}
    assert [*table] == ["item_click", "user_brand_liked", "brand_spent"]
    for name, value in why.counters.items():
        counter, kind, days = re.fullmatch(r"(.*)_(log_sum|log_count|rate|recency)_?(.*)", name).groups()
        text = table[counter].pop(f"{kind} {days.replace('p', '.')}".strip())
        number = value if kind == "rate" or value is None else np.expm1(value)
        assert text == "missing" if value is None else float(text) == pytest.approx(number, rel=1e-3, abs=1e-3), name
    assert {text for row in table.values() for text in row.values()} == {""}
    clicked = why.histories["clicked"]
    assert clicked
    assert page.texts("#histories ul:first-of-type li")[: len(clicked)] == [str(item) for item in clicked]


def test_numbers_near_one_are_distinguished_from_it(page: Browser) -> None:
    values = [0.5, 0.9987276, 0.99995, 0.9999849, 0.99999994, 1 - 2**-53, -0.99996, 1.0, 0.0, 123.456, 2e7, 3e-9]
    texts = page.run("return arguments[0].map(formatNumber)", values)
    np.testing.assert_allclose(texts_as_numbers := [float(item) for item in texts], values, rtol=1e-2)
    for text, value in zip(texts_as_numbers, values, strict=True):
        assert abs(1 - text) == pytest.approx(abs(1 - value), rel=0.06)


def test_large_ids_stay_as_they_are(page: Browser) -> None:
    send(page, call_of([LARGE, 0]))
    assert str(LARGE) in columns(page)["candidate"]
    page.run(
        "const field = document.querySelector('#user-0'); field.value = '-9223372036854775807';"
        "field.dispatchEvent(new Event('input'))"
    )
    assert '"user": -9223372036854775807' in page.run("return document.querySelector('#text').value")
    assert f"[{LARGE}, 0]" in page.run("return document.querySelector('#text').value")


def test_errors_are_the_servers_sentence(page: Browser) -> None:
    for call, sentence in (
        (call_of([]), "'candidates' is empty: column 'item' needs at least one id"),
        (call_of([1], params={"top_k": 0}), "'top_k' must be an integer of at least 1"),
        (call_of([1], params=5), "'params' must be an object"),
        ('{"inputs": [', "the body is not valid JSON"),
        ({"dataframe_records": [{"user": 5, "item": 1}]}, "the reply to a data frame has rows: send 'inputs'"),
        (json.dumps(call_of([1])).replace("12:00", HTML.replace('"', "'")), "which is not an ISO 8601 time"),
    ):
        send(page, call)
        (message,) = page.texts("#error")
        assert sentence in message
        assert page.run("return document.querySelector('#reply').hidden")
    send(page, call_of([1]))
    assert page.texts("#error") == []


def test_ids_that_hold_html_are_text(opened: Browser, tmp_path: Path) -> None:
    with serving(SmallModel(tmp_path, strings=True), None) as address:
        opened.complaints()  # of the calls that other tests have refused
        opened.open(address)
        opened.wait("return document.querySelector('#text').value")
        call = call_of([HTML, "id 0"])
        call["inputs"][0]["user"] = {"user": HTML, "clicked": [HTML]}
        send(opened, call)
        assert sorted(columns(opened)["candidate"]) == sorted([HTML, "id 0"])
        assert HTML in opened.texts("#histories li")
        assert opened.run("return document.querySelectorAll('main img, main b').length") == 0
        assert opened.run("return document.title") != "taken"
        assert opened.complaints() == []
