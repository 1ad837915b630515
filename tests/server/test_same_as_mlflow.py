"""The same requests to this server's application and to the MLflow model in process give the same replies."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.inference.mlflow_model import ARTIFACT_KEY, RankingPythonModel
from mmoe_rec.inference.request_reader import REQUEST_KEYS, group_rows_by_request
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from tests.inference.small_model import ITEMS, SmallModel, as_request
from tests.log.small_logs import random_log, with_requests
from tests.server.asking import ask, element

NAMES = ("brand", "price", "tags")
PARAMS: list[Any] = [None, {}, {"top_k": 2}, {"task_weights": {"click": 2}, "mask_experts": [0]}]


@pytest.fixture(scope="module")
def mlflow_model(small: SmallModel) -> RankingPythonModel:
    model = RankingPythonModel()
    model.load_context(SimpleNamespace(artifacts={ARTIFACT_KEY: str(small.folder)}))
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
    for turn in range(12):
        elements = [random_element(random, small) for _ in range(random.integers(1, 4))]
        params = PARAMS[turn % 4]
        actual, expected = both(app, mlflow_model, elements, params)
        assert actual == expected
        assert actual[0] == 200


def test_the_example_in_the_artifact_is_taken_as_it_is(
    app: Application, mlflow_model: RankingPythonModel, small: SmallModel
) -> None:
    body = (small.folder / "example_request.json").read_bytes()
    answer = ask(app, body)
    assert answer.status == 200
    assert answer.tree == {"predictions": mlflow_model.predict(None, json.loads(body))}
    with pytest.raises(MlflowException, match=r"predict: 'params' is not allowed next to 'inputs'\. Pass the arg"):
        mlflow_model.predict(None, {**json.loads(body), "params": {"top_k": 1}})


def test_explained_replies(app: Application, mlflow_model: RankingPythonModel, small: SmallModel) -> None:
    made = as_request(small.later_rows(5)[0])
    actual, expected = both(app, mlflow_model, [made, made | {"explain": False}], {"explain": True, "top_k": 3})
    assert actual == expected
    assert actual[0] == 200


@pytest.mark.parametrize(
    ("changes", "params"),
    [
        ({"candidates": {"item": ITEMS, "price": [1]}}, None),
        ({"candidates": {"item": [2**63, 1]}}, None),
        ({"candidates": [{"item": 1}]}, None),
        ({"user": {}}, None),
        ({"context": None}, None),
        ({"usr": {"user": 7}}, None),
        ({"task_weights": {"clik": 1}}, None),
        ({"top_k": "2"}, None),
        ({}, {"top_k": 0}),
        ({}, {"gate_top_k": 9}),
        ({}, {"mask_experts": 7}),
        ({}, {"explain": "yes"}),
        ({}, {"task_weights": [1]}),
    ],
    ids=str,
)
def test_refusals(app: Application, mlflow_model: RankingPythonModel, changes: dict[str, Any], params: Any) -> None:
    for elements in ([element(**changes)], [element(), element(**changes)]):
        actual, expected = both(app, mlflow_model, elements, params)
        assert actual == expected
        assert actual[0] == 400


def as_rows(made: dict[str, Any], ranking: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A request as a table with a row for each candidate, and what a ranking says of each row."""
    rows, actual = [], {}
    for place in range(len(ranking["order"])):
        own = {name: item[place] for name, item in made["candidates"].items()}
        rows.append({**own, **made["user"], **made["context"]})
        rank = ranking["order"].index(place)
        actual[place] = {f"predicted_{name}": item[rank] for name, item in ranking["predictions"].items()} | {
            "score": ranking["scores"][rank],
            "log_score": ranking["log_scores"][rank],
            "rank": rank + 1,
            "warnings": ranking["warnings"],
        }
    return rows, [actual[place] for place in range(len(rows))]


def split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}


def test_a_row_for_each_candidate_gets_what_its_request_gets(
    app: Application, mlflow_model: RankingPythonModel, small: SmallModel
) -> None:
    random = np.random.default_rng(4)
    for _ in range(12):
        made = {name: item for name, item in random_element(random, small).items() if name in REQUEST_KEYS.values()}
        options = {"task_weights": {"engagement": 3}} if random.random() < 0.5 else {}
        (ranking,) = mlflow_model.predict(None, [made], options)
        rows, expected = as_rows(made, ranking)
        for form in ({"dataframe_records": rows}, {"dataframe_split": split(rows)}):
            assert ask(app, {**form, "params": options}).tree == {"predictions": expected}
        frame = pd.DataFrame(rows, index=range(7, 7 + len(rows)))
        actual = mlflow_model.predict(None, frame, options)
        assert actual.to_dict("records") == expected
        assert actual.index.equals(frame.index)
    assert mlflow_model.predict(None, pd.DataFrame([made]), options) == [ranking], (
        "a request in a row, as Spark sends it"
    )


