"""What a journal holds as files of the logs: the rows that readers hold, in the logs' own types, for builds to read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.live import journal_rows
from mmoe_rec.live.journal import Batch, Journal
from mmoe_rec.live.journal_rows import RowValidator, join_by_log, make_batch, write_journal_files
from mmoe_rec.log.columns import canonicalize, column_uses, event_column_uses
from mmoe_rec.log.reader import EventLogFiles, Log
from mmoe_rec.point_in_time.join import in_window
from tests.log.small_logs import DAY, START, files_of, times_of
from tests.preprocessing.growing_log import Growing
from tests.server.asking import as_json

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
    pipeline = FeaturePipeline.load(growing.work / "features" / "serving", stores=False)
    validator = RowValidator(pipeline)
    rows, events = _rows_of(growing, start, end)
    for first in range(0, max(len(rows), len(events)), size):
        batches = []
        if len(part := rows.slice(first, size)):
            batches.append(make_batch(None, validator.read_json(None, as_json(part)), pipeline.schema))
        if len(part := events.slice(first, size)):
            numbers = pa.array(range(int(1000 * start) + first, int(1000 * start) + first + len(part)))
            part = part.append_column("event_id", numbers)
            batches.append(make_batch("purchases", validator.read_json("purchases", as_json(part)), pipeline.schema))
        for _ in range(1 + (first // size % 3 == 0)):
            journal.append(*batches)


def _write(growing: Growing, journal: Journal, after: int = 0, **more: int) -> list[Path]:
    """Write the journal's files, and return the new ones."""
    before = _files(growing, journal)
    assert write_journal_files(journal, growing.schema, growing.source, after, **more) == journal.last_position()
    return [path for path in _files(growing, journal) if path not in before]


def _files(growing: Growing, journal: Journal) -> list[Path]:
    return sorted(growing.folder.rglob(f"journal-{journal.id}-*.parquet"), key=lambda path: (path.name, path))


def _live(growing: Growing, journal: Journal, max_rows: int = 1000) -> dict[str | None, list[pa.Table]]:
    """What a reader holds."""
    after = 0
    tables: dict[str | None, list[pa.Table]] = {}
    while batches := journal.read(after, max_rows):
        for log_name, rows in join_by_log(batches, growing.schema).items():
            tables.setdefault(log_name, []).append(rows.table)
        after = batches[-1].position
    return tables


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.db")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one refresh cuts a journal several times."""
    monkeypatch.setattr(journal_rows, "MAX_FILE_ROWS", 20)


@pytest.mark.parametrize("max_rows", [1, 50, 10**6])
@pytest.mark.usefixtures("small_files")
def test_files_hold_what_readers_hold(growing, journal, max_rows):
    _post(journal, growing, 8, 9)
    _post(journal, growing, 9, 9.5)
    _post(journal, growing, 8, 8.5, size=3)
    written = _write(growing, journal)
    live = _live(growing, journal, max_rows)
    log = Log(growing.source, growing.schema)
    events = EventLogFiles("purchases", log)
    for source, files in ((None, log), ("purchases", events)):
        uses = column_uses(growing.schema) if source is None else event_column_uses(growing.schema, source)
        own = [path for path in written if path.is_relative_to(files.source)]
        assert {str(path) for path in own} <= {file.uri for file in files.files}
        table = pa.concat_tables([pq.read_table(path) for path in sorted(own)])
        expected = pa.concat_tables(live[source], promote_options="default")
        for name, use in uses.items():
            assert canonicalize(name, use, table[name]).equals(canonicalize(name, use, expected[name])), name
    assert sum(len(rows) for rows in log.stream()) == log.rows
    assert sum(len(rows) for rows in events.stream()) == events.rows


@pytest.mark.usefixtures("small_files")
def test_files_are_written_once_and_alike(growing, journal):
    """After a crash the files that are there stay as they are, and the others are written alike."""
    _post(journal, growing, 8, 9)
    written = _write(growing, journal)
    assert len({path.name for path in written}) > 1
    assert all(path.name.startswith(f"journal-{journal.id}-00000000") for path in written)
    before, through = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written}, journal.last_position()
    assert _write(growing, journal) == []
    for killed_after in (1, 2, len(before) - 1):
        for path in written[killed_after:]:
            path.unlink()
        assert _write(growing, journal) == written[killed_after:]
        assert {path: path.read_bytes() for path in before} == {path: item for path, (item, _) in before.items()}
    assert written[0].stat().st_mtime_ns == before[written[0]][1]
    _post(journal, growing, 9, 10)
    more = _write(growing, journal, after=through)
    assert more
    assert not {path.name for path in more} & {path.name for path in written}


