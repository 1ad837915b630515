"""`/invocations?after=POSITION`: a position of the journal is waited for, and any other one gets a sentence."""

from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.position import Position
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.live import following
from mmoe_rec.server.live.learning import Learning
from mmoe_rec.server.models import Models
from mmoe_rec.server.reloading import Source
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, START
from tests.server.asking import Answer, ask
from tests.server.test_events import as_json, asked, later_log


def server(small: SmallModel, work: Path) -> Application:
    Journal(work / "journal").close()
    models = Models(Limits(), work / "journal")
    models.load(Source(small.folder, "models:/small/7", "a_run"))
    return Application(models, Limits())


def after(app: Application, position: object) -> Answer:
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}")
    assert isinstance(answer, Answer)
    return answer


def positions(app: Application, calls: int, seed: int = 3) -> list[Position]:
    """Those that calls of /events get, each with one row."""
    rows = as_json(later_log(seed, rows=calls))
    answers = [ask(app, {"events": [row]}, page="/events") for row in rows]
    return [Position.parse(each.tree["position"]) for each in answers]


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[Position]:
    """The positions for which the journal's files are read."""
    found: list[Position] = []
    check = Learning.check

    def checked(self: Learning, position: Position) -> None:
        found.append(position)
        check(self, position)

    monkeypatch.setattr(Learning, "check", checked)
    return found


def test_a_position_within_a_record_is_refused_however_far_the_model_is(small, tmp_path):
    app = server(small, tmp_path)
    first, *_, last = positions(app, 3)
    assert after(app, last).status == 200
    for wrong in (first.offset + 8, first.offset - 8, last.offset - 8):
        answer = after(app, Position(1, wrong))
        assert answer.status == 400
        assert f"'after': position 1-{wrong} is not the end of a record of the journal" in answer.message
    assert after(app, first).status == 200


def test_a_position_of_another_journal_is_refused(small, tmp_path):
    app = server(small, tmp_path / "one")
    mine = positions(app, 3)
    other = server(small, tmp_path / "other")
    ask(other, {"events": as_json(later_log(4, rows=2))}, page="/events")
    (theirs,) = positions(other, 1, seed=5)
    assert theirs < mine[-1]
    assert theirs not in mine
    assert after(app, mine[-1]).status == 200
    assert "not the end of a record" in after(app, theirs).message


def test_known_positions_are_not_looked_up_in_the_journal(small, tmp_path, looked_up, monkeypatch):
    monkeypatch.setattr(following, "MOST_ENDS", 3)
    app = server(small, tmp_path)
    appended = positions(app, 4)
    assert after(app, appended[-1]).status == 200
    assert looked_up == []  # which this process has appended
    assert after(app, appended[0]).status == 200
    assert after(app, appended[0]).status == 200
    assert looked_up == [appended[0]]  # as more came after it than are kept; but once


def test_positions_that_were_read_are_not_looked_up(small, tmp_path, looked_up):
    """As in a worker, where most events are appended by others."""
    app = server(small, tmp_path)
    other = Journal(tmp_path / "journal")
    positions(app, 3)
    batches = Follower(tmp_path / "journal").read()
    theirs = [other.append(each) for each in batches]
    other.close()
    answer = ask(app, {"events": as_json(later_log(9, rows=1))}, page="/events")
    assert after(app, answer.tree["position"]).status == 200  # so the model has read all before
    assert [after(app, each).status for each in theirs] == [200] * 3
    assert looked_up == []


def test_positions_of_removed_segments_are_answered(small, tmp_path):
    """A caller may come with an old one: what it stands for lies in the tables, or the reply says that it does not."""
    app = server(small, tmp_path)
    old = positions(app, 3)[-1]
    journal = Journal(tmp_path / "journal")
    journal.close_segment()
    journal.close()
    new = positions(app, 2, seed=6)[-1]
    assert new.segment == 2
    assert after(app, new).status == 200
    (tmp_path / "journal" / "segment-00000001.journal").unlink()
    assert after(app, old).status == 200
    again = server(small, tmp_path)  # which has not met it
    answer = after(again, old)
    assert answer.status == 200
    assert "begins with segment 2" in answer.tree["predictions"][0]["warnings"][-1]
    assert "not the end of a record" in after(again, Position(2, new.offset - 8)).message


def test_a_journal_that_can_not_be_read_is_no_fault_of_the_caller(small, tmp_path, monkeypatch, caplog):
    app = server(small, tmp_path)
    first, *_ = positions(app, 2)
    again = server(small, tmp_path)

    def fails(*_: Any) -> None:
        raise UserError("the disk is gone")

    monkeypatch.setattr(Learning, "check", fails)
    answer = after(again, first)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "can't be looked up" in answer.message
    assert "the disk is gone" in caplog.text
    monkeypatch.undo()
    assert after(again, first).status == 200
