"""Whatever is sent, the reply is rankings or one sentence, and holds nothing of the body but the name in question."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from mmoe_rec.errors import LONGEST_QUOTE
from mmoe_rec.inference.artifact import version_of
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request import OPTIONS
from mmoe_rec.server.app import Application
from mmoe_rec.server.calls import reply as write_reply
from mmoe_rec.server.limits import Limits, Refused
from mmoe_rec.server.models import Models
from mmoe_rec.server.parsing import MOST_IGNORED
from tests.inference.small_model import SmallModel
from tests.server.asking import Answer, ask, element, reply

GOOD = json.dumps({"inputs": [element()]}).encode()
LONG = "never seen again" * 12


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON"),
        (b'"x"', "must be an object such as"),
        (b'{"inputs": 5}', "needs the key 'inputs'"),
        (b'{"input": [], "x": 1}', "no key 'input'; did you mean 'inputs'?"),
        (b'{"user": {}}', "no key 'user'; valid are inputs, params"),
        (b'{"inputs": [5]}', "must be an object with the keys user, context and candidates"),
        (b'{"inputs": [{}], "params": 5}', "'params' must be an object"),
        (b'{"inputs": [{}]}', "a request needs the key 'user'"),
        (GOOD.replace(b"5", b"NaN", 1), "not valid JSON"),
        (GOOD.replace(b"5", b"9" * 5000, 1), "not valid JSON: number is infinity"),
        (GOOD.replace(b"5", b"1e999", 1), "not valid JSON: number is infinity"),
        (GOOD.replace(b"5", b'"\\ud800"', 1), "not valid JSON: no low surrogate"),
        (GOOD.replace(b'"user": 5', b'"user": 5, "user": 5', 1), "gives the key 'user' twice"),
        (GOOD.replace(b'"user": 5', b'"user" \n: 5, "us\\u0065r": 5', 1), "gives the key 'user' twice"),
        (b'{"inputs": [], "inputs": []}', "gives the key 'inputs' twice"),
        (b"[" * 17 + b"]" * 17, "more than 16 deep"),
        (b'{"inputs": ' * 17 + b"1" + b"}" * 17, "more than 16 deep"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON: depth limit"),
        (b'{"inputs": [{"%s": 1}]}' % (b"k" * 100_000), "a key of more than 256 characters"),
        (b'{"inputs": [%s]}' % b",".join([b"{}"] * 10), "has 10 elements; this server takes at most 9"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_malformed_bodies(app: Application, body: bytes, sentence: str) -> None:
    answer = ask(app, body)
    assert answer.status == 400
    assert sentence in answer.message
    assert answer.tree["error_code"] == "INVALID_PARAMETER_VALUE"
    assert len(answer.body) < 500
    assert "\n" not in answer.message


def test_a_string_that_looks_like_a_key_is_none(app: Application) -> None:
    answer = ask(app, {"inputs": [element(context={"time": ":a"})]})
    assert "holds ':a', which is not an ISO 8601 time" in answer.message


@pytest.mark.parametrize(
    "body",
    [
        {LONG: 1},
        {"inputs": [element(**{LONG: 1})]},
        {"inputs": [element(top_k=LONG)]},
        {"inputs": [element(gate_top_k=10**300)]},
        {"inputs": [element(task_weights={LONG: 1})]},
        {"inputs": [element(task_weights={"click": LONG})]},
        {"inputs": [element(user={"user": LONG})]},
        {"inputs": [element(user={"user": 5, LONG: 1})]},
        {"inputs": [element(candidates=LONG)]},
        {"inputs": [element(candidates={"item": [1], LONG: [1, 2]})]},
        {"inputs": [element(candidates={"item": [int("1234567890" * 30)]})]},
        {"inputs": [element(context={"time": LONG})]},
        {"inputs": [element(mask_experts=["x"] * 3_000)]},
        {"inputs": [element()], "params": {"top_k": LONG}},
        {"inputs": [element()], "params": {LONG: 1}},
        {"inputs": [element()], "params": {f"name{number}": 1 for number in range(3_000)}},
    ],
    ids=lambda body: json.dumps(body)[:60].replace(LONG[:16], "long"),
)
def test_sentences_quote_little(app: Application, body: dict[str, Any]) -> None:
    answer = ask(app, body)
    is_warning = any(name not in OPTIONS for name in body.get("params", {}))
    assert answer.status == (200 if is_warning else 400)
    if is_warning:
        assert len(answer.tree["predictions"][0]["warnings"]) <= MOST_IGNORED
    told, parts = answer.body.decode(), (LONG, "1234567890" * 30)
    assert max(size for size in range(250) for part in parts if part[:size] in told) <= LONGEST_QUOTE
    assert len(answer.body) < (3_000 if is_warning else 500)


def test_unknown_params_are_warned_of_in_each_ranking(app: Application) -> None:
    good, other = (ask(app, {"inputs": [element()] * 2, "params": params}).tree for params in ({}, {"topk": 1}))
    for before, after in zip(good["predictions"], other["predictions"], strict=True):
        assert after["warnings"] == ["'params' has an unknown key 'topk', which was ignored; did you mean 'top_k'?"]
        assert {**after, "warnings": []} == before


def test_candidates_to_be_explained_count_more(app: Application) -> None:
    few, many = (element(candidates={"item": list(range(count))}) for count in (3, 10))
    assert ask(app, {"inputs": [many, many | {"explain": False}], "params": {"explain": True}}).status == 200
    for body in (
        {"inputs": [many, few], "params": {"explain": True}},
        {"inputs": [many | {"explain": True}, few | {"explain": True}]},
    ):
        answer = ask(app, body)
        assert answer.status == 400
        assert "130 candidates in all (with explain, each counts as 10)" in answer.message


def test_candidates_of_all_elements_together(app: Application) -> None:
    most = element(candidates={"item": list(range(40))})
    assert ask(app, {"inputs": [most] * 3}).status == 200
    answer = ask(app, {"inputs": [most] * 3 + [element(candidates={"item": [1]})]})
    assert (answer.status, "121 candidates in all; this server takes at most 120" in answer.message) == (400, True)


# Partial


def test_with_partial_an_error_stands_in_the_place_of_its_element(app: Application) -> None:
    wrong = element(user={})
    answer = ask(app, {"inputs": [element(), wrong, 5, element(top_k=1)]}, page="/invocations?partial=true")
    assert answer.status == 200
    first, second, third, fourth = answer.tree["predictions"]
    (alone,) = ask(app, {"inputs": [element()]}).tree["predictions"]
    assert first.pop("scores") == pytest.approx(alone.pop("scores"), rel=1e-5)
    predictions = alone.pop("predictions")
    assert first.keys() - alone.keys() == {"predictions"}
    for task, values in first.pop("predictions").items():
        assert values == pytest.approx(predictions.pop(task), rel=1e-5)
    assert (first, predictions) == (alone, {})
    assert second == {"error": ask(app, {"inputs": [wrong]}).message}
    assert third["error"].startswith("a request must be an object")
    assert len(fourth["order"]) == 1


def test_without_partial_the_first_error_is_the_reply(app: Application) -> None:
    body = {"inputs": [element(), 5, element(user={})]}
    for page in ("/invocations", "/invocations?partial=false"):
        assert ask(app, body, page=page).message.startswith("inputs[1]: a request must be an object")


@pytest.mark.parametrize("query", ["partial=yes", "partal=true"])
def test_other_queries_are_refused(app: Application, query: str) -> None:
    answer = ask(app, GOOD, page=f"/invocations?{query}")
    assert (answer.status, "'partial'" in answer.message) == (400, True)


# Bodies that are not read


async def endless() -> AsyncIterator[bytes]:
    """A body that a server must not read to its end."""
    for _ in range(3_000):
        yield b" " * 2**10
    raise AssertionError("far more than the limit was read")


async def silent() -> AsyncIterator[bytes]:
    """A body that never goes on."""
    yield GOOD[:20]
    await asyncio.sleep(1_000)


def unread() -> AsyncIterator[bytes]:
    """A body of which nothing must be read."""

    async def pieces() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    return pieces()


def test_a_large_body_is_refused_by_its_length(app: Application) -> None:
    for length in (str(2**20 + 1), "9" * 30):
        answer = ask(app, b"", headers={"Content-Length": length}, parts=unread())
        assert (answer.status, "larger than 1 MiB" in answer.message) == (413, True)
    assert ask(app, GOOD + b" " * (2**20 - len(GOOD))).status == 200


def test_a_body_without_a_length_is_read_to_the_limit(app: Application) -> None:
    assert ask(app, b"", parts=endless()).status == 413
    assert ask(app, b"", parts=[GOOD[:9], GOOD[9:]]).tree == ask(app, GOOD).tree


def test_what_headers_say_of_a_body(app: Application) -> None:
    for name, value, status in [
        ("Content-Type", "text/csv", 415),
        ("Content-Type", "application/json; charset=utf-8", 200),
        ("Content-Encoding", "gzip", 415),
        ("Transfer-Encoding", "gzip, chunked", 415),
        ("Transfer-Encoding", "chunked", 200),
        ("Upgrade", "h2c", 400),
        ("X-Long", "y" * 2**16, 431),
        ("X-Long", "y" * 2**15, 200),
    ]:
        more = {} if status == 200 else {"parts": unread()}
        assert ask(app, GOOD, headers={name: value}, **more).status == status


def test_a_body_that_stops_coming(models: Models) -> None:
    app = Application(models, Limits(read_seconds=0.01))
    answer = ask(app, b"", parts=silent())
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert "within 0.01 seconds" in answer.message


def test_calls_beyond_the_limit_are_told_to_come_again(models: Models) -> None:
    app = Application(models, Limits(max_waiting=2))
    answers = ask(app, *[GOOD] * 5)
    assert sorted(each.status for each in answers) == [200, 200, 503, 503, 503]
    refused = next(each for each in answers if each.status == 503)
    assert refused.headers["retry-after"] == "1"
    assert ask(app, GOOD).status == 200


def test_nothing_is_ranked_for_a_caller_who_has_left(models: Models) -> None:
    app = Application(models, Limits())

    async def together() -> list[Answer]:
        left = asyncio.Event()
        left.set()
        return await asyncio.gather(reply(app, GOOD), reply(app, GOOD, left=left), reply(app, GOOD))

    assert [each.status for each in asyncio.run(together())] == [200, 499, 200]
    numbers = app.metrics.text().decode()
    assert "mmoe_rec_calls_per_pass_sum 2.0" in numbers
    assert 'mmoe_rec_refusals_total{reason="caller_gone"} 1.0' in numbers
    assert "mmoe_rec_calls 0.0" in numbers


# Other pages


def test_pages(app: Application, models: Models, small: SmallModel) -> None:
    served = models.current
    assert served is not None
    for page in ("/health", "/ping"):
        assert ask(app, b"", page=page, method="GET").status == 200
        assert ask(app, b"", page=page, method="HEAD").status == 200
    version = ask(app, b"", page="/version", method="GET").tree
    assert version["model"] == "small"
    assert version["version"] == "7"
    assert version["run_id"] == "a_run"
    assert version["artifact"] == version_of(small.folder)
    assert ask(app, GOOD).tree["predictions"][0]["model"] == {"name": "small", "version": version["artifact"]}
    assert version["tables_as_of"] == served.ranker.about.tables_as_of
    assert version["exact_from"] == served.ranker.exact_from
    assert datetime.fromisoformat(version["exact_from"]) - datetime.fromisoformat(version["tables_as_of"]) == timedelta(
        microseconds=1
    )
    assert ask(app, b"", page="/model", method="GET").tree["exact_from"] == version["exact_from"]
    assert version["mmoe_rec"]
    for page, method in (("/no", "GET"), ("/version/", "GET"), ("/invocations/", "POST")):
        answer = ask(app, GOOD, page=page, method=method, headers={"Host": "elsewhere"})
        assert (answer.status, "location" in answer.headers) == (404, False), "no page sends elsewhere"
        assert answer.message.startswith("there is no such page")
    assert ask(app, b"", page="/invocations", method="GET").status == 405


def test_before_a_model_is_loaded() -> None:
    app = Application(Models(Limits()), Limits())
    assert ask(app, b"", page="/health", method="GET").status == 503
    answer = ask(app, GOOD)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")


def test_the_schema_has_the_models_own_example(app: Application) -> None:
    tree = ask(app, b"", page="/openapi.json", method="GET").tree
    operation = tree["paths"]["/invocations"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert ask(app, content["example"]).status == 200
    assert [*tree["paths"]["/metrics"]["get"]["responses"]["200"]["content"]] == ["text/plain"]
    names = tree["components"]["schemas"]
    for reference in (content["schema"], operation["responses"]["200"]["content"]["application/json"]["schema"]):
        assert reference["$ref"].rpartition("/")[2] in names
    assert set(names["Request"]["properties"]) == {"user", "context", "candidates", "task_weights"} | {
        "top_k",
        "gate_top_k",
        "mask_experts",
        "explain",
    }
    assert set(names["Params"]["properties"]) == {*OPTIONS}
    (sent,) = ask(app, {"inputs": [element(explain=True)]}).tree["predictions"]
    assert set(names["Ranking"]["properties"]) == {*sent, "request_id"}  # which a server has that logs requests
    assert set(names["Explanation"]["properties"]) == set(sent["explanations"][0])


def test_a_token_is_asked_for(models: Models) -> None:
    app = Application(models, Limits(), token="secret")
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        answer = ask(app, b"", headers=given, parts=unread())
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "secret" not in answer.message
        assert ask(app, b"", page="/metrics", method="GET", headers=given).status == 401
        assert ask(app, b"", page="/health", method="GET", headers=given).status == 200
    assert ask(app, GOOD, headers={"Authorization": "Bearer secret"}).status == 200


def test_what_is_no_number_is_never_replied() -> None:
    ranking = Ranking(["null", ",null"], [1.0, 0.5], {"a": [0.1, 0.2]}, [0, 1], "t", "t")
    assert json.loads(write_reply([ranking], (), False))["predictions"][0]["candidates"] == ["null", ",null"]
    with pytest.raises(Refused, match="not finite"):
        write_reply([Ranking([1], [float("nan")], {}, [0], "t", "t")], (), False)
    with pytest.raises(Refused, match="not finite"):
        write_reply([Ranking([1, 2], [1.0, 1.0], {"a": [0.5, float("inf")]}, [0], "t", "t")], (), False)
