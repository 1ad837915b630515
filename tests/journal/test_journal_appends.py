"""A journal in one process: what is appended is read, in order, across segments, threads and forks."""

import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import RequestError, UserError
from mmoe_rec.journal import folder as folders
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.group_commit import GroupCommit
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import Batch
from mmoe_rec.journal.segments import segment_numbers, segment_path
from tests.journal.journals import all_numbers, batch, every_batch, numbers_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_batches_come_back_as_they_were(folder):
    tables = [
        pa.table({"id": ["a", None, "ü"], "x": [1.5, None, -0.0], "many": [[1], None, []], "none": pa.nulls(3)}),
        pa.table({"at": pa.array([1, 2], pa.timestamp("us", tz="UTC"))}),
        pa.table({"id": ["b"] * 4000}).slice(7, 3000),
    ]
    batches = [Batch(None, 5, tables[0]), Batch("views", 3, tables[1]), Batch(None, 9, tables[2])]
    journal = Journal(folder)
    journal.append(batches[0], batches[1])
    journal.append(batches[2])
    found = list(every_batch(folder))
    assert [(each.source, each.accepted_at) for each in found] == [(None, 5), ("views", 3), (None, 9)]
    assert [each.table.to_pydict() for each in found] == [table.to_pydict() for table in tables]
    assert [each.table.schema for each in found] == [table.schema for table in tables]


def test_positions_rise_and_each_one_is_where_reading_goes_on(folder):
    journal = Journal(folder, segment_bytes=1500)
    positions = [journal.end(), *(journal.append(batch(number)) for number in range(12))]
    assert positions == sorted(set(positions))
    assert positions[-1].segment > 2
    for count, position in enumerate(positions):
        assert Position.parse(str(position)) == position
        follower, found = Follower(folder, position), list[int]()
        while batches := follower.read(1):
            found += numbers_in(batches)
            assert follower.position == positions[count + len(found)]
        assert found == list(range(count, 12))
        assert follower.position == journal.end() == follower.end()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1-",
        "-32",
        "0-32",
        "1-31",
        "1-32 ",
        "1-32\n",
        "\uff11-32",
        "1-1e3",
        "1-" + "9" * 99,
        None,
        5,
        "a" * 999,
    ],
)
def test_nonsense_is_no_position(text):
    with pytest.raises(RequestError, match="is no position of a journal") as error:
        Position.parse(text)
    assert len(str(error.value)) < 200


def test_positions_of_elsewhere_are_told(folder, tmp_path):
    journal, other = Journal(folder, 600), Journal(tmp_path / "other")
    for number in range(4):
        journal.append(batch(number))
        end = other.append(batch(number, text="other"))
    with pytest.raises(RequestError, match="beyond the journal's end"):
        Follower(folder, Position(99, 32))
    with pytest.raises(RequestError, match="beyond the journal's end"):
        Follower(tmp_path / "other", Position(1, end.offset + 8))
    for offset in range(33, end.offset):
        if offset not in _ends(tmp_path / "other"):
            with pytest.raises(RequestError, match="not the end of a record"):
                Follower(tmp_path / "other", Position(1, offset))
    follower = Follower(folder)
    follower.check(journal.end())


def _ends(folder: Path) -> list[int]:
    follower, ends = Follower(folder), list[int]()
    while follower.read(1):
        ends.append(follower.position.offset)
    return ends


def test_nothing_new_is_nothing(folder):
    journal = Journal(folder)
    follower = Follower(folder)
    assert follower.read() == []
    assert not follower.wait(0)
    assert journal.append() == journal.append(batch()) == journal.end() == follower.position
    assert not follower.wait(0.05)
    journal.append(batch(1))
    assert follower.wait(0)
    assert numbers_in(follower.read()) == [1]
    assert not follower.wait(0)


