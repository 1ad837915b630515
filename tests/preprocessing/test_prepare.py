"""A build in steps: whatever it is divided into and wherever it runs, it gives what one process in memory would."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.layout import EncodedInputs
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.preprocessing import build_steps as engines
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing import look_up
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions, check_work_outside_logs
from mmoe_rec.preprocessing.build_steps import open_engine
from mmoe_rec.preprocessing.extend import extend
from mmoe_rec.preprocessing.prepare import FeatureFolder, find_existing_features, prepare
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import (
    ALL_KINDS,
    DAY,
    assert_same,
    files_of,
    fit_in_memory,
    log_rows,
    random_log,
    remembered,
    save_memories,
    schema_of,
    times_of,
    windows_of,
    with_column,
    with_requests,
    write_log,
)
from tests.preprocessing.growing_log import OF_PURCHASES, schema_with_purchases

SCHEMA = schema_of(ALL_KINDS)
WINDOWS = windows_of(6, 8, start=1)


def _cut(table: pa.Table, *edges: int) -> list[pa.Table]:
    rows = [0, *edges, table.num_rows]
    return [table.slice(start, end - start) for start, end in pairwise(rows)]


def _encoded(prepared: FeatureFolder, split: str) -> tuple[EncodedInputs, pa.Table]:
    table = pq.read_table(prepared.split(split))
    return EncodedInputs.from_arrow(table, prepared.layout), table


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("rows_in_memory", [25, 200, 10**6])
def test_partitions_stretches_and_blocks_change_no_bit(tmp_path, small_pieces, monkeypatch, strings, rows_in_memory):
    asked = []

    class CountedChunk(look_up.TimeChunk):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            asked.append(len(self.rows))

    monkeypatch.setattr(look_up, "TimeChunk", CountedChunk)
    table = random_log(5, rows=500, strings=strings)
    source = str(write_log(tmp_path / "log", *_cut(table, 13, 240, 240, 400)))
    prepared = prepare(BuildInputs(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=rows_in_memory)))
    pipeline = fit_in_memory(SCHEMA, [log_rows(table, SCHEMA)], WINDOWS["train"])
    assert max(asked) <= rows_in_memory, "no chunk of a partition has more rows than memory has room for"
    assert prepared.layout == pipeline.layout
    for split, window in WINDOWS.items():
        encoded, written = _encoded(prepared, split)
        rows: LogRows = log_rows(table, SCHEMA).filter(in_window(times_of(table), window))
        assert_same(encoded, pipeline.encode(rows))
        assert written["time"].cast(pa.int64()).to_pylist() == rows.times().tolist()
    (tmp_path / "memories").mkdir()
    save_memories(pipeline, tmp_path / "memories", int(times_of(table).max()) + 1)
    for file in (tmp_path / "memories").iterdir():
        kept, mine = remembered(prepared.serving / file.name), remembered(file)
        assert kept.schema.metadata == mine.schema.metadata
        for name in mine.column_names:
            np.testing.assert_array_equal(kept[name].to_numpy(), mine[name].to_numpy(), err_msg=name)


@pytest.fixture(scope="module")
def ray_is_running():
    """Ray, started once as the engine starts it: it takes its time."""
    with open_engine("ray", 2):
        yield


@pytest.fixture(params=["threads", "processes", pytest.param("ray", marks=pytest.mark.thorough)])
def two_workers(request, monkeypatch) -> dict[str, Any]:
    """Options for two workers: threads, processes as many are, or Ray's."""
    if request.param == "processes":
        monkeypatch.setattr(steps, "MIN_ROWS_FOR_PROCESSES", 0)
        monkeypatch.setattr(engines, "MAX_THREADS", 0)
    if request.param == "ray":
        request.getfixturevalue("ray_is_running")
    return {"engine": "ray" if request.param == "ray" else "local", "workers": 2}