OF_USER = "column 'user' describes the user of a request, but differs between rows"


@pytest.mark.parametrize(
    ("rows", "params", "sentence"),
    [
        ([{"user": 5, "item": 3}, {"user": 6, "item": 4}], {}, f"{OF_USER} 0 and 1"),
        ([{"user": 5, "item": 3, "slot": 1}], {}, "column 'slot' describes placement, which is absent in serving: "),
        ([{"user": 5, "iten": 3}], {}, "the data frame has an unknown column 'iten'; did you mean 'item'?"),
        ([{"user": 5, "item": True}], {}, "column 'item' must hold integers, as in the log; found true/false"),
        ([{"user": 5}], {}, "'candidates' needs a column 'item' with the candidates' ids"),
        ([{"user": 5, "item": 3}], {"top_k": 2}, "top_k is not for data frames, which get one predict"),
    ],
)
def test_a_wrong_data_frame(
    app: Application, mlflow_model: RankingPythonModel, rows: list[Any], params: dict[str, Any], sentence: str
) -> None:
    for form in ({"dataframe_records": rows}, {"dataframe_split": split(rows)}):
        answer = ask(app, {**form, "params": params})
        assert (answer.status, answer.message[: len(sentence)]) == (400, sentence)
    with pytest.raises(MlflowException) as refused:
        mlflow_model.predict(None, pd.DataFrame(rows), params)
    assert refused.value.sentence == answer.message


def test_requests_of_a_data_frame_are_named_by_their_ids(tmp_path: Path) -> None:
    columns = {"user": "user", "candidate": "item", "time": "time", "request": "request"}
    small = SmallModel(tmp_path, columns=columns, log=[with_requests(random_log(1, rows=600))])
    app, model = (
        Application(ModelManager(ServerOptions(), ResolvedModel(small.folder, "small", None))),
        RankingPythonModel(),
    )
    model.load_context(SimpleNamespace(artifacts={ARTIFACT_KEY: str(small.folder)}))
    user, time = {"user": -7}, "2023-11-29T10:00:00"
    elements = [
        element(context={"time": time, "request": 31}),
        element(user=user, context={"time": time, "request": 30}),
    ]
    tables = [as_rows(*item) for item in zip(elements, model.predict(None, elements), strict=True)]
    rows, expected = ([item for pair in zip(*part, strict=True) for item in pair] for part in zip(*tables, strict=True))
    for form in ({"dataframe_records": rows}, {"dataframe_split": split(rows)}):
        assert ask(app, form).tree == {"predictions": expected}
    assert model.predict(None, pd.DataFrame(rows)).to_dict("records") == expected
    wrong = [*rows[:3], rows[3] | {"user": 6}]
    says = f"{OF_USER} 1 and 3"
    answer = ask(app, {"dataframe_records": wrong})
    assert answer.message == f"the request of row 1: {says}"
    partial = ask(app, {"dataframe_records": wrong}, page="/invocations?partial=true").tree["predictions"]
    assert [item.get("error") for item in partial] == [None, says, None, says]
    null = {"dataframe_records": [*rows[:2], rows[2] | {"request": None}]}
    assert ask(app, null).message == "column 'request' is null in row 2: give each row the id of its request"
    without = [{name: item for name, item in row.items() if name != "request"} for row in rows]
    assert "give each request a unique id in 'request'" in ask(app, {"dataframe_split": split(without)}).message


def test_a_call_without_elements(app: Application, mlflow_model: RankingPythonModel) -> None:
    for form in ({"inputs": []}, {"dataframe_records": []}, {"dataframe_split": {"columns": ["item"], "data": []}}):
        assert ask(app, form).tree == {"predictions": []}
    assert mlflow_model.predict(None, []) == []


def test_values_of_a_data_frame_are_made_only_where_its_names_and_number_are_right(
    app: Application, mlflow_model: RankingPythonModel
) -> None:
    columns = (pytest.fail("as many values as names times rows") for _ in "ab")
    with pytest.raises(RequestError, match="unknown column 'a'"):
        group_rows_by_request(mlflow_model.ranker.reader, ["a", "b"], columns, {})
    says = "the call has 121 candidates in all; this server takes at most 120"
    assert ask(app, {"dataframe_records": [{"no_column": 1}] * 121}).message.startswith(says)
