"""What a server has accepted goes into the tables of a new version, which a server then serves as the one before."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live.journal import Journal
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from tests.live.refreshed_model import RefreshedModel
from tests.log.small_logs import DAY, START
from tests.preprocessing.test_tables_of_models import assert_same_tables
from tests.server.asking import as_json, ask, take_up
from tests.server.test_events import asked

pytestmark = pytest.mark.thorough

TIMES = [START + 15 * DAY, START + 17 * DAY, START + 40 * DAY]


def _served(model: RefreshedModel, number: str, journal: Path | None = None) -> Application:
    address = model.journal if journal is None else journal
    Journal(address).close()
    source = ResolvedModel(model.folder_of(number), f"models:/small/{number}")
    return Application(ModelManager(ServerOptions(journal=str(address)), source))


def _answers(app: Application, position: str) -> list[Any]:
    actual = []
    for time in TIMES:
        for user in (-7, 0, 5):
            body = {"inputs": [asked(time, user)], "params": {"explain": True}}
            answer = ask(app, body, page=f"/invocations?after={position}")
            assert answer.status == 200, answer.tree
            (ranking,) = answer.tree["predictions"]
            known = [
                {name: explanation[name] for name in ("counters", "histories")}
                for explanation in ranking["explanations"]
            ]
            actual.append([ranking["candidates"], ranking["scores"], known])
    return actual


def _check(actual: list[Any], expected: list[Any]) -> None:
    """Counters and histories are the same; scores nearly, as sums of products may differ in their last bits."""
    for (candidates, scores, known), second in zip(actual, expected, strict=True):
        assert [candidates, known] == [second[0], second[2]]
        assert scores == pytest.approx(second[1], abs=1e-6)


def _sent(app: Application, rows: list[dict[str, Any]]) -> str:
    position = ""
    for start in range(0, len(rows), 17):
        answer = ask(app, {"events": rows[start : start + 17]}, page="/events")
        assert answer.status == 200, answer.tree
        position = answer.tree["position"]
    return position


def _through(model: RefreshedModel) -> int:
    known = model.about(model.champion_version().number).journal
    return int(known["through"])


def test_a_refreshed_model_answers_as_the_one_that_learnt(model: RefreshedModel, capsys: pytest.CaptureFixture) -> None:
    app = _served(model, "1")
    first = as_json(model._days(9, 11))
    late = as_json(model._days(6, 6.5).slice(0, 3))  # which a model may hold that does not know the journal
    for number, row in enumerate(late):
        row["item"] = 10**6 + number
    position = _sent(app, [*first, *first[:5], *late])
    before = _answers(app, position)

    model.take_in()
    said = capsys.readouterr()
    assert "'champion' of 'small' is version 2 now" in said.out
    through = _through(model)
    assert through == int(position)
    assert len([*model.log.glob("journal-*.parquet")]) == 1

    # The tables alone say the same, and a server that goes on with the journal counts nothing twice.
    request = asked(TIMES[0], 5)
    message = Ranker.load(model.folder_of("2")).rank(**request, explain=True)
    again = _served(model, "2")
    _check(_answers(again, position), before)
    assert message.scores == pytest.approx(_answers(again, position)[2][1], abs=1e-6)

    # The next day.
    position = _sent(again, as_json(model._days(11, 14)))
    position = _sent(again, first[:5]) or position  # which the tables hold already
    for row in late:
        row["item"] += 100
    position = _sent(again, late)
    before = _answers(again, position)
    _check(_answers(_served(model, "2"), position), before)  # which learns what came since its refresh
    model.take_in("--remove-events")
    assert "came late" in capsys.readouterr().err
    assert model.champion_version().number == "3"
    assert Journal(model.journal).removed_until() == through
    _check(_answers(_served(model, "3"), position), before)
    model.take_in()
    assert "no new files" in capsys.readouterr().out
    assert len(model.versions()) == 3


def test_another_journal_than_the_tables_hold_is_refused(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    second = tmp_path / "other.db"
    app = _served(model, "1")
    rows = as_json(model._days(9, 14))
    _sent(app, rows[:30])
    model.take_in()
    position = _sent(app, rows[30:40])  # by the model before, which goes on until the server takes up the new one
    before = _answers(app, position)
    _check(_answers(_served(model, "2"), position), before)
    _sent(_served(model, "2", second), rows[-5:])
    assert "the model's tables include journal " in model.refused(capsys, "--journal", str(second))
    # What the right one holds was not lost.
    model.take_in()
    _check(_answers(_served(model, "3"), position), before)
    model.refresh("--journal", str(second), "--other-journal")
    about = model.about("4")
    assert about.journal["id"] == Journal(second).id


def _rolled_back(model: RefreshedModel) -> str:
    """Three refreshes, of which the last one removes what the second took; then the alias goes back to version 2.

    Gives the journal's last position.
    """
    app, rows = _served(model, "1"), as_json(model._days(9, 14))
    for number, start in enumerate((0, 20, 40)):
        _sent(app, rows[start : start + 20])
        model.take_in(*(["--remove-events"] if number == 2 else []))
    assert model.champion_version().number == "4"
    assert Journal(model.journal).removed_until() == 4
    model.move_alias("2")
    return _sent(app, rows[60:])


def _learnt(app: Application) -> int:
    ingester = app.models.current.ingester
    return ingester.ranker.pipeline.live.rows


def _failure(app: Application) -> str | None:
    return ask(app, b"", page="/version", method="GET").tree["events_failure"]


def _reported(app: Application) -> str:
    message = _failure(app)
    answer = ask(app, {"inputs": [asked(TIMES[0], 5)]})
    assert answer.tree["predictions"][0]["warnings"][-1] == f"the reply ignores some events: {message}"
    return str(message)


def test_an_earlier_version_serves_without_what_was_removed_and_says_so(
    model: RefreshedModel, caplog: pytest.LogCaptureFixture
) -> None:
    position = _rolled_back(model)
    app = _served(model, "4")
    assert _failure(app) is None
    take_up(app.models, ResolvedModel(model.folder_of("2"), "models:/small/2"))
    assert ask(app, b"", page="/version", method="GET").tree["uri"] == "models:/small/2"
    message = _reported(app)
    assert "begins after position 4, and the model's tables include only positions up to 2. The removed" in message
    assert "mmoe-rec refresh --config FILE --model models:/NAME@ALIAS, without --journal" in message
    assert message in caplog.text
    # All that came after the removed batches it does know.
    assert ask(app, {"inputs": [asked(TIMES[0], 5)]}, page=f"/invocations?after={position}").status == 200
    assert _learnt(app) == len(model._days(9, 14)) - 40
    take_up(app.models, ResolvedModel(model.folder_of("4"), "models:/small/4"))
    assert _failure(app) is None


def test_a_refresh_of_an_earlier_version_without_the_journal_knows_what_was_removed(
    model: RefreshedModel, capsys: pytest.CaptureFixture
) -> None:
    position = _rolled_back(model)
    message = model.refused(capsys, "--journal", str(model.journal))
    assert "positions up to 2. The removed events are in the log's files" in message
    expected = _answers(_served(model, "4"), position)
    for number, words in (("5", ()), ("6", ("--journal", str(model.journal)))):
        model.refresh(*words)
        assert model.champion_version().number == number
        app = _served(model, number)
        assert _failure(app) is None
        _check(_answers(app, position), expected)


def test_a_journal_that_is_none_is_reported(
    model: RefreshedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, message in (
        (("--journal", str(tmp_path / "nothing")), "is not a journal"),
        (("--remove-events",), "--journal"),
        (("--other-journal",), "--journal"),
    ):
        assert message in model.refused(capsys, *words)
    assert not (tmp_path / "nothing").exists()


def _of_journal(model: RefreshedModel) -> list[dict[str, Any]]:
    """The rows that came into the log from journals."""
    files = sorted(model.log.glob("journal-*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def _refreshed_once(model: RefreshedModel) -> Application:
    """With rows of day 9 through the journal, so that it is known to the model; serves what was refreshed."""
    _sent(_served(model, "1"), as_json(model._days(9, 10)))
    model.take_in()
    return _served(model, "2")


@pytest.mark.parametrize("first", ["file", "journal"])
def test_a_row_that_came_by_the_journal_and_in_a_file_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, first: str
) -> None:
    """As long as one of the two is new; a build of all files refuses it."""
    model, whole = RefreshedModel(tmp_path / "one", requests=True), RefreshedModel(tmp_path / "other", requests=True)
    app, again = _refreshed_once(model), len(_of_journal(model))
    if first == "file":
        again = len(old := as_json(model._days(2, 3)))
        _sent(app, [*as_json(model._days(10, 11)), *old])
        model.take_in()
        whole.add(9, 11)
    else:
        model.add(9, 10.5)
        model.refresh()
        whole.add(9, 10.5)
    whole.refresh()
    assert f"skipped {again:,} rows of new files that repeat rows of earlier files" in capsys.readouterr().err
    assert model.champion_version().number == "3"
    left, second = (item.folder_of(item.champion_version().number) / "features" for item in (model, whole))
    assert_same_tables(left, second, compare_files=False)
    message = model.refused(capsys, "--rebuild")
    assert f". The log has {again:,} such rows" in message
    assert "repeats request and candidate" in message


def test_without_requests_ids_new_files_of_another_program_are_refused(
    model: RefreshedModel, capsys: pytest.CaptureFixture
) -> None:
    app = _refreshed_once(model)
    old = next(path for path in model.log.glob("*.parquet") if "journal" not in path.name)
    old.rename(model.log / "renamed.parquet")
    model.take_in()
    _sent(app, as_json(model._days(11, 12)))
    model.add(10, 11)
    assert "days 10 to 11.parquet' is new in the log" in model.refused(capsys, "--journal", str(model.journal))
    model.refresh()
    model.take_in()
    assert model.champion_version().number == "4"


@pytest.mark.parametrize("words", [(), ("--rebuild",)])
def test_the_known_position_of_a_journal_never_falls(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Duplicates leave no file, and a refresh without the journal knows them all the same."""
    model = RefreshedModel(tmp_path, requests=True)
    position = int(_sent(_refreshed_once(model), as_json(model._days(9, 10))))
    model.add(10, 11)
    model.take_in()
    assert _through(model) == position
    model.add(11, 12)
    model.refresh(*words)
    assert model.champion_version().number == "4"
    assert _through(model) == position