def test_two_workers_change_no_byte(tmp_path, two_workers):
    source = str(write_log(tmp_path / "log", *_cut(with_requests(random_log(7, rows=400)), 100, 150)))
    columns = SCHEMA.columns.model_copy(update={"request": "request"})
    schema = SCHEMA.model_copy(update={"columns": columns})
    alone = prepare(
        BuildInputs(source, schema, WINDOWS, tmp_path / "alone", BuildOptions(workers=1, rows_in_memory=300))
    )
    assert alone.manifest["requests"]["conflicting_times"] > 10
    options = BuildOptions(**two_workers, rows_in_memory=300)
    assert files_of(prepare(BuildInputs(source, schema, WINDOWS, tmp_path / "many", options)).folder) == files_of(
        alone.folder
    )


def test_a_worker_says_what_is_wrong_with_the_log(tmp_path, two_workers):
    table = random_log(8)
    source = str(write_log(tmp_path / "log", table, with_column(table, "click", [2.0] * table.num_rows)))
    with pytest.raises(
        UserError, match=r"1\.parquet': column 'click' is the label of the binary task 'click' and holds 2"
    ):
        prepare(BuildInputs(source, SCHEMA, WINDOWS, tmp_path / "work", BuildOptions(**two_workers)))
    assert not (tmp_path / "work").exists()


def test_rows_that_occur_twice(tmp_path, small_pieces):
    table = random_log(9, rows=200)
    source = str(write_log(tmp_path / "log", table, table.slice(150, 2)))
    with pytest.raises(
        UserError,
        match=r"row 0 of '.*1\.parquet' repeats request and candidate \(columns 'user', 'time' and 'item'\) "
        r"of row 150 of '.*0\.parquet'\. The log has 2 such rows\. .* data\.on_duplicates",
    ):
        prepare(BuildInputs(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=50)))
    prepared = prepare(
        BuildInputs(source, SCHEMA, WINDOWS, tmp_path, BuildOptions(rows_in_memory=50, on_duplicates="keep"))
    )
    assert prepared.manifest["rows"] == 202


def test_what_was_not_looked_for_is_once_it_is_asked_for(tmp_path):
    table = random_log(9, rows=200)
    twice = str(write_log(tmp_path / "twice", table, table.slice(150, 2)))
    times = pa.array(times_of(table) + 40_000 * DAY).cast(table.schema.field("time").type)
    future = str(write_log(tmp_path / "future", with_column(table, "time", times)))
    late = {name: tuple(t if t is None else t + 40_000 * DAY for t in item) for name, item in WINDOWS.items()}
    cases = {
        "on_duplicates": (twice, WINDOWS, "repeats request and candidate"),
        "on_future_times": (future, late, "a request in the future"),
    }
    for setting, (source, windows, message) in cases.items():
        place, keep = (source, SCHEMA, windows, tmp_path / setting), BuildOptions(**{setting: "keep"})
        prepared = prepare(BuildInputs(*place, keep))
        assert find_existing_features(BuildInputs(*place, keep)) == prepared
        assert find_existing_features(BuildInputs(*place)) is None
        with pytest.raises(UserError, match=message):
            prepare(BuildInputs(*place))
        assert find_existing_features(BuildInputs(*place, keep)) == prepared


