"""Models with different logs of events share a journal: neither forgets its events for the other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.journal import folder as journal_folder
from mmoe_rec.journal.checkpoints import (
    checkpoint_path,
    checkpoints,
    duplicates_after,
    remove_through,
    removed_files,
    save_checkpoint,
)
from mmoe_rec.journal.duplicates import Counts, Duplicates
from mmoe_rec.journal.folder import FolderLock
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.parquet_files import write_files
from mmoe_rec.journal.records import Batch
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.settings.schema import Schema
from tests.log.small_logs import ALL_KINDS, START, schema_of

LOGS = ("purchases", "returns")


def _schema(folder: Path, *logs: str) -> Schema:
    """Of a model that has these logs of events."""
    for name in ("log", *logs):
        (folder / name).mkdir(exist_ok=True)
    histories = {f"of_{log}": {"kind": "history", "events": log, "of": "item", "length": 3} for log in logs}
    events = {log: {"path": str(folder / log), "time": "bought_at"} for log in logs}
    return schema_of({**ALL_KINDS, **histories}, events=events)


def _events(log: str, *numbers: int) -> Batch:
    times = pa.array([START + number for number in numbers]).cast(UTC_MICROSECONDS)
    ids = pa.array(numbers, pa.int64())
    return Batch(log, 0, pa.table({"user": ids, "item": ids, "bought_at": times, "event_id": ids}))


def _refresh(folder: Path, journal: Journal, schema: Schema, after: int) -> tuple[int, dict[str | None, Counts]]:
    """As one model's refresh does; gives the segment through which its tables then know the journal."""
    through = journal.close_segment()
    last = max((each for each in checkpoints(journal.folder) if each <= after), default=0)
    return through, dict(write_files(journal.folder, schema, through, str(folder / "log"), last).counts)


def _plain(journal: Journal, schema: Schema, segment: int) -> dict[str, np.ndarray]:
    """What is remembered of all the segments, without a checkpoint."""
    duplicates, follower = Duplicates(schema), Follower(journal.folder)
    while batches := follower.read(through=segment):
        duplicates.take(batches)
    return duplicates.to_arrays()


def _one_refreshed(tmp_path: Path, *batches: Batch) -> tuple[Journal, Schema, Schema, int]:
    """A journal with these batches, two models that share it, of which the first was refreshed from it, and the segment
    through which it was."""
    journal = Journal(tmp_path / "journal")
    one, other = (_schema(tmp_path, log) for log in LOGS)
    journal.append(*batches)
    through, _ = _refresh(tmp_path, journal, one, 0)
    return journal, one, other, through


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("close_between", [False, True])
def test_each_model_remembers_the_events_of_its_own_logs(tmp_path: Path, remove: bool, close_between: bool) -> None:
    journal = Journal(tmp_path / "journal")
    schemas, known = [_schema(tmp_path, log) for log in LOGS], [0, 0]
    for turn in range(3):
        numbers = range(10 * turn, 10 * turn + 10)
        for log in LOGS:
            journal.append(_events(log, *numbers))
        expected = [_plain(journal, schema, 100) for schema in schemas]
        for model in (0, 1) if turn % 2 else (1, 0):
            if close_between:  # each model's refresh closes a segment
                journal.append(_events("of nobody", turn))
            known[model], counts = _refresh(tmp_path, journal, schemas[model], known[model])
            assert counts[LOGS[model]] == Counts(accepted=10)
        if remove and turn == 1:
            assert remove_through(journal.folder, min(checkpoints(journal.folder)[-1], *known))
        for model, schema in enumerate(schemas):
            # A server of this model, or its next refresh, goes on from there.
            duplicates, _ = duplicates_after(journal.folder, schema, known[model])
            if not remove:
                for name, values in expected[model].items():
                    np.testing.assert_array_equal(duplicates.to_arrays()[name], values, name)
            again = duplicates.take([_events(LOGS[model], *range(10 * turn + 10))])
            assert again[LOGS[model]].counts == Counts(duplicate=10 * turn + 10)


def test_events_that_another_models_refresh_has_removed_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    journal, one, other, through = _one_refreshed(tmp_path, _events("purchases", 1), _events("returns", 1))
    duplicates_after(journal.folder, other, through)
    assert capsys.readouterr().err == ""
    remove_through(journal.folder, through)
    duplicates_after(journal.folder, one, through)
    duplicates_after(journal.folder, _schema(tmp_path, "purchases", "clicks"), through)  # a log without a row so far
    assert capsys.readouterr().err == ""
    duplicates_after(journal.folder, other, through)
    told = capsys.readouterr().err
    assert "events of the log 'returns' came in segments of the journal" in told
    assert "those are in no file of this log" in told


@pytest.mark.parametrize("lost", [False, True])
def test_what_the_last_model_to_refresh_does_not_know_stays_known(
    tmp_path: Path, capsys: pytest.CaptureFixture, lost: bool
) -> None:
    """A model may hold segments by files that another one's refresh wrote, as where it was trained since."""
    journal, one, other, first = _one_refreshed(tmp_path, _events("purchases", 1), _events("returns", 1))
    _refresh(tmp_path, journal, other, 0)
    journal.append(_events("purchases", 2), *([_events("returns", 2)] if lost else []))
    through, _ = _refresh(tmp_path, journal, one, first)
    remove_through(journal.folder, through)
    duplicates, _ = duplicates_after(journal.folder, other, through)
    assert duplicates.take([_events("returns", 1)])["returns"].counts == Counts(duplicate=1)
    assert ("events of the log 'returns' came in segments" in capsys.readouterr().err) == lost


