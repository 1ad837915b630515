"""Whatever is sent, the reply is rankings or one sentence, and holds nothing of the body but the name in question."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import jsonschema
import numpy as np
import pytest

from mmoe_rec.errors import MAX_QUOTE_CHARS
from mmoe_rec.inference.artifact import artifact_version
from mmoe_rec.inference.request_reader import REQUEST_KEYS, REQUEST_OPTIONS
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.ranking_queue import MAX_BATCH_CANDIDATES
from tests.inference.small_model import ITEMS, USER, SmallModel
from tests.server.asking import PROBES, Answer, application, ask, element, numbers, reply

GOOD = json.dumps({"inputs": [element()]}).encode()
LONG = "never seen again" * 9_999


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not valid JSON"),
        (b'"x"', "must be an object such as"),
        (b'{"inputs": 5}', "needs the key 'inputs'"),
        (b'{"input": [], "x": 1}', "no key 'input'; did you mean 'inputs'?"),
        (b'{"user": {}}', "no key 'user'; valid are inputs, params"),
        (b'{"inputs": [], "dataframe_records": []}', "only one of 'inputs' and 'dataframe_records'"),
        (b'{"dataframe_records": [5]}', "'dataframe_records' must be a list of objects"),
        (b'{"dataframe_split": []}', "'dataframe_split' must be {"),
        (b'{"dataframe_split": {"columns": [1], "data": [[1]]}}', "'dataframe_split' must be {"),
        (b'{"dataframe_split": {"columns": ["user"], "data": [[1, 2]]}}', "with rows of one length"),
        (b'{"dataframe_split": {"columns": ["user", "user"], "data": [[1, 1]]}}', "has column 'user' twice"),
        (b'{"inputs": [5]}', "must be an object with the keys user, context and candidates"),
        (b'{"inputs": [{}], "params": 5}', "'params' must be an object"),
        (b'{"inputs": [{}]}', "a request needs the key 'user'"),
        (GOOD.replace(b"5", b"NaN", 1), "not valid JSON"),
        (GOOD.replace(b"5", b"9" * 5000, 1), "not valid JSON: number is infinity"),
        (GOOD.replace(b"5", b"1e999", 1), "not valid JSON: number is infinity"),
        (GOOD.replace(b"5", b'"\\ud800"', 1), "not valid JSON: no low surrogate"),
        (b"[" * 16 + b"]" * 16, "must be an object such as"),
        (b"[" * 17 + b"]" * 17, "more than 16 deep"),
        (b'{"inputs": ' * 17 + b"1" + b"}" * 17, "more than 16 deep"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON: depth limit"),
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


@pytest.mark.parametrize(
    "body",
    [
        {LONG: 1},
        {"inputs": [element(**{LONG: 1})]},
        {"inputs": [element(top_k=LONG)]},
        {"inputs": [element(task_weights={"click": LONG})]},
        {"inputs": [element(user={"user": LONG})]},
        {"inputs": [element(candidates={"item": [1], LONG: [1, 2]})]},
        {"inputs": [element(candidates={"item": [int("1234567890" * 30)]})]},
        {"inputs": [element(mask_experts=["x"] * 3_000)]},
        {"inputs": [element()], "params": {LONG: 1}},
    ],
    ids=lambda body: json.dumps(body)[:60].replace(LONG[:16], "long"),
)
def test_sentences_quote_little(app: Application, body: dict[str, Any]) -> None:
    answer = ask(app, body)
    assert answer.status == 400
    message, parts = answer.body.decode(), (LONG, "1234567890" * 30)
    assert max(size for size in range(250) for part in parts if part[:size] in message) <= MAX_QUOTE_CHARS
    assert len(answer.body) < 500
    if (params := body.get("params")) and params.keys() - {*REQUEST_OPTIONS}:
        assert "'params' has an unknown key" in answer.message


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
    for name in ("scores", "log_scores"):
        assert first.pop(name) == pytest.approx(alone.pop(name), rel=1e-5)
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


def test_a_large_body_is_refused(app: Application) -> None:
    for parts in ([GOOD, b" " * 2**20], [b" " * 2**10] * 3_000):
        answer = ask(app, b"", parts=parts)
        assert (answer.status, "larger than 1 MiB" in answer.message) == (413, True)
    assert ask(app, GOOD + b" " * (2**20 - len(GOOD))).status == 200
    assert ask(app, b"", parts=[GOOD[:9], GOOD[9:]]).tree == ask(app, GOOD).tree


def test_what_headers_say_of_a_body(app: Application) -> None:
    for name, value, status in [
        ("Content-Type", "text/csv", 415),
        ("Content-Type", "text/plain", 415),
        ("Content-Type", "", 415),
        ("Content-Type", "application/json; charset=utf-8", 200),
        ("Content-Encoding", "gzip", 415),
        ("Transfer-Encoding", "gzip, chunked", 415),
        ("Transfer-Encoding", "chunked", 200),
        ("Upgrade", "h2c", 400),
    ]:
        more = {} if status == 200 else {"parts": unread()}
        assert ask(app, GOOD, headers={name: value}, **more).status == status


def test_a_body_that_stops_coming(models: ModelManager) -> None:
    app = application(models, read_timeout_seconds=0.01)
    answer = ask(app, b"", parts=silent())
    assert answer.status == 408
    assert "within 0.01 seconds" in answer.message


def test_calls_beyond_the_limit_are_asked_to_retry(models: ModelManager) -> None:
    app = application(models, max_concurrent_calls=2)
    answers = ask(app, *[GOOD] * 5)
    assert sorted(answer.status for answer in answers) == [200, 200, 503, 503, 503]
    refused = next(answer for answer in answers if answer.status == 503)
    assert refused.headers["retry-after"] == "1"
    assert ask(app, GOOD).status == 200


def test_nothing_is_ranked_for_a_caller_who_has_left(models: ModelManager) -> None:
    app, ranker = watched(models)
    ranker.go_on.clear()

    async def together() -> list[Answer]:
        left = asyncio.Event()
        left.set()
        calls = [asyncio.ensure_future(reply(app, GOOD, left=item)) for item in (None, left, None)]
        await calls[1]
        ranker.go_on.set()
        return await asyncio.gather(*calls)

    assert [item.status for item in asyncio.run(together())] == [200, 499, 200]
    actual = numbers(app)
    assert (actual["calls_per_batch_sum"], actual['refusals_total{reason="caller_gone"}'], actual["calls"]) == (2, 1, 0)


# Names of the server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "shop.example"}, 200),  # through a proxy, with --allow-host
        ({"Host": "elsewhere.example:8000"}, 403),  # as after DNS rebinding
        ({"Host": "localhost.elsewhere.example"}, 403),
        ({"Host": "[::2]:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "192.0.2.7:8000"}, 403),
    ],
    ids=str,
)
def test_calls_by_other_names_are_refused(models: ModelManager, headers: dict[str, str], status: int) -> None:
    app = application(models, allowed_hosts=frozenset({"localhost", "127.0.0.1", "::1", "shop.example"}))
    assert ask(app, GOOD, headers=headers).status == status
    for page, method in (
        ("/version", "GET"),
        ("/metrics", "GET"),
        ("/invocations", "OPTIONS"),
        ("/openapi.json", "HEAD"),
    ):
        answer = ask(app, b"", page=page, method=method, headers=headers)
        assert (answer.status == 403) == (status == 403)
    if status == 403:
        assert ask(app, GOOD, headers=headers).tree["error_code"] == "PERMISSION_DENIED"
        assert numbers(app)['refusals_total{reason="foreign"}'] == 6
        guarded, token = application(models, token="sesame"), {"Authorization": "Bearer sesame"}
        assert ask(guarded, GOOD, headers=headers).status == 401
        assert ask(guarded, GOOD, headers=headers | token).status == 200, "who knows it may"
    for page in ("/", "/health", "/ping"):
        assert ask(app, b"", page=page, method="GET", headers=headers).status == 200, "which hold nothing"


def test_a_reload_says_that_it_is_json(models: ModelManager) -> None:
    reloads = list[int]()

    async def reload() -> None:
        reloads.append(1)

    app = Application(models, reload=reload)
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = ask(app, b"", page="/reload", headers={"Content-Type": kind})
        assert (answer.status, "Content-Type: application/json" in answer.message) == (415, True)
    assert not reloads
    assert ask(app, b"", page="/reload").status == 200
    assert reloads == [1]


# Other pages


def test_pages(app: Application, models: ModelManager, small: SmallModel) -> None:
    served = models.current
    for page in ("/health", "/ping"):
        assert ask(app, b"", page=page, method="GET").status == 200
        assert ask(app, b"", page=page, method="HEAD").status == 200
    version = ask(app, b"", page="/version", method="GET").tree
    assert version["model"] == "small"
    assert version["version"] == "7"
    assert version["run_id"] == "a_run"
    assert version["artifact"] == artifact_version(small.folder)
    assert ask(app, GOOD).tree["predictions"][0]["model"] == {"name": "small", "version": version["artifact"]}
    assert version["tables_as_of"] == served.ranker.info.tables_as_of
    assert ask(app, b"", page="/model", method="GET").tree["tables_as_of"] == version["tables_as_of"]
    assert version["mmoe_rec"]
    for page, method in (("/no", "GET"), ("/version/", "GET"), ("/invocations/", "POST")):
        answer = ask(app, GOOD, page=page, method=method, headers={"Host": "elsewhere"})
        assert (answer.status, "location" in answer.headers) == (404, False), "no page sends elsewhere"
        assert answer.message.startswith("this path doesn't exist")
    assert ask(app, b"", page="/invocations", method="GET").status == 405


def test_the_schema_has_the_models_own_example_and_columns(app: Application) -> None:
    tree = ask(app, b"", page="/openapi.json", method="GET").tree
    operation = tree["paths"]["/invocations"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert ask(app, content["example"]).status == 200
    validator = jsonschema.Draft202012Validator(content["schema"])
    assert validator.is_valid(content["example"])
    assert not validator.is_valid({"inputs": [element(no_key=1)]})
    parts = content["schema"]["properties"]["inputs"]["items"]["properties"]
    assert parts["user"]["properties"]["user"] == {"description": "int64"}
    assert {"item", "brand", "item_click_rate"} <= set(parts["candidates"]["properties"])
    assert [parameter["name"] for parameter in operation["parameters"]] == ["partial"]
    assert "/events" not in tree["paths"]
    assert {"/metrics", "/version", "/health"} < tree["paths"].keys()


def test_any_value_in_any_place_is_answered_or_refused(models: ModelManager) -> None:
    app = application(models)
    requests = []
    for part in REQUEST_KEYS.values():
        for name in ("user", "clicked", "liked_items", "born", "item", "brand", "price", "tags", "item_click_rate"):
            for value in PROBES:
                request = {"user": {"user": USER}, "candidates": {"item": [1, 2]}}
                request.setdefault(part, {})[name] = [value, value] if part == "candidates" else value
                requests.append(request)
    requests += [{**element(), option: value} for option in REQUEST_OPTIONS for value in PROBES]
    answers = []
    for start in range(0, len(requests), 200):
        reply = ask(app, {"inputs": requests[start : start + 200]}, page="/invocations?partial=true")
        assert reply.status == 200
        answers += reply.tree["predictions"]
    assert 50 < sum("error" not in answer for answer in answers) < len(answers) / 2


def test_a_token_is_asked_for(models: ModelManager) -> None:
    app = application(models, token="secret")
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


# Calls that wait share a pass, and no caller notices: neither in the numbers, nor in another one's errors


POISON = 666


class Watched:
    """A ranker that notes how many requests each pass has, fails for a poisoned user, and waits where it is told to."""

    def __init__(self, ranker: Any) -> None:
        self.ranker, self.passes = ranker, list[int]()
        self.go_on = threading.Event()
        self.go_on.set()

    def rank_many(self, requests: Sequence[Any]) -> Any:
        self.passes.append(len(requests))
        assert self.go_on.wait(600)
        for request in requests:
            if getattr(request, "user", {}).get("user") == POISON:
                raise RuntimeError("poisoned\nbadly")
            if getattr(request, "user", {}).get("user") == POISON + 1:
                raise LookupError("/a/path")
        return self.ranker.rank_many(requests)


def watched(models: ModelManager, **limits: Any) -> tuple[Application, Watched]:
    """An application around a watched ranker."""
    ranker = Watched(models.current.ranker)
    app = application(models, **limits)
    app.models.current = replace(models.current, ranker=ranker)  # type: ignore[arg-type]
    return app, ranker


def ask_while_busy(app: Application, ranker: Watched, bodies: Sequence[Any]) -> list[Answer]:
    """The answers to calls that wait for a first one to end, unless they are refused; it comes first in the list."""

    async def together() -> list[Answer]:
        ranker.go_on.clear()
        first = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await until(lambda: bool(ranker.passes))
        rest = [asyncio.create_task(reply(app, body)) for body in bodies]
        await until(lambda: app.invocations.limiter.active + sum(item.done() for item in rest) == 1 + len(bodies))
        ranker.go_on.set()
        return list(await asyncio.gather(first, *rest))

    return asyncio.run(together())


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that other tasks or threads do."""
    while not condition():
        await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0)  # what was let in comes to wait


