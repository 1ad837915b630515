"""A log in any number of files, folders and row groups is the same rows, in parts that other processes can read."""

import os
import pickle
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.dataset import dataset

from mmoe_rec.errors import UserError
from mmoe_rec.log import reader as log_module
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.database import open_database
from mmoe_rec.log.reader import Log
from mmoe_rec.log.rows import LogRows
from mmoe_rec.preprocessing.build_inputs import DEFAULT_OPTIONS, IncludedFiles, Logs
from tests.log.small_logs import ALL_KINDS, CLICKS, log_rows, random_log, schema_of, two_ids, with_column, write_log

TABLE = random_log(0)
SCHEMA = two_ids()


def _table(batches: Iterable[LogRows]) -> pa.Table:
    return pa.concat_tables([rows.table for rows in batches], promote_options="default").combine_chunks()


def _write_groups(path: Path, table: pa.Table, sizes: Iterable[int], start: int = 0) -> int:
    """One file with row groups of these sizes, zeros included; returns the row after its last."""
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    return start


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """Files in memory, none of which is left."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


# Parts


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.integers(1, 25), st.integers(1, 12)
)
def test_parts_are_the_log(sizes, rows_per_part, rows_at_a_time):
    total = sum(map(sum, sizes))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "READ_BATCH_ROWS", rows_at_a_time)
        start = 0
        for index, groups in enumerate(sizes):
            start = _write_groups(Path(folder, f"{index}.parquet"), TABLE, groups, start)
        if not total:
            return
        log = Log(folder, SCHEMA)
        assert [file.row_group_sizes for file in log.files] == [tuple(groups) for groups in sizes]
        parts = log.parts(rows_per_part)
        assert parts == Log(folder, SCHEMA).parts(rows_per_part)
        assert sum(part.rows for part in parts) == log.rows == total
        expected = log_rows(TABLE, SCHEMA).table
        next_row = 0
        for part in parts:
            assert part.start == next_row
            batches = list(log.reader.read(part))
            assert all(0 < len(rows) <= rows_at_a_time for rows in batches)
            _assert_equal(_table(batches), expected.slice(part.start, part.rows))
            assert sum(piece.rows for piece in part.pieces) == part.rows
            next_row += part.rows
            # No part is longer than its last row group makes it.
            last = part.pieces[-1]
            file = next(file for file in log.files if file.uri == last.uri)
            assert part.rows - file.row_group_sizes[last.groups[-1]] < rows_per_part
        assert all(part.rows >= rows_per_part for part in parts[:-1])
        _assert_equal(_table(log.stream()), expected.slice(0, total))


def _assert_equal(first: pa.Table, second: pa.Table) -> None:
    assert first.column_names == second.column_names
    for name in first.column_names:
        # A column that is null throughout a file has type null.
        kind = second.schema.field(name).type
        assert first[name].cast(kind).to_pylist() == second[name].to_pylist(), name


def test_the_digest_changes_with_the_files(tmp_path):
    def digest(*tables: pa.Table) -> str:
        logs = Logs(str(write_log(tmp_path, *tables)), SCHEMA, DEFAULT_OPTIONS)
        return IncludedFiles.of(logs, {}).logs[0].digest

    tables = TABLE.slice(150), TABLE.slice(0, 150), TABLE.slice(0, 0)
    assert digest(*tables) == digest(*tables)
    assert digest(TABLE.slice(149), TABLE.slice(0, 149), TABLE.slice(0, 0)) != digest(*tables)


def test_a_log_in_memory(memory):
    for name, table in (("a/0", TABLE.slice(0, 100)), ("a/1", TABLE.slice(100, 0)), ("b/0", TABLE.slice(100))):
        with memory.open(f"/log/{name}.parquet", "wb") as handle:
            pq.write_table(table, handle, row_group_size=40)
    log = Log("memory://log", SCHEMA)
    assert [file.rows for file in log.files] == [100, 0, 200]
    reader, parts = pickle.loads(pickle.dumps((log.reader, log.parts(60))))
    _assert_equal(_table(rows for part in parts for rows in reader.read(part)), log_rows(TABLE, SCHEMA).table)


# Times


def test_times_of_any_unit_and_zone_are_one(tmp_path):
    seconds = TABLE["time"].cast(pa.int64()).to_numpy() // 10**6 * 10**6
    seconds[:50] -= 2 * 10**15  # before 1970 too
    moments = pa.array(seconds).cast(UTC_MICROSECONDS)
    kinds = [
        pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Asia/Tokyo", "+05:30")
    ]
    place = TABLE.column_names.index("time")
    tables = [TABLE.set_column(place, "time", moments.cast(kind)) for kind in kinds]
    folder = write_log(tmp_path / "times", *tables)
    pq.write_table(tables[0], folder / "int96.parquet", use_deprecated_int96_timestamps=True)
    log = Log(str(folder), SCHEMA)
    assert len(log.files) == len(kinds) + 1
    assert log.types["time"] == UTC_MICROSECONDS
    times = np.concatenate([rows.times() for rows in log.stream()])
    np.testing.assert_array_equal(times, np.tile(seconds, len(kinds) + 1))
    for unit, integers in (("s", seconds // 10**6), ("ms", seconds // 10**3), ("us", seconds), ("ns", seconds * 1000)):
        folder = write_log(tmp_path / unit, with_column(TABLE, "time", integers))
        columns = {"user": "user", "candidate": "item", "time": "time", "time_unit": unit}
        (rows,) = Log(str(folder), two_ids(columns=columns)).stream()
        np.testing.assert_array_equal(rows.times(), seconds)


# Hive partitions


def _partitioned(folder: Path, column: str, values: dict[str, pa.Table]) -> str:
    for value, table in values.items():
        write_log(folder / f"year=2024/{column}={value}", table.drop_columns([column]))
    return str(folder)


def test_columns_in_paths(tmp_path):
    halves = {"7": TABLE.slice(0, 100), "-08": TABLE.slice(100, 100), "__HIVE_DEFAULT_PARTITION__": TABLE.slice(200)}
    schema = schema_of({"item": ALL_KINDS["item"], "slot": ALL_KINDS["slot"]}, tasks=CLICKS)
    log = Log(_partitioned(tmp_path, "slot", halves), schema)
    assert log.types["slot"] == pa.int64()
    assert "year" not in log.types
    rows = _table(log.stream())
    assert rows["slot"].to_pylist() == [-8] * 100 + [7] * 100 + [None] * 100
    assert (
        rows["user"].to_pylist()
        == TABLE["user"].to_pylist()[100:200] + TABLE["user"].to_pylist()[:100] + TABLE["user"].to_pylist()[200:]
    )
    assert [piece.path_columns for piece in log.parts()[0].pieces] == [(("slot", value),) for value in (-8, 7, None)]
    pickle.dumps(log.parts())


@pytest.mark.parametrize("values", [("7", "x%2Fy"), ("7", "8.5"), ("7", str(2**63)), ("a", "b"), ("7", "")])
def test_columns_in_paths_are_strings_if_one_is_no_integer(tmp_path, values):
    log = Log(_partitioned(tmp_path, "brand", dict(zip(values, (TABLE, TABLE), strict=True))), SCHEMA)
    assert log.types["brand"] == pa.string()
    assert set(_table(log.stream())["brand"].to_pylist()) == {value.replace("%2F", "/") for value in values}


def test_a_label_in_the_path(tmp_path):
    log = Log(_partitioned(tmp_path, "click", {"0": TABLE, "1": TABLE.slice(0, 5)}), SCHEMA)
    assert _table(log.stream())["click"].to_pylist() == [0.0] * 300 + [1.0] * 5


def test_a_time_in_the_path(tmp_path):
    write_log(tmp_path / "time=2024-01-01", TABLE.drop_columns(["time"]))
    message = "has the time column 'time' only in its path. Write the times as a column of the file"
    with pytest.raises(BadFile, match=message):
        Log(str(tmp_path), SCHEMA)


# Remote


def test_a_copy_of_arrow_files_does_not_need_them(tmp_path):
    """Where a query left off while it reads them, as a join with nothing does, Arrow would crash now and then."""
    (tmp_path / "files").mkdir()
    for number in range(3):
        with pa.OSFile(f"{tmp_path}/files/{number}", "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
            writer.write_table(TABLE)
    with open_database(tmp_path / "database") as database:
        database.copy("log", dataset(tmp_path / "files", format="ipc"))
        shutil.rmtree(tmp_path / "files")
        database.create_table("nothing", pa.schema({"item": pa.int64()}), [])
        assert database.row("SELECT count(*), count(nothing.item) FROM log LEFT JOIN nothing USING (item)") == (900, 0)


def test_a_full_disk_is_reported_as_one_and_what_a_killed_process_left_goes(tmp_path):
    folder = tmp_path / "database"
    folder.mkdir()
    (folder / "left").write_text("x")
    full = f'IO Error: Could not write file "{folder}/duckdb_temp_storage-0.tmp": No space left on device'
    sentence = rf"^the disk of '{tmp_path}' is full \(IO Error: Could not write file"
    with pytest.raises(UserError, match=sentence), open_database(folder):
        raise duckdb.IOException(full if not any(folder.iterdir()) else "something was left")
    with pytest.raises(duckdb.IOException, match="damaged"), open_database(folder):
        raise duckdb.IOException("damaged")
    assert not folder.exists()


def test_ctrl_c_ends_a_query_as_it_ends_all_else(tmp_path):
    def compute() -> None:
        with open_database(tmp_path / "database") as database:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            database.row("SELECT sum(a.range * b.range) FROM range(200000) AS a, range(200000) AS b")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background command ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            compute()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "database").exists()


def test_bad_files_in_memory_are_named_by_their_address(memory):
    for name, table in (("0", TABLE), ("1", TABLE.set_column(0, "user", pa.nulls(300, pa.int64())))):
        with memory.open(f"/log/{name}.parquet", "wb") as handle:
            pq.write_table(table, handle)
    log = Log("memory://log", SCHEMA)
    with pytest.raises(BadFile, match=r"^'memory:///log/1.parquet': column 'user' is null, but every row"):
        list(log.stream())
    memory.rm("/log/1.parquet")
    with pytest.raises(BadFile, match=r"'memory:///log/1.parquet' is not a readable Parquet file"):
        list(log.stream())
    memory.pipe_file("/log/1.parquet", b"half")
    with pytest.raises(BadFile) as caught:
        Log("memory://log", SCHEMA)
    assert caught.value.uri == "memory:///log/1.parquet"


@pytest.mark.parametrize(("owner", "function"), [(MemoryFileSystem, "_open"), (MemoryFile, "read")])
def test_a_place_that_fails_is_not_a_bad_file(memory, monkeypatch, owner, function):
    """Otherwise a minute without network would leave files out."""
    with memory.open("/log/0.parquet", "wb") as handle:
        pq.write_table(TABLE, handle)
    log = Log("memory://log", SCHEMA)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(owner, function, fail)
    for attempt in (lambda: Log("memory://log", SCHEMA, skip_bad_files=True), lambda: list(log.stream())):
        with pytest.raises(UserError, match=r"/log/0.parquet' can't be reached .*by peer") as caught:
            attempt()
        assert not isinstance(caught.value, BadFile)
