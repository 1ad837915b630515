"""A build in steps: whatever it is divided into and wherever it runs, it gives what one process in memory would."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed_builds import killed_builds
from small_logs import (
    ALL_KINDS,
    DAY,
    START,
    assert_same,
    files_of,
    fit_in_memory,
    log_rows,
    random_log,
    save_memories,
    schema_of,
    times_of,
    with_requests,
    write_log,
)

from mmoe_rec import engines
from mmoe_rec.engines import EngineName, open_engine
from mmoe_rec.errors import UserError
from mmoe_rec.features import answers, log, splits, steps
from mmoe_rec.features.build import Prepared, prepare
from mmoe_rec.features.encoded import Encoded
from mmoe_rec.features.pipeline import FeaturePipeline, in_window
from mmoe_rec.features.rows import LogRows
from mmoe_rec.features.steps import BuildOptions

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = {
    "train": (START + DAY, START + 6 * DAY),
    "validation": (START + 6 * DAY, START + 8 * DAY),
    "test": (START + 8 * DAY, None),
}


@pytest.fixture
def small_pieces(monkeypatch):
    """Parts, blocks and row groups of some dozen rows."""
    monkeypatch.setattr(answers, "ROWS_PER_BLOCK", 64)
    monkeypatch.setattr(splits, "ROWS_PER_GROUP", 32)
    monkeypatch.setattr(log, "ROWS_AT_A_TIME", 50)
    monkeypatch.setattr(log.Log.parts, "__defaults__", (70,))


def _cut(table: pa.Table, *edges: int) -> list[pa.Table]:
    rows = [0, *edges, table.num_rows]
    return [table.slice(start, end - start) for start, end in pairwise(rows)]


def _encoded(prepared: Prepared, split: str) -> tuple[Encoded, pa.Table]:
    table = pq.read_table(prepared.split(split))
    return Encoded.from_arrow(table, prepared.layout), table


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("rows_in_memory", [25, 200, 10**6])
def test_partitions_stretches_and_blocks_change_no_bit(tmp_path, small_pieces, strings, rows_in_memory):
    table = random_log(5, rows=500, strings=strings)
    source = str(write_log(tmp_path / "log", *_cut(table, 13, 240, 240, 400)))
    prepared = prepare(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=rows_in_memory))
    pipeline = fit_in_memory(SCHEMA, [log_rows(table, SCHEMA)], WINDOWS["train"])
    assert prepared.layout == pipeline.layout
    for split, window in WINDOWS.items():
        encoded, written = _encoded(prepared, split)
        rows: LogRows = log_rows(table, SCHEMA).filter(in_window(times_of(table), window))
        assert_same(encoded, pipeline.encode(rows))
        assert written["time"].cast(pa.int64()).to_pylist() == rows.times().tolist()
    (tmp_path / "memories").mkdir()
    save_memories(pipeline, tmp_path / "memories", int(times_of(table).max()) + 1)
    for file in (tmp_path / "memories").iterdir():
        kept, mine = pq.read_table(prepared.serving / file.name), pq.read_table(file)
        assert kept.schema.metadata == mine.schema.metadata
        for name in mine.column_names:
            np.testing.assert_array_equal(kept[name].to_numpy(), mine[name].to_numpy(), err_msg=name)


def test_stretches_beyond_the_last_row_forget_nothing(tmp_path):
    """Where labels mature long after the log's end, requests right after it ask for what was known by then."""
    late = {"label": "liked", "objective": "satisfaction", "matures_after_days": 9}
    features = {
        "item": ALL_KINDS["item"],
        "n": {"kind": "counter", "task": "liked", "by": ["brand"], "window_days": [None, 0.5]},
        "last": {"kind": "history", "task": "liked", "of": "item", "length": 2, "at_least": 0},
    }
    schema = schema_of(features, tasks=SCHEMA.model_dump()["tasks"] | {"liked": late})
    source = str(write_log(tmp_path / "log", random_log(0)))
    windows = {"train": (None, START + 9 * DAY + DAY // 2), "validation": (START + 9 * DAY + DAY // 2, None)}
    windows = {**windows, "test": windows["validation"]}
    few, all_at_once = (
        prepare(source, schema, windows, tmp_path / str(rows), BuildOptions(rows_in_memory=rows))
        for rows in (15, 10**6)
    )
    after = START + 10 * DAY
    asking = log_rows(random_log(0).set_column(2, "time", pa.array([after] * 300, pa.timestamp("us", "UTC"))), schema)
    assert_same(*(FeaturePipeline.load(each.serving).encode(asking) for each in (few, all_at_once)))


def test_no_order_of_files_changes_state_or_encoding(tmp_path, small_pieces):
    table = random_log(6, rows=400)
    parts = _cut(table, 50, 120, 300)
    one = prepare(str(write_log(tmp_path / "a", *parts)), SCHEMA, WINDOWS, tmp_path / "one")
    other = prepare(str(write_log(tmp_path / "b", *parts[::-1])), SCHEMA, WINDOWS, tmp_path / "other")
    assert files_of(one.serving) == files_of(other.serving)
    for split in WINDOWS:
        keys = [("user", "ascending"), ("time", "ascending"), ("candidate", "ascending")]
        mine, theirs = (pq.read_table(each.split(split)).sort_by(keys) for each in (one, other))
        assert mine.equals(theirs)


@pytest.fixture(scope="module")
def ray_is_running():
    """Ray, started once as the engine starts it: it takes its time."""
    with open_engine("ray", 2):
        yield


def _alike_on_two_workers(tmp_path: Path, engine: EngineName) -> None:
    source = str(write_log(tmp_path / "log", *_cut(with_requests(random_log(7, rows=400)), 100, 150)))
    columns = SCHEMA.columns.model_copy(update={"request": "request"})
    schema = SCHEMA.model_copy(update={"columns": columns})
    alone = prepare(source, schema, WINDOWS, tmp_path / "alone", BuildOptions(workers=1, rows_in_memory=300))
    assert alone.manifest["requests"]["several_times"] > 10
    options = BuildOptions(engine=engine, workers=2, rows_in_memory=300)
    assert files_of(prepare(source, schema, WINDOWS, tmp_path / "many", options).folder) == files_of(alone.folder)


def _wrong_on_two_workers(tmp_path: Path, engine: EngineName) -> None:
    table = random_log(8)
    wrong = table.set_column(table.column_names.index("click"), "click", pa.array([2.0] * table.num_rows))
    source = str(write_log(tmp_path / "log", table, wrong))
    with pytest.raises(UserError, match=r"1\.parquet': label column 'click' of binary task 'click' holds 2"):
        prepare(source, SCHEMA, WINDOWS, tmp_path / "work", BuildOptions(engine=engine, workers=2))
    assert list((tmp_path / "work").iterdir()) == []


@pytest.fixture(params=["threads", "processes"])
def two_workers(request, monkeypatch):
    """Two workers are threads, or processes as many are."""
    if request.param == "processes":
        monkeypatch.setattr(steps, "ROWS_FOR_PROCESSES", 0)
        monkeypatch.setattr(engines, "THREADS_AT_MOST", 0)


def test_two_workers_change_no_byte(tmp_path, two_workers):
    _alike_on_two_workers(tmp_path, "local")


def test_ray_changes_no_byte(tmp_path, ray_is_running):
    _alike_on_two_workers(tmp_path, "ray")


def test_a_worker_says_what_is_wrong_with_the_log(tmp_path, two_workers):
    _wrong_on_two_workers(tmp_path, "local")


def test_ray_says_what_is_wrong_with_the_log(tmp_path, ray_is_running):
    _wrong_on_two_workers(tmp_path, "ray")


def test_rows_that_occur_twice(tmp_path, small_pieces):
    table = random_log(9, rows=200)
    source = str(write_log(tmp_path / "log", table, table.slice(150, 2)))
    with pytest.raises(
        UserError,
        match=r"row 0 of '.*1\.parquet' repeats request and candidate \(columns 'user', 'time' and 'item'\) "
        r"of row 150 of '.*0\.parquet'; 2 rows of the log do so: .* data\.duplicates",
    ):
        prepare(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=50))
    prepared = prepare(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=50, duplicates="keep"))
    assert prepared.manifest["rows"] == 202