def values(answer: Answer) -> list[Any]:
    """All numbers of a reply."""
    return [
        [prediction["candidates"], prediction["order"], prediction["scores"], *prediction["predictions"].values()]
        for prediction in answer.tree["predictions"]
    ]


def test_waiting_calls_share_a_pass_and_get_their_own_replies(models: ModelManager) -> None:
    random = np.random.default_rng(5)
    bodies: list[dict[str, Any]] = []
    for number in range(7):
        elements = []
        for _ in range(random.integers(1, 4)):
            items = random.choice([*ITEMS, 17], int(random.integers(1, 9))).tolist()
            elements.append(element(user={"user": int(random.integers(1, 9))}, candidates={"item": items}))
        # One would be taken for the other if params were shared: True equals 1.
        params = [{}, {"top_k": 1}, {"top_k": True}, {"task_weights": {"liked": 2}, "mask_experts": [1]}][number % 4]
        bodies.append({"inputs": elements, "params": params})
    app, ranker = watched(models)
    _, *together = ask_while_busy(app, ranker, bodies)
    wrong = [body["params"].get("top_k") is True for body in bodies]
    assert ranker.passes == [1, sum(len(body["inputs"]) for body, bad in zip(bodies, wrong, strict=True) if not bad)]
    for body, answer in zip(bodies, together, strict=True):
        alone = ask(app, body)
        assert answer.status == alone.status == (400 if body["params"].get("top_k") is True else 200)
        if alone.status == 400:
            assert answer.tree == alone.tree
            continue
        for actual, expected in zip(values(answer), values(alone), strict=True):
            assert actual[:2] == expected[:2]
            for first_one_value, right in zip(actual[2:], expected[2:], strict=True):
                np.testing.assert_allclose(first_one_value, right, atol=1e-6)


