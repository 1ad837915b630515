"""Closed segments as files of the logs: the rows that followers hold, in the logs' own types, for builds to read."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.journal.checked import RowChecks, known_types
from mmoe_rec.journal.checkpoints import checkpoints, duplicates_after, remove_through
from mmoe_rec.journal.duplicates import Duplicates
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.parquet_files import write_files
from mmoe_rec.journal.records import Batch
from mmoe_rec.journal.segments import segment_numbers
from mmoe_rec.log.columns import canonical, column_uses, event_uses
from mmoe_rec.log.reader import EventRows, Log
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import DAY, START, files_of, times_of
from tests.preprocessing.growing_log import Growing

_UTC = pa.timestamp("us", tz="UTC")


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    """Eight days, prepared; four more are to come."""
    return Growing.of_eight_days(tmp_path)


def _rows_of(growing: Growing, start: float, end: float) -> tuple[pa.Table, pa.Table]:
    """Interactions and events of some days, as they come."""
    window = (START + int(start * DAY), START + int(end * DAY))
    rows = growing.table.filter(pa.array(in_window(times_of(growing.table), window)))
    return rows, growing.events.filter(pa.array(in_window(growing.written, window)))


def _post(journal: Journal, growing: Growing, start: float, end: float, size: int = 7) -> None:
    """Sends the rows of some days as a caller would, every third batch twice."""
    pipeline = FeaturePipeline.load(growing.work / "features" / "serving", memories=False)
    checks = RowChecks(growing.schema, known_types(pipeline))
    rows, events = _rows_of(growing, start, end)
    for first in range(0, max(len(rows), len(events)), size):
        batches = []
        if len(part := rows.slice(first, size)):
            batches.append(Batch(None, 0, checks.of_table(None, part)))
        if len(part := events.slice(first, size)):
            numbers = pa.array(range(int(1000 * start) + first, int(1000 * start) + first + len(part)))
            part = part.append_column("event_id", numbers)
            batches.append(Batch("purchases", 0, checks.of_table("purchases", part)))
        for _ in range(1 + (first // size % 3 == 0)):
            journal.append(*batches)


def _write(growing: Growing, through: int, after: int = 0, schema: Schema | None = None):
    return write_files(growing.folder / "journal", schema or growing.schema, through, growing.source, after)


def _live(growing: Growing, most_rows: int) -> dict[str | None, list[pa.Table]]:
    """What a follower holds."""
    duplicates, follower = Duplicates(growing.schema), Follower(growing.folder / "journal")
    found: dict[str | None, list[pa.Table]] = {}
    while batches := follower.read(most_rows):
        for source, taken in duplicates.take(batches).items():
            found.setdefault(source, []).append(taken.table)
    return found


def test_extending_by_them_gives_the_features_of_the_days_files(growing, tmp_path):
    """The same days once from files as they always came, once through a journal and its duplicates."""
    shutil.copytree(tmp_path / "work", tmp_path / "kept")
    for name in ("log", "events"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name} kept")
    growing.add(8, 10)
    growing.extend()
    expected = _serving(growing.work)
    shutil.rmtree(growing.work)
    (tmp_path / "kept").rename(growing.work)
    for name in ("log", "events"):
        shutil.rmtree(tmp_path / name)
        (tmp_path / f"{name} kept").rename(tmp_path / name)
    journal = Journal(tmp_path / "journal", segment_bytes=20_000)
    _post(journal, growing, 8, 10)
    through = journal.close_segment()
    assert through > 2
    written = _write(growing, through)
    assert written.counts[None].duplicate > 5
    assert written.counts["purchases"].duplicate > 5
    extended = growing.extend()
    assert extended is not None
    assert extended.files == len(written.files)
    found = _serving(growing.work)
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        assert table.equals(found[name]), name


def _serving(work: Path) -> dict[str, pa.Table]:
    folder = work / "features" / "serving"
    return {
        path.relative_to(folder).as_posix(): pq.read_table(path)
        for path in [*sorted(folder.glob("*.memory/*.parquet")), *sorted(folder.glob("*.parquet"))]
    }


@pytest.mark.parametrize("most_rows", [1, 50, 10**6])
def test_files_hold_what_followers_hold(growing, most_rows):
    journal = Journal(growing.folder / "journal", segment_bytes=8000)
    _post(journal, growing, 8, 9)
    _post(journal, growing, 9, 9.5)
    _post(journal, growing, 8, 8.5, size=3)
    written = _write(growing, journal.close_segment())
    live = _live(growing, most_rows)
    assert written.counts["purchases"].accepted + written.counts[None].accepted == sum(
        len(table) for tables in live.values() for table in tables
    )
    log = Log(growing.source, growing.schema)
    events = EventRows("purchases", log)
    for source, files in ((None, log), ("purchases", events)):
        uses = column_uses(growing.schema) if source is None else event_uses(growing.schema, source)
        own = [path for path in written.files if path.is_relative_to(files.source)]
        assert {str(path) for path in own} <= {file.address for file in files.files}
        table = pa.concat_tables([pq.read_table(path) for path in sorted(own)])
        expected = pa.concat_tables(live[source], promote_options="default")
        for name, use in uses.items():
            assert canonical(name, use, table[name]).equals(canonical(name, use, expected[name])), name
    assert sum(len(rows) for rows in log.stream()) == log.rows
    assert sum(len(rows) for rows in events.stream()) == events.rows


def test_files_are_written_once_and_alike(growing, tmp_path):
    journal = Journal(tmp_path / "journal", segment_bytes=8000)
    _post(journal, growing, 8, 9)
    through = journal.close_segment()
    written = _write(growing, through)
    assert len({path.name for path in written.files}) > 2
    assert all(path.name.startswith(f"journal-{journal.id}-0000000") for path in written.files)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written.files}
    again = _write(growing, through)
    assert again.files == written.files
    assert again.counts == written.counts
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in again.files}
    for path in written.files[1::2]:
        path.unlink()
    _write(growing, through)
    assert {path: path.read_bytes() for path in written.files} == {
        path: content for path, (content, _) in before.items()
    }
    logs = files_of(tmp_path / "log"), files_of(tmp_path / "events")
    _post(journal, growing, 9, 10)
    one = _write(growing, journal.close_segment(), after=through)
    assert not {path.name for path in one.files} & {path.name for path in written.files}
    for path in one.files:
        path.unlink()
    assert (files_of(tmp_path / "log"), files_of(tmp_path / "events")) == logs
    whole = _write(growing, segment_numbers(tmp_path / "journal")[-1] - 1)
    assert {path.name for path in whole.files} == {path.name for path in (*written.files, *one.files)}


def test_a_segment_without_rows_of_a_log_gives_no_file(growing, tmp_path):
    journal = Journal(tmp_path / "journal")
    table = pa.table(
        {"user": [5], "item": [3], "brand": ["a"], "bought_at": pa.array([START]).cast(_UTC), "event_id": [1]}
    )
    for _ in range(2):
        journal.append(Batch("purchases", 0, table))
        journal.close_segment()
    written = _write(growing, 2)
    assert [path.parent.name for path in written.files] == ["events"], "what segment 2 holds came before"
    journal.append(Batch("gone", 0, table))
    assert _write(growing, journal.close_segment(), after=2).unknown == {"gone": 1}


def test_columns_have_the_types_of_the_logs_files(growing, tmp_path):
    for path in (tmp_path / "log").iterdir():
        path.unlink()
    rows, _ = _rows_of(growing, 0, 8)
    types = {
        "user": pa.int64(), "item": pa.int64(), "time": pa.timestamp("ns"), "click": pa.bool_(), "liked": pa.int8(),
        "spent": pa.decimal128(20, 3), "brand": pa.dictionary(pa.int32(), pa.string()), "price": pa.float32(),
        "tags": pa.large_list(pa.large_string()), "born": pa.date32(), "slot": pa.int8(), "age": pa.int8(),
    }  # fmt: skip
    fields = [pa.field(name, types[name], nullable=name != "user") for name in rows.column_names]
    empty = pa.schema([*fields, pa.field("colour", pa.string())], {"written": "by somebody"}).empty_table()
    pq.write_table(empty, tmp_path / "log" / "0.parquet")
    journal = Journal(tmp_path / "journal")
    _post(journal, growing, 8, 9)
    (path,) = (each for each in _write(growing, journal.close_segment()).files if each.parent.name == "log")
    schema, table = pq.read_schema(path), pq.read_table(path)
    expected = pq.read_schema(tmp_path / "log" / "0.parquet")
    assert schema.names == expected.names
    # Fractions, instants and numbers of these rows do not fit: both types are read alike.
    wide = {"spent": pa.float64(), "price": pa.float64(), "born": _UTC}
    for name in schema.names:
        assert schema.field(name).type == wide.get(name, expected.field(name).type), name
    assert table["colour"].null_count == table["age"].null_count == len(table)
    live = pa.concat_tables(_live(growing, 100)[None], promote_options="default")
    for name, use in column_uses(growing.schema).items():
        assert canonical(name, use, table[name]).equals(canonical(name, use, live[name])), name


def test_integer_times_stay_integers(tmp_path):
    schema = _simple(time_unit="ms")
    rows = pa.table({"user": [1], "item": [2], "at": [START // 1000], "click": [1]})
    (tmp_path / "log").mkdir()
    pq.write_table(rows, tmp_path / "log" / "0.parquet")
    journal = Journal(tmp_path / "journal")
    checks = RowChecks(schema)
    journal.append(Batch(None, 0, checks.of_json(None, [{"user": 1, "item": 3, "at": START // 1000 + 5, "click": 0}])))
    (path,) = write_files(tmp_path / "journal", schema, journal.close_segment(), str(tmp_path / "log")).files
    assert pq.read_table(path).to_pylist() == [{"user": 1, "item": 3, "at": START // 1000 + 5, "click": 0}]
    finer = pa.array([START + 7]).cast(_UTC)
    journal.append(Batch(None, 0, pa.table({"user": [1], "item": [3], "at": finer, "click": [0.0]})))
    (path,) = write_files(tmp_path / "journal", schema, journal.close_segment(), str(tmp_path / "log"), 1).files
    assert pq.read_table(path)["at"].type == _UTC, "milliseconds could not hold it"
    assert [rows.times().tolist() for rows in Log(str(tmp_path / "log"), schema).stream()] == [
        [START // 1000 * 1000, START // 1000 * 1000 + 5000, START + 7]
    ]


def _simple(**columns: str) -> Schema:
    return kinds.schema_of(
        {
            "columns": {"user": "user", "candidate": "item", "time": "at", **columns},
            "tasks": {"click": {"label": "click"}},
            "features": {"item": {"kind": "id", "column": "item"}},
        }
    )


def test_rows_of_a_request_have_one_time_in_the_files(tmp_path):
    """So that a build gives all of them the time that a follower gave them."""
    schema = _simple(request="request")
    (tmp_path / "log").mkdir()
    journal = Journal(tmp_path / "journal")
    for hours in ((2, 1), (0, 3)):
        times = pa.array([START + hour * 3_600_000_000 for hour in hours]).cast(_UTC)
        items = [10 * hours[0], 10 * hours[0] + 1]
        journal.append(
            Batch(
                None, 0, pa.table({"user": [1, 1], "item": items, "at": times, "request": [5, 5], "click": [0.0, 1.0]})
            )
        )
    (path,) = write_files(tmp_path / "journal", schema, journal.close_segment(), str(tmp_path / "log")).files
    table = pq.read_table(path)
    assert table["at"].cast(pa.int64()).to_pylist() == [START + 3_600_000_000] * 4
    assert table["click"].to_pylist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("s3://bucket/log", "is remote"),
        ("{}/log/100.parquet", "is no folder"),
        ("{}/elsewhere", "is no folder"),
        ("{}/log/1*.parquet", "is no folder, and no pattern that takes in 'journal-"),
        ("{}/*/x*/*.parquet", "is no folder, and no pattern"),
    ],
)
def test_places_that_take_no_files(growing, tmp_path, source, sentence):
    journal = Journal(tmp_path / "journal")
    _post(journal, growing, 8, 9)
    before = files_of(tmp_path / "log")
    with pytest.raises(UserError, match=sentence) as error:
        write_files(tmp_path / "journal", growing.schema, journal.close_segment(), source.format(tmp_path))
    assert "`data.log`" in str(error.value)
    assert files_of(tmp_path / "log") == before
    assert checkpoints(tmp_path / "journal") == [], "nothing says that they were written"


def test_patterns_that_take_files(growing, tmp_path):
    journal = Journal(tmp_path / "journal")
    _post(journal, growing, 8, 9)
    through = journal.close_segment()
    for source in ("{}/log/*.parquet", "file://{}/log", "{}/log/**", "{}/log/**/*.parquet"):
        written = write_files(tmp_path / "journal", growing.schema, through, source.format(tmp_path)).files
        own = [path for path in written if path.parent == tmp_path / "log"]
        assert len(own) == 1
        assert str(own[0]) in {file.address for file in Log(source.format(tmp_path), growing.schema).files}
        own[0].unlink()


def test_segments_that_are_not_there_or_not_closed(growing, tmp_path):
    journal = Journal(tmp_path / "journal")
    _post(journal, growing, 8, 9)
    for through in (1, 2):
        with pytest.raises(UserError, match=f"segment {through} of the journal .* is not closed; the last one is 0"):
            _write(growing, through)
    journal.close_segment()
    with pytest.raises(UserError, match="can't be read after segment 2: its closed segments allow 0 to 1"):
        _write(growing, 3, after=2)


def test_old_segments_can_be_removed_and_their_rows_stay_known(growing, tmp_path):
    folder = tmp_path / "journal"
    journal = Journal(folder, segment_bytes=8000)
    _post(journal, growing, 8, 9)
    first = journal.close_segment()
    _write(growing, first)
    _post(journal, growing, 9, 10)
    second = journal.close_segment()
    with pytest.raises(UserError, match=f"possible are: {first}$"):
        remove_through(folder, second)
    with pytest.raises(UserError, match="is not closed, so it can't be removed"):
        remove_through(folder, second + 1)
    middle = Follower(folder).position
    counts = _write(growing, second, after=first).counts
    _post(journal, growing, 8, 10, size=11)  # all of it once more, in other batches
    third = journal.close_segment()
    whole = _write(growing, third, after=second)
    assert whole.counts[None].accepted == 0
    expected, _ = duplicates_after(folder, growing.schema, second)
    assert remove_through(folder, first) == list(range(1, first + 1))
    assert remove_through(folder, first) == []
    assert segment_numbers(folder)[0] == first + 1
    assert checkpoints(folder) == [first, second, third]
    with pytest.raises(RequestError, match="lies in a segment that was removed"):
        Follower(folder, middle)
    assert _write(growing, second, after=first).counts == counts
    assert remove_through(folder, second) == list(range(first + 1, second + 1))
    assert checkpoints(folder) == [second, third]
    found, follower = duplicates_after(folder, growing.schema, second)
    for name, values in expected.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], values)
    while batches := follower.read():
        taken = found.take(batches)
        assert None not in taken or len(taken[None].table) == 0, "all of these came in segments that are gone"
    with pytest.raises(UserError, match=f"after segment {first}: its closed segments allow {second} to {third}"):
        duplicates_after(folder, growing.schema, first)
    assert journal.append() == Follower(folder, journal.end()).position
    for damage in (b"", b"PK\x03\x04nonsense"):
        (folder / f"duplicates-{second:08d}.npz").write_bytes(damage)
        with pytest.raises(UserError, match=r"duplicates-\d+.npz' is damaged"):
            duplicates_after(folder, growing.schema, second)
    (folder / f"duplicates-{second:08d}.npz").unlink()
    with pytest.raises(UserError, match="it is not known which rows came in the segments that were removed"):
        duplicates_after(folder, growing.schema, second)


def test_extend_refuses_nothing_after_a_rerun(growing, tmp_path):
    """A crash between the files and what follows: the same call again changes no file that features hold already."""
    journal = Journal(tmp_path / "journal", segment_bytes=20_000)
    _post(journal, growing, 8, 9)
    through = journal.close_segment()
    _write(growing, through)
    assert growing.extend() is not None
    _write(growing, through)
    assert growing.extend() is None
