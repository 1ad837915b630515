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
from mmoe_rec.log.reader import Log
from mmoe_rec.preprocessing.prepare import Prepared, prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import ALL_KINDS, DAY, START, assert_same, fit, log_rows, random_log, schema_of, write_log

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = {
    "train": (None, START + 6 * DAY),
    "validation": (START + 6 * DAY, START + 8 * DAY),
    "test": (START + 8 * DAY, None),
}
TABLE = random_log(0)


def _prepare(log: Path | str, tmp_path: Path, schema: Schema = SCHEMA, windows: Any = WINDOWS) -> Prepared:
    return prepare(str(log), schema, windows, tmp_path / "work")


def _refuses(message: str, log: Path | str, tmp_path: Path, schema: Schema = SCHEMA, windows: Any = WINDOWS) -> None:
    with pytest.raises(UserError) as caught:
        _prepare(log, tmp_path, schema, windows)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    left = list((tmp_path / "work").rglob("*")) if (tmp_path / "work").exists() else []
    assert left == []


def _replace(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def _parts() -> list[pa.Table]:
    return [TABLE.slice(0, 150), TABLE.slice(150)]


# Files


def test_missing_path(tmp_path):
    _refuses(r"the log '.*nowhere' does not exist; set `data.log`", tmp_path / "nowhere", tmp_path)
    _refuses(r"the log '.*\*.parquet' does not exist; set `data.log`", tmp_path / "*.parquet", tmp_path)


def test_empty_folder(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "readme.txt").write_text("no data")
    _refuses(r"the log '.*log' holds no \*.parquet file; set `data.log`", tmp_path / "log", tmp_path)


def test_what_a_killed_writer_left_behind_is_not_read(tmp_path):
    log = write_log(tmp_path / "log", TABLE)
    for name in ("_temporary/0", ".log.1a2b.tmp"):
        write_log(tmp_path / "log" / name, TABLE)
    (log / "_metadata.parquet").write_bytes(b"half")
    write_log(tmp_path / "log" / "day=__HIVE_DEFAULT_PARTITION__", TABLE)
    assert Log(str(log), SCHEMA).rows == 600


@pytest.mark.parametrize("content", [b"", b"user,item\n1,2\n", b"PAR1 and then nothing PAR1"])
def test_a_file_that_is_not_parquet(tmp_path, content):
    log = write_log(tmp_path / "log", TABLE)
    (log / "1.parquet").write_bytes(content)
    _refuses(r"1.parquet' is not a readable Parquet file: .*[^.]; write it again, or move it out", log, tmp_path)


def test_a_truncated_file(tmp_path):
    log = write_log(tmp_path / "log", TABLE)
    whole = (log / "0.parquet").read_bytes()
    (log / "0.parquet").write_bytes(whole[: len(whole) // 2])
    _refuses(r"0.parquet' is not a readable Parquet file", log, tmp_path)


def test_a_file_that_is_damaged_in_the_middle(tmp_path):
    log = write_log(tmp_path / "log", TABLE)
    content = bytearray((log / "0.parquet").read_bytes())
    content[4:2000] = os.urandom(1996)
    (log / "0.parquet").write_bytes(content)
    _refuses(r"0.parquet' is damaged: .*; write the file again", log, tmp_path)


def test_an_empty_log(tmp_path):
    _refuses("the log '.*log' has no rows", write_log(tmp_path / "log", TABLE.slice(0, 0)), tmp_path)


def test_files_and_row_groups_without_rows_among_others_do_no_harm(tmp_path):
    plain = _prepare(write_log(tmp_path / "plain", TABLE), tmp_path / "a")
    log = write_log(tmp_path / "log", TABLE.slice(0, 0), *_parts(), TABLE.slice(0, 0))
    with pq.ParquetWriter(log / "1.parquet", TABLE.schema) as writer:
        for part in (TABLE.slice(0, 0), TABLE.slice(0, 70), TABLE.slice(0, 0), TABLE.slice(70, 80)):
            writer.write_table(part)
    _assert_same_rows(_prepare(log, tmp_path / "b"), plain)


def _assert_same_rows(one: Prepared, other: Prepared) -> None:
    assert one.layout == other.layout
    for split in WINDOWS:
        tables = [pq.read_table(each.split(split)) for each in (one, other)]
        assert tables[0].equals(tables[1]), split


# Columns


def test_a_missing_column(tmp_path):
    log = write_log(tmp_path / "log", TABLE, TABLE.drop_columns(["brand"]))
    _refuses(r"1.parquet' has no column 'brand'; it has age, born, click", log, tmp_path)


def test_a_column_that_is_there_twice(tmp_path):
    log = write_log(tmp_path / "log", TABLE.append_column("brand", TABLE["brand"]))
    _refuses(r"0.parquet' has 2 columns called 'brand'; rename all but one", log, tmp_path)


def test_a_column_that_changes_its_type(tmp_path):
    first, second = _parts()
    log = write_log(tmp_path / "log", first, _replace(second, "item", second["item"].cast(pa.string())))
    message = r"column 'item' changes its type: int64 in '.*0.parquet', string in '.*1.parquet'; write all files"
    _refuses(message, log, tmp_path)


def test_integers_of_different_widths_are_one_type(tmp_path):
    first, second = _parts()
    plain = _prepare(write_log(tmp_path / "plain", first, second), tmp_path / "a")
    log = write_log(tmp_path / "log", _replace(first, "age", first["age"].cast(pa.int32())), second)
    _assert_same_rows(_prepare(log, tmp_path / "b"), plain)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "item",
            pa.array(np.zeros(300)),
            r"column 'item' must hold integers or strings, found double \(pandas makes .*Int64",
        ),
        (
            "user",
            pa.array([b"a"] * 300),
            r"column 'user' must hold integers or strings, found binary \(write it as a string\)",
        ),
        ("user", pa.array([2**64 - 1] * 300, pa.uint64()), r"column 'user' cannot be read as int64"),
        ("price", pa.array(["1"] * 300), r"column 'price' must hold numbers, found string"),
        ("click", pa.array(["yes"] * 300), r"column 'click' must hold numbers, found string"),
        ("tags", pa.array(["x"] * 300), r"column 'tags' must hold lists of integers or lists of strings, found string"),
        ("time", pa.array(["2020"] * 300), r"column 'time' must hold timestamps .*, found string \(parse it"),
        (
            "time",
            pa.array([1] * 300),
            r"column 'time' must hold timestamps \(or integers, with `columns.time_unit` set\)",
        ),
        ("born", pa.array([0.5] * 300), r"column 'born' must hold timestamps .*, found double"),
    ],
)
def test_a_column_of_the_wrong_type(tmp_path, column, values, message):
    log = write_log(tmp_path / "log", _replace(TABLE, column, values))
    _refuses(rf"'.*0.parquet': {message}", log, tmp_path)


