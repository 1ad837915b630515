"""Values that features can't be made of are found while a log is read, and name file, column and row."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.reader import Log, LogReader
from mmoe_rec.preprocessing.logs import BuildOptions, Logs
from mmoe_rec.preprocessing.prepare import prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START, log_rows, random_log, schema_of, write_log

TASKS = {"click": {"label": "click", "objective": "engagement"}}
ROLES = {**BASE["roles"], "candidate": ["brand", "price", "tags", "x"]}
WINDOWS = {"train": (START, START + 5 * DAY), "validation": (START + 5 * DAY, START + 7 * DAY)}
WINDOWS |= {"test": (START + 7 * DAY, None)}
TABLE = random_log(0)
VECTOR = {"kind": "vector", "column": "x", "size": 2}


def _schema(tasks: dict[str, Any] = TASKS, **features: Any) -> Schema:
    return schema_of({"item": ALL_KINDS["item"], **features}, tasks=tasks, roles=ROLES)


def _with(values: Any, kind: pa.DataType | None = None) -> pa.Table:
    return TABLE.append_column("x", values if isinstance(values, pa.Array) else pa.array(values, kind))


def _log(folder: Path, *tables: pa.Table) -> Path:
    """One file a table, in row groups of 40 rows."""
    folder.mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=40)
    return folder


def _naive(lists: list[Any], size: int) -> tuple[list[int], list[int]]:
    """Rows with a list of another size, and those with an element that is no finite number."""
    sizes = [row for row, each in enumerate(lists) if each is not None and len(each) != size]
    none = [
        row
        for row, each in enumerate(lists)
        if each is not None and any(value is None or not np.isfinite(value) for value in each)
    ]
    return sizes, none


@pytest.mark.parametrize("rows_per_part", [1, 10_000])
@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32())])
@pytest.mark.parametrize("seed", range(4))
def test_vectors_of_another_size_or_with_elements_that_are_no_numbers(tmp_path, seed, kind, rows_per_part):
    rng = np.random.default_rng(seed)
    odd = [[1.0], [], [1.0, 2.0, 3.0], [1.0, None], [float("nan"), 1.0], [float("inf"), 0.0], [None]]
    lists: list[Any] = [None if rng.random() < 0.2 else rng.normal(size=2).tolist() for _ in range(300)]
    good = _with(lists, kind)
    for row in rng.choice(300, 5, replace=False):
        # Lists of the right size only, in half of the logs: one problem of a file is told, that of the size first.
        lists[row] = odd[rng.integers(3, 6) if seed % 2 else rng.integers(0, 7)]
    sizes, none = _naive(lists, 2)
    folder = _log(tmp_path / "log", good, _with(lists, kind))
    log = Log(str(folder), _schema(look=VECTOR))
    with pytest.raises(BadFile) as caught:
        _ = [list(log.reader.read(part)) for part in log.parts(rows_per_part)]
    said, row = str(caught.value), (sizes or none)[0]
    assert said.startswith(f"'{folder}/1.parquet': column 'x' of feature 'look' holds ")
    if sizes and (rows_per_part > 1 or not none or sizes[0] // 40 <= none[0] // 40):
        assert f"holds a list of {len(lists[row])} numbers, but its `size` is 2 ({len(sizes)} rows); " in said
        assert said.endswith(f" (the first is row {row} of the file, counted from 0)")
    else:  # parts are read in turn
        assert f"holds null, NaN or infinity within a list ({len(none)} rows); write finite" in said
        assert said.endswith(f" (the first is row {none[0]} of the file, counted from 0)")


@pytest.mark.parametrize("feature", [VECTOR, {"kind": "ids", "column": "x"}])
def test_null_among_lists_of_a_fixed_size(tmp_path, feature):
    folder = _log(tmp_path / "log", _with([[1, 2]] * 299 + [None], pa.list_(pa.int64(), 2)))
    with pytest.raises(
        BadFile, match=r"0.parquet' holds null among lists of a fixed size, which .*: 'x'; write lists of"
    ):
        list(Log(str(folder), _schema(f=feature)).stream())


@pytest.mark.parametrize("kind", [pa.uint64(), pa.list_(pa.uint64())])
def test_the_row_of_an_id_beyond_64_bits(tmp_path, kind):
    values: list[Any] = [5] * 300
    values[201] = values[77] = 2**63 + 1
    many = pa.types.is_list(kind)
    folder = _log(tmp_path / "log", _with([[each, 1] for each in values] if many else values, kind))
    feature = {"kind": "ids" if many else "id", "column": "x"}
    with pytest.raises(BadFile, match=r"0.parquet': column 'x' cannot be read as .* \(the first is row 77 of the file"):
        list(Log(str(folder), _schema(f=feature)).stream())


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Pacific/Apia"])
def test_a_time_that_stands_for_never_has_an_hour(tmp_path, zone):
    """As in the year 9599: calendars repeat after 400 years, days of the week included."""
    never = ["9999-12-30T23:30", "9999-12-31T23:59:59", "10399-12-31T23:59:59", "200399-06-30T12:00", "294247-01-09"]
    values = np.array(never, "M8[us]")
    same = [(12, 30, 23), (12, 31, 23), (12, 31, 23), (6, 30, 12)]
    local = [datetime(9599, *each, 45, tzinfo=UTC).astimezone(ZoneInfo(zone)) for each in same]
    table = _with(pa.array(np.resize(values, 300), pa.timestamp("us", "UTC")))
    schema = _schema(t={"kind": "time", "column": "x", "timezone": zone, "parts": ["hour", "weekday", "age"]})
    prepared = prepare(str(_log(tmp_path / "log", table)), schema, WINDOWS, tmp_path / "work")
    encoded = FeaturePipeline.load(prepared.serving, memories=False).encode(log_rows(table, schema))
    assert (encoded.ids["t_hour"][:4] - 1).tolist() == [each.hour for each in local]
    assert (encoded.ids["t_weekday"][:4] - 1).tolist() == [each.weekday() for each in local]


# What no file, but the log as a whole can't be read as


def _observed(value: Any) -> dict[str, Any]:
    return {"click": {**TASKS["click"], "observed_when": {"column": "x", "equals": value}}}


@pytest.mark.parametrize(
    ("values", "schema", "message"),
    [
        (
            ["a"] * 300,
            _schema(x={"kind": "id", "column": "x"}, y={"kind": "numeric", "column": "x"}),
            r"feature 'y' can't be read from the log '.*/log': column 'x' must hold numbers, found strings",
        ),
        (
            [1] * 300,
            _schema(_observed("1")),
            r"task 'click' can't be read from the log '.*': an `observed_when` compares column 'x', which holds num",
        ),
    ],
)
def test_columns_of_a_type_that_a_feature_or_task_cannot_read_are_told_of_before_the_log_is_read(
    tmp_path, monkeypatch, values, schema, message
):
    folder = _log(tmp_path / "log", _with(values))
    monkeypatch.setattr(LogReader, "read", lambda *_: pytest.fail("the log is read"))
    with pytest.raises(UserError, match=message):
        prepare(str(folder), schema, WINDOWS, tmp_path / "work")


def test_a_log_of_other_types_than_a_model_was_fitted_to(tmp_path):
    schema = _schema()
    fitted = prepare(str(write_log(tmp_path / "log", TABLE)), schema, WINDOWS, tmp_path / "work").serving
    items = pa.array([str(each) for each in TABLE["item"].to_pylist()])
    other = write_log(tmp_path / "other", TABLE.set_column(1, "item", items))
    types = [FeaturePipeline.load(fitted, memories=False).key_types]
    message = r"column 'item' changes its type: int64 in the fitted features, string in '.*other/0.parquet'"
    with pytest.raises(UserError, match=message):
        Logs(str(other), schema, BuildOptions(), types)
