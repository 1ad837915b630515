"""A file, or a value in it, that can't be used is named with what is wrong, or left out where that is asked for."""

import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log import reader as log_module
from mmoe_rec.log.checks import BadFile, SkippedFile, format_time
from mmoe_rec.log.reader import EventLogFiles, Log
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.prepare import prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    ALL_KINDS,
    BASE,
    CLICKS,
    DAY,
    START,
    log_rows,
    random_log,
    schema_of,
    two_ids,
    windows_of,
    with_column,
    with_values,
    write_log,
)

TABLE = random_log(0)
SCHEMA = two_ids()


def _opening(log: Path | str, schema: Schema = SCHEMA) -> BadFile:
    with pytest.raises(BadFile) as caught:
        Log(str(log), schema)
    return caught.value


def _reading(log: Path | str, schema: Schema = SCHEMA, rows_per_part: int = 262_144, **options: Any) -> BadFile:
    opened = Log(str(log), schema, **options)
    with pytest.raises(BadFile) as caught:
        _ = [list(opened.reader.read(part)) for part in opened.parts(rows_per_part)]
    return caught.value


def _five(folder: Path) -> Path:
    return write_log(folder, *[TABLE.slice(row, 60) for row in range(0, 300, 60)])


def _spoil(kind: str, path: Path) -> str:
    """Makes a file one that can't be opened; returns what is said of it."""
    whole = path.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(whole[: len(whole) * 2 // 3])
        case "not Parquet":
            path.write_bytes(b"user,item\n" * 50)
        case "wrong magic":
            path.write_bytes(whole[:-4] + b"PAR9")
        case "empty":
            path.write_bytes(b"")
        case "link to nowhere":
            path.unlink()
            path.symlink_to("nowhere")
        case "lacks a column":
            pq.write_table(TABLE.drop_columns(["click"]), path)
            return f"'{path}' has no column 'click' .did you mean 'liked'... Its columns are: age, born, brand"
        case "without columns":
            pq.write_table(pa.table({}), path)
            return f"'{path}' has no column '.*'. Its columns are: none."
        case "another type":
            pq.write_table(with_column(TABLE, "item", TABLE["item"].cast(pa.string())), path)
            return f"column 'item' has the type int64 in '.*0.parquet', but string in '{path}' .4 of 5 files"
        case "impossible type":
            pq.write_table(with_column(TABLE, "item", pa.array(np.zeros(300))), path)
            return f"'{path}': column 'item' must hold integers or strings, found double"
    return f"'{path}' is not a readable Parquet file .*. Write the file again, or move it out of the log"


KINDS = ["truncated", "not Parquet", "wrong magic", "empty", "link to nowhere"]
KINDS += ["lacks a column", "without columns", "another type", "impossible type"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_opened(tmp_path, kind):
    folder = _five(tmp_path)
    said = _spoil(kind, folder / "3.parquet")
    error = _opening(folder)
    assert error.uri == str(folder / "3.parquet")
    with pytest.raises(BadFile, match=f"^{said}"):
        raise error
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.uri) == (BadFile, str(error), error.uri)

    log = Log(str(folder), SCHEMA, skip_bad_files=True)
    assert [(item.uri, item.reason) for item in log.skipped] == [(error.uri, str(error))]
    assert [Path(file.uri).stem for file in log.files] == ["0", "1", "2", "4"]
    assert log.rows == sum(len(rows) for rows in log.stream()) == 240


def test_the_first_of_several_bad_files_is_named_and_all_are_left_out(tmp_path):
    folder = _five(tmp_path)
    for name, kind in (("4", "truncated"), ("1", "another type"), ("2", "lacks a column")):
        _spoil(kind, folder / f"{name}.parquet")
    assert Path(_opening(folder).uri).stem == "1"
    log = Log(str(folder), SCHEMA, skip_bad_files=True)
    assert [Path(item.uri).stem for item in log.skipped] == ["1", "2", "4"]
    assert [Path(file.uri).stem for file in log.files] == ["0", "3"]
    found_files = log.found_files[str(folder / "3.parquet")]
    fault = BadFile("found to be bad when it was read", found_files.uri)
    fewer = log.without_bad_files([None, fault, BadFile("and so is another part", found_files.uri)])
    late = SkippedFile(found_files.uri, found_files.bytes, found_files.version, "found to be bad when it was read")
    assert fewer.skipped == [*log.skipped, late]
    assert [Path(file.uri).stem for file in fewer.files] == ["0"]
    assert fewer.types == log.types


def test_a_log_of_bad_files_only(tmp_path):
    folder = _five(tmp_path)
    for path in folder.iterdir():
        _spoil("truncated", path)
    message = r"the log '.*' has no usable file among 5. The first problem: '.*0.parquet' is not a readable"
    with pytest.raises(UserError, match=message):
        Log(str(folder), SCHEMA, skip_bad_files=True)


def test_a_file_without_rows_has_no_types_that_could_be_wrong(tmp_path):
    empty = pa.table({name: pa.array([], pa.float64()) for name in TABLE.column_names})
    log = Log(str(write_log(tmp_path, empty, TABLE)), SCHEMA)
    assert log.types["item"] == pa.int64()
    assert sum(len(rows) for rows in log.stream()) == 300
    pq.write_table(empty.drop_columns(["click"]), tmp_path / "2.parquet")
    assert str(_opening(tmp_path)).startswith(f"'{tmp_path}/2.parquet' has no column 'click' (did you mean")


# Pages


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_data_page_that_is_damaged(tmp_path, compression):
    folder = _five(tmp_path)
    path = folder / "2.parquet"
    # Uncompressed numbers are numbers whatever happened to them: only the checksum tells.
    pq.write_table(
        TABLE, path, compression=compression, use_dictionary=False, row_group_size=100, write_page_checksum=True
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(TABLE.column_names.index("click"))
    middle = column.data_page_offset + column.total_compressed_size * 2 // 3
    content = bytearray(path.read_bytes())
    content[middle : middle + 8] = bytes(byte ^ 0x55 for byte in content[middle : middle + 8])
    path.write_bytes(content)
    error = _reading(folder)
    assert error.uri == str(path)
    assert str(error).startswith(f"'{path}' is damaged (")
    assert str(error).endswith("). Write the file again.")
    log = Log(str(folder), SCHEMA).without_bad_files([error])
    assert sum(len(rows) for rows in log.stream()) == 240


def test_a_file_that_changed_after_the_log_was_opened(tmp_path):
    folder = _five(tmp_path)
    log = Log(str(folder), SCHEMA)
    for table in (TABLE.slice(0, 59), TABLE.slice(0, 60).drop_columns(["click"])):
        pq.write_table(table, folder / "1.parquet")
        with pytest.raises(BadFile, match=r"1.parquet' has changed since the log was opened. Run the command again"):
            list(log.stream())
    (folder / "1.parquet").unlink()
    with pytest.raises(BadFile, match=r"1.parquet' is not a readable Parquet file .*No such file"):
        list(log.stream())


# Values


def test_text_that_is_not_utf8(tmp_path):
    binary = pa.array([b"a"] * 7 + [b"\xff\xfe"] + [b"b"] * 292)
    text = pa.Array.from_buffers(pa.string(), 300, binary.buffers())
    error = _reading(write_log(tmp_path, with_column(TABLE, "brand", text)))
    assert str(error).startswith(f"'{tmp_path}/0.parquet': column 'brand' contains text that is not UTF-8")


SPENT, TOO_LARGE = "is the label of task 'spent' and holds", "which is infinite or too large for float32. Make it null"
NO_RATE = "which is not from 1e-30 to 1. Fix the data or remove columns.sampling_rate"
NO_LABEL = "neither 0 nor 1. Fix the data, or set the task's kind to regression"


@pytest.mark.parametrize("rows_per_part", [1, 1_000])
@pytest.mark.parametrize(
    ("column", "changes", "row", "message"),
    [
        ("user", {130: None, 290: None}, 130, "is null, but every row needs one"),
        ("item", {130: None}, 130, "is null, but every row needs one"),
        ("time", {150: None}, 150, "is null, but every row needs one"),
        (
            "click",
            {101: 3.0, 299: 2.0, 7: 0.5},
            7,
            f"is the label of the binary task 'click' and holds 0.5, {NO_LABEL}",
        ),
        ("spent", {250: np.inf, 260: -np.inf}, 250, f"{SPENT} inf, {TOO_LARGE}"),
        ("spent", {9: -1e39}, 9, f"{SPENT} -1e+39, {TOO_LARGE}"),
        *(("price", {9: rate}, 9, f"holds {said}, {NO_RATE}") for rate, said in ((0.0, 0), (1.5, 1.5), (None, "null"))),
    ],
)
def test_the_first_wrong_value_is_reported_in_any_part(
    tmp_path, monkeypatch, column, changes, row, message, rows_per_part
):
    monkeypatch.setattr(log_module, "READ_BATCH_ROWS", 30)
    tasks = {**CLICKS, "spent": {"label": "spent", "kind": "regression", "objective": "engagement"}}
    columns = {"user": "user", "candidate": "item", "time": "time", "sampling_rate": "price"}
    table = with_column(TABLE, "price", pa.array(np.full(300, 0.5)))
    folder = write_log(tmp_path, table, table)
    pq.write_table(with_values(table, column, changes), folder / "1.parquet", row_group_size=40)
    error = _reading(folder, two_ids(tasks=tasks, columns=columns), rows_per_part)
    end = f"(the first is row {row} of the file, counted from 0)"
    assert str(error) == f"'{folder}/1.parquet': column '{column}' {message} {end}"


def test_times_of_the_future(tmp_path):
    last = START + 10 * DAY
    folder = write_log(tmp_path, TABLE, TABLE)
    times = TABLE["time"].cast(pa.int64()).to_numpy()
    max_time = int(times[280])
    later = np.flatnonzero(times > max_time)
    assert len(later)
    error = _reading(folder, max_time=max_time)
    assert str(error) == (
        f"'{folder}/0.parquet': column 'time' holds a request in the future, {format_time(int(times[later[0]]))}, "
        f"later than {format_time(max_time)}. Fix the data, or set columns.time_unit if the integers have another unit "
        f"(the first is row {later[0]} of the file, counted from 0)"
    )
    assert sum(len(rows) for rows in Log(str(folder), SCHEMA, max_time=last).stream()) == 600


def test_without_a_now_tomorrow_passes_and_next_week_does_not(tmp_path):
    today = int(np.datetime64("now", "us").astype(np.int64))
    for days, passes in ((0.9, True), (7, False)):
        moment = pa.scalar(today + round(days * DAY)).cast(TABLE["time"].type)
        log = Log(str(write_log(tmp_path, with_values(TABLE, "time", {299: moment.as_py()}))), SCHEMA)
        if passes:
            assert sum(len(rows) for rows in log.stream()) == 300
        else:
            with pytest.raises(BadFile, match=r"column 'time' holds a request in the future, .*row 299"):
                list(pickle.loads(pickle.dumps(log.reader)).read(log.parts()[0]))


@pytest.mark.parametrize(
    ("kind", "integers", "unit"),
    [
        (pa.timestamp("ms", "UTC"), 2**62, None),
        (pa.date32(), 2**31 - 1, None),
        (pa.int64(), 2**62, "s"),
        (pa.uint64(), 2**64 - 1, "us"),
    ],
)
def test_times_that_no_microsecond_counts(tmp_path, kind, integers, unit):
    storage = {pa.date32(): pa.int32(), pa.uint64(): pa.uint64()}.get(kind, pa.int64())
    values = pa.array([0] * 33 + [integers] + [0] * 266, storage).cast(kind)
    pq.write_table(with_column(TABLE, "time", values), tmp_path / "0.parquet", row_group_size=20)
    columns = {"user": "user", "candidate": "item", "time": "time", "time_unit": unit}
    error = _reading(tmp_path, two_ids(columns=columns), rows_per_part=10)
    assert str(error).startswith(f"'{tmp_path}/0.parquet': column 'time' can't be converted to timestamp[us, tz=UTC]: ")


# Events


def _events(path: Path | str) -> Schema:
    history = {"kind": "history", "events": "purchases", "of": "item", "length": 3}
    events = {"purchases": {"path": str(path), "time": "born"}}
    return schema_of({"item": ALL_KINDS["item"], "bought": history}, tasks=CLICKS, events=events)


def test_bad_files_of_events(tmp_path):
    events = with_column(TABLE, "born", TABLE["time"])
    folder = write_log(tmp_path / "purchases", events, events, events)
    log = Log(str(write_log(tmp_path / "log", TABLE)), _events(folder))
    said = _spoil("truncated", folder / "1.parquet")
    with pytest.raises(BadFile, match=said):
        EventLogFiles("purchases", log)
    purchases = EventLogFiles("purchases", log, skip_bad_files=True)
    assert [Path(item.uri).stem for item in purchases.skipped] == ["1"]
    assert purchases.rows == 600

    early = Log(log.source, log.schema, max_time=START)
    message = r"0.parquet': column 'born' holds an event in the future, .*\(the first is row \d+"
    with pytest.raises(BadFile, match=message):
        list(EventLogFiles("purchases", early, skip_bad_files=True).stream())
    pq.write_table(with_values(events, "born", {77: None}), folder / "2.parquet")
    message = r"2.parquet': column 'born' is null, but every event needs a time \(the first is row 77 "
    with pytest.raises(BadFile, match=message):
        list(EventLogFiles("purchases", log, skip_bad_files=True).stream())


# While features are built


WINDOWS = windows_of(5, 7)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def _bad_label(path: Path) -> None:
    pq.write_table(with_values(pq.read_table(path), "click", {1: 7.0}), path)


def _other_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).take(list(range(60))[::-1]), path)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("step", ["count", "look_up", "encode"])
@pytest.mark.parametrize("change", [Path.unlink, _cut, _bad_label, _other_rows])
def test_a_file_that_turns_bad_while_features_are_built(tmp_path, monkeypatch, change, step, skip):
    """Found by what reads it next, or at the end; no rows are encoded with what was counted of others."""
    folder = _five(tmp_path / "log")
    schema = schema_of({"item": ALL_KINDS["item"], "n": ALL_KINDS["item_click"]}, tasks=CLICKS)
    run = getattr(steps.BuildSteps, step)

    def changing(*args: Any, **named: Any) -> Any:
        change(folder / "1.parquet")
        return run(*args, **named)

    monkeypatch.setattr(steps.BuildSteps, step, changing)
    options = BuildOptions(skip_bad_files=skip)
    if step == "count" and (skip or change is _other_rows):
        # Nothing was learnt before: the file is left out as any bad one, or is what it is by now.
        if change is _other_rows:
            with pytest.raises(
                BadFile, match=r"1.parquet' has changed since the log was opened. Run the command again"
            ):
                prepare(BuildInputs(str(folder), schema, WINDOWS, tmp_path / "work", options))
        else:
            skipped = prepare(BuildInputs(str(folder), schema, WINDOWS, tmp_path / "work", options)).manifest["skipped"]
            assert [Path(item["file"]).name for item in skipped] == ["1.parquet"]
        return
    with pytest.raises(BadFile) as caught:
        prepare(BuildInputs(str(folder), schema, WINDOWS, tmp_path / "work", options))
    assert str(caught.value).startswith(f"'{folder}/1.parquet'")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


ROLES = {**BASE["roles"], "candidate": ["brand", "price", "tags", "x"]}
VECTOR = {"kind": "vector", "column": "x", "size": 2}


def _with_vectors(**features: Any) -> Schema:
    return schema_of({"item": ALL_KINDS["item"], **features}, tasks=CLICKS, roles=ROLES)


def _with(values: Any, kind: pa.DataType | None = None) -> pa.Table:
    return TABLE.append_column("x", values if isinstance(values, pa.Array) else pa.array(values, kind))


def _log(folder: Path, *tables: pa.Table) -> Path:
    """One file a table, in row groups of 40 rows."""
    folder.mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=40)
    return folder


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32())])
@pytest.mark.parametrize("odd", [[], [1.0], [1.0] * 3, [1.0, None], [1.0, float("nan")], [1.0, float("inf")]])
def test_vectors_of_another_size_or_with_elements_that_are_no_numbers(tmp_path, kind, odd):
    lists: list[Any] = [None, [0.5, -1.0], [0.0, 2.0]] * 100
    good = _with(lists, kind)
    lists[77] = lists[203] = odd
    error = _reading(_log(tmp_path / "log", good, _with(lists, kind)), _with_vectors(look=VECTOR))
    assert str(error) == (
        f"'{tmp_path}/log/1.parquet': column 'x' holds {odd}. Feature 'look' needs lists of 2 finite numbers (its "
        "`size`), or null for a missing list (the first is row 77 of the file, counted from 0)"
    )


def test_a_time_that_stands_for_never_has_an_hour(tmp_path):
    """As on the last day that Python's calendar has in every time zone."""
    values = np.array(["9999-12-31T23:59:59", "200399-06-30T12:00", "294247-01-09"], "M8[us]")
    table = _with(pa.array(np.resize(values, 300), pa.timestamp("us", "UTC")))
    schema = _with_vectors(t={"kind": "time", "column": "x", "parts": ["hour", "weekday", "age"]})
    prepared = prepare(BuildInputs(str(_log(tmp_path / "log", table)), schema, WINDOWS, tmp_path / "work"))
    encoded = FeaturePipeline.load(prepared.serving, stores=False).encode(log_rows(table, schema))
    assert set(encoded.ids["t_weekday"].tolist()) == {1 + datetime(9999, 12, 30, tzinfo=UTC).weekday()}