def test_files_that_turn_out_to_be_bad_are_left_out_and_recorded(tmp_path):
    table = random_log(11, rows=300)
    wrong = with_column(table, "click", pa.array([7.0] * table.num_rows))
    folder = write_log(tmp_path / "log", table.slice(0, 150), wrong, table.slice(150))
    (folder / "9.parquet").write_bytes(b"not Parquet")
    place, skipping = (str(folder), SCHEMA, WINDOWS, tmp_path / "some"), BuildOptions(skip_bad_files=True)
    prepared = prepare(BuildInputs(*place, skipping))
    skipped = prepared.manifest["skipped"]
    assert [Path(item["file"]).name for item in skipped] == ["1.parquet", "9.parquet"]
    assert "holds 7" in skipped[0]["reason"]
    good = write_log(tmp_path / "good", table.slice(0, 150), table.slice(150))
    whole = prepare(BuildInputs(str(good), SCHEMA, WINDOWS, tmp_path / "whole"))
    assert files_of(prepared.folder / "encoded") == files_of(whole.folder / "encoded")
    assert files_of(prepared.serving) == files_of(whole.serving)
    # They do not stand where none may be skipped, also where one can be opened.
    (folder / "9.parquet").unlink()
    assert find_existing_features(BuildInputs(*place)) is None
    with pytest.raises(UserError, match=r"1\.parquet': column 'click' .* holds 7"):
        prepare(BuildInputs(*place))
    # What was built stays, and stands where bad files may be skipped, however the log is addressed.
    for source in (str(folder), f"{folder}/", f"{folder}/*.parquet"):
        assert find_existing_features(BuildInputs(source, *place[1:], skipping)) == prepared
    # Without these files, they are what a build would give.
    (folder / "1.parquet").unlink()
    assert find_existing_features(BuildInputs(*place)) == prepare(BuildInputs(*place)) == prepared


def test_a_log_that_takes_in_what_is_built_is_refused_before_anything_is(tmp_path):
    source = write_log(tmp_path / "log", random_log(0, 300))
    events = {"purchases": {"path": str(tmp_path), "time": "time"}}
    inside, separate = source / "work", tmp_path / "apart"
    own = (
        r"`data.log` '.*/log' includes files that are written to `data.work_dir` '.*/log/work'.*Set `data.work_dir` "
        r"to a folder outside"
    )
    theirs = r"`data.events.purchases.path` '.*' includes files that are written to `data.work_dir` '.*/apart'"
    for schema, work, message in ((SCHEMA, inside, own), (schema_of(ALL_KINDS, events=events), separate, theirs)):
        for built in (prepare, find_existing_features, extend):
            with pytest.raises(UserError, match=message):
                built(BuildInputs(str(source), schema, WINDOWS, work))
        assert not work.exists()


def test_no_pattern_takes_in_any_file_of_what_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = {"user": "user", "candidate": "item", "time": "time", "request": "request"}
    schema = schema_of(ALL_KINDS, columns=columns)
    table = with_requests(random_log(0, 300), spread=1)
    built = prepare(BuildInputs(str(write_log(tmp_path / "log", table)), schema, WINDOWS, tmp_path / "work"))
    files = [file.relative_to(tmp_path / "work") for file in built.folder.rglob("*.parquet")]
    assert {file.parts[1] for file in files} == {"counts", "encoded", "requests", "serving"}
    shutil.rmtree(tmp_path / "work")
    for file in files:
        name = "part-*.parquet" if file.name.startswith("part-") else "*.parquet"
        pattern = "/".join(["work", *("*" for _ in file.parents[1:]), name])
        with pytest.raises(UserError, match=r"includes files that are written to `data\.work_dir` 'work'"):
            check_work_outside_logs(pattern, schema, Path("work"))
    for source in ("work/features", "work/features/encoded/*/*.parquet", "work/model/**/*.parquet", "work/champion"):
        with pytest.raises(UserError, match=r"includes files that are written to `data\.work_dir` 'work'"):
            check_work_outside_logs(source, schema, Path("work"))
    # Logs may lie beside what is written.
    check_work_outside_logs("work/*/*.parquet", schema, Path("work"))


