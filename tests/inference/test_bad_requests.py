"""Each malformed request is answered by one sentence that names what the caller has to change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.ranker import Ranker
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel

NAN, INFINITY = float("nan"), float("inf")


def rank(ranker: Ranker, changes: dict[str, Any]) -> None:
    """Ranks a good request after merging `changes` into its parts."""
    request: dict[str, Any] = {"user": {"user": USER}, "context": dict(CONTEXT), "candidates": {"item": ITEMS}}
    for part, values in changes.items():
        request[part] = {**request[part], **values} if part in request and isinstance(values, dict) else values
    ranker.rank(**request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": {"brnad": ["a"] * 5}}, "'candidates' has an unknown column 'brnad'; did you mean 'brand'?"),
        ({"user": {"zzz": 1}}, "'user' has an unknown column 'zzz'; valid are user, clicked, liked_items"),
        ({"context": {"click": 1}}, "unknown column 'click'"),
        ({"candidates": {"slot": [1] * 5}}, "'slot' describes placement, which is absent in serving"),
        ({"context": {"slot": 1}}, "'slot' describes placement"),
        ({"user": {"brand": "a"}}, "'brand' describes the candidate: give it in 'candidates', not in 'user'"),
        ({"candidates": {"age": [1] * 5}}, "'age' describes the user: give it in 'user'"),
        ({"user": {"item_click_rate": 0.1}}, "'item_click_rate' describes the candidate"),
        ({"candidates": {"price": [1.0, 2.0]}}, "'item' has 5 values, 'price' has 2"),
        ({"candidates": {"price": 1.0}}, "'price' in 'candidates' must be a list"),
        ({"candidates": {"item": "abc"}}, "'item' in 'candidates' must be a list"),
        ({"candidates": {"item": []}}, "'candidates' is empty"),
        ({"candidates": {"item": [1] * 51}}, "has 51 candidates; this model takes at most 50"),
        ({"candidates": {"item": [1, None, 3, 4, 5]}}, "'item' in 'candidates' holds null"),
        ({"candidates": {"item": [1, "2", 3, 4, 5]}}, "'item' must hold integers.*; found integers and strings"),
        ({"candidates": {"item": list("12345")}}, "'item' must hold integers, as in the log; found strings: give 12"),
        ({"candidates": {"item": [1.0, 2, 3, 4, 5]}}, "found numbers with a fraction and integers"),
        ({"candidates": {"item": [2**63, 2, 3, 4, 5]}}, "9223372036854775808, which does not fit into 64 bits"),
        ({"candidates": {"item": [-(2**70), 2, 3, 4, 5]}}, "does not fit into 64 bits"),
        ({"candidates": {"brand": [1] * 5}}, "'brand' must hold strings, as in the log; found integers: give \"12\""),
        ({"candidates": {"brand": ["\ud800"] * 5}}, "not valid Unicode"),
        ({"candidates": {"price": ["1"] * 5}}, "'price' must hold numbers; found strings"),
        ({"candidates": {"price": [NAN] * 5}}, "'price' holds NaN or infinity"),
        ({"candidates": {"price": [INFINITY, 1, 1, 1, 1]}}, "'price' holds NaN or infinity"),
        ({"candidates": {"price": [{}] * 5}}, "'price' must hold numbers; found objects"),
        ({"candidates": {"tags": ["x"] * 5}}, "'tags' must hold lists of strings.*; found strings"),
        ({"candidates": {"tags": [[1]] * 5}}, "'tags' must hold lists of strings.*; found lists of integers"),
        ({"candidates": {"item_click_rate": ["a"] * 5}}, "'item_click_rate' must hold numbers"),
        ({"user": {"clicked": 7}}, "'clicked' must hold lists of integers.*; found integers"),
        ({"user": {"clicked": ["7"]}}, "'clicked' must hold lists of integers.*; found lists of strings"),
        ({"user": {"user": None}}, "'user' needs a column 'user'"),
        ({"user": {"user": "5"}}, "'user' must hold integers, as in the log; found strings"),
        ({"user": {"user": [5]}}, "'user' must hold integers, as in the log; found lists of integers"),
        ({"context": {"time": "yesterday"}}, "'time' holds 'yesterday', which is not an ISO 8601 time"),
        ({"context": {"time": 1.5}}, "'time' must hold times"),
        ({"user": {"user": True}}, "'user' holds true or false, which is no id"),
        ({"candidates": {"item": [1, True]}}, "'item' holds true or false, which is no id"),
        ({"context": {"time": True}}, "'time' must hold times"),
        ({"context": {"time": "2201-01-01"}}, "outside the years 1700 to 2200"),
        ({"context": {"time": 1_701_255_600}}, "'time' holds the integer 1701255600, whose unit is not known"),
        ({"context": {"born": "0001-01-01"}}, "outside the years"),
        ({"user": 5}, "'user' must be an object"),
        ({"task_weights": {"clicks": 1}}, "names 'clicks', which is no task or objective; did you mean 'click'?"),
        ({"task_weights": {"click": -1}}, "weight of 'click' must lie between 0 and"),
        ({"task_weights": {"click": NAN}}, "weight of 'click' must lie between 0 and"),
        ({"task_weights": {"click": INFINITY}}, "weight of 'click' must lie between 0 and"),
        ({"task_weights": {"click": "1"}}, "weight of 'click' must be a number"),
        ({"task_weights": {"click": True}}, "weight of 'click' must be a number"),
        ({"task_weights": {"engagement": 0, "satisfaction": 0}}, "leave every task out"),
        ({"task_weights": [1]}, "must be an object"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": True}, "top_k must be an integer"),
        ({"explain": "yes"}, "explain must be true or false"),
        ({"explain": 1}, "explain must be true or false"),
        ({"gate_top_k": 0}, "gate_top_k must be an integer of at least 1, found 0"),
        ({"gate_top_k": True}, "gate_top_k must be an integer"),
        ({"gate_top_k": 1000}, "gate_top_k is 1000, and the model has 3 experts"),
        ({"mask_experts": 1}, "mask_experts must be a list of experts' numbers"),
        ({"mask_experts": ["a"]}, "mask_experts must be a list of experts' numbers"),
        ({"mask_experts": [77]}, "mask_experts names expert 77; the model has 0 to 2"),
        ({"mask_experts": [-1]}, "mask_experts names expert -1"),
    ],
)
def test_sentence(ranker: Ranker, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        rank(ranker, changes)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_ids_are_required(ranker: Ranker) -> None:
    with pytest.raises(RequestError, match="'candidates' needs a column 'item'"):
        ranker.rank({"user": USER}, {}, {"brand": ["a"]})
    with pytest.raises(RequestError, match="'user' needs a column 'user'"):
        ranker.rank({"age": 1}, {}, {"item": ITEMS})


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": {"price": [1, 2**60, -3, 0.5, None]}},
        {"candidates": {"brand": [None] * 5, "tags": [None] * 5, "price": [None] * 5}},
        {"candidates": {"tags": [[], None, [None], ["x"], ["new"]]}},
        {"candidates": {"item": [5] * 5}},
        {"user": {"user": 2**63 - 1, "age": None}},
        {"user": {"clicked": None}},
        {"context": {"time": None, "born": None}},
        {"context": {"time": "2199-12-31T23:59:59.999999Z"}},
        {"context": {"time": "1969-01-01"}},
    ],
)
def test_unusual_but_good(ranker: Ranker, changes: dict[str, Any]) -> None:
    rank(ranker, json.loads(json.dumps(changes)))


def test_columns_that_no_feature_reads_are_ignored(tmp_path: Path) -> None:
    roles = {"user": ["age", "nickname"], "candidate": ["brand", "price", "tags"], "context": ["born"]}
    ranker = Ranker.load(SmallModel(tmp_path, roles={**roles, "placement": ["slot", "row"]}).folder)
    rank(ranker, {"user": {"nickname": "x"}})
    with pytest.raises(RequestError, match="'row' describes placement"):
        rank(ranker, {"context": {"row": 1}})


def test_integer_times_have_the_logs_unit(tmp_path: Path) -> None:
    columns = {"user": "user", "candidate": "item", "time": "time", "time_unit": "s"}
    ranker = Ranker.load(SmallModel(tmp_path, columns=columns).folder)
    for moment in (1_701_255_600, np.int64(1_701_255_600)):
        ranking = ranker.rank({"user": USER}, {"time": moment}, {"item": ITEMS})
        assert ranking.request_time == "2023-11-29T11:00:00+00:00"
