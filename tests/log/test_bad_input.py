"""Bad logs end in one sentence that names what is wrong and what to do, and leave nothing half-written."""

import datetime
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import format_time
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    START,
    fit,
    log_rows,
    random_log,
    schema_of,
    windows_of,
    with_column,
    with_values,
    write_log,
)

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = windows_of(6, 8)
TABLE = random_log(0)
COLUMNS = {"user": "user", "candidate": "item", "time": "time"}
ITEM = {"item": ALL_KINDS["item"]}


def _prepare(log: Path | str, tmp_path: Path, schema: Schema = SCHEMA, windows: Any = WINDOWS) -> FeatureFolder:
    return prepare(BuildInputs(str(log), schema, windows, tmp_path / "work"))


def _refuses(message: str, log: Path | str, tmp_path: Path, schema: Schema = SCHEMA, windows: Any = WINDOWS) -> None:
    with pytest.raises(UserError) as caught:
        _prepare(log, tmp_path, schema, windows)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    left = list((tmp_path / "work").rglob("*")) if (tmp_path / "work").exists() else []
    assert left == []


def _task(**keys: Any) -> Schema:
    return schema_of(ITEM, tasks={"t": {"label": "liked", "objective": "engagement", **keys}})


def _numbers(**columns: str) -> Schema:
    return schema_of({name: {"kind": "numeric", "column": column} for name, column in columns.items()})


