"""How a worker's model follows the journal: callers may wait for a position, and the thread ends with its server."""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.live.journal import Journal
from mmoe_rec.live.journal_files import cut_journal, remove_batches, write_files
from mmoe_rec.server import ranking_queue
from mmoe_rec.server.app import Application
from mmoe_rec.server.following import step_back
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from mmoe_rec.server.ranking_queue import Passes
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, START
from tests.processes import PATIENCE, until
from tests.server.asking import Answer, ask, element, reply
from tests.server.test_batching import Watched
from tests.server.test_events import as_json, asked, later_log


def server(small: SmallModel, work: Path, limits: Limits = Limits()) -> Application:  # noqa: B008 - it is frozen
    Journal(work / "journal.db").close()
    models = Models(limits, str(work / "journal.db"))
    models.load(Source(small.folder, "models:/small/7", "a_run"))
    return Application(models, limits)


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
    for wrong in ("x", ""):
        answer = after(app, wrong)
        assert (answer.status, "no position" in answer.message) == (400, True)
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


@pytest.mark.parametrize("ranking", [0, 1])
def test_work_waits_for_a_pass_of_any_worker(ranking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    marks, done = bytearray(2), threading.Event()
    own, _ = workers = [Passes(marks, number) for number in range(2)]
    own.wait()  # nobody ranks
    workers[ranking].begin()
    own.wait()  # and it gives up in the end
    monkeypatch.setattr(ranking_queue, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
    threading.Thread(target=lambda: (own.wait(), done.set()), daemon=True).start()
    assert not done.wait(0.05)
    workers[ranking].end()
    assert done.wait(PATIENCE)


def test_events_are_taken_after_a_pass(small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_queue, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
    app = server(small, tmp_path)
    served, events = app.models.current, app.events
    assert served is not None
    assert events is not None
    ranker = Watched(served.ranker)
    ranker.pipeline = served.ranker.pipeline  # type: ignore[attr-defined]
    app.models.current = replace(served, ranker=ranker)  # type: ignore[arg-type]

    async def scenario() -> None:
        ranker.go_on.clear()
        ranked = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await asyncio.to_thread(until, lambda: ranker.passes)
        taken = asyncio.create_task(reply(app, b"no JSON", page="/events"))
        while not events.places.taken:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert not taken.done()
        ranker.go_on.set()
        assert (await ranked).status == 200
        assert (await taken).status == 400
        assert not events.places.taken

    asyncio.run(scenario())


def test_events_do_not_wait_soon_after_a_wait(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers leave no moment in which none ranks."""
    app, wait, waits = server(small, tmp_path), Passes.wait, list[str]()
    monkeypatch.setattr(ranking_queue, "LONGEST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(Passes, "wait", lambda self: (waits.append(threading.current_thread().name), wait(self)))
    app.calls.passes.begin()
    assert [ask(app, b"no JSON", page="/events").status for _ in range(3)] == [400] * 3
    assert len([name for name in waits if name.startswith("events")]) == 1


@pytest.mark.parametrize("full", ["/invocations", "/events"])
def test_a_page_that_is_full_leaves_the_other_one_its_places(small: SmallModel, tmp_path: Path, full: str) -> None:
    app = server(small, tmp_path, Limits(max_waiting=2))
    assert app.events is not None
    places = {"/invocations": app.calls.places, "/events": app.events.places}
    bodies = {"/invocations": {"inputs": [element()]}, "/events": {"events": as_json(later_log(3, rows=2))}}

    async def statuses() -> dict[str, int]:
        end = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await end.wait()

        held = [asyncio.ensure_future(reply(app, page=full, parts=slow())) for _ in range(2)]
        while places[full].taken < 2:
            await asyncio.sleep(0)
        found = {page: (await reply(app, body, page=page)).status for page, body in bodies.items()}
        end.set()
        await asyncio.gather(*held)
        return found

    assert asyncio.run(statuses()) == {page: 503 if page == full else 200 for page in bodies}
    assert [each.taken for each in places.values()] == [0, 0]
