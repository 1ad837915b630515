"""The same requests to this server's application and to the MLflow model in process give the same replies."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from mmoe_rec.inference.mlflow_model import ARTIFACT, RankingPythonModel
from mmoe_rec.server.app import Application
from tests.inference.small_model import ITEMS, SmallModel, as_request
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
    ("changes", "params"),
    [
        ({"candidates": {"item": ITEMS, "price": [1]}}, None),
        ({"candidates": {"item": ["1", "2"]}}, None),
        ({"candidates": {"item": [2**63, 1]}}, None),
        ({"candidates": {"item": ITEMS, "slot": [1] * 5}}, None),
        ({"candidates": [{"item": 1}]}, None),
        ({"user": {}}, None),
        ({"context": None}, None),
        ({"context": {"time": 1.5}}, None),
        ({"usr": {"user": 7}}, None),
        ({"task_weights": {"clik": 1}}, None),
        ({"top_k": "2"}, None),
        ({"mask_experts": [3]}, None),
        ({}, {"top_k": 0}),
        ({}, {"top_k": True}),
        ({}, {"gate_top_k": 9}),
        ({}, {"mask_experts": 7}),
        ({}, {"explain": "yes"}),
        ({}, {"task_weights": [1]}),
    ],
    ids=str,
)
def test_refusals(app: Application, mlflow_model: RankingPythonModel, changes: dict[str, Any], params: Any) -> None:
    for elements in ([element(**changes)], [element(), element(**changes)]):
        found, expected = both(app, mlflow_model, elements, params)
        assert found == expected
        assert found[0] == 400


def test_explained_replies(app: Application, mlflow_model: RankingPythonModel, small: SmallModel) -> None:
    made = as_request(small.later_rows(5)[0])
    found, expected = both(app, mlflow_model, [made, made | {"explain": False}], {"explain": True, "top_k": 3})
    assert found == expected
    first, second = found[1]["predictions"]
    assert len(first["explanations"]) == 3
    assert "explanations" not in second


def test_a_call_without_elements(app: Application) -> None:
    assert ask(app, {"inputs": []}).tree == {"predictions": []}
