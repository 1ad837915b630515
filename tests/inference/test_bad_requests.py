"""Each malformed request is answered by one sentence that names what the caller has to change."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request_reader import read_requests
from mmoe_rec.live.journal_rows import RowValidator
from mmoe_rec.tracking import registry, runs
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request
from tests.log.small_logs import random_log, with_column

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
        ({"candidates": {"slot": [1] * 5}}, "'slot' describes placement, which is absent in serving"),
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
        ({"candidates": {"item": [1.0, 2, 3, 4, 5]}}, "found numbers with a fraction and integers"),
        ({"candidates": {"item": [2**63, 2, 3, 4, 5]}}, "9223372036854775808, which does not fit into 64 bits"),
        ({"candidates": {"brand": [1] * 5}}, "'brand' must hold strings, as in the log; found integers"),
        ({"candidates": {"brand": ["\ud800"] * 5}}, "not valid Unicode"),
        ({"candidates": {"price": [NAN] * 5}}, "'price' holds NaN or infinity"),
        ({"candidates": {"price": [{}] * 5}}, "'price' must hold numbers; found objects"),
        ({"candidates": {"tags": ["x"] * 5}}, "'tags' must hold lists of strings.*; found strings"),
        ({"candidates": {"tags": [[1]] * 5}}, "'tags' must hold lists of strings.*; found lists of integers"),
        ({"user": {"clicked": 7}}, "'clicked' must hold lists of integers.*; found integers"),
        ({"user": {"user": None}}, "'user' needs a column 'user'"),
        ({"user": {"user": "5"}}, "'user' must hold integers, as in the log; found strings"),
        ({"context": {"time": "yesterday"}}, "'time' holds 'yesterday', which is not an ISO 8601 time"),
        ({"context": {"time": 1.5}}, "'time' must hold times"),
        ({"candidates": {"item": [1, True, 3, 4, 5]}}, "'item' must hold integers.*; found integers and true/false"),
        ({"candidates": {"price": [True] * 5}}, "'price' must hold numbers; found true/false"),
        ({"candidates": {"item_click_rate": [False] * 5}}, "'item_click_rate' must hold numbers; found true/false"),
        ({"context": {"time": True}}, "'time' must hold times"),
        ({"context": {"time": "2201-01-01"}}, "outside the years 1700 to 2199"),
        ({"context": {"time": 1_701_255_600}}, "'time' holds the integer 1701255600, but the log has timestamps"),
        ({"user": 5}, "'user' must be an object"),
        ({"task_weights": {"clicks": 1}}, "names 'clicks', which is no task or objective; did you mean 'click'?"),
        ({"task_weights": {"click": -1}}, "weight of 'click' must lie between 0 and"),
        ({"task_weights": {"click": INFINITY}}, "weight of 'click' must lie between 0 and"),
        ({"task_weights": {"click": "1"}}, "weight of 'click' must be a number"),
        ({"task_weights": {"engagement": 0, "satisfaction": 0}}, "leave every task out"),
        ({"task_weights": [1]}, "must be an object"),
        ({"top_k": 0}, "'top_k' must be an integer of at least 1"),
        ({"top_k": 1.5}, "'top_k' must be an integer"),
        ({"explain": "yes"}, "'explain' must be true or false"),
        ({"gate_top_k": 1000}, "gate_top_k is 1000, and the model has 3 experts"),
        ({"mask_experts": 1}, "'mask_experts' must be a list of integers"),
        ({"mask_experts": ["a"]}, "mask_experts must be a list of experts' numbers"),
        ({"mask_experts": [77]}, "mask_experts names expert 77; the model has 0 to 2"),
        # Arrays and times of Python programs.
        ({"candidates": {"price": np.array([1.0, NAN, 3, 4, 5])}}, "'price' holds NaN or infinity. Use null for"),
        ({"candidates": {"price": np.ones((5, 2))}}, "'price' must hold numbers; found lists of numbers with a"),
        ({"candidates": {"price": {1.0, 2.0}}}, "'price' in 'candidates' must be a list with one value per candidate"),
        ({"candidates": {"price": np.ones(4)}}, "'candidates' differ in length: 'item' has 5 values, 'price' has 4"),
        ({"candidates": {"item": pd.Series(ITEMS).astype(str)}}, "'item' must hold integers.*; found strings"),
        ({"candidates": {"item": np.array([2**63] * 5, np.uint64)}}, "'item' holds 9223372036854775808, which does"),
        ({"candidates": {"item": [np.True_] * 5}}, "'item' must hold integers, as in the log; found true/false"),
        ({"candidates": {"price": [1.0, np.True_, 1, 1, 1]}}, "found numbers with a fraction and true/false"),
        ({"candidates": {"price": [np.datetime64(1, "ns")] * 5}}, "'price' must hold numbers; found datetime64"),
        ({"candidates": {"tags": [(True,)] * 5}}, "'tags' must hold lists of strings.*; found lists of true/false"),
        ({"candidates": {"brand": np.array([b"x"] * 5)}}, "'brand' must hold strings, as in the log; found bytes"),
        ({"context": {"time": np.datetime64("2500-01-01")}}, "'time' .*a time outside the years 1700 to 2199"),
        ({"context": {"time": NAN}}, r"'time' must hold times \(ISO 8601 strings or integers\); found NaN or infinity"),
        ({"context": {"time": np.float64(1.5)}}, "'time' must hold times .*; found float64"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_sentence(ranker: Ranker, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        rank(ranker, changes)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_a_logs_own_booleans_are_taken_in_requests_and_events(tmp_path: Path) -> None:
    log = random_log(1, rows=600)
    for name, flags in {"price": pc.greater(log["price"], 1.0), "click": pc.equal(log["click"], 1.0)}.items():
        log = with_column(log, name, flags)
    folder = SmallModel(tmp_path, log=[log.slice(0, 200), log.slice(200)]).folder
    ranker = Ranker.load(folder)
    assert ranked(ranker, price=[True, False, 1, 0, None]) == ranked(ranker, price=[1.0, 0.0, 1.0, 0.0, None])
    with pytest.raises(RequestError, match="'brand' must hold strings, as in the log; found true/false"):
        ranked(ranker, brand=[True] * 5)
    row = {"user": 5, "item": 3, "time": "2023-12-01", "click": True, "liked": None, "spent": 1, "brand": "a"}
    assert RowValidator(ranker.pipeline).read_json(None, [row, row | {"click": 0}])["click"].to_pylist() == [1.0, 0.0]
    with pytest.raises(RequestError, match="'liked' must hold numbers; found true/false"):
        RowValidator(ranker.pipeline).read_json(None, [row | {"liked": True}])


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


# What Python programs have instead of JSON's lists and strings: arrays of candidates, and times


PRICES = [1.5, 2.0, 0.25, 8.0, 3.0]
BRANDS = ["b1", "b2", "new", "b1", "b0"]


def ranked(ranker: Ranker, **candidates: Any) -> Ranking:
    return ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS, **candidates})


@pytest.mark.parametrize(
    "given",
    [
        np.array,
        lambda values: np.array(values, object),
        pd.Series,
        lambda values: pd.Series(values, index=range(10, 15)),
        pd.Index,
        pd.array,
        pa.array,
        lambda values: pa.chunked_array([pa.array(values[:2]), pa.array(values[2:])]),
        tuple,
        lambda values: pd.Series(values).astype("category"),
    ],
)
def test_columns_may_be_arrays(small: SmallModel, ranker: Ranker, given: Any) -> None:
    expected = ranked(ranker, price=PRICES, brand=BRANDS)
    actual = ranker.rank(
        {"user": USER}, CONTEXT, {"item": given(ITEMS), "price": given(PRICES), "brand": given(BRANDS)}
    )
    assert actual == expected
    json.dumps(actual.to_dict())
    frame = pd.DataFrame({"item": ITEMS, "price": PRICES, "brand": BRANDS})
    assert ranker.rank({"user": USER}, CONTEXT, frame) == expected  # type: ignore[arg-type]


def test_numbers_of_any_width(ranker: Ranker) -> None:
    quarters = [0.25, 0.5, 0.75, 1.0, 1.25]
    for given in (np.array(quarters, np.float32), pa.array(quarters, pa.float32())):
        assert ranked(ranker, price=given) == ranked(ranker, price=quarters)
    few = [3, 7, 0, 99]
    expected = ranker.rank({"user": USER}, CONTEXT, {"item": few})
    for width in (np.int16, np.uint64):
        assert ranker.rank({"user": width(USER)}, CONTEXT, {"item": np.array(few, width)}) == expected


def test_missing_values_are_null(ranker: Ranker) -> None:
    expected = ranked(ranker, price=[1.5, None, 0.25, None, 3.0], brand=["b1", None, "new", "b1", None])
    brand = pd.Series(["b1", None, "new", "b1", None])
    for price in (
        pd.Series([1.5, np.nan, 0.25, None, 3.0]),
        pd.Series([1.5, pd.NA, 0.25, pd.NA, 3.0], dtype="Float64"),
    ):
        assert ranked(ranker, price=price, brand=brand) == expected
    assert ranked(ranker, price=pa.array([1.5, None, 0.25, None, 3.0]), brand=pa.array(brand)) == expected


def test_lists_in_a_column(ranker: Ranker) -> None:
    tags = [["a", "b"], [], ["c"], None, ["a"]]
    expected = ranked(ranker, tags=tags)
    arrays = [None if tag is None else np.array(tag, object) for tag in tags]
    for given in (arrays, pa.array(tags), pd.Series(tags), pd.Series(arrays)):
        assert ranked(ranker, tags=given) == expected


MOMENT = datetime(2023, 11, 29, 11, 0, 0, 250_000, UTC)


@pytest.mark.parametrize(
    "given",
    [
        MOMENT,
        MOMENT.replace(tzinfo=None),
        MOMENT.astimezone(timezone(timedelta(hours=-5))),
        pd.Timestamp(MOMENT),
        pd.Timestamp(MOMENT.replace(tzinfo=None)),
        pd.Timestamp(MOMENT).tz_convert("Europe/Berlin"),
        np.datetime64("2023-11-29T11:00:00.250"),
        np.datetime64("2023-11-29T11:00:00.250000000", "ns"),
    ],
    ids=repr,
)
def test_times_of_python_pandas_and_numpy(ranker: Ranker, given: Any) -> None:
    text = ranker.rank({"user": USER}, CONTEXT | {"time": MOMENT.isoformat()}, {"item": ITEMS})
    assert text.request_time == MOMENT.isoformat()
    assert ranker.rank({"user": USER}, CONTEXT | {"time": given}, {"item": ITEMS}) == text


def test_the_mlflow_model_takes_them_and_one_request_alone(
    small: SmallModel, ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with runs.open_run(uri, "small") as run:
        registry.register_model(run, small.folder, "small", "champion")
    model = mlflow.pyfunc.load_model("models:/small@champion")
    table, _ = small.later_rows()
    plain = as_request(table)
    (expected,) = model.predict([plain])
    arrays = {**plain, "candidates": {name: table[name].combine_chunks() for name in plain["candidates"]}}
    assert model.predict([arrays]) == model.predict(arrays) == [expected]
    assert model.predict(plain, params={"top_k": 2})[0]["candidates"] == expected["candidates"][:2]
    with pytest.raises(mlflow.exceptions.MlflowException, match="'item' has 20 values, 'price' has 2"):
        model.predict({**plain, "candidates": {**arrays["candidates"], "price": np.ones(2)}})


def test_options_may_be_numbers_of_numpy(ranker: Ranker) -> None:
    plain: dict[str, Any] = {"top_k": 3, "task_weights": {"click": 0.5}, "gate_top_k": 2, "mask_experts": [1]}
    arrays = {
        "top_k": np.int64(3),
        "task_weights": {"click": np.float32(0.5)},
        "gate_top_k": np.int8(2),
        "mask_experts": np.array([1]),
        "explain": np.bool_(False),
    }
    expected = ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, **plain)
    assert ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, **arrays) == expected
    element = {"user": {"user": USER}, "context": CONTEXT, "candidates": pd.DataFrame({"item": ITEMS}), **arrays}
    assert ranker.rank_many(read_requests([element], {})) == [expected]


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("user", pa.array(["5"] * 20), "column 'user' of the rows holds string, but .* int64"),
        ("item", pa.array([None] * 20, pa.int64()), "column 'item' of the rows is null in 20 of 20 rows"),
        ("user", pa.array([5] * 19 + [None]), "column 'user' of the rows is null in 1 of 20 rows"),
        ("time", pa.nulls(20, pa.timestamp("us", "UTC")), "column 'time' of the rows is null in 20 of 20 rows"),
        ("brand", pa.array(range(20)), "column 'brand' of the rows holds int64, but .* string"),
    ],
)
def test_rows_of_a_table_have_the_types_of_the_log(
    small: SmallModel, ranker: Ranker, column: str, values: pa.Array, says: str
) -> None:
    table, _ = small.later_rows()
    assert ranker.score_table(table.to_pandas()) == ranker.score_table(table)
    with pytest.raises(UserError, match=says):
        ranker.score_table(table.set_column(table.column_names.index(column), column, values))


def test_a_column_that_is_there_twice_or_has_several_types_is_refused(small: SmallModel, ranker: Ranker) -> None:
    frame = pd.DataFrame([[ITEMS[0], 1.0, 2.0]], columns=["item", "price", "price"])
    with pytest.raises(RequestError, match="'candidates' has column 'price' twice"):
        ranker.rank({"user": USER}, CONTEXT, frame)  # type: ignore[arg-type]
    table, _ = small.later_rows()
    mixed = table.to_pandas().assign(brand=[1, "a"] * 10)
    for rows in (table.append_column("price", table["price"]), frame):
        with pytest.raises(UserError, match="column 'price' is given twice"):
            ranker.score(rows)
    with pytest.raises(UserError, match=r"the data frame can't be read: .* column brand"):
        ranker.score(mixed)
    with pytest.raises(UserError, match="rows must be a pyarrow Table or a pandas DataFrame, not a list"):
        ranker.score(table.to_pylist())  # type: ignore[arg-type]
