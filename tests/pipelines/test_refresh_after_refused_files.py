"""Rows of a journal that new files of a log hold count once, whatever becomes of these files."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.refreshing.provisional import Provisional
from mmoe_rec.tracking import registry
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _answers, _check, _sent, _served
from tests.pipelines.test_refresh_of_held_rows import REPEATED, _of_journal, _refreshed_once
from tests.server.test_events import as_json


def _set(model: RefreshedModel, **data: Any) -> None:
    settings = model.settings.model_copy(update={"data": model.settings.data.model_copy(update=data)})
    model.config.write_text(settings.to_yaml(), encoding="utf-8")


def _add(model: RefreshedModel, table: pa.Table) -> Path:
    path = model.log / "backfill.parquet"
    pq.write_table(table, path)
    return path


def _early(model: RefreshedModel) -> pa.Table:
    """A row of a new request of day 3, which no table can go on with."""
    row = model._days(3, 4).slice(0, 1)
    return row.set_column(row.column_names.index("request"), "request", pa.array([-5], row["request"].type))


def _bad(table: pa.Table) -> pa.Table:
    """With a label that is neither 0 nor 1 in the last row."""
    place = table.column_names.index("click")
    values = [*table["click"].to_pylist()[:-1], 7]
    return table.set_column(place, table.field(place), pa.array(values, table["click"].type))


def _each_once(model: RefreshedModel, sent: list[dict[str, Any]]) -> None:
    """In all files of the log together, the rows that were sent are there once."""
    rows = [row for path in sorted(model.log.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = Counter((row["request"], row["item"]) for row in rows)
    assert {found[row["request"], row["item"]] for row in sent} == {1}


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_rows_are_not_lost_with_a_file_that_held_them_and_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool, killed: bool, anew: bool
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    app = _refreshed_once(model, journal)
    new = as_json(model._days(10, 12))
    position = _sent(app, new)
    live, before = _answers(app, position), len(_of_journal(model))
    held = model._days(11, 12)
    path = _add(model, pa.concat_tables([held, _early(model)]) if not anew else _bad(held))
    with monkeypatch.context() as patched:
        if killed:
            patched.setattr(Provisional, "undo", lambda self: None)
        with pytest.raises(SystemExit):
            model.refresh("--journal", str(journal), *(["--anew"] if anew else []))
    assert (len(_of_journal(model)) > before) == killed
    if mended:
        pq.write_table(held, path)
    else:
        path.unlink()
    if killed:
        model.refresh()  # without the journal, what its files lack must not be taken for known
    model.refresh("--journal", str(journal))
    _check(_answers(_served(model, model.holder().number, journal), position), live)
    _each_once(model, new)
    assert not (Path(model.settings.data.work) / "journal_files.json").exists()


def test_rows_are_not_lost_with_a_file_that_was_written_again_and_is_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The tables hold the file as it was before."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    path = _add(model, model._days(10, 11))
    app = _refreshed_once(model, journal)
    further = model._days(10, 11).slice(0, 1)  # of a request that the file holds
    place = further.column_names.index("item")
    further = further.set_column(place, further.field(place), pa.array([123], further["item"].type))
    new = as_json(pa.concat_tables([further, model._days(11, 12)]))
    position = _sent(app, new)
    live, copy = _answers(app, position), tmp_path / "copy"
    shutil.copy2(path, copy)
    _add(model, pa.concat_tables([model._days(10, 11), further]))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(journal))
    assert f"'{path}' has changed since" in capsys.readouterr().err
    shutil.copy2(copy, path)
    model.refresh("--journal", str(journal))
    _check(_answers(_served(model, "3", journal), position), live)
    _each_once(model, new)


def test_a_refresh_that_failed_at_mlflow_goes_on_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that held rows is all right, and nothing is registered twice."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    app = _refreshed_once(model, journal)
    new = as_json(model._days(10, 12))
    position = _sent(app, new)
    live = _answers(app, position)
    path = _add(model, model._days(11, 12))

    def fail(*_: object, **__: object) -> None:
        raise UserError("MLflow is away")

    with monkeypatch.context() as patched:
        patched.setattr(registry, "register_model", fail)
        with pytest.raises(SystemExit):
            model.refresh("--journal", str(journal))
    (written,) = set(model.log.glob("journal-*-00000002.parquet"))
    modified = written.stat().st_mtime_ns
    model.refresh("--journal", str(journal))
    assert written.stat().st_mtime_ns == modified
    assert len(model.versions()) == 3
    _check(_answers(_served(model, "3", journal), position), live)
    _each_once(model, new)
    path.unlink()  # what the tables hold stays counted
    model.refresh("--journal", str(journal))
    assert len(model.versions()) == 3
    assert written.stat().st_mtime_ns == modified


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("days", [(10, 12), (11, 12)])
def test_rows_of_a_file_that_is_left_out_as_bad_count_as_the_journal_has_them(
    tmp_path: Path, anew: bool, days: tuple[int, int]
) -> None:
    """days: that the file holds; all of what was sent, or some."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    _set(model, skip_bad_files=True)
    app = _refreshed_once(model, journal)
    _add(model, _bad(model._days(*days)))
    new = as_json(model._days(10, 12))
    position = _sent(app, new)
    live, before = _answers(app, position), len(_of_journal(model))
    model.refresh("--journal", str(journal), *(["--anew"] if anew else []))
    assert len(_of_journal(model)) == before + len(new)
    _check(_answers(_served(model, "3", journal), position), live)