def test_reads_are_bounded_by_whole_records(folder):
    journal = Journal(folder)
    for number in range(10):
        journal.append(*(batch(*range(30 * number + 3 * part, 30 * number + 3 * part + 3)) for part in range(10)))
    follower = Follower(folder)
    sizes = []
    while batches := follower.read(40):
        sizes.append(sum(map(len, batches)))
    assert sizes == [60] * 5


def test_records_larger_than_a_read_of_the_file_come_whole(folder):
    journal = Journal(folder)
    for number in range(3):
        journal.append(batch(number, text="z" * 3_000_000), batch(number + 10))
    assert all_numbers(folder) == [0, 10, 1, 11, 2, 12]


def test_closed_segments(folder):
    journal = Journal(folder)
    assert journal.close_segment() == 0, "an empty segment is not closed"
    journal.append(batch(0))
    assert journal.close_segment() == journal.close_segment() == 1
    assert Journal(folder).close_segment() == 1
    journal.append(batch(1))
    assert Journal(folder).close_segment() == 2
    assert journal.append(batch(2)) > Position.begin(3)
    assert all_numbers(folder) == [0, 1, 2]
    follower = Follower(folder)
    assert numbers_in(follower.read(through=2)) == [0, 1]
    assert follower.read(through=2) == []
    assert follower.position == Position.begin(3)
    assert numbers_in(follower.read()) == [2]


def test_threads_append_together(folder, monkeypatch):
    """While one thread waits for the disk, the others' batches gather for one record."""
    journal = Journal(folder)
    group = GroupCommit(journal)
    append, gate, calls = Journal.append, threading.Event(), list[int]()

    def slow(self: Journal, *batches: Batch) -> Position:
        calls.append(len(batches))
        if len(calls) == 1:
            gate.wait()
        return append(self, *batches)

    monkeypatch.setattr(Journal, "append", slow)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(group.append, batch(number)) for number in range(8)]
        while len(group._queue) + sum(calls) < 8:
            pass
        gate.set()
        positions = {number: each.result() for number, each in enumerate(waiting)}
    assert sum(calls) == 8
    assert len(calls) == 2
    assert sorted(all_numbers(folder)) == list(range(8))
    for number, position in positions.items():
        assert number not in numbers_in(Follower(folder, position).read())


def test_one_threads_error_is_not_the_others(folder):
    journal = Journal(folder)
    journal.append(batch(0))
    group = GroupCommit(journal)
    wrong = Batch(None, 0, pa.table({"number": ["not a number"]}))
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(group.append, wrong if number % 4 == 0 else batch(number)) for number in range(64)]
        failed = {number for number, each in enumerate(waiting) if each.exception() is not None}
    assert failed == set(range(0, 64, 4))
    assert sorted(all_numbers(folder)) == [0, *(number for number in range(64) if number % 4)]


def _append_in_child(journal: Journal, group: GroupCommit, first: int) -> None:
    for number in range(first, first + 50):
        journal.append(batch(number))
        group.append(batch(number + 1000))


def test_a_journal_is_used_on_both_sides_of_a_fork(folder):
    """A lock that parent and child shared would lock neither of them out."""
    journal = Journal(folder, 4000)
    group = GroupCommit(journal)
    group.append(batch(9999))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_append_in_child, args=(journal, group, 100 * child)) for child in (1, 2, 3)]
    for child in children:
        child.start()
    _append_in_child(journal, group, 0)
    for child in children:
        child.join()
        assert child.exitcode == 0
    expected = [
        number + more for first in (0, 100, 200, 300) for number in range(first, first + 50) for more in (0, 1000)
    ]
    assert sorted(all_numbers(folder)) == sorted([9999, *expected])
    assert segment_numbers(folder)[-1] > 3


def test_a_fork_while_the_lock_is_held_does_not_hold_it(folder):
    journal = Journal(folder)
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()

    def child() -> None:
        begun.set()
        end.wait()

    with journal._lock.alone():
        process = context.Process(target=child)
        process.start()
        begun.wait()
    try:
        assert Journal(folder).append(batch(1)) == journal.append()
    finally:
        end.set()
        process.join()


