"""What a server has accepted goes into the tables of a new version, which a server then serves as the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live.journal import Journal
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from tests.log.small_logs import DAY, START
from tests.pipelines.refreshed_model import RefreshedModel
from tests.server.asking import ask
from tests.server.test_events import as_json, asked

pytestmark = pytest.mark.thorough

TIMES = [START + 15 * DAY, START + 17 * DAY, START + 40 * DAY]


def _served(model: RefreshedModel, number: str, journal: Path) -> Application:
    Journal(journal).close()
    models = Models(Limits(), str(journal))
    models.load(Source(model.folder_of(number), f"models:/small/{number}"))
    return Application(models, Limits())


def _answers(app: Application, position: str) -> list[Any]:
    found = []
    for time in TIMES:
        for user in (-7, 0, 5):
            body = {"inputs": [asked(time, user)], "params": {"explain": True}}
            answer = ask(app, body, page=f"/invocations?after={position}")
            assert answer.status == 200, answer.tree
            (ranking,) = answer.tree["predictions"]
            known = [{name: each[name] for name in ("counters", "histories")} for each in ranking["explanations"]]
            found.append([ranking["candidates"], ranking["scores"], known])
    return found


def _check(found: list[Any], expected: list[Any]) -> None:
    """Counters and histories are the same; scores nearly, as sums of products may differ in their last bits."""
    for (candidates, scores, known), other in zip(found, expected, strict=True):
        assert [candidates, known] == [other[0], other[2]]
        assert scores == pytest.approx(other[1], abs=1e-6)


def _sent(app: Application, rows: list[dict[str, Any]]) -> str:
    position = ""
    for start in range(0, len(rows), 17):
        answer = ask(app, {"events": rows[start : start + 17]}, page="/events")
        assert answer.status == 200, answer.tree
        position = answer.tree["position"]
    return position


@pytest.fixture
def model(tmp_path: Path) -> RefreshedModel:
    return RefreshedModel(tmp_path)


def test_a_refreshed_model_answers_as_the_one_that_learnt(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    journal = tmp_path / "journal.db"
    app = _served(model, "1", journal)
    first = as_json(model._days(9, 11))
    late = as_json(model._days(6, 6.5).slice(0, 3))  # which a model may hold that does not know the journal
    for number, row in enumerate(late):
        row["item"] = 10**6 + number
    position = _sent(app, [*first, *first[:5], *late])
    before = _answers(app, position)

    model.refresh("--journal", str(journal))
    said = capsys.readouterr()
    assert "'champion' of 'small' is version 2 now" in said.out
    about = model.about("2")
    assert about.journal is not None
    assert about.journal["through"] == int(position)
    files = sorted(each.name for each in model.log.glob("journal-*.parquet"))
    assert len(files) == 1

    # The tables alone say the same, and a server that goes on with the journal counts nothing twice.
    request = asked(TIMES[0], 5)
    told = Ranker.load(model.folder_of("2")).rank(**request, explain=True)
    again = _served(model, "2", journal)
    _check(_answers(again, position), before)
    assert told.scores == pytest.approx(_answers(again, position)[2][1], abs=1e-6)

    # The next day.
    position = _sent(again, as_json(model._days(11, 14)))
    position = _sent(again, first[:5]) or position  # which the tables hold already
    for row in late:
        row["item"] += 100
    position = _sent(again, late)
    before = _answers(again, position)
    model.refresh("--journal", str(journal), "--remove-events")
    assert "they came late" in capsys.readouterr().err
    assert model.holder().number == "3"
    assert Journal(journal).removed() == about.journal["through"]
    _check(_answers(_served(model, "3", journal), position), before)
    model.refresh("--journal", str(journal))
    assert "no new files" in capsys.readouterr().out
    assert len(model.versions()) == 3


def test_what_a_server_accepts_meanwhile_is_not_lost(model: RefreshedModel, tmp_path: Path) -> None:
    journal = tmp_path / "journal.db"
    app = _served(model, "1", journal)
    rows = as_json(model._days(9, 14))
    _sent(app, rows[:30])
    model.refresh("--journal", str(journal))
    position = _sent(app, rows[30:])  # by the model before, which goes on until the server takes up the new one
    before = _answers(app, position)
    _check(_answers(_served(model, "2", journal), position), before)


def test_another_journal_than_the_tables_hold_is_refused(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    journal, other = tmp_path / "journal.db", tmp_path / "other.db"
    app = _served(model, "1", journal)
    rows = as_json(model._days(9, 14))
    _sent(app, rows[:30])
    model.refresh("--journal", str(journal))
    position = _sent(app, rows[30:40])
    before = _answers(app, position)
    _sent(_served(model, "2", other), rows[-5:])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(other))
    assert "hold another journal" in capsys.readouterr().err
    assert len(model.versions()) == 2
    # What the right one holds was not lost.
    model.refresh("--journal", str(journal))
    _check(_answers(_served(model, "3", journal), position), before)
    model.refresh("--journal", str(other), "--other-journal")
    about = model.about("4")
    assert about.journal is not None
    assert about.journal["id"] == Journal(other).id


def _rolled_back(model: RefreshedModel, journal: Path) -> str:
    """Three refreshes, of which the last one removes what the second took; then the alias goes back to version 2.

    Gives the journal's last position.
    """
    app, rows = _served(model, "1", journal), as_json(model._days(9, 14))
    for number, start in enumerate((0, 20, 40)):
        _sent(app, rows[start : start + 20])
        model.refresh("--journal", str(journal), *(["--remove-events"] if number == 2 else []))
    assert model.holder().number == "4"
    assert Journal(journal).removed() == 4
    model.move_alias("2")
    return _sent(app, rows[60:])


def _told(app: Application) -> str:
    told = ask(app, b"", page="/version", method="GET").tree["events_failure"]
    answer = ask(app, {"inputs": [asked(TIMES[0], 5)]})
    assert answer.tree["predictions"][0]["warnings"][-1] == f"some events are not counted: {told}"
    return str(told)


def test_an_earlier_version_serves_without_what_was_removed_and_says_so(
    model: RefreshedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "journal.db"
    position = _rolled_back(model, journal)
    app = _served(model, "4", journal)
    assert ask(app, b"", page="/version", method="GET").tree["events_failure"] is None
    app.models.load(Source(model.folder_of("2"), "models:/small/2"))
    assert ask(app, b"", page="/version", method="GET").tree["address"] == "models:/small/2"
    told = _told(app)
    assert "up to position 2, and what came up to position 4 was removed since, so it does not know that" in told
    assert "mmoe-rec refresh --config FILE --model models:/NAME@ALIAS, without --journal" in told
    assert told in caplog.text
    # All that came after the removed batches it does know.
    assert ask(app, {"inputs": [asked(TIMES[0], 5)]}, page=f"/invocations?after={position}").status == 200
    learning = app.models.current.learning
    assert learning is not None
    assert learning.ranker.live_rows == len(model._days(9, 14)) - 40
    app.models.load(Source(model.folder_of("4"), "models:/small/4"))
    assert ask(app, b"", page="/version", method="GET").tree["events_failure"] is None


def test_a_refresh_of_an_earlier_version_without_the_journal_knows_what_was_removed(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    journal = tmp_path / "journal.db"
    position = _rolled_back(model, journal)
    with pytest.raises(SystemExit):
        model.refresh("--journal", str(journal))
    assert "up to 2 only: what was removed is in the log's files" in capsys.readouterr().err
    expected = _answers(_served(model, "4", journal), position)
    for number, words in (("5", ()), ("6", ("--journal", str(journal)))):
        model.refresh(*words)
        assert model.holder().number == number
        app = _served(model, number, journal)
        assert ask(app, b"", page="/version", method="GET").tree["events_failure"] is None
        _check(_answers(app, position), expected)


def test_a_journal_that_is_none_is_told(model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, told in (
        (("--journal", str(tmp_path / "nothing")), "holds no journal"),
        (("--remove-events",), "--journal"),
        (("--other-journal",), "--journal"),
    ):
        with pytest.raises(SystemExit):
            model.refresh(*words)
        assert told in capsys.readouterr().err
    assert len(model.versions()) == 1
    assert not (tmp_path / "nothing").exists()