def test_times_of_two_units(tmp_path):
    table = random_log(10, rows=200)
    seconds = pa.array(times_of(table) // 1_000_000).cast(pa.timestamp("us", tz="UTC"))
    wrong = table.set_column(table.column_names.index("time"), "time", seconds)
    source = str(write_log(tmp_path / "log", table, wrong))
    with pytest.raises(UserError, match=r"column 'time' goes from 1970-01-.*1\.parquet'\) to 20.*in one unit"):
        prepare(source, SCHEMA, WINDOWS, tmp_path)


def test_files_that_turn_out_to_be_bad_are_left_out_and_recorded(tmp_path):
    table = random_log(11, rows=300)
    wrong = table.set_column(table.column_names.index("click"), "click", pa.array([7.0] * table.num_rows))
    folder = write_log(tmp_path / "log", table.slice(0, 150), wrong, table.slice(150))
    (folder / "9.parquet").write_bytes(b"not Parquet")
    prepared = prepare(str(folder), SCHEMA, WINDOWS, tmp_path / "some", BuildOptions(skip_bad_files=True))
    left_out = prepared.manifest["left_out"]
    assert [Path(each["file"]).name for each in left_out] == ["1.parquet", "9.parquet"]
    assert "holds 7" in left_out[0]["reason"]
    good = write_log(tmp_path / "good", table.slice(0, 150), table.slice(150))
    whole = prepare(str(good), SCHEMA, WINDOWS, tmp_path / "whole")
    assert files_of(prepared.folder / "encoded") == files_of(whole.folder / "encoded")
    assert files_of(prepared.serving) == files_of(whole.serving)
    again = prepare(str(folder), SCHEMA, WINDOWS, tmp_path / "some", BuildOptions(skip_bad_files=True))
    assert again.manifest == prepared.manifest


def test_builds_killed_at_random_moments_leave_nothing_that_is_read(tmp_path):
    assert killed_builds(tmp_path, kills=3) >= 3
