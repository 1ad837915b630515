"""A journal in SQLite and in PostgreSQL: what is acknowledged is read by all, in one order, whatever is killed."""

import os
import resource
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import sqlalchemy as sql

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.live import journal as module
from mmoe_rec.live.journal import Batch, Journal, parse_position
from tests.fork_server import call
from tests.live.journals import (
    THOUSANDS,
    PostgreSQL,
    all_numbers,
    append_and_tell,
    batch,
    every_batch,
    follow_and_tell,
    numbers_in,
)
from tests.processes import until


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of an SQLite database that is not there yet."""
    return tmp_path / "journal.db"


def test_batches_come_back_as_they_were(address: str) -> None:
    tables = [
        pa.table({"id": ["a", None, "ü"], "x": [1.5, None, -0.0], "many": [[1], None, []], "none": pa.nulls(3)}),
        pa.table({"at": pa.array([1, 2], pa.timestamp("us", tz="UTC"))}),
        pa.table({"id": ["b"] * 4000}).slice(7, 3000),
    ]
    journal = Journal(address)
    assert journal.append(Batch(None, 5, tables[0]), Batch("views", 3, tables[1])) == 2
    assert journal.append(Batch(None, 9, tables[2])) == journal.append() == journal.append(batch()) == 3
    batches = list(every_batch(Journal(address, create=False)))
    assert [(item.log_name, item.accepted_at, item.position) for item in batches] == [
        (None, 5, 1),
        ("views", 3, 2),
        (None, 9, 3),
    ]
    assert [item.table.to_pydict() for item in batches] == [table.to_pydict() for table in tables]
    assert [item.table.schema for item in batches] == [table.schema for table in tables]


def test_reading_goes_on_from_each_position(address: str) -> None:
    journal = Journal(address)
    assert journal.last_position() == 0
    assert journal.read(0) == []
    for number in range(12):
        assert journal.append(batch(2 * number, 2 * number + 1)) == number + 1
    for after in range(13):
        assert numbers_in(list(every_batch(journal, after, max_rows=1))) == list(range(2 * after, 24))
    assert [len(journal.read(0, max_rows)) for max_rows in (1, 2, 3, 1000)] == [1, 1, 2, 12]
    assert numbers_in(journal.read(3, through=5)) == [6, 7, 8, 9]
    with pytest.raises(UserError, match="it ends with batch 12, and 13 were acknowledged"):
        journal.read(13)
    assert Journal(address).id == journal.id


@pytest.mark.parametrize(
    "text", ["", "-1", "1.0", "12 ", "12\n", "\uff11", "1e3", "9" * 19, "1-32", None, 5, "a" * 999]
)
def test_nonsense_is_no_position(text: object) -> None:
    with pytest.raises(RequestError, match="is not a position of a journal") as error:
        parse_position(text)
    assert len(str(error.value)) < 200


def test_columns_keep_their_types(address: str) -> None:
    """A request 12 and one "12" have other hashes: they would count twice."""
    journal, second = Journal(address), Journal(address)
    journal.append(Batch(None, 0, pa.table({"request": [12], "label": pa.nulls(1)})))
    with pytest.raises(RequestError, match="column 'request' contains string, but int64 in earlier rows"):
        second.append(Batch(None, 0, pa.table({"request": ["12"]})))
    second.append(Batch("views", 0, pa.table({"request": ["12"]})))
    second.append(Batch(None, 0, pa.table({"request": pa.nulls(1), "label": [1.0]})))
    with pytest.raises(RequestError, match="column 'label' contains string, but double"):
        journal.append(Batch(None, 0, pa.table({"label": ["1"]})))
    assert journal.last_position() == 3
    journal.append(Batch(None, 0, pa.table({"tags": [[12]]})))
    with pytest.raises(RequestError, match="column 'tags' contains"):
        journal.append(Batch(None, 0, pa.table({"tags": [None, [], ["12"]]})))


def test_a_batch_has_a_largest_size(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(file)
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 5000)
    with pytest.raises(RequestError, match="a batch has at most 5,000"):
        journal.append(batch(1, text="v" * 5000))
    assert journal.last_position() == 0


def test_addresses_that_hold_no_journal(tmp_path: Path, file: Path) -> None:
    for address in ("mysql://localhost/x", "sqlite://", "nonsense://"):
        with pytest.raises(UserError, match="the URL of a journal is sqlite:///FILE or postgresql://"):
            Journal(address)
    with pytest.raises(UserError, match="is not a journal"):
        Journal(file, create=False)
    assert list(tmp_path.iterdir()) == []
    sqlite3.connect(file).close()
    with pytest.raises(UserError, match="is not a journal"):
        Journal(file, create=False)
    file.write_text("something else " * 99)
    with pytest.raises(UserError, match="can't be written, so nothing was appended: file is not a database"):
        Journal(file)
    with pytest.raises(UserError, match="can't be created"):
        Journal(file / "below" / "journal.db")
    with pytest.raises(UserError, match=r"the journal '.*' can't be created: File name too long"):
        Journal(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="is a folder, but a journal is a file"):
        Journal(tmp_path)
    with pytest.raises(UserError, match=r"'postgresql\+psycopg://me:\*\*\*@.*can't be written") as error:
        Journal(f"postgresql://me:secret@/x?host={tmp_path}")
    assert "secret" not in str(error.value)


def test_a_writer_that_never_ends_is_reported(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(address)
    monkeypatch.setattr(module, "LOCK_TIMEOUT_SECONDS", 1)
    second = Journal(address, create=False)
    with (
        journal.write_transaction(),
        pytest.raises(UserError, match=r"can't be written, so nothing was appended: .*lock"),
    ):
        second.append(batch(1))
    assert second.append(batch(2)) == 1


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_of_a_batch(file: Path) -> None:
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "as Python begins"
    journal = Journal(file)
    journal.append(batch(0))
    size = Path(f"{file}-wal").stat().st_size
    for room in (0, 9, 5000):
        with _files_no_larger_than(size + room), pytest.raises(UserError, match="so nothing was appended"):
            journal.append(batch(5, text="w" * 100_000))
        assert all_numbers(journal) == all_numbers(Journal(file, create=False)) == [0]
    journal.append(batch(6))
    assert all_numbers(journal) == [0, 6]


@pytest.mark.parametrize("column", ["log", "accepted_at", "duplicates", "checksum", "payload", "position", None])
def test_a_batch_that_was_changed_or_lost_is_reported(address: str, column: str | None) -> None:
    journal, table = Journal(address), module._BATCHES
    for number in range(3):
        journal.append(batch(number))
    value = {"log": "views", "payload": b"x"}.get(str(column), 99)
    change = sql.delete(table) if column is None else sql.update(table).values({column: value})
    with journal.write_transaction() as connection:
        connection.execute(change.where(table.c.position == 2))
    assert numbers_in(journal.read(0, 1)) == [0]
    with pytest.raises(UserError, match="is damaged at batch 2"):
        journal.read(1)


def _acknowledged(printed: str) -> dict[int, int]:
    lines = [line.split() for line in printed.splitlines(keepends=True) if line.endswith("\n")]
    return {int(first): int(position) for first, position in lines}


def _check_writers(journal: Journal, acknowledged: dict[int, int]) -> None:
    """All that was acknowledged is at its position, once, and batches are whole."""
    batches = {item.position: item.table["number"].to_pylist() for item in every_batch(journal)}
    assert list(batches) == list(range(1, len(batches) + 1))
    assert all(len(rows) == 2 and rows[1] == rows[0] + 1 for rows in batches.values())
    assert len({rows[0] for rows in batches.values()}) == len(batches)
    assert {
        first: position for first, position in acknowledged.items() if batches.get(position, [-1])[0] != first
    } == {}


@pytest.mark.parametrize("turns", [2, pytest.param(8, marks=pytest.mark.thorough)])
def test_nothing_that_was_acknowledged_is_lost_when_writers_are_killed(address: str, turns: int) -> None:
    """Two writers at a time, one of them with threads; each is killed once it has told of some batches."""
    acknowledged: dict[int, int] = {}
    for turn in range(turns):
        writers = [
            call(append_and_tell, address, 2 * turn + item, 100_000, threads) for item, threads in enumerate((1, 4))
        ]
        for writer in writers:
            until(lambda writer=writer, turn=turn: writer.stdout.count("\n") > 3 + 5 * (turn % 4))
            writer.kill()
            acknowledged |= _acknowledged(writer.stdout)
    journal = Journal(address)
    assert len(acknowledged) > 8 * turns
    assert journal.append(batch(-2, -1)) > max(acknowledged.values())
    _check_writers(journal, acknowledged)


def append_and_die(address: str, step: str) -> None:
    """Appends two batches, and kills itself at a step of the second one. It is called in a process of its own."""
    journal = Journal(address)
    print(1, journal.append(batch(1, 2)), flush=True)
    insert = Journal._insert

    def die(self: Journal, *arguments: object) -> None:
        insert(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if step == "before the commit":
        Journal._insert = die  # type: ignore[method-assign]
    journal.append(batch(3, 4))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", ["before the commit", "before the answer"])
def test_a_kill_at_any_step_of_an_append_loses_nothing(address: str, step: str) -> None:
    writer = call(append_and_die, address, step)
    assert writer.wait() == -signal.SIGKILL, writer.stderr
    reader = Journal(address, create=False)
    assert numbers_in(reader.read(0)) in ([1, 2], [1, 2, 3, 4]), "a reader may learn later of what nobody was told"
    journal = Journal(address)
    expected = [1, 2] if step == "before the commit" else [1, 2, 3, 4]
    assert all_numbers(journal) == expected
    assert journal.append(batch(5, 6)) == len(expected) // 2 + 1
    _check_writers(journal, _acknowledged(writer.stdout))


@pytest.mark.thorough
def test_processes_append_while_others_follow(address: str) -> None:
    """Every reader gets each batch once, all in the same order, and a writer's in its own: no position is visible
    before an earlier one."""
    Journal(address)
    rows = 4 * 2 * 100
    readers = [call(follow_and_tell, address, rows, max_rows) for max_rows in (1, 50, 10_000)]
    writers = [call(append_and_tell, address, writer, 100, threads) for writer, threads in enumerate((1, 4, 1, 4))]
    assert [item.wait() for item in (*writers, *readers)] == [0] * 7, [item.stderr for item in (*writers, *readers)]
    numbers = [list(map(int, reader.stdout.split())) for reader in readers]
    journal = Journal(address)
    assert numbers[0] == numbers[1] == numbers[2] == all_numbers(journal)
    _check_writers(
        journal, {first: position for item in writers for first, position in _acknowledged(item.stdout).items()}
    )
    for writer in (0, 2):
        assert [number % THOUSANDS for number in numbers[0] if number // THOUSANDS == writer] == list(range(200))


@pytest.mark.thorough
def test_nothing_is_lost_when_postgresql_crashes(postgres: PostgreSQL) -> None:
    address = postgres.new_address()
    journal, writer = Journal(address), call(append_and_tell, address, 0, 100_000, 4)
    until(lambda: writer.stdout.count("\n") > 20)
    postgres.kill()
    assert writer.wait() == 1
    with pytest.raises(UserError, match="nothing was appended"):
        journal.append(batch(-2, -1))
    postgres.start()
    acknowledged = _acknowledged(writer.stdout)
    assert len(acknowledged) > 20
    assert journal.append(batch(-2, -1)) > max(acknowledged.values())
    _check_writers(journal, acknowledged)