FIRST, SECOND = TABLE.slice(0, 150), TABLE.slice(150)
RATE = {"kind": "counter", "task": "click", "by": ["item"], "outputs": ["rate"]}
AS_TIME_AND_ID = schema_of({"a": {"kind": "id", "column": "born"}, "b": {"kind": "time", "column": "born"}})
AS_ID_AND_NUMBER = schema_of({"x": {"kind": "id", "column": "brand"}, "y": {"kind": "numeric", "column": "brand"}})
LIKE_A_COLUMN = schema_of({"i": {**ITEM["item"]}, "user": {"kind": "history", "task": "click", "of": "i"}})
ONE_INPUT = schema_of({"a": RATE, "a_rate": {"kind": "numeric", "column": "price"}})
OF_NO_BRAND = _task(observed_when={"column": "brand", "equals": "z"})
THREE = with_values(FIRST, "click", {5: 3.0})
NO_ROWS = TABLE.slice(0, 0)
REFUSED: list[tuple[list[pa.Table], Schema, str]] = [
    ([NO_ROWS], SCHEMA, "the log '.*log' has no rows"),
    # Columns
    ([TABLE.append_column("brand", TABLE["brand"])], SCHEMA, r"0.parquet' has 2 columns called 'brand'"),
    *(
        ([with_column(TABLE, column, values)], SCHEMA, rf"0.parquet': column '{column}' {message}")
        for column, values, message in (
            ("item", np.zeros(300), r"must hold integers or strings, found double \(pandas stores .*Int64"),
            ("user", [b"a"] * 300, "must hold integers or strings, found binary"),
            ("user", pa.array([2**64 - 1] * 300, pa.uint64()), "can't be converted to int64"),
            ("price", ["1"] * 300, "must hold numbers, found string"),
            ("click", ["yes"] * 300, "must hold numbers, found string"),
            ("tags", ["x"] * 300, "must hold lists of integers or lists of strings, found string"),
            ("time", ["2020"] * 300, "must hold timestamps .*, found string"),
            ("time", [1] * 300, "must hold timestamps .*columns.time_unit"),
            ("born", [0.5] * 300, "must hold timestamps .*, found double"),
        )
    ),
    # Features
    ([TABLE], AS_TIME_AND_ID, "column 'born' is read as integers or strings by feature 'a' and as .* by feature 'b'"),
    ([TABLE], AS_ID_AND_NUMBER, "column 'brand' must hold numbers, found strings"),
    ([TABLE], ONE_INPUT, "Features 'a' and 'a_rate' both have an input 'a_rate'"),
    ([TABLE], _numbers(a="price", a_missing="age"), "Features 'a' and 'a_missing' both have an input 'a_missing'"),
    ([TABLE], LIKE_A_COLUMN, "Feature 'user': its input 'user' is also a column"),
    # Labels. The first file alone would also leave the later splits empty; the label is what is wrong.
    (
        [THREE, SECOND],
        SCHEMA,
        r"0.parquet': column 'click' is the label of the binary task 'click' and holds 3, neither",
    ),
    ([with_column(TABLE, "liked", [0] * 300)], _task(), "task 't' has one class .*'liked' are 0;"),
    ([with_column(TABLE, "liked", [1] * 300)], _task(), "task 't' has one class .*'liked' are 1;"),
    ([TABLE], _task(label_delay_days=30), "task 't' has no observed label in training: .*split.train_end, 30 days"),
    ([TABLE], OF_NO_BRAND, "task 't' has no observed label in training: .*column 'brand' never equals 'z'"),
    ([TABLE], _task(observed_when={"column": "age", "equals": "1"}), "column 'age' holds numbers, but .* with '1'"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_a_log_that_is_refused(tmp_path, case):
    tables, schema, message = REFUSED[case]
    _refuses(message, write_log(tmp_path / "log", *tables), tmp_path, schema)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_names_the_logs_times(tmp_path, split):
    far = START + 1000 * DAY
    windows = {**WINDOWS, split: (far, far + DAY)}
    first, last = (format_time(int(TABLE["time"].cast(pa.int64())[i].as_py())) for i in (0, -1))
    message = f"the {split} split is empty: .* requests from {re.escape(first)} to {re.escape(last)}; set `split.t"
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, windows=windows)


def test_times_in_the_wrong_unit_point_to_the_unit(tmp_path):
    log = write_log(tmp_path / "log", with_column(TABLE, "time", TABLE["time"].cast(pa.int64()).to_numpy() // 1000))
    for unit, year in (("s", r"\d{5}"), ("us", "1970")):
        schema = schema_of(ALL_KINDS, columns={**COLUMNS, "time_unit": unit})
        _refuses(f"(a request in the future, |requests from ){year}-.*columns.time_unit", log, tmp_path, schema)


def test_times_of_two_units_are_refused(tmp_path):
    times = TABLE["time"].cast(pa.int64()).to_numpy() // 1000
    mixed = np.where(np.arange(len(times)) % 2, times, times // 1000)
    schema = schema_of(ALL_KINDS, columns={**COLUMNS, "time_unit": "ms"})
    log = write_log(tmp_path / "log", with_column(TABLE, "time", mixed))
    _refuses("column 'time' of the log .* goes from 1970-.* to 20.* Write all times in one unit", log, tmp_path, schema)


# What looks different but is the same


def test_dates_are_midnights_in_utc():
    schema = schema_of({"born": {"kind": "time", "column": "born", "parts": ["hour", "weekday"]}})
    dates = pa.array([datetime.date(2024, 2, 29), None] * 150)
    for values in (dates, dates.cast(pa.date64())):
        table = with_column(TABLE, "born", values)
        encoded = fit(table, schema, START + 6 * DAY).encode(log_rows(table, schema))
        assert encoded.ids["born_hour"][:2].tolist() == [1, 0]
        assert encoded.ids["born_weekday"][:2].tolist() == [4, 0]  # a Thursday


def _coded(table: pa.Table) -> pa.Table:
    for name in ("user", "brand", "click"):
        table = with_column(table, name, table[name].combine_chunks().dictionary_encode())
    table = with_column(table, "item", table["item"].cast(pa.large_string()))
    return with_column(table, "tags", table["tags"].cast(pa.large_list(pa.large_string())))


TEXT = random_log(0, strings=True)
NULL = pa.nulls(150, pa.string())


@pytest.mark.parametrize(
    ("plain", "second"),
    [
        ([TEXT], [_coded(TEXT)]),
        ([FIRST, SECOND], [with_column(FIRST, "age", FIRST["age"].cast(pa.int32())), SECOND]),
        ([with_column(FIRST, "brand", NULL), SECOND], [with_column(FIRST, "brand", pa.nulls(150)), SECOND]),
        ([TABLE], [NO_ROWS, FIRST, SECOND.slice(0, 70), NO_ROWS, SECOND.slice(70), NO_ROWS]),
    ],
    ids=["dictionaries and large types", "widths of integers", "null throughout a file", "files without rows"],
)
def test_what_looks_different_is_the_same(tmp_path, plain, second):
    first_one_value, two = (
        _prepare(write_log(tmp_path / n / "log", *item), tmp_path / n)
        for n, item in zip("ab", (plain, second), strict=True)
    )
    assert first_one_value.layout == two.layout
    for split in WINDOWS:
        assert pq.read_table(first_one_value.split(split)).equals(pq.read_table(two.split(split))), split


def test_columns_of_nothing_but_nulls_work(tmp_path):
    table = TABLE
    for name in ("brand", "price", "tags", "born", "slot", "age"):
        table = with_column(table, name, pa.nulls(300))
    train = pq.read_table(_prepare(write_log(tmp_path / "log", table), tmp_path).split("train"))
    for name in ("brand", "price_bucket", "born_weekday", "slot"):
        assert set(train[f"id.{name}"].to_pylist()) == {0}
    assert {tuple(tags) for tags in train["id.tags"].to_pylist()} == {()}
    assert set(train["dense.price"].to_pylist()) == {0.0}
    assert set(train["dense.price_missing"].to_pylist()) == {1.0}


# What is kept and what is built again


def test_what_is_there_is_kept_until_log_schema_or_split_change(tmp_path):
    log = write_log(tmp_path / "log", FIRST, SECOND)

    def built(**changes: Any) -> int:
        return os.stat(_prepare(log, tmp_path, **changes).folder / "manifest.json").st_ino

    first = built()
    assert built() == first
    assert built(windows={**WINDOWS, "test": (START + 8 * DAY, START + 9 * DAY)}) != first
    again = built()
    assert built(schema=schema_of(ITEM)) != again
    again = built()
    first_file = log / "0.parquet"
    os.utime(first_file, ns=(1, 1))
    assert built() == again, "the bytes are the same"
    table = pq.read_table(first_file)
    pq.write_table(table.set_column(table.schema.get_field_index("liked"), "liked", table["liked"][::-1]), first_file)
    assert built() != again
    (tmp_path / "work" / "features" / "manifest.json").write_text("half")
    before = _prepare(log, tmp_path).manifest
    assert before["rows"] == 300
    # A build that fails leaves what was there.
    (log / "1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.parquet"):
        _prepare(log, tmp_path)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["features"]
    assert FeatureFolder(tmp_path / "work" / "features").manifest == before
