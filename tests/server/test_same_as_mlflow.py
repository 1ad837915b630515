"""The same requests to this server's application and to the MLflow model in process give the same replies."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from mmoe_rec.inference.mlflow_model import ARTIFACT, RankingPythonModel
from mmoe_rec.server.app import Application
from tests.inference.small_model import CONTEXT, ITEMS, SmallModel, as_request
from tests.server.asking import ask, element

NAMES = ("brand", "price", "tags")


@pytest.fixture(scope="module")
def mlflow_model(small: SmallModel) -> RankingPythonModel:
    model = RankingPythonModel()
    model.load_context(SimpleNamespace(artifacts={ARTIFACT: str(small.folder)}))
    return model


def both(app: Application, model: RankingPythonModel, elements: list[Any], params: Any = None) -> tuple[Any, Any]:
    """Status and body of the reply of either."""
    answer = ask(app, {"inputs": elements} | ({} if params is None else {"params": params}))
    try:
        expected = 200, {"predictions": model.predict(None, elements, params)}
    except MlflowException as error:
        expected = 400, json.loads(error.serialize_as_json())
    return (answer.status, answer.tree), expected


def random_element(random: np.random.Generator, small: SmallModel) -> dict[str, Any]:
    """A request with some attributes left out and some options given."""
    made = as_request(small.later_rows(int(random.integers(1, 20)))[0])
    for name in NAMES:
        if random.random() < 0.4:
            del made["candidates"][name]
    if random.random() < 0.3:
        made["context"] = {"time": made["context"]["time"]}
    options: dict[str, Any] = {"top_k": 3, "gate_top_k": 1, "mask_experts": [1], "task_weights": {"engagement": 2}}
    return made | {name: value for name, value in options.items() if random.random() < 0.3}


def test_replies_to_good_requests(app: Application, mlflow_model: RankingPythonModel, small: SmallModel) -> None:
    random = np.random.default_rng(3)
    for _ in range(12):
        elements = [random_element(random, small) for _ in range(random.integers(1, 4))]
        params = [None, {}, {"top_k": 2}, {"task_weights": {"click": 2}, "mask_experts": [0]}][random.integers(4)]
        found, expected = both(app, mlflow_model, elements, params)
        assert found == expected
        assert found[0] == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": {"item": ITEMS, "prise": [1] * 5}},
        {"candidates": {"item": ITEMS, "price": [1]}},
        {"candidates": {"item": ["1", "2"]}},
        {"candidates": {"item": []}},
        {"candidates": {"item": list(range(51))}},
        {"candidates": {"item": [2**70, 1]}},
        {"candidates": {"item": [2**63, 1]}},
        {"candidates": {"item": ITEMS, "slot": [1] * 5}},
        {"candidates": [{"item": 1}]},
        {"candidates": {"item": 1}},
        {"candidates": {"item": ITEMS, "tags": [[[1]]] * 5}},
        {"user": 7},
        {"user": {}},
        {"context": None},
        {"context": {"time": 10**30}},
        {"context": {"time": 1.5}},
        {"usr": {"user": 7}},
        {"task_weights": {"clik": 1}},
        {"task_weights": {"click": 10**25}},
        {"task_weights": 3},
        {"top_k": "2"},
        {"top_k": 0},
        {"top_k": 2**65},
        {"gate_top_k": 4},
        {"mask_experts": [3]},
        {"mask_experts": 1},
        {"explain": 1},
        {"explain": "yes"},
    ],
    ids=str,
)
def test_refusals(app: Application, mlflow_model: RankingPythonModel, changes: dict[str, Any]) -> None:
    for elements in ([element(**changes)], [element(), element(**changes)]):
        found, expected = both(app, mlflow_model, elements)
        assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 0},
        {"top_k": "2"},
        {"top_k": True},
        {"gate_top_k": 9},
        {"mask_experts": [7]},
        {"mask_experts": 7},
        {"explain": "yes"},
        {"explain": 1},
        {"task_weights": {"clik": 1}},
        {"task_weights": {"click": -1}},
        {"task_weights": [1]},
    ],
    ids=str,
)
def test_refused_params(app: Application, mlflow_model: RankingPythonModel, params: dict[str, Any]) -> None:
    found, expected = both(app, mlflow_model, [element()], params)
    assert found == expected
    assert found[0] == 400
    assert next(iter(params)) in found[1]["message"]


def test_an_elements_own_option_wins(app: Application, mlflow_model: RankingPythonModel) -> None:
    found, expected = both(app, mlflow_model, [element(top_k=1), element()], {"top_k": 3})
    assert found == expected
    assert [len(each["order"]) for each in found[1]["predictions"]] == [1, 3]


def test_explained_replies(app: Application, mlflow_model: RankingPythonModel, small: SmallModel) -> None:
    made = as_request(small.later_rows(5)[0])
    found, expected = both(app, mlflow_model, [made, made | {"explain": False}], {"explain": True, "top_k": 3})
    assert found == expected
    first, second = found[1]["predictions"]
    assert len(first["explanations"]) == 3
    assert "explanations" not in second


@pytest.mark.parametrize("days", [-30, 30])
def test_replies_that_warn(app: Application, mlflow_model: RankingPythonModel, days: int) -> None:
    moment = datetime.fromisoformat(CONTEXT["time"]) + timedelta(days=days)
    found, expected = both(app, mlflow_model, [element(context={"time": moment.isoformat()})])
    assert found == expected
    assert len(found[1]["predictions"][0]["warnings"]) == 1


def test_a_call_without_elements(app: Application, mlflow_model: RankingPythonModel) -> None:
    assert ask(app, {"inputs": []}).tree == {"predictions": []}