@pytest.mark.parametrize(
    "names",
    [
        {"user": "(time)", "item": "(event)", "brand": "a.b", "price": "a", "tags": "a.b.c", "time": "row"},
        {"user": "key", "item": "known", "brand": "time", "price": "label", "tags": "value", "time": "0"},
        {"user": "der\nNutzer", "item": "'item'", "brand": 'a "b"', "price": " ", "tags": "ключ/🙂", "time": "\\t"},
        {"user": "element", "item": "list", "brand": "{brand}", "price": "%s", "tags": "*", "age": "id.item"},
    ],
)
def test_names_of_columns_change_nothing(tmp_path, names):
    events = random_log(1, 200).rename_columns({"time": "at"})
    named = ("among",)  # Its inputs have the names of columns.
    features = {name: feature for name, feature in ALL_KINDS.items() if name not in named} | {
        "bought": {"kind": "history", "events": "bought", "of": "item"},
        "rows": {"kind": "counter", "events": "bought", "by": ["user", "brand"], "outputs": ["log_count", "recency"]},
    }
    prepared = []
    for renamed in ({}, names):
        folder = tmp_path / str(len(prepared))
        source = write_log(folder / "log", _renamed(random_log(0, 300), renamed))
        bought = write_log(folder / "bought", _renamed(events, renamed))
        tree = schema_of(features, events={"bought": {"path": str(bought), "time": "at"}}).model_dump(mode="json")
        schema = kinds.parse_schema(_with_columns(tree, renamed))
        prepared.append(prepare(BuildInputs(str(source), schema, WINDOWS, folder / "work")))
    plain, odd = prepared
    for split in WINDOWS:
        assert_same(_encoded(plain, split)[0], _encoded(odd, split)[0])
        assert _encoded(plain, split)[1].equals(_encoded(odd, split)[1])
    for role in ("user", "candidate"):
        plain_latest, odd_latest = (pq.read_table(item.serving / f"latest.{role}.parquet") for item in prepared)
        assert odd_latest.equals(_renamed(plain_latest, names))


def _renamed(table: pa.Table, names: dict[str, str]) -> pa.Table:
    return table.rename_columns([names.get(name, name) for name in table.column_names])


def _with_columns(tree: Any, names: dict[str, str]) -> Any:
    """A schema's tree with other names of columns, wherever one is named."""
    naming = {"column", "columns", "by", "user", "candidate", "context", "placement", "time", "label"}

    def change(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change(name, item) for name, item in value.items()}
        if isinstance(value, list):
            return [change(key, item) for item in value]
        return names.get(value, value) if key in naming and isinstance(value, str) else value

    return change("", tree)


LOG = random_log(0)


def _events(seed: int, rows: int = 200) -> pa.Table:
    """Purchases at some of the log's own times and between them."""
    table = random_log(0, 300).slice(0, 300).take(pa.array(np.random.default_rng(seed).integers(0, 300, rows)))
    shift = np.random.default_rng(seed).choice([0, 0, 1, -1, DAY // 3], rows)
    times = pa.array(times_of(table) + shift).cast(table["time"].type)
    return table.select(["user", "item", "brand"]).append_column("bought_at", times)


def _schema(path: Path) -> Schema:
    return schema_with_purchases({"item": ALL_KINDS["item"], **OF_PURCHASES}, path)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (None, r"does not exist. Set data.events.purchases.path"),
        (_events(0).drop_columns(["brand"]), r"0.parquet' has no column 'brand'"),
        (
            with_column(_events(0), "item", [""] * 200),
            r"column 'item' has the type string in events 'purchases', but int",
        ),
    ],
)
def test_bad_events(tmp_path, events, message):
    path = tmp_path / "purchases" if events is None else write_log(tmp_path / "purchases", events)
    with pytest.raises(UserError, match=message):
        prepare(BuildInputs(str(write_log(tmp_path / "log", LOG)), _schema(path), WINDOWS, tmp_path / "work"))
    assert not list(tmp_path.glob("work/*"))


def test_changed_events_are_built_again(tmp_path):
    path = write_log(tmp_path / "purchases", _events(0))
    log = str(write_log(tmp_path / "log", LOG))
    first = prepare(BuildInputs(log, _schema(path), WINDOWS, tmp_path / "work")).manifest
    assert first["events"] == {"purchases": {"files": 1, "rows": 200}}
    write_log(path, _events(1, rows=150))
    second = prepare(BuildInputs(log, _schema(path), WINDOWS, tmp_path / "work")).manifest
    assert second["events"]["purchases"]["rows"] == 150