def test_a_checkpoint_is_written_again_only_for_logs_that_it_lacks(tmp_path: Path) -> None:
    journal, one, other, through = _one_refreshed(tmp_path, _events("purchases", 1), _events("returns", 1))
    path, times = checkpoint_path(journal.folder, through), []
    for schema in (one, other, one, other):
        _refresh(tmp_path, journal, schema, 0)
        times.append(path.stat().st_mtime_ns)
    assert times[0] != times[1]
    assert times[1] == times[2] == times[3]


def _events_in(folder: Path, log: str) -> list[int]:
    """The items of all events in a log's files."""
    return sorted(pq.read_table(folder / log)["item"].to_pylist())


@pytest.mark.parametrize("more", [False, True])
def test_events_of_segments_that_another_model_has_refreshed_get_files(tmp_path: Path, more: bool) -> None:
    """As where a model was trained since, and takes these segments for known by its files' names."""
    journal, _, other, first = _one_refreshed(tmp_path, _events("purchases", 1, 2), _events("returns", 1, 2))
    (file,) = (tmp_path / "purchases").iterdir()
    before = file.stat()
    if more:
        journal.append(_events("returns", 2, 3))
    through, counts = _refresh(tmp_path, journal, other, first)
    assert counts == {"returns": Counts(accepted=2 + more, duplicate=int(more))}
    assert _events_in(tmp_path, "returns") == [1, 2, 3][: 2 + more]
    assert file.stat() == before
    assert _refresh(tmp_path, journal, other, through) == (through, {})
    # Also once its segments are gone, its events are known.
    remove_through(journal.folder, through)
    duplicates, _ = duplicates_after(journal.folder, other, through)
    assert duplicates.take([_events("returns", 1, 2)])["returns"].counts == Counts(duplicate=2)


def test_logs_are_lacking_only_where_nobody_has_written_their_events(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A model that reads all segments anew meets rows of another one's log, which that one has written."""
    journal, one, other, first = _one_refreshed(tmp_path, _events("purchases", 1))
    journal.append(_events("returns", 1))
    through, _ = _refresh(tmp_path, journal, other, 0)
    remove_through(journal.folder, through)
    duplicates_after(journal.folder, one, through)
    assert capsys.readouterr().err == ""
    assert removed_files(journal.folder, one, first) == []
    assert removed_files(journal.folder, other, first) == ["returns"]
    assert removed_files(journal.folder, one, 0) == ["purchases"]
    assert removed_files(journal.folder, other, through) == []
    checkpoint_path(journal.folder, through).unlink()
    assert removed_files(journal.folder, one, first) == [None, "purchases"]


@pytest.mark.parametrize("removed", [False, True])
def test_files_that_do_not_say_what_is_lacking_do_not_silence_that(
    tmp_path: Path, capsys: pytest.CaptureFixture, removed: bool
) -> None:
    journal, one, other, first = _one_refreshed(tmp_path, _events("purchases", 1), _events("returns", 1))
    path = checkpoint_path(journal.folder, first)
    with np.load(path) as found:
        kept = {name: found[name] for name in found if name in ("names", "through") or name.startswith("a")}
    np.savez(path, **kept)
    journal.append(_events("purchases", 2))
    through, _ = _refresh(tmp_path, journal, one, first)
    if removed:
        remove_through(journal.folder, through)
    duplicates_after(journal.folder, one, through)
    assert capsys.readouterr().err == ""
    duplicates_after(journal.folder, other, through)
    assert ("events of the log 'returns' came in segments" in capsys.readouterr().err) == removed


def test_what_another_process_removes_meanwhile_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal")
    one = _schema(tmp_path, LOGS[0])
    journal.append(_events("purchases", 1))
    first, _ = _refresh(tmp_path, journal, one, 0)
    journal.append(_events("purchases", 2))
    through, load, missing = journal.close_segment(), np.load, []

    def removed_meanwhile(path: Path, **options: bool) -> object:
        monkeypatch.setattr(np, "load", load)
        write_files(journal.folder, one, through, str(tmp_path / "log"), first)
        remove_through(journal.folder, through)
        missing.append(not path.exists())
        return load(path, **options)

    monkeypatch.setattr(np, "load", removed_meanwhile)
    duplicates, _ = duplicates_after(journal.folder, one, through)
    assert missing == [True]
    assert duplicates.take([_events("purchases", 1, 2)])["purchases"].counts == Counts(duplicate=2)


def test_one_process_at_a_time_changes_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")
    one = _schema(tmp_path, LOGS[0])
    journal.append(_events("purchases", 1))
    through, _ = _refresh(tmp_path, journal, one, 0)
    duplicates, _ = duplicates_after(journal.folder, one, through)
    monkeypatch.setattr(journal_folder, "LOCK_SECONDS", 0.0)
    with FolderLock(journal.folder).alone():
        with pytest.raises(UserError, match="another process has held the lock"):
            save_checkpoint(journal.folder, through, duplicates)
        with pytest.raises(UserError, match="another process has held the lock"):
            remove_through(journal.folder, through)
    save_checkpoint(journal.folder, through, duplicates)
    assert remove_through(journal.folder, through) == [1]