def test_a_column_that_is_read_in_two_ways(tmp_path):
    schema = schema_of({"a": {"kind": "id", "column": "born"}, "b": {"kind": "time", "column": "born"}})
    message = (
        "column 'born' is read as integers or strings by feature 'a' and as timestamps .* by feature 'b'; it can "
        "be only one"
    )
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, schema)


@pytest.mark.parametrize("column", ["user", "item", "time"])
def test_a_row_without_its_place_in_the_log(tmp_path, column):
    values = TABLE[column].to_pylist()
    values[3] = values[7] = None
    log = write_log(tmp_path / "log", _replace(TABLE, column, pa.array(values, TABLE[column].type)))
    _refuses(rf"0.parquet': column '{column}' is null in 2 rows; every row needs one", log, tmp_path)


def test_features_whose_inputs_have_one_name(tmp_path):
    counter = {"kind": "counter", "task": "click", "by": ["item"], "outputs": ["rate"]}
    schema = schema_of({"a": counter, "a_rate": {"kind": "numeric", "column": "price"}})
    log = write_log(tmp_path / "log", TABLE)
    _refuses("features 'a' and 'a_rate' both give an input 'a_rate'; rename one", log, tmp_path, schema)
    schema = schema_of({"a": {"kind": "numeric", "column": "price"}, "a_missing": {"kind": "numeric", "column": "age"}})
    _refuses("features 'a' and 'a_missing' both give an input 'a_missing'", log, tmp_path, schema)


