"""Rows that come through a journal though the log's own files hold them, or their request with another user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.server.app import Application
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _answers, _check, _sent, _served
from tests.server.test_events import as_json

REPEATED = "are left out, as the log's files hold them already; the first: "
OTHER_USER = "are left out, as the log's files hold their requests with another user; the first: "


def _of_journal(model: RefreshedModel) -> list[dict[str, Any]]:
    """The rows that came into the log from journals."""
    files = sorted(model.log.glob("journal-*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def _refreshed_once(model: RefreshedModel, journal: Path) -> Application:
    """With rows of day 9 through the journal, so that it is known to the model; serves what was refreshed."""
    _sent(_served(model, "1", journal), as_json(model._days(9, 10)))
    model.refresh("--journal", str(journal))
    return _served(model, "2", journal)


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_rows_of_the_logs_own_files_that_are_sent_again_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, requests: bool, anew: bool
) -> None:
    model, journal = RefreshedModel(tmp_path, requests), tmp_path / "journal"
    app = _refreshed_once(model, journal)
    new, old = as_json(model._days(10, 11)), as_json(model._days(2, 3))
    position = _sent(app, [*new[:20], *old, *new[20:]])
    before = len(_of_journal(model))
    capsys.readouterr()
    model.refresh("--journal", str(journal), *(["--anew"] if anew else []))
    told = capsys.readouterr().err
    by = f"request {old[0]['request']}" if requests else f"user {old[0]['user']}, time "
    assert f"{len(old):,} rows of the journal {REPEATED}{by}" in told
    assert f"item {old[0]['item']}" in told
    assert len(_of_journal(model)) == before + len(new)
    # Tables that never heard of these rows say the same.
    other = RefreshedModel(tmp_path / "other", requests)
    _refreshed_once(other, tmp_path / "other" / "journal")
    server = _served(other, "2", other.folder / "journal")
    expected = _answers(server, _sent(server, new))
    _check(_answers(_served(model, "3", journal), position), expected)
    # And it stays so.
    model.refresh("--journal", str(journal), "--anew")
    _check(_answers(_served(model, model.holder().number, journal), position), expected)


def test_rows_of_files_that_came_since_the_last_refresh_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A backfill into the log that another program writes beside the journal."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    app = _refreshed_once(model, journal)
    rows = as_json(model._days(10, 12))
    _sent(app, rows)
    added = model.add(11, 12)
    capsys.readouterr()
    model.refresh("--journal", str(journal))
    assert f"{len(added):,} rows of the journal {REPEATED}" in capsys.readouterr().err
    model.refresh("--journal", str(journal), "--anew")
    kept = {(row["request"], row["item"]) for row in [*_of_journal(model), *added.to_pylist()]}
    assert kept >= {(row["request"], row["item"]) for row in rows}


@pytest.mark.parametrize("is_known", [False, True])
def test_a_row_of_a_request_that_the_log_has_of_another_user_stops_no_refresh(
    tmp_path: Path, capsys: pytest.CaptureFixture, is_known: bool
) -> None:
    """Whether or not the model has been refreshed from the journal."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    app = _refreshed_once(model, journal) if is_known else _served(model, "1", journal)
    new = as_json(model._days(10, 11))
    wrong = {**new[0], "request": model._days(2, 3)["request"][0].as_py(), "item": 123, "user": 99}
    position = _sent(app, [wrong, *new, {**wrong, "item": 124}])
    live, before = _answers(app, position), len(_of_journal(model))
    capsys.readouterr()
    model.refresh("--journal", str(journal))
    _check(_answers(_served(model, model.holder().number, journal), position), live)
    told = capsys.readouterr().err
    assert f"2 rows of the journal {OTHER_USER}request {wrong['request']} and item 123" in told
    assert len(_of_journal(model)) == before + len(new)
    _sent(_served(model, model.holder().number, journal), [{**wrong, "item": 125}, *as_json(model._days(11, 12))])
    model.refresh("--journal", str(journal))
    assert f"1 rows of the journal {OTHER_USER}" in capsys.readouterr().err
    for path in model.log.glob("*.parquet"):  # of files that are gone the tables still know the requests
        if not path.name.startswith("journal-"):
            path.unlink()
    _sent(_served(model, model.holder().number, journal), [{**wrong, "item": 126}, *as_json(model._days(12, 13))])
    model.refresh("--journal", str(journal))
    assert f"1 rows of the journal {OTHER_USER}" in capsys.readouterr().err
    model.refresh("--journal", str(journal), "--anew")


@pytest.mark.parametrize("several_times", ["first", "error"])
@pytest.mark.parametrize("day", [1, 10])
def test_a_further_row_of_a_request_that_the_log_has_gets_its_time(
    tmp_path: Path, several_times: str, day: int
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
    data = model.settings.data.model_copy(update={"several_times": several_times})
    model.config.write_text(model.settings.model_copy(update={"data": data}).to_yaml(), encoding="utf-8")
    app = _refreshed_once(model, journal)
    old = next(row for row in as_json(model._days(4, 5)) if row["user"] == 5)
    time = max(row["time"] for row in as_json(model._days(day, day + 1)))
    further = {**old, "item": 123, "time": time, "click": 1, "liked": 1}
    position = _sent(app, [*as_json(model._days(10, 11)), further])
    live = _answers(app, position)
    model.refresh("--journal", str(journal))
    (found,) = (row for row in _of_journal(model) if row["item"] == 123)
    assert found["time"].isoformat() == old["time"]
    _check(_answers(_served(model, "3", journal), position), live)
    model.refresh("--journal", str(journal), "--anew")
    _check(_answers(_served(model, model.holder().number, journal), position), live)


def test_a_file_with_rows_that_came_by_the_journal_before_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal"
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