def test_a_call_that_fails_leaves_the_others_alone(models: ModelManager) -> None:
    app, ranker = watched(models)
    good, wrong, failing = element(), element(user={}), element(user={"user": POISON})
    bodies = [{"inputs": [item]} for item in (good, wrong, failing, good, element(user={"user": POISON + 1}))]
    _, *answers = ask_while_busy(app, ranker, bodies)
    assert [answer.status for answer in answers] == [200, 400, 500, 200, 500]
    assert answers[0].tree == answers[3].tree == ask(app, bodies[0]).tree
    assert answers[2].tree == {"error_code": "INTERNAL_ERROR", "message": "poisoned badly"}
    assert "/a/path" not in answers[4].message, "an error of another kind may hold anything"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", range(3))
def test_what_is_no_number_is_never_replied(
    models: ModelManager, monkeypatch: pytest.MonkeyPatch, number: float, task: int
) -> None:
    """orjson would write null. A logit of infinity is the probability 1, which is a number."""
    model = models.current.ranker.model
    computes = type(model).forward_inputs

    def fails(*given: Any, **options: Any) -> Any:
        outputs = computes(model, *given, **options)
        outputs.logits[0, task] = number
        return outputs

    monkeypatch.setattr(models.current.ranker.scorer, "fused", None)
    monkeypatch.setattr(model, "forward_inputs", fails)
    answer = ask(application(models), {"inputs": [element()], "params": {"explain": True}})
    if number == math.inf and models.current.ranker.info.tasks[task].kind == "binary":
        assert answer.status == 200
        (ranking,) = answer.tree["predictions"]
        explained = [explanation["uncalibrated"].values() for explanation in ranking["explanations"]]
        actual = chain(ranking["scores"], *ranking["predictions"].values(), *explained)
        assert all(isinstance(item, float) for item in actual)
    else:
        assert (answer.status, "not finite numbers" in answer.message) == (500, True)


