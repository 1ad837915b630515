"""Calls that wait share a pass, and no caller notices: neither in the numbers, nor in another one's errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.ranking_queue import JOINT_CANDIDATES
from tests.inference.small_model import ITEMS
from tests.server.asking import Answer, ask, element, reply

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
        for each in requests:
            if getattr(each, "user", {}).get("user") == POISON:
                raise RuntimeError("poisoned\nbadly")
            if getattr(each, "user", {}).get("user") == POISON + 1:
                raise LookupError("/a/path")
        return self.ranker.rank_many(requests)


def watched(models: Models, **limits: Any) -> tuple[Application, Watched]:
    """An application around a watched ranker."""
    served = models.current
    assert served is not None
    ranker = Watched(served.ranker)
    own = Models(Limits(**limits))
    own.current = replace(served, ranker=ranker)  # type: ignore[arg-type]
    return Application(own, Limits(**limits)), ranker


def ask_while_busy(app: Application, ranker: Watched, bodies: Sequence[Any]) -> list[Answer]:
    """The answers to calls that all wait for a first one to end, which comes first in the list."""

    async def together() -> list[Answer]:
        ranker.go_on.clear()
        first = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await until(lambda: bool(ranker.passes))
        rest = [asyncio.create_task(reply(app, body)) for body in bodies]
        await until(lambda: app.calls.places.taken == 1 + len(bodies))
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
        [each["candidates"], each["order"], each["scores"], *each["predictions"].values()]
        for each in answer.tree["predictions"]
    ]


def test_waiting_calls_share_a_pass_and_get_their_own_replies(models: Models) -> None:
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
    assert ranker.passes == [1, sum(len(body["inputs"]) for body in bodies)]
    for body, answer in zip(bodies, together, strict=True):
        alone = ask(app, body)
        assert answer.status == alone.status == (400 if body["params"].get("top_k") is True else 200)
        if alone.status == 400:
            assert answer.tree == alone.tree
            continue
        for found, expected in zip(values(answer), values(alone), strict=True):
            assert found[:2] == expected[:2]
            for one, other in zip(found[2:], expected[2:], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_call_that_fails_leaves_the_others_alone(models: Models) -> None:
    app, ranker = watched(models)
    good, wrong, failing = element(), element(user={}), element(user={"user": POISON})
    bodies = [{"inputs": [each]} for each in (good, wrong, failing, good, element(user={"user": POISON + 1}))]
    _, *answers = ask_while_busy(app, ranker, bodies)
    assert [each.status for each in answers] == [200, 400, 500, 200, 500]
    assert answers[0].tree == answers[3].tree == ask(app, bodies[0]).tree
    assert answers[2].tree == {"error_code": "INTERNAL_ERROR", "message": "poisoned badly"}
    assert "/a/path" not in answers[4].message, "an error of another kind may hold anything"


def test_a_pass_takes_no_more_than_is_worth_waiting_for(models: Models) -> None:
    app, ranker = watched(models)
    count = 50
    elements = [element(candidates={"item": list(range(count))})] * 40
    bodies = [{"inputs": elements}] * 3
    assert all(each.status == 200 for each in ask_while_busy(app, ranker, bodies))
    assert 2 * count * 40 <= JOINT_CANDIDATES < 3 * count * 40
    assert ranker.passes == [1, 80, 40]


def test_a_call_without_an_answer_in_time_and_those_behind_it(models: Models) -> None:
    app, ranker = watched(models, answer_seconds=0.05)

    async def scenario() -> list[Answer]:
        ranker.go_on.clear()
        answers = await asyncio.gather(*(reply(app, {"inputs": [element()]}) for _ in range(3)))
        ranker.go_on.set()
        await until(lambda: not app.calls.queue.is_busy)
        return list(answers)

    for answer in asyncio.run(scenario()):
        assert (answer.status, "no answer within 0.05 seconds" in answer.message) == (504, True)
    assert ranker.passes == [1], "what nobody waits for is not ranked"
    assert ask(Application(app.models, Limits()), {"inputs": [element()]}).status == 200


def test_health_is_answered_while_a_pass_is_under_way_until_it_is_stuck(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, ranker = watched(models)

    async def scenario() -> list[int]:
        ranker.go_on.clear()
        task = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await until(lambda: bool(ranker.passes))
        found = [(await reply(app, b"", "/health", "GET")).status]
        monkeypatch.setattr(app.calls.queue, "_busy_since", -1e9)
        found.append((await reply(app, b"", "/health", "GET")).status)
        ranker.go_on.set()
        return [*found, (await task).status]

    assert asyncio.run(scenario()) == [200, 503, 200]


def numbers(app: Application) -> dict[str, float]:
    """What the page of metrics says."""
    lines = ask(app, b"", page="/metrics", method="GET").body.decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("mmoe_rec_"): float(value) for name, value in pairs}


def test_the_numbers_of_metrics(models: Models) -> None:
    app, ranker = watched(models, max_elements=2, max_body_mib=1)
    ask_while_busy(app, ranker, [{"inputs": [element()]}] * 2)
    late = element(mask_experts=[0, 1, 2], context={"time": "2030-01-01"})
    warnings = ask(app, {"inputs": [late, element()]}).tree["predictions"][0]["warnings"]
    assert len(warnings) == 4, "of which one is about no expert"
    ask(app, b"no json")
    ask(app, {"inputs": [element(user={})]})
    ask(app, {"inputs": [element(user={"user": POISON})]})
    ask(app, b"", headers={"Content-Length": str(2**30)})
    found = numbers(app)
    assert [found[f'replies_total{{status="{name}"}}'] for name in ("200", "400", "413", "500")] == [4, 2, 1, 1]
    assert [found[f'errors_total{{kind="{name}"}}'] for name in ("body", "element", "model")] == [1, 1, 1]
    assert found['refusals_total{reason="too_large"}'] == 1
    assert found["elements_total"] == 7
    assert found["candidates_total"] == 7 * len(ITEMS)
    assert found["expert_warnings_total"] == 3
    assert found["calls"] == found["waiting"] == 0
    assert (found["calls_per_pass_count"], found["calls_per_pass_sum"]) == (5, 6)
    assert found['stage_seconds_count{stage="read"}'] == 8, "one of them by its length"
    assert found['stage_seconds_count{stage="score"}'] == 5
    assert found['stage_seconds_count{stage="write"}'] == 5


def test_unknown_ids_are_counted_in_what_is_ranked(models: Models) -> None:
    app, ranker = watched(models)
    assert models.current is not None
    known = set(models.current.ranker.reader.candidates.table["item"].to_pylist())
    assert [item in known for item in ITEMS] == [True] * 4 + [False]
    assert 77 not in models.current.ranker.reader.users.table["user"].to_pylist()
    stranger, wrong = element(user={"user": 77}, top_k=1), element(user={})
    two = element(candidates={"item": [98, 99, 98, ITEMS[0]], "brand": ["a", "b", None, "a"]})
    bodies = [{"inputs": [element(), stranger]}, {"inputs": [two]}, {"inputs": [two, wrong]}]
    _, *answers = ask_while_busy(app, ranker, bodies)
    assert [each.status for each in answers] == [200, 200, 400]
    assert ask(app, {"inputs": [wrong, stranger]}, page="/invocations?partial=true").status == 200
    found = numbers(app)
    assert found['unknown_ids_total{role="user"}'] == 2
    assert found['unknown_ids_total{role="candidate"}'] == 1 + (1 + 1) + 3 + 3 + 1
    assert "unknown_ids" not in answers[0].tree["predictions"][0]
