"""Rows that come both by a journal and in files of another program are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.server.app import Application
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _sent, _served
from tests.server.test_events import as_json

pytestmark = pytest.mark.thorough


def _of_journal(model: RefreshedModel) -> list[dict[str, Any]]:
    """The rows that came into the log from journals."""
    files = sorted(model.log.glob("journal-*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def _refreshed_once(model: RefreshedModel, journal: Path) -> Application:
    """With rows of day 9 through the journal, so that it is known to the model; serves what was refreshed."""
    _sent(_served(model, "1", journal), as_json(model._days(9, 10)))
    model.refresh("--journal", str(journal))
    return _served(model, "2", journal)


def test_a_row_of_the_journal_that_a_file_of_the_log_holds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal.db"
    app = _refreshed_once(model, journal)
    old = as_json(model._days(2, 3))
    _sent(app, [*as_json(model._days(10, 11)), *old])
    for words in (("--journal", str(journal)), (), ("--journal", str(journal), "--anew")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            model.refresh(*words)
        told = capsys.readouterr().err
        assert f"{len(old):,} rows of " in told
        assert "repeats request and candidate" in told
    assert model.holder().number == "2"


def test_a_row_of_a_request_that_the_log_has_of_another_user_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal.db"
    app = _refreshed_once(model, journal)
    new = as_json(model._days(10, 11))
    _sent(app, [*new, {**new[0], "request": model._days(2, 3)["request"][0].as_py(), "item": 123, "user": 99}])
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(journal))
    assert "user" in capsys.readouterr().err


def test_without_requests_ids_new_files_of_another_program_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, journal = RefreshedModel(tmp_path), tmp_path / "journal.db"
    app = _refreshed_once(model, journal)
    _sent(app, as_json(model._days(11, 12)))
    model.add(10, 11)
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(journal))
    assert "days 10 to 11.parquet' is new in the log" in capsys.readouterr().err
    model.refresh()
    model.refresh("--journal", str(journal))
    assert model.holder().number == "4"


def test_a_file_with_rows_that_came_by_the_journal_before_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal.db"
    _refreshed_once(model, journal)
    sent = len(_of_journal(model))
    model.add(9, 10.5)  # which without its later requests holds nothing but rows that are known
    for words in ((), ("--journal", str(journal)), ("--anew",)):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            model.refresh(*words)
        told = capsys.readouterr().err
        assert "'" + str(model.log / "days 9 to 10.5.parquet") in told
        assert f"{sent:,} rows of " in told
        assert "repeats request and candidate" in told
    assert model.holder().number == "2"
    (model.log / "days 9 to 10.5.parquet").unlink()
    model.add(10, 10.5)
    model.refresh("--journal", str(journal))
    assert model.holder().number == "3"