def test_a_lock_that_is_never_let_go_is_told(folder, monkeypatch):
    journal, other = Journal(folder), Journal(folder)
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.05)
    with journal._lock.alone(), pytest.raises(UserError, match="another process has held the lock of the journal"):
        other.append(batch(1))
    other.append(batch(2))
    assert all_numbers(folder) == [2]


def test_columns_keep_their_types(folder):
    """A request 12 and one "12" have other hashes: they would count twice."""
    journal, other = Journal(folder), Journal(folder)
    journal.append(Batch(None, 0, pa.table({"request": [12], "label": pa.nulls(1)})))
    with pytest.raises(RequestError, match="column 'request' holds string, but int64 in earlier rows"):
        other.append(Batch(None, 0, pa.table({"request": ["12"]})))
    other.append(Batch("views", 0, pa.table({"request": ["12"]})))
    other.append(Batch(None, 0, pa.table({"request": pa.nulls(1), "label": [1.0]})))
    with pytest.raises(RequestError, match="column 'label' holds string, but double"):
        journal.append(Batch(None, 0, pa.table({"label": ["1"]})))
    assert len(list(every_batch(folder))) == 3


@pytest.mark.parametrize(
    ("values", "row"),
    [
        (pa.array([None, None, "12", "13"]), 2),
        (pa.chunked_array([pa.array([None, None], pa.string()), pa.array([None, "12"])]), 3),
        (pa.array([None, [], ["12"]]), 2),
    ],
    ids=["text", "chunks", "list"],
)
def test_a_column_of_another_type_is_told_by_its_first_row_with_a_value(folder, values, row):
    journal = Journal(folder)
    first = pa.array([[12]]) if pa.types.is_list(values.type) else pa.array([12])
    journal.append(Batch(None, 0, pa.table({"key": first})))
    with pytest.raises(RequestError, match=f"^row {row}: column 'key' holds .*string.*, but .*int64.* in earlier rows"):
        journal.append(Batch(None, 0, pa.table({"key": values})))


def test_of_batches_that_are_appended_together_only_the_wrong_one_is_told_and_by_its_own_row(folder):
    group = GroupCommit(Journal(folder))
    group.append(batch(0))
    wrong = Batch(None, 0, pa.table({"number": [None, "not a number"]}))
    with ThreadPoolExecutor(3) as pool:
        with group._writer:  # so that all three gather
            waiting = [pool.submit(group.append, each) for each in (batch(1, 2, 3), wrong, batch(4))]
            while len(group._queue) < 3:
                pass
        assert str(waiting[1].exception()).startswith("row 1: column 'number' holds string, but int64 in earlier rows")
        assert [waiting[0].exception(), waiting[2].exception()] == [None, None]
    assert sorted(all_numbers(folder)) == [0, 1, 2, 3, 4]


def test_a_record_has_a_largest_size(folder, monkeypatch):
    journal = Journal(folder)
    monkeypatch.setattr("mmoe_rec.journal.journal.MOST_PAYLOAD_BYTES", 5000)
    with pytest.raises(RequestError, match="a record holds at most 5,000"):
        journal.append(batch(1, text="v" * 5000))
    journal.append(batch(2))
    assert all_numbers(folder) == [2]


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(UserError, match="holds no journal"):
        Follower(folder)
    with pytest.raises(UserError, match="holds no journal"):
        Journal(folder, create=False)
    folder.mkdir()
    Journal(folder).append(batch(3))  # an empty one may become a journal
    assert all_numbers(folder) == [3]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds something else than a journal"):
        Journal(tmp_path / "other")
    assert [each.name for each in (tmp_path / "other").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="holds something else"):
        Journal(tmp_path / "other" / "notes.txt")
    with pytest.raises(UserError, match="there can be no journal in"):
        Journal(tmp_path / "other" / "notes.txt" / "below")
    (folder / "journal.json").write_text('{"format": 99, "id": "x"}')
    with pytest.raises(UserError, match="is of format 99, this version reads 1"):
        Journal(folder)
    for text in ("", "{", "[]", '{"format": 1, "id": 5}', '{"format": 1, "id": "zz"}', '{"id": "' + "0" * 32 + '"}'):
        (folder / "journal.json").write_text(text)
        with pytest.raises(UserError, match=r"journal.json' is damaged"):
            Follower(folder)