def test_a_computed_feature_with_the_name_of_a_column(tmp_path):
    item = {"kind": "id", "column": "item"}
    schema = schema_of({"item_id": item, "user": {"kind": "history", "task": "click", "of": "item_id"}})
    message = "feature 'user' gives an input 'user', which is also a column; rename the feature"
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, schema)


# Labels


def test_a_label_that_is_neither_0_nor_1(tmp_path):
    first, second = _parts()
    values = first["click"].to_pylist()
    values[5] = 3.0
    log = write_log(tmp_path / "log", _replace(first, "click", pa.array(values)), second)
    # The first file alone would also leave the later splits empty; the label is what is wrong.
    message = (
        r"0.parquet': label column 'click' of binary task 'click' holds 3 \(1 rows are neither .*; fix .* regression"
    )
    _refuses(message, log, tmp_path)


def test_an_infinite_label(tmp_path):
    log = write_log(tmp_path / "log", _replace(TABLE, "spent", pa.array([np.inf] * 300)))
    _refuses("label column 'spent' of task 'spent' holds an infinite value; make it null", log, tmp_path)


def test_a_label_that_would_be_infinite_in_encoded_rows(tmp_path):
    log = write_log(tmp_path / "log", _replace(TABLE, "spent", pa.array([1.0, -1e39] * 150)))
    message = "label column 'spent' of task 'spent' holds -1e\\+39, too large for 32 bits; make it null"
    _refuses(message + r" \(150 rows\)", log, tmp_path)


@pytest.mark.parametrize("label", [0, 1])
def test_a_task_of_one_class(tmp_path, label):
    log = write_log(tmp_path / "log", _replace(TABLE, "click", pa.array([label] * 300)))
    schema = schema_of({"item": ALL_KINDS["item"]}, tasks={"click": {"label": "click", "objective": "engagement"}})
    message = (
        rf"task 'click' has one class in training: all \d+ observed labels in column 'click' are {label}; .*remove it"
    )
    _refuses(message, log, tmp_path, schema)


def test_a_task_without_a_matured_label(tmp_path):
    task = {"label": "liked", "objective": "satisfaction", "matures_after_days": 30}
    schema = schema_of({"item": ALL_KINDS["item"]}, tasks={"liked": task})
    message = "task 'liked' has no observed label in training: .*no label had matured by split.train_end, 30 days after"
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, schema)


def test_a_task_whose_rule_never_holds(tmp_path):
    task = {"label": "click", "objective": "engagement", "observed_when": {"column": "brand", "equals": "z"}}
    schema = schema_of({"item": ALL_KINDS["item"]}, tasks={"click": task})
    message = "task 'click' has no observed label in training: .*column 'brand' never equals 'z'"
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, schema)


def test_a_rule_that_compares_numbers_with_text(tmp_path):
    task = {"label": "liked", "objective": "engagement", "observed_when": {"column": "age", "equals": "1"}}
    schema = schema_of({"item": ALL_KINDS["item"]}, tasks={"liked": task})
    message = (
        "`observed_when` compares column 'age', which holds numbers, with the string '1'; write `equals` without quotes"
    )
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, schema)


def test_rules_compare_booleans_integers_and_strings(tmp_path):
    table = TABLE.append_column("seen", pa.array([True, False, None] * 100))
    for column, equals, values in (("seen", True, [True]), ("seen", 1, [True]), ("brand", "a", ["a"]), ("age", 2, [2])):
        task = {"label": "liked", "objective": "engagement", "observed_when": {"column": column, "equals": equals}}
        schema = schema_of({"item": ALL_KINDS["item"]}, tasks={"liked": task})
        labels = log_rows(table, schema).labels(schema.tasks["liked"], START + 99 * DAY)
        expected = [row["liked"] if row[column] in values else None for row in table.to_pylist()]
        assert [None if np.isnan(label) else label for label in labels] == expected