def test_rows_that_do_not_count_give_no_file(growing, journal, capsys):
    table = pa.table(
        {"user": [5], "item": [3], "brand": ["a"], "bought_at": pa.array([START]).cast(_UTC), "event_id": [1]}
    )
    journal.append(make_batch("purchases", table, growing.schema))
    assert [path.parent.name for path in _write(growing, journal)] == ["events"]
    journal.append(make_batch("purchases", table, growing.schema), Batch("gone", 0, table), Batch("gone", 0, table))
    assert _write(growing, journal, after=1) == []
    assert "skipped 2 rows of the journal: the settings have no event log 'gone'" in capsys.readouterr().err


def test_rows_are_read_beside_files_of_other_types(journal: Journal, tmp_path: Path) -> None:
    """Such as times that are integers."""
    columns = {"user": "user", "candidate": "item", "time": "at", "time_unit": "ms"}
    features = {"item": {"kind": "id", "column": "item"}}
    schema = kinds.parse_schema({"columns": columns, "tasks": {"click": {"label": "click"}}, "features": features})
    rows = pa.table({"user": [1], "item": pa.array([2], pa.int8()), "at": [START // 1000], "click": [True]})
    (tmp_path / "log").mkdir()
    pq.write_table(rows.append_column("colour", pa.array(["red"])), tmp_path / "log" / "0.parquet")
    row = {"user": 1, "item": 3, "at": START // 1000 + 5, "click": 0}
    journal.append(Batch(None, 0, RowValidator(FeaturePipeline(schema)).read_json(None, [row])))
    write_journal_files(journal, schema, str(tmp_path / "log"))
    (rows,) = Log(str(tmp_path / "log"), schema).stream()
    assert rows.times().tolist() == [START // 1000 * 1000, START // 1000 * 1000 + 5000]
    assert (rows.column("item").to_pylist(), rows.column("click").to_pylist()) == ([2, 3], [1, 0])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("s3://bucket/log", "is remote"),
        ("{}/log/100.parquet", "is not a folder"),
        ("{}/elsewhere", "is not a folder"),
        ("{}/log/1*.parquet", "is not a folder, and its pattern doesn't match 'journal-"),
        ("{}/*/x*/*.parquet", "is not a folder, and its pattern"),
    ],
)
def test_places_that_take_no_files(growing, journal, tmp_path, source, sentence):
    _post(journal, growing, 8, 9)
    before = files_of(tmp_path / "log")
    with pytest.raises(UserError, match=sentence) as error:
        write_journal_files(journal, growing.schema, source.format(tmp_path))
    assert "`data.log`" in str(error.value)
    assert files_of(tmp_path / "log") == before


def test_patterns_that_take_files(growing, tmp_path):
    for number, source in enumerate(("{}/log/*.parquet", "file://{}/log", "{}/log/**", "{}/log/**/*.parquet")):
        journal = Journal(tmp_path / f"{number}.db")
        _post(journal, growing, 8, 9)
        write_journal_files(journal, growing.schema, source.format(tmp_path))
        own = [*(tmp_path / "log").glob(f"journal-{journal.id}-*")]
        assert len(own) == 1
        assert str(own[0]) in {file.uri for file in Log(source.format(tmp_path), growing.schema).files}
        own[0].unlink()


def test_old_batches_can_be_removed_and_their_rows_stay_known(growing, journal):
    _post(journal, growing, 8, 9)
    first = journal.last_position()
    _post(journal, growing, 9, 10)
    second = journal.last_position()
    _post(journal, growing, 8, 10, size=11)  # all of it once more, in other batches
    third = journal.last_position()
    journal.remove_until(first)
    journal.remove_until(first)
    assert (journal.removed_until(), journal.last_position(), journal.read(first)[0].position) == (
        first,
        third,
        first + 1,
    )
    with pytest.raises(UserError, match=r"were removed\. Use a model whose tables include them"):
        journal.read(first - 1)
    journal.remove_until(second)
    again = [item for item in journal.read(second) if item.log_name is None]
    assert sum(map(len, again)) == 0
    assert sum(item.duplicates for item in again) > 20, "all of these came in batches that are gone"
    journal.remove_until(third)
    journal.remove_until(first)  # by the refresh of a model that is behind
    assert (journal.removed_until(), journal.last_position(), Journal(journal.name).last_position()) == (third,) * 3
    assert journal.append(Batch("gone", 0, pa.table({"x": [1]}))) == third + 1
    assert [batch.position for batch in journal.read(third)] == [third + 1]


def test_rows_that_tables_know_already_are_left_out(
    growing: Growing, journal: Journal, capsys: pytest.CaptureFixture
) -> None:
    """Rows of the moment up to which the tables know the log are among them."""
    times = pa.array([START + number for number in (1, 2, 3)]).cast(_UTC)
    table = pa.table({"user": [5] * 3, "item": [1, 2, 3], "brand": ["a"] * 3, "bought_at": times})
    journal.append(make_batch("purchases", table, growing.schema))
    (path,) = _write(growing, journal, later_than=START + 2)
    assert pq.read_table(path)["item"].to_pylist() == [3]
    assert "skipped 2 rows of the journal: not later than" in capsys.readouterr().err
