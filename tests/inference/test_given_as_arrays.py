"""What Python programs have instead of JSON's lists and strings: arrays of candidates, and times."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.request import read_requests
from mmoe_rec.tracking import registry, runs
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request

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
    found = ranker.rank({"user": USER}, CONTEXT, {"item": given(ITEMS), "price": given(PRICES), "brand": given(BRANDS)})
    assert found == expected
    json.dumps(found.to_dict())
    frame = pd.DataFrame({"item": ITEMS, "price": PRICES, "brand": BRANDS})
    assert ranker.rank({"user": USER}, CONTEXT, frame) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        np.array([1, 2, 3, 4, 5], np.float32) / 4,
        [np.float32(each / 4) for each in range(1, 6)],
        np.array([1, 2, 3, 4, 5]) / 4,
        pa.array([0.25, 0.5, 0.75, 1.0, 1.25], pa.float32()),
    ],
    ids=["float32", "list of float32", "float64", "Arrow's float32"],
)
def test_numbers_of_any_width(ranker: Ranker, given: Any) -> None:
    assert ranked(ranker, price=given) == ranked(ranker, price=[0.25, 0.5, 0.75, 1.0, 1.25])


def test_integers_of_any_width(ranker: Ranker) -> None:
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
    arrays = [None if each is None else np.array(each, object) for each in tags]
    for given in (arrays, pa.array(tags), pd.Series(tags), pd.Series(arrays)):
        assert ranked(ranker, tags=given) == expected


@pytest.mark.parametrize(
    ("column", "given", "sentence"),
    [
        ("price", np.array([1.0, np.nan, 3, 4, 5]), "column 'price' holds NaN or infinity; give null for"),
        ("price", np.ones((5, 2)), "column 'price' must hold numbers; found lists of numbers with a fraction"),
        ("price", {1.0, 2.0}, "column 'price' in 'candidates' must be a list with one value per candidate"),
        ("price", np.ones(4), "columns of 'candidates' differ in length: 'item' has 5 values, 'price' has 4"),
        (
            "item",
            pd.Series(ITEMS).astype(str),
            "column 'item' must hold integers, as in the log; found strings: give 12",
        ),
        ("item", np.array([2**63] * 5, np.uint64), "column 'item' holds 9223372036854775808, which does not fit"),
        ("brand", np.array([b"x"] * 5), "column 'brand' must hold strings, as in the log; found bytes"),
    ],
)
def test_wrong_arrays_get_the_sentences_of_lists(ranker: Ranker, column: str, given: Any, sentence: str) -> None:
    with pytest.raises(RequestError) as refused:
        ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS} | {column: given})
    assert str(refused.value).startswith(sentence)


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


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (datetime(1600, 1, 1), "a time outside the years 1700 to 2200"),
        (np.datetime64("2500-01-01"), "a time outside the years 1700 to 2200"),
        (float("nan"), "column 'time' must hold times (ISO 8601 strings or integers); found NaN or infinity"),
        (np.float64(1.5), "column 'time' must hold times (ISO 8601 strings or integers); found float64"),
    ],
)
def test_wrong_times(ranker: Ranker, given: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=r"column 'time' ") as refused:
        ranker.rank({"user": USER}, {"time": given}, {"item": ITEMS})
    assert sentence in str(refused.value)


def test_the_mlflow_model_takes_them_and_one_request_alone(
    small: SmallModel, ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with runs.open_run(uri, "small") as run:
        registry.register_model(run, small.folder, "small", "champion")
    model = mlflow.pyfunc.load_model("models:/small@champion")
    table, _ = small.later_rows()
    plain = as_request(table)
    (expected,) = model.predict([plain])
    candidates = {name: table[name].combine_chunks() for name in plain["candidates"]}
    moment = table["time"].to_pylist()[0]
    arrays = {**plain, "candidates": candidates, "context": plain["context"] | {"time": moment}}
    frame = {**plain, "candidates": {n: each.to_pandas() for n, each in candidates.items() if n != "tags"}}
    assert model.predict([arrays]) == model.predict(arrays) == [expected]
    assert model.predict(plain, params={"top_k": 2})[0]["candidates"] == expected["candidates"][:2]
    without_tags = {**plain, "candidates": {n: each for n, each in plain["candidates"].items() if n != "tags"}}
    assert model.predict(frame) == model.predict([without_tags])
    with pytest.raises(mlflow.exceptions.MlflowException, match="'item' has 20 values, 'price' has 2"):
        model.predict({**plain, "candidates": {**candidates, "price": np.ones(2)}})


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
    frame = pd.DataFrame({"item": ITEMS})
    for candidates in ({"item": ITEMS}, frame):
        element = {"user": {"user": USER}, "context": CONTEXT, "candidates": candidates, **arrays}
        assert ranker.rank_many(read_requests([element], {})) == [expected]


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("user", pa.array(["5"] * 20), "column 'user' of the rows holds string, and the log .* int64"),
        ("item", pa.array([None] * 20, pa.int64()), "column 'item' of the rows is null in 20 of 20 rows"),
        ("user", pa.array([5] * 19 + [None]), "column 'user' of the rows is null in 1 of 20 rows"),
        ("time", pa.nulls(20, pa.timestamp("us", "UTC")), "column 'time' of the rows is null in 20 of 20 rows"),
        ("brand", pa.array(range(20)), "column 'brand' of the rows holds int64, and the log .* string"),
    ],
)
def test_rows_of_a_table_have_the_types_of_the_log(
    small: SmallModel, ranker: Ranker, column: str, values: pa.Array, says: str
) -> None:
    table, _ = small.later_rows()
    assert ranker.score_table(table.to_pandas()) == ranker.score_table(table)
    with pytest.raises(UserError, match=says):
        ranker.score_table(table.set_column(table.column_names.index(column), column, values))
