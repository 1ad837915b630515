"""How a worker's model follows the journal: callers may wait for a position, and the thread leaves the processor to
requests, rests never for long, and ends with its server."""

import gc
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_files import cut_journal, remove_batches, write_files
from mmoe_rec.server import following
from mmoe_rec.server.app import Application
from mmoe_rec.server.following import Following, step_back
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, START
from tests.processes import until
from tests.server.asking import Answer, ask
from tests.server.test_events import as_json, asked, later_log


def server(small: SmallModel, work: Path) -> Application:
    Journal(work / "journal.db").close()
    models = Models(Limits(), str(work / "journal.db"))
    models.load(Source(small.folder, "models:/small/7", "a_run"))
    return Application(models, Limits())


def after(app: Application, position: object) -> Answer:
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}")
    assert isinstance(answer, Answer)
    return answer


def positions(app: Application, calls: int, seed: int = 3) -> list[int]:
    """Those that calls of /events get, each with one row."""
    rows = as_json(later_log(seed, rows=calls))
    return [int(ask(app, {"events": [row]}, page="/events").tree["position"]) for row in rows]


def test_positions_up_to_the_end_are_answered_and_others_refused(small, tmp_path):
    app = server(small, tmp_path)
    assert positions(app, 3) == [1, 2, 3]
    for position in (3, 1, 0, 2):
        assert after(app, position).status == 200
    answer = after(app, 4)
    assert answer.status == 400
    assert "'after': position 4 lies beyond the journal's end, 3" in answer.message
    other = Journal(tmp_path / "journal.db")
    assert other.append(*other.read(0)) == 6  # as another worker does
    assert after(app, 6).status == 200


def test_positions_of_removed_batches_are_answered(small, tmp_path):
    """A caller may come with an old one: what it stands for lies in the tables, or the reply says that it does not."""
    app = server(small, tmp_path)
    old = positions(app, 3)[-1]
    assert after(app, old).status == 200
    journal, place = Journal(tmp_path / "journal.db"), tmp_path / "log"
    place.mkdir()
    write_files(journal, small.settings.schema_, cut_journal(journal), str(place))
    remove_batches(journal, old)
    assert after(app, positions(app, 2, seed=6)[-1]).status == 200
    assert after(app, old).status == 200
    answer = after(server(small, tmp_path), old)
    assert answer.status == 200
    assert "the journal begins after position 3" in answer.tree["predictions"][0]["warnings"][-1]


def test_a_journal_that_can_not_be_read_is_no_fault_of_the_caller(small, tmp_path, monkeypatch, caplog):
    app = server(small, tmp_path)

    def fails(*_: Any) -> None:
        raise UserError("the disk is gone")

    monkeypatch.setattr(Journal, "check", fails)
    answer = after(app, 7)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "can't be looked up" in answer.message
    assert "the disk is gone" in caplog.text


WAITING = (None, None, None)
WITHIN_SECONDS = 1.0
"""Until an event is to be visible."""


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return 0


class Passes:
    """A thread of passes, of which one is under way for a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def wait(self) -> None:
        self._clock.now += 60

    def between_passes(self, function):
        self._clock.now += 60
        function()
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Stub:
    """Has learnt something within a second."""

    live_rows, position = 0, None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def read(self):
        self._clock.now += 1
        return SimpleNamespace(accepted_at=[], counts={})

    def take(self, learnt) -> None:
        pass


def test_waiting_for_a_pass_is_no_work_that_it_rests_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    app = server(SmallModel(tmp_path / "model"), tmp_path)
    metrics = app.metrics
    monkeypatch.setattr(following, "time", clock)
    models = SimpleNamespace(current=SimpleNamespace(learning=Stub(clock)))
    passes = Passes(clock)
    it = Following(models, passes, passes, None, metrics)
    assert it._step() == 1
    assert clock.now == 60 + 1 + 60
    it._waiting.append(WAITING)
    assert it._step() == 1
    assert clock.now == 121 + 1 + 60, "for a caller it learns at once"


def test_rests_are_short_and_left_out_while_a_caller_waits() -> None:
    it = Following(None, None, None, None, None)
    assert it._rest(0.0) == 0
    assert 0.1 <= it._rest(0.001) <= it._rest(0.05) <= it._rest(1000) <= WITHIN_SECONDS / 2
    it._waiting.append(WAITING)
    assert it._rest(1000) == 0


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_thread_steps_back_alone() -> None:
    before = _priority()
    with ThreadPoolExecutor(1, initializer=step_back) as threads:
        assert threads.submit(_priority).result() == min(before + 10, 19)
    assert _priority() == before


def test_threads_end_with_their_server(small: SmallModel, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    app = server(small, tmp_path)
    positions(app, 3)
    assert ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}).status == 200
    threads = set(threading.enumerate()) - before
    assert {"following", "ranking"} <= {each.name for each in threads}
    del app

    def have_ended() -> bool:
        gc.collect()
        return not any(each.is_alive() for each in threads)

    until(have_ended, f"one of {threads} goes on")