def test_rows_that_repair_a_file_that_was_left_out_count(tmp_path: Path) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    _set(model, skip_bad_files=True)
    _add(model, _bad(model._days(10, 11)))
    app = _refreshed_once(model, journal)  # its tables leave the file out
    new = as_json(model._days(10, 12))
    position = _sent(app, new)
    live, before = _answers(app, position), len(_of_journal(model))
    model.refresh("--journal", str(journal))
    assert len(_of_journal(model)) == before + len(new)
    _check(_answers(_served(model, "3", journal), position), live)


def test_rows_of_a_mended_file_that_comes_too_late_count_as_the_journal_has_them(tmp_path: Path) -> None:
    """A file is mended that tables have left out, and leave out again as its rows are not later than what they know."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    _set(model, skip_bad_files=True)
    old = _early(model)
    path = _add(model, _bad(old))
    app = _refreshed_once(model, journal)
    pq.write_table(old, path)
    new = as_json(pa.concat_tables([old, model._days(10, 11)]))
    position = _sent(app, new)
    live, before = _answers(app, position), len(_of_journal(model))
    model.refresh("--journal", str(journal))
    assert len(_of_journal(model)) == before + len(new)
    _check(_answers(_served(model, "3", journal), position), live)


def test_repeats_count_in_a_log_that_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    _set(model, duplicates="keep")
    app = _refreshed_once(model, journal)
    old, new = as_json(model._days(2, 3)), as_json(model._days(10, 11))
    position = _sent(app, [*old, *new])
    live, before = _answers(app, position), len(_of_journal(model))
    capsys.readouterr()
    model.refresh("--journal", str(journal))
    assert REPEATED not in capsys.readouterr().err
    assert len(_of_journal(model)) == before + len(old) + len(new)
    _check(_answers(_served(model, "3", journal), position), live)


def test_a_row_that_came_by_the_journal_is_recognised_in_a_file_with_another_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Such as the time at which another program wrote it, days later than its request."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    _refreshed_once(model, journal)
    rows, later = model._days(9, 10), model._days(13, 14)
    place = rows.column_names.index("time")
    moved = pa.array([later["time"][0].as_py()] * len(rows), rows["time"].type)
    path = _add(model, pa.concat_tables([later, rows.set_column(place, rows.field(place), moved)]))
    for words in ((), ("--journal", str(journal))):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            model.refresh(*words)
        told = capsys.readouterr().err
        assert f"row {len(later)} of '{path}' repeats request and candidate of a row that came by a server" in told
        assert f"{len(rows):,} rows of new files" in told