def test_a_pass_takes_no_more_than_is_worth_waiting_for(models: ModelManager) -> None:
    app, ranker = watched(models)
    count = 50
    elements = [element(candidates={"item": list(range(count))})] * 40
    bodies = [{"inputs": elements}] * 3
    assert all(item.status == 200 for item in ask_while_busy(app, ranker, bodies))
    assert 2 * count * 40 <= MAX_BATCH_CANDIDATES < 3 * count * 40
    assert ranker.passes == [1, 80, 40]


def test_a_call_without_an_answer_in_time_and_those_behind_it(models: ModelManager) -> None:
    app, ranker = watched(models, call_timeout_seconds=0.05)

    async def scenario() -> list[Answer]:
        ranker.go_on.clear()
        answers = await asyncio.gather(*(reply(app, {"inputs": [element()]}) for _ in range(3)))
        ranker.go_on.set()
        await until(lambda: not app.invocations.queue.is_busy)
        return list(answers)

    for answer in asyncio.run(scenario()):
        assert (answer.status, "no answer within 0.05 seconds" in answer.message) == (504, True)
    assert ranker.passes == [1], "what nobody waits for is not ranked"
    assert ask(application(app.models), {"inputs": [element()]}).status == 200


def test_health_is_answered_while_a_pass_is_under_way_until_it_is_stuck(
    models: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, ranker = watched(models)

    async def scenario() -> list[int]:
        ranker.go_on.clear()
        task = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await until(lambda: bool(ranker.passes))
        actual = [(await reply(app, b"", "/health", "GET")).status]
        monkeypatch.setattr(app.invocations.queue, "_busy_since", -1e9)
        actual.append((await reply(app, b"", "/health", "GET")).status)
        ranker.go_on.set()
        return [*actual, (await task).status]

    assert asyncio.run(scenario()) == [200, 503, 200]


def test_the_numbers_of_metrics(models: ModelManager) -> None:
    app, ranker = watched(models, max_elements=2, max_body_mib=1)
    ask_while_busy(app, ranker, [{"inputs": [element()]}] * 2)
    late = element(mask_experts=[0, 1, 2], context={"time": "2030-01-01"})
    warnings = ask(app, {"inputs": [late, element()]}).tree["predictions"][0]["warnings"]
    assert len(warnings) == 4, "three of them about experts"
    ask(app, b"no json")
    ask(app, {"inputs": [element(user={})]})
    ask(app, {"inputs": [element(user={"user": POISON})]})
    ask(app, b" " * (2**20 + 1))
    actual = numbers(app)
    assert [actual[f'replies_total{{status="{name}"}}'] for name in ("200", "400", "413", "500")] == [4, 2, 1, 1]
    assert [actual[f'errors_total{{kind="{name}"}}'] for name in ("body", "element", "model")] == [1, 1, 1]
    assert actual['refusals_total{reason="too_large"}'] == 1
    assert actual["elements_total"] == 7
    assert actual["candidates_total"] == 7 * len(ITEMS)
    assert actual["calls"] == actual["waiting"] == 0
    assert (actual["calls_per_batch_count"], actual["calls_per_batch_sum"]) == (5, 6)
    assert actual['stage_seconds_count{stage="read"}'] == 8, "one of them by its length"
    assert actual['stage_seconds_count{stage="score"}'] == 5
    assert actual['stage_seconds_count{stage="write"}'] == 5


def test_unknown_ids_are_counted_in_what_is_ranked(models: ModelManager) -> None:
    app, ranker = watched(models)
    known = set(models.current.ranker.reader.candidates.table["item"].to_pylist())
    assert [item in known for item in ITEMS] == [True] * 4 + [False]
    assert 77 not in models.current.ranker.reader.users.table["user"].to_pylist()
    stranger, wrong = element(user={"user": 77}, top_k=1), element(user={})
    two = element(candidates={"item": [98, 99, 98, ITEMS[0]], "brand": ["a", "b", None, "a"]})
    bodies = [{"inputs": [element(), stranger]}, {"inputs": [two]}, {"inputs": [two, wrong]}]
    _, *answers = ask_while_busy(app, ranker, bodies)
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert ask(app, {"inputs": [wrong, stranger]}, page="/invocations?partial=true").status == 200
    actual = numbers(app)
    assert actual['unknown_ids_total{role="user"}'] == 2
    assert actual['unknown_ids_total{role="candidate"}'] == 1 + (1 + 1) + 3 + 3 + 1
    assert "unknown_ids" not in answers[0].tree["predictions"][0]
