"""Models of one interaction log and one journal, each with its own logs of events, refresh in turn: none loses any."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.live.journal import Batch, Journal
from mmoe_rec.live.journal_files import cut_journal
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.server.app import Application
from tests.inference.small_model import ITEMS
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _answers, _check, _sent, _served
from tests.server.asking import ask
from tests.server.test_events import as_json

pytestmark = pytest.mark.thorough


def _returns(first: int, last: int) -> pa.Table:
    """Events of user 5, numbered, each an hour after the one before from day 9 on."""
    numbers = range(first, last)
    times = pa.array([START + 9 * DAY + each * DAY // 24 for each in numbers]).cast(UTC_MICROSECONDS)
    items = pa.array([ITEMS[each % 3] for each in numbers])
    return pa.table({"user": pa.array([5] * len(numbers)), "item": items, "bought_at": times})


def _sent_returns(journal: Path, first: int, last: int) -> str:
    numbers = pa.array(range(first, last), pa.int64())
    writer = Journal(journal)
    position = str(writer.append(Batch("returns", 0, _returns(first, last).append_column("event_id", numbers))))
    writer.close()
    return position


def _other(model: RefreshedModel) -> RefreshedModel:
    """A model that is trained now from the log of another one, and knows returns, too."""
    folder = model.folder / "other"
    (folder / "returns").mkdir(parents=True)
    pq.write_table(_returns(-48, 0), folder / "returns" / "0.parquet")
    events = {"returns": {"path": str(folder / "returns"), "time": "bought_at"}}
    data = {"log": str(model.log), "work": str(folder / "work"), "events": events}
    features = {**ALL_KINDS, "returned": {"kind": "history", "events": "returns", "of": "item", "length": 3}}
    return RefreshedModel(folder, data=data, features=features)


def _learnt(app: Application) -> int:
    learning = app.models.current.learning
    assert learning is not None
    return learning.ranker.live_rows


def _failure(app: Application) -> str | None:
    told: str | None = ask(app, b"", page="/version", method="GET").tree["events_failure"]
    return told


@pytest.fixture
def model(tmp_path: Path) -> RefreshedModel:
    return RefreshedModel(tmp_path)


@pytest.mark.parametrize("more", [False, True])
def test_a_model_that_is_trained_after_anothers_refresh_knows_its_events(
    model: RefreshedModel, tmp_path: Path, more: bool
) -> None:
    journal = tmp_path / "journal.db"
    _sent(_served(model, "1", journal), as_json(model._days(9, 11)))
    position = _sent_returns(journal, 0, 30)
    model.refresh("--journal", str(journal))
    other = _other(model)
    about = other.about("1")
    assert about.journal is not None
    assert about.journal["through"] == int(position)
    if more:
        position = _sent_returns(journal, 30, 40)
    app = _served(other, "1", journal)
    assert _learnt(app) == 30 + 10 * more
    before = _answers(app, position)
    assert before[5][2][0]["histories"]["returned"] == [
        ITEMS[each % 3] for each in range(27 + 10 * more, 30 + 10 * more)
    ]
    other.refresh("--journal", str(journal))
    app = _served(other, "2", journal)
    assert _learnt(app) == 0
    _check(_answers(app, position), before)


def _through(model: RefreshedModel) -> int:
    known = model.about(model.holder().number).journal
    assert known is not None
    return int(known["through"])


@pytest.mark.parametrize("anew", [False, True])
def test_segments_of_another_models_events_alone_lock_no_model_out(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, anew: bool
) -> None:
    journal = tmp_path / "journal.db"
    _sent(_served(model, "1", journal), as_json(model._days(9, 10)))
    model.refresh("--journal", str(journal))
    first, other = _through(model), _other(model)
    _sent_returns(journal, 0, 30)
    model.refresh("--journal", str(journal))
    assert "no new files" in capsys.readouterr().out
    assert _through(model) == first
    other.refresh("--journal", str(journal))
    for number in (30, 40):
        _sent_returns(journal, number, number + 10)
        other.refresh("--journal", str(journal), "--remove-events")
    assert Journal(journal).removed() > first
    caplog.clear()
    app = _served(model, "2", journal)
    assert _failure(app) is None
    assert "removed" not in caplog.text
    position = _sent(app, as_json(model._days(10, 11)))
    before = _answers(app, position)
    model.refresh("--journal", str(journal), *(["--anew"] if anew else []))
    assert model.holder().number == "3"
    assert _through(model) == int(position)
    _check(_answers(_served(model, "3", journal), position), before)


def test_a_model_that_knows_another_journal_or_none_joins_one_whose_first_segments_are_gone(
    model: RefreshedModel, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.db"
    Journal(journal).close()
    other = _other(model)
    for number in (0, 10):
        _sent_returns(journal, number, number + 10)
        other.refresh("--journal", str(journal), "--remove-events")
    assert Journal(journal).removed() > 0
    app = _served(model, "1", journal)
    assert _failure(app) is None
    position = _sent(app, as_json(model._days(9, 10)))
    before = _answers(app, position)
    model.refresh("--journal", str(journal))
    assert _through(model) == int(position)
    _check(_answers(_served(model, "2", journal), position), before)


@pytest.mark.parametrize("words", [(), ("--anew",)])
def test_what_is_known_of_a_journal_never_becomes_less(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Batches that leave no file are known all the same, and so they stay without the journal."""
    model, journal = RefreshedModel(tmp_path, requests=True), tmp_path / "journal.db"
    Journal(journal).close()
    for number in (0, 10):
        _sent_returns(journal, number, number + 10)
        through = cut_journal(Journal(journal))
    model.add(9, 10)
    model.refresh("--journal", str(journal))
    assert _through(model) == through
    model.add(10, 11)
    model.refresh(*words)
    assert model.holder().number == "3"
    assert _through(model) == through


def test_files_that_lack_columns_of_a_model_are_refused(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One model does not read a column, so its refresh wrote nulls there."""
    features = {name: each for name, each in ALL_KINDS.items() if name != "brand_spent"}
    tasks = {name: each for name, each in BASE["tasks"].items() if name != "spent"}
    data = {"log": str(model.log), "work": str(tmp_path / "fewer" / "work")}
    fewer = RefreshedModel(tmp_path / "fewer", data=data, features=features, tasks=tasks)
    journal = tmp_path / "journal.db"
    app = _served(model, "1", journal)
    rows = as_json(model._days(9, 11))
    _sent(app, rows[:30])
    model.refresh("--journal", str(journal))
    _sent(app, rows[30:60])
    fewer.refresh("--journal", str(journal))  # it reads no column that the first file lacks
    assert fewer.holder().number == "2"
    _sent(app, rows[60:])
    files = sorted(model.log.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(journal))
    assert "of a model that does not read the column 'spent', so" in capsys.readouterr().err
    assert sorted(model.log.iterdir()) == files
    assert model.holder().number == "2"
    # A person may take the file as it is, and then goes on.
    model.refresh()
    model.refresh("--journal", str(journal))
    assert model.holder().number == "4"