@pytest.mark.parametrize(("rate", "found"), [(0.0, "0"), (1.5, "1.5"), (None, "null")])
def test_a_sampling_rate_out_of_range(tmp_path, rate, found):
    rates = pa.array([rate] + [0.5] * 299)
    log = write_log(tmp_path / "log", TABLE.append_column("rate", rates))
    schema = schema_of({"item": ALL_KINDS["item"]}, columns={**_COLUMNS, "sampling_rate": "rate"})
    _refuses(rf"column 'rate' holds {found} \(1 rows are not in \(0, 1\]\)", log, tmp_path, schema)


_COLUMNS = {"user": "user", "candidate": "item", "time": "time"}


# Splits and times


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_names_the_logs_times(tmp_path, split):
    far = START + 1000 * DAY
    windows = {**WINDOWS, split: (far, far + DAY)}
    first, last = (format_time(int(TABLE["time"].cast(pa.int64())[i].as_py())) for i in (0, -1))
    message = (
        f"the {split} split is empty: .* requests from {re.escape(first)} to {re.escape(last)}; set `split.train_end`"
    )
    _refuses(message, write_log(tmp_path / "log", TABLE), tmp_path, windows=windows)


def test_times_in_the_wrong_unit_point_to_the_unit(tmp_path):
    milliseconds = pa.array(TABLE["time"].cast(pa.int64()).to_numpy() // 1000)
    log = write_log(tmp_path / "log", _replace(TABLE, "time", milliseconds))
    for unit, message in (
        ("s", r"requests from \d{5}-.*columns.time_unit"),
        ("us", "requests from 1970-.*columns.time_unit"),
    ):
        _refuses(message, log, tmp_path, schema_of(ALL_KINDS, columns={**_COLUMNS, "time_unit": unit}))


def test_times_are_the_same_in_any_unit_and_zone(tmp_path):
    seconds = TABLE["time"].cast(pa.int64()).to_numpy() // 10**6 * 10**6
    table = _replace(TABLE, "time", pa.array(seconds).cast(pa.timestamp("us", tz="UTC")))
    expected = fit(table, SCHEMA, START + 6 * DAY).encode(log_rows(table, SCHEMA))
    moments = table["time"].combine_chunks()
    for values in (
        moments.cast(pa.timestamp("ns", tz="Asia/Tokyo")),
        moments.cast(pa.timestamp("ms", tz="America/New_York")),
        moments.cast(pa.timestamp("us")),  # without a zone: UTC
        moments.cast(pa.timestamp("s")),
    ):
        other = _replace(table, "time", values)
        assert_same(fit(other, SCHEMA, START + 6 * DAY).encode(log_rows(other, SCHEMA)), expected)
    for unit, factor in (("s", 10**-6), ("ms", 10**-3), ("us", 1), ("ns", 10**3)):
        schema = schema_of(ALL_KINDS, columns={**_COLUMNS, "time_unit": unit})
        integers = seconds * factor if factor >= 1 else seconds // round(1 / factor)
        other = _replace(table, "time", pa.array(integers))
        assert_same(fit(other, schema, START + 6 * DAY).encode(log_rows(other, schema)), expected)


def test_dates_are_midnights_in_utc():
    schema = schema_of({"born": {"kind": "time", "column": "born", "parts": ["hour", "weekday"]}})
    dates = pa.array([datetime.date(2024, 2, 29), None] * 150)
    for values in (dates, dates.cast(pa.date64())):
        table = _replace(TABLE, "born", values)
        encoded = fit(table, schema, START + 6 * DAY).encode(log_rows(table, schema))
        assert encoded.ids["born_hour"][:2].tolist() == [1, 0]
        assert encoded.ids["born_weekday"][:2].tolist() == [4, 0]  # a Thursday


# What looks different but is the same


def test_dictionaries_and_large_types_are_the_same_as_plain(tmp_path):
    table = random_log(0, strings=True)
    plain = _prepare(write_log(tmp_path / "plain", table), tmp_path / "a")
    other = table
    for name in ("user", "brand", "click"):
        other = _replace(other, name, other[name].combine_chunks().dictionary_encode())
    other = _replace(other, "item", other["item"].cast(pa.large_string()))
    other = _replace(other, "tags", other["tags"].cast(pa.large_list(pa.large_string())))
    _assert_same_rows(_prepare(write_log(tmp_path / "log", other), tmp_path / "b"), plain)


def test_columns_of_nothing_but_nulls_work(tmp_path):
    table = TABLE
    for name in ("brand", "price", "tags", "born", "slot", "age"):
        table = _replace(table, name, pa.nulls(300))
    prepared = _prepare(write_log(tmp_path / "log", table), tmp_path)
    train = pq.read_table(prepared.split("train"))
    for name in ("brand", "price_bucket", "born_weekday", "slot"):
        assert set(train[f"id.{name}"].to_pylist()) == {0}
    assert {tuple(tags) for tags in train["id.tags"].to_pylist()} == {()}
    assert set(train["dense.price"].to_pylist()) == {0.0}
    assert set(train["dense.price_missing"].to_pylist()) == {1.0}


def test_a_column_may_be_null_throughout_one_file(tmp_path):
    first, second = _parts()
    typed = _replace(first, "brand", pa.nulls(150, pa.string()))
    plain = _prepare(write_log(tmp_path / "plain", typed, second), tmp_path / "a")
    log = write_log(tmp_path / "log", _replace(first, "brand", pa.nulls(150)), second)
    _assert_same_rows(_prepare(log, tmp_path / "b"), plain)


# What is kept and what is built again


def test_what_is_there_is_kept_until_log_schema_or_split_change(tmp_path):
    log = write_log(tmp_path / "log", *_parts())

    def built(**changes: Any) -> int:
        return os.stat(_prepare(log, tmp_path, **changes).folder / "manifest.json").st_ino

    first = built()
    assert built() == first
    assert built(windows={**WINDOWS, "test": (START + 8 * DAY, START + 9 * DAY)}) != first
    again = built()
    assert built(schema=schema_of({"item": ALL_KINDS["item"]})) != again
    again = built()
    # Other values in a file of the same size.
    first_file = log / "0.parquet"
    status = first_file.stat()
    os.utime(first_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert built() != again
    (tmp_path / "work" / "features" / "manifest.json").write_text("half")
    assert _prepare(log, tmp_path).manifest["rows"] == 300


def test_a_failed_build_leaves_the_old_one(tmp_path):
    log = write_log(tmp_path / "log", *_parts())
    before = _prepare(log, tmp_path).manifest
    (log / "1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.parquet"):
        _prepare(log, tmp_path)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["features"]
    assert Prepared(tmp_path / "work" / "features").manifest == before


def test_splits_hold_their_rows_and_labels(tmp_path):
    prepared = _prepare(write_log(tmp_path / "log", *_parts()), tmp_path)
    rows = TABLE.to_pylist()
    times = TABLE["time"].cast(pa.int64()).to_pylist()
    end = max(times)
    for split, (start, stop) in WINDOWS.items():
        inside = [
            (row, time)
            for row, time in zip(rows, times, strict=True)
            if (start is None or time >= start) and (stop is None or time < stop)
        ]
        table = pq.read_table(prepared.split(split))
        assert table["user"].to_pylist() == [row["user"] for row, _ in inside]
        assert table["candidate"].to_pylist() == [row["item"] for row, _ in inside]
        assert table["label.click"].to_pylist() == [row["click"] for row, _ in inside]
        known_by = WINDOWS["train"][1] if split == "train" else end
        liked = [row["liked"] if row["click"] == 1 and time + 2.5 * DAY <= known_by else None for row, time in inside]
        assert table["label.liked"].to_pylist() == liked
        counts = prepared.manifest["splits"][split]
        assert counts["rows"] == len(inside)
        assert counts["observed"]["liked"] == sum(label is not None for label in liked)
        assert counts["label_sum"]["liked"] == sum(label or 0 for label in liked)
        # Without a request column, a user's rows of one instant form a request.
        requests = [
            (request, row["user"], time)
            for request, (row, time) in zip(table["request"].to_pylist(), inside, strict=True)
        ]
        assert len({request for request, _, _ in requests}) == len(set(requests)) == len({key[1:] for key in requests})
