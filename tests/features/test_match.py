"""The feature kind `match` against sets, loops and `math`, offline and served; and the columns that it refuses."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.features.kinds import match
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import RequestRows, ServingRows
from mmoe_rec.settings.schema import Schema
from tests.inference.small_model import SmallModel
from tests.log.small_logs import CLICKS, DAY, START, fit, log_rows, schema_of, with_column

UNTIL = START + 100 * DAY
NAMES = ("id", "list", "number", "time", "vector")
ROLES = {
    "user": ["u_id", "u_list", "u_number"],
    "context": ["u_time", "u_vector"],
    "candidate": [f"c_{name}" for name in NAMES],
    "placement": ["slot"],
}
FEATURES: dict[str, dict[str, Any]] = {
    "same": {"columns": ["u_id", "c_id"], "compare": "equal"},
    "has": {"columns": ["u_list", "c_id"], "compare": "contains"},
    "is_in": {"columns": ["c_list", "u_id"], "compare": ["contains"]},
    "shares": {"columns": ["u_list", "c_list"], "compare": ["jaccard", "overlap", "coverage"]},
    "covers": {"columns": ["c_list", "u_list"], "compare": "coverage"},
    "amount": {"columns": ["u_number", "c_number"], "compare": ["difference", "ratio"]},
    "less": {"columns": ["c_number", "u_number"], "compare": "difference"},
    "days": {"columns": ["u_time", "c_time"], "compare": "time_difference"},
    "angle": {"columns": ["u_vector", "c_vector"], "compare": "cosine", "size": 3},
}
FEATURES = {name: {"kind": "match", **feature} for name, feature in FEATURES.items()}
Row = dict[str, Any]


def drawn_log(seed: int, requests: int = 12, longest: int = 6, strings: bool = False) -> tuple[pa.Table, np.ndarray]:
    """A log with the columns of `ROLES`, any of them null, and the request of each row, (N,) int64."""
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(requests), rng.integers(1, 6, requests))
    vocabulary = 2 * longest

    def values(prefix: str, rows: int) -> dict[str, pa.Array]:
        lists = [rng.integers(0, vocabulary, rng.integers(0, longest + 1)).tolist() for _ in range(rows)]
        columns: dict[str, list[Any]] = {
            "id": rng.integers(0, vocabulary, rows).tolist(),
            "list": [[None if rng.random() < 0.1 else element for element in entry] for entry in lists],
            "number": rng.normal(0, 5, rows).tolist(),
            "time": rng.integers(START - 900 * DAY, START, rows).tolist(),
            "vector": rng.normal(size=(rows, 3)).tolist(),
        }
        columns["vector"][0] = [0.0, 0.0, 0.0]
        if strings:
            columns["id"] = [f"id {value}" for value in columns["id"]]
            columns["list"] = [
                [value if value is None else f"id {value}" for value in entry] for entry in columns["list"]
            ]
        id_type = pa.string() if strings else pa.int64()
        types = {"id": id_type, "list": pa.list_(id_type), "number": pa.float64(), "time": UTC_MICROSECONDS}
        types["vector"] = pa.list_(pa.float64())
        return {
            f"{prefix}_{name}": pa.array(
                [None if rng.random() < 0.15 else value for value in columns[name]], types[name]
            )
            for name in NAMES
        }

    of_request = {name: column.take(pa.array(index)) for name, column in values("u", requests).items()}
    return pa.table(
        {
            "user": index,
            "item": np.arange(len(index)),
            "time": pa.array(START + index * DAY).cast(UTC_MICROSECONDS),
            "click": rng.integers(0, 2, len(index)),
            "slot": rng.integers(0, 3, len(index)),
            **of_request,
            **values("c", len(index)),
        }
    ), index


def schema(**features: dict[str, Any]) -> Schema:
    return schema_of(features or FEATURES, roles=ROLES, tasks=CLICKS)


def distinct(values: Sequence[Any] | None) -> set[Any]:
    return {value for value in values or () if value is not None}


def naive(output: str, x: Any, y: Any) -> float | None:  # noqa: PLR0911 - one line for each output
    """An output for the values of one row, None if it is missing."""
    if output in ("overlap", "coverage", "jaccard"):
        one, other = distinct(x), distinct(y)
        shared = len(one & other)
        divisor = {"overlap": 1, "coverage": len(other), "jaccard": len(one | other)}[output]
        return shared / divisor if one and other else None
    if output == "contains":
        return float(y in x) if distinct(x) and y is not None else None
    if x is None or y is None:
        return None
    if output == "equal":
        return float(x == y)
    if output == "difference":
        return float(y - x)
    if output == "ratio":
        return math.log((1 + abs(y)) / (1 + abs(x)))
    if output == "time_difference":
        return float((y - x).total_seconds() / 86_400)
    lengths = math.sqrt(sum(value * value for value in x)) * math.sqrt(sum(value * value for value in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else None


def expected_outputs(table: pa.Table) -> dict[str, np.ndarray]:
    """The name of each output -> its values in all rows, NaN if missing."""
    rows, outputs = table.to_pylist(), {}
    for name, feature in FEATURES.items():
        first, second = feature["columns"]
        for output in [feature["compare"]] if isinstance(feature["compare"], str) else feature["compare"]:
            if output == "coverage":  # of the candidate's list, in any order of the columns
                first, second = "u_list", "c_list"
            values = [naive(output, row[first], row[second]) for row in rows]
            outputs[f"{name}_{output}"] = np.array([np.nan if value is None else value for value in values])
    return outputs


def raw_outputs(pipeline: FeaturePipeline, rows: Any) -> dict[str, np.ndarray]:
    encoders = pipeline.encoders.values()
    return {number.name: values for encoder in encoders for values, number in encoder.encode(rows).numbers}


def request_rows(table: pa.Table, index: np.ndarray, of: Schema) -> RequestRows:
    """The rows as a server has them: columns of the user and context once for each request."""
    canonical = log_rows(table, of).table.combine_chunks()
    columns = {name: canonical[name].combine_chunks() for name in canonical.column_names}
    first = pa.array(np.unique(index, return_index=True)[1])
    of_request = {name for name in columns if name.startswith("u_") or name in ("user", "time")}
    shared = {name: columns[name].take(first) for name in of_request}
    own = {name: column for name, column in columns.items() if name not in of_request}
    return RequestRows(ServingRows(shared, len(first), of), own, index)


@pytest.mark.parametrize("decade", range(10))
def test_outputs_equal_a_naive_loop_offline_and_served(decade: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "_CHUNK_ROWS", [5, 16, 1024][decade % 3])
    of = schema()
    for seed in range(10 * decade, 10 * decade + 10):
        table, index = drawn_log(seed, strings=bool(seed % 2))
        pipeline, expected = fit(table, of, UNTIL), expected_outputs(table)
        actual = raw_outputs(pipeline, log_rows(table, of))
        assert actual.keys() == expected.keys()
        encoded = pipeline.encode(log_rows(table, of)).dense
        served = pipeline.request_inputs(request_rows(table, index, of))[1].dense
        place = {number.name: number for number in pipeline.layout.dense}
        assert [*place] == [*served]
        for column, name in enumerate(place):
            np.testing.assert_array_equal(encoded[:, column].view(np.uint32), served[name].view(np.uint32))
        for name, values in expected.items():
            np.testing.assert_allclose(actual[name], values, rtol=1e-13, atol=1e-13)
            missing, present = np.isnan(values), values[~np.isnan(values)]
            spread = present.std() if len(present) and present.std() > 1e-12 else 1.0
            scaled = (values - present.mean()) / spread if len(present) else values
            np.testing.assert_allclose(served[name], np.nan_to_num(np.clip(scaled, -10, 10)), rtol=1e-5, atol=1e-6)
            assert (f"{name}_missing" in served) == missing.any()
            if missing.any():
                assert served[f"{name}_missing"].tolist() == missing.tolist()


@pytest.mark.parametrize("strings", [False, True])
def test_long_lists_and_many_requests(strings: bool) -> None:
    """Lists of up to 1,000 ids in requests that lie in several chunks of rows."""
    of = schema()
    table, index = drawn_log(5, requests=20, longest=1000, strings=strings)
    repeated = pa.concat_tables([table] * 25)
    pipeline, expected = fit(table, of, UNTIL), expected_outputs(table)
    later = np.concatenate([index + 20 * number for number in range(25)])
    assert len(later) > match._CHUNK_ROWS
    for rows in (log_rows(repeated, of), request_rows(repeated, later, of)):
        for name, values in raw_outputs(pipeline, rows).items():
            np.testing.assert_allclose(values, np.tile(expected[name], 25), rtol=1e-13, atol=1e-13, err_msg=name)
    assert expected["shares_overlap"][~np.isnan(expected["shares_overlap"])].max() > 100


def test_columns_of_nothing_but_null_are_missing() -> None:
    table, index = drawn_log(0)
    full = fit(table, schema(), UNTIL)
    columns = [name for name in table.column_names if name.startswith("u_")]
    for name in columns:
        table = with_column(table, name, pa.nulls(len(table)))
    assert all(np.isnan(values).all() for values in raw_outputs(full, request_rows(table, index, schema())).values())
    pipeline = fit(table, schema(), UNTIL)
    dense = pipeline.encode(log_rows(table, schema())).dense
    assert dense.tolist() == [[0.0, 1.0] * 12] * len(table)


def test_infinite_numbers_and_numbers_of_another_kind() -> None:
    """A whole number that another feature reads as an ID, and infinity, which has no difference."""
    of = schema(
        size={"kind": "match", "columns": ["u_number", "c_number"], "compare": ["difference", "ratio"]},
        code={"kind": "id", "column": "u_number"},
    )
    table = drawn_log(1)[0].slice(0, 4)
    table = with_column(table, "u_number", pa.array([3, None, -2, 7]))
    table = with_column(table, "c_number", pa.array([1.5, 2.0, math.inf, math.nan]))
    pipeline = fit(table, of, UNTIL)
    encoded = pipeline.encode(log_rows(table, of)).dense
    assert encoded[:, 1].tolist() == encoded[:, 3].tolist() == [0.0, 1.0, 1.0, 1.0]


# Refused settings


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (
            {"columns": ["u_id"]},
            "'f' needs one column of the candidate and one of the user or .* 'u_id' .user.. Change",
        ),
        ({"columns": ["u_id", "c_id", "c_list"]}, "found 'u_id' .user., 'c_id' .candidate., 'c_list' .candidate.. Cha"),
        ({"columns": ["u_id", "c_id", "click"]}, "found 'u_id' .user., 'c_id' .candidate., 'click' .no role.. Change "),
        ({"columns": ["u_id", "u_time"]}, r"found 'u_id' .user., 'u_time' .context.. Change `columns`, or the roles"),
        ({"columns": ["c_id", "item"]}, r"found 'c_id' .candidate., 'item' .candidate.. Change `columns`, or the ro"),
        ({"columns": ["slot", "c_id"]}, "'f' reads a placement column together with other columns"),
        ({"columns": ["c_id", "c_id"]}, "lists c_id twice"),
        ({"columns": ["u_idd", "c_id"]}, "reads column 'u_idd', which has no role .did you mean 'u_id'"),
        ({"columns": ["click", "c_id"]}, "feature 'f' reads column 'click', which is the label of task 'click'"),
        ({"compare": []}, "at least 1 item"),
        ({"compare": "same"}, "Input should be 'equal', "),
        ({"compare": ["equal", "equal"]}, "lists equal twice"),
        (
            {"compare": ["overlap", "cosine"]},
            "mixes outputs of different types: overlap reads lists of integers or lists of strings and .*, cosine "
            "reads lists of numbers and lists of numbers. Write a feature for each type",
        ),
        ({"compare": "cosine"}, "`compare: cosine` needs `size`, the length of the vectors"),
        ({"compare": "equal", "size": 3}, "Other outputs have no `size`"),
    ],
)
def test_settings_that_are_refused(feature: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        schema(f={"kind": "match", "columns": ["u_id", "c_id"], "compare": "equal", **feature})


# Refused values


@pytest.mark.parametrize("name", ["same", "has", "is_in", "shares"])
def test_integers_are_not_compared_with_strings(name: str) -> None:
    of = schema(**{name: FEATURES[name]})
    integers, strings = (drawn_log(3, strings=strings)[0] for strings in (False, True))
    first, second = FEATURES[name]["columns"]
    message = rf"feature '{name}': column '{first}' holds int64 and column '{second}' holds string, which are never e"
    mixed = with_column(integers, second, strings[second])
    with pytest.raises(UserError, match=message):
        fit(mixed, of, UNTIL)
    if not pa.types.is_list(strings[second].type):
        coded = with_column(integers, second, strings[second].combine_chunks().dictionary_encode())
        with pytest.raises(UserError, match=message):
            fit(coded, of, UNTIL)


def test_a_vector_of_another_size_is_refused() -> None:
    of, (table, index) = schema(), drawn_log(4)
    pipeline = fit(table, of, UNTIL)
    table = with_column(table, "u_vector", pa.array([[1.0, 2.0]] * len(table)))
    with pytest.raises(UserError, match="'angle': column 'u_vector' holds a list of 2 numbers, but `size` is 3"):
        pipeline.request_inputs(request_rows(table, index, of))


# A model


MODEL_LOG = drawn_log(1, requests=24, strings=True)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    sections = {"features": FEATURES, "roles": ROLES, "tasks": CLICKS}
    return SmallModel(tmp_path_factory.mktemp("match"), log=[MODEL_LOG], **sections)


def as_request(table: pa.Table, index: np.ndarray, number: int) -> Request:
    """A logged request as JSON values, with all its attributes."""
    rows = table.filter(pa.array(index == number)).to_pylist()
    rows = [{name: v.isoformat() if hasattr(v, "isoformat") else v for name, v in row.items()} for row in rows]
    return Request(
        user={name: rows[0][name] for name in ("user", *ROLES["user"])},
        context={name: rows[0][name] for name in ("time", *ROLES["context"])},
        candidates={name: [row[name] for row in rows] for name in ("item", *ROLES["candidate"])},
    )


def test_a_request_has_the_inputs_of_its_logged_rows(model: SmallModel) -> None:
    ranker = Ranker.load(model.folder)
    table, index = drawn_log(9, requests=30, strings=True)
    encoded, layout = ranker.pipeline.encode(log_rows(table, model.settings.schema_)).dense, ranker.pipeline.layout
    assert {number.feature for number in layout.dense} == set(FEATURES)
    for number in range(30):
        rows = ranker.reader.rows([as_request(table, index, number)])
        _, inputs = ranker.pipeline.request_inputs(rows)
        served = np.stack([inputs.dense[item.name] for item in layout.dense], axis=1)
        np.testing.assert_array_equal(served.view(np.uint32), encoded[index == number].view(np.uint32))


def test_a_request_of_ids_reads_the_latest_values(model: SmallModel) -> None:
    """Users and candidates bring their lists; what only the context knows is missing."""
    ranker = Ranker.load(model.folder)
    latest = {row["item"]: row for row in MODEL_LOG.to_pylist()}
    items = [0, 3, 7, 11, 20]
    user = {row["user"]: row for row in MODEL_LOG.to_pylist()}[5]
    rows = ranker.reader.rows([Request(user={"user": 5}, candidates={"item": items})])
    actual = raw_outputs(ranker.pipeline, rows)
    for name in ("same", "has", "is_in", "shares", "amount", "less"):
        first, second = FEATURES[name]["columns"]
        for output in ranker.pipeline.schema.features[name].compare:  # type: ignore[attr-defined]
            pairs = [({**latest[item], **{n: user[n] for n in ROLES["user"]}}) for item in items]
            values = [naive(output, pair[first], pair[second]) for pair in pairs]
            expected = [np.nan if value is None else value for value in values]
            np.testing.assert_allclose(actual[f"{name}_{output}"], expected, rtol=1e-13)
    assert np.isnan(actual["days_time_difference"]).all()
    assert np.isnan(actual["angle_cosine"]).all()


@pytest.mark.parametrize(
    ("part", "column", "value", "message"),
    [
        ("user", "u_list", [1, 2], "column 'u_list' must hold lists of strings, as in the log; found lists of integ"),
        ("user", "u_id", 1, "column 'u_id' must hold strings, as in the log; found integers"),
        ("context", "u_vector", ["a"], "column 'u_vector' must hold lists of numbers; found lists of strings"),
    ],
)
def test_a_request_of_another_type_is_refused(
    model: SmallModel, part: str, column: str, value: Any, message: str
) -> None:
    reader = Ranker.load(model.folder).reader
    parts: dict[str, dict[str, Any]] = {"user": {"user": 1}, "context": {}}
    parts[part][column] = value
    with pytest.raises(RequestError, match=message):
        reader.rows([Request(**parts, candidates={"item": [1]})])


def test_lists_of_the_context_have_the_type_of_the_log(tmp_path: Path) -> None:
    """No latest values say the type of a context column, only the fitted log."""
    roles = {**ROLES, "user": ["u_id", "u_number"], "context": ["u_list", "u_time", "u_vector"]}
    small = SmallModel(tmp_path, log=[MODEL_LOG], features=FEATURES, roles=roles, tasks=CLICKS)
    ranker = Ranker.load(small.folder)
    with pytest.raises(RequestError, match="column 'u_list' must hold lists of strings, as in the log; found lists"):
        ranker.reader.rows([Request(user={"user": 1}, context={"u_list": [1]}, candidates={"item": [1]})])
    integers = with_column(MODEL_LOG, "u_list", pa.array([[1]] * len(MODEL_LOG)))
    with pytest.raises(UserError, match=r"column 'u_list' of the rows holds list<int64>, but .* a log with list<str"):
        ranker.score(integers)


def test_a_build_refuses_columns_of_different_types(tmp_path: Path) -> None:
    table = with_column(MODEL_LOG, "u_list", drawn_log(1, requests=24)[0]["u_list"])
    with pytest.raises(UserError, match="'shares': column 'u_list' holds int64 and column 'c_list' holds string"):
        SmallModel(tmp_path, log=[table], features={"shares": FEATURES["shares"]}, roles=ROLES, tasks=CLICKS)