def test_a_folder_on_another_machine_is_refused(folder, monkeypatch):
    monkeypatch.setattr(folders, "_file_system", lambda path: "nfs4")
    with pytest.raises(UserError, match="another machine"):
        Journal(folder)
    assert not folder.exists()


def test_two_processes_make_the_same_journal(folder, monkeypatch):
    """Another one is put there while this one is being made."""
    rename = os.rename

    def late(source: str | Path, target: str | Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        Journal(folder).append(batch(5))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    journal = Journal(folder)
    journal.append(batch(6))
    assert all_numbers(folder) == [5, 6]
    assert [each.name for each in folder.parent.iterdir()] == ["journal"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read_can_be_followed(folder):
    Journal(folder).append(batch(1, 2))
    (folder / "end").unlink()
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="may not be written to"):
            Journal(folder)
        assert all_numbers(folder) == [1, 2]
    finally:
        folder.chmod(0o755)


def test_a_folder_that_was_moved_is_noticed(folder, tmp_path):
    """An open journal appends to what has its name, never to what was moved away or removed."""
    journal = Journal(folder)
    journal.append(batch(1))
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="can't be opened"):
        journal.append(batch(2))
    shutil.copytree(tmp_path / "moved", folder)
    journal.append(batch(3))
    assert all_numbers(folder) == [1, 3]
    assert all_numbers(tmp_path / "moved") == [1]
    shutil.rmtree(folder)
    Journal(folder).append(batch(4))
    with pytest.raises(UserError, match="was replaced by another one"):
        journal.append(batch(5))
    assert all_numbers(folder) == [4]


def test_a_segment_that_was_put_back_is_noticed(folder):
    journal = Journal(folder)
    journal.append(batch(1))
    path = segment_path(folder, 1)
    shutil.copy(path, folder / "copy")
    os.replace(folder / "copy", path)
    journal.append(batch(2))
    assert all_numbers(folder) == [1, 2]


def _read_all(follower: Follower) -> list[int]:
    found = list[int]()
    while batches := follower.read():
        found += numbers_in(batches)
    return found


def test_segments_that_are_missing_are_told(folder):
    journal = Journal(folder, 500)
    for number in range(8):
        journal.append(batch(number))
    follower = Follower(folder)
    follower.read(1)
    segment_path(folder, 3).rename(folder / "aside")
    with pytest.raises(UserError, match=r"has no 'segment-00000003\.journal', though it has later ones"):
        Journal(folder)
    with pytest.raises(UserError, match=r"has no 'segment-00000003\.journal'"):
        Follower(folder)
    with pytest.raises(UserError, match=r"segment-00000003.journal' is not there any more"):
        _read_all(follower)
    shutil.copy(segment_path(folder, 2), segment_path(folder, 3))
    with pytest.raises(UserError, match=r"segment-00000003.journal' is segment 2; put back"):
        _read_all(follower)
    other = Journal(folder.parent / "other", 500)
    for number in range(8):
        other.append(batch(number))
    shutil.copy(segment_path(other.folder, 3), segment_path(folder, 3))
    with pytest.raises(UserError, match=f"is a segment of another journal \\({other.id}\\)"):
        _read_all(follower)
    os.replace(folder / "aside", segment_path(folder, 3))
    found = _read_all(follower)
    assert sorted(np.unique(found)) == found
    assert found[-1] == 7
