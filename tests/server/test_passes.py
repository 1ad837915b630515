"""Work on events lets passes of all workers end first, but not for ever."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.server.limits import Limits
from mmoe_rec.server.metrics import FOLDER_VARIABLE
from mmoe_rec.server.options import Options
from mmoe_rec.server.reloading import Source
from mmoe_rec.server.sharing import passes
from mmoe_rec.server.sharing.passes import Passes, Place, places
from mmoe_rec.server.workers import _Parent, _Worker
from tests.processes import PATIENCE, until
from tests.server.asking import element, reply
from tests.server.test_after import server
from tests.server.test_batching import Watched
from tests.serving.small_model import SmallModel


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up."""
    monkeypatch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)


def in_thread(waiting: Passes) -> threading.Event:
    """Set once a thread has waited."""
    done = threading.Event()

    def wait() -> None:
        waiting.wait()
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    return done


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("ranking", [0, 1])
def test_a_thread_waits_for_a_pass_of_any_worker(ranking: int) -> None:
    workers = [Passes(each) for each in places(2)]
    assert in_thread(workers[0]).wait(PATIENCE), "nobody ranks"
    workers[ranking].begin()
    done = in_thread(workers[0])
    assert not done.wait(0.05)
    workers[ranking].end()
    assert done.wait(PATIENCE)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("ranking", [0, 1])
def test_calls_wait_for_a_pass_of_any_worker(ranking: int) -> None:
    workers = [Passes(each) for each in places(2)]

    async def scenario() -> None:
        await workers[0].ended()  # nobody ranks
        workers[ranking].begin()
        calls = [asyncio.create_task(workers[0].ended()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in calls)
        workers[ranking].end()
        await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)

    asyncio.run(scenario())


def test_passes_that_follow_each_other_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Passes()
    worker.begin()
    worker.wait()

    async def scenario() -> None:
        await worker.ended()
        monkeypatch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
        await asyncio.wait_for(worker.ended(), PATIENCE)  # not so soon again

    monkeypatch.setattr(passes, "SHARE", 1e6)
    asyncio.run(scenario())


def test_a_call_waits_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(passes, "time", clock)
    monkeypatch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
    worker = Passes()

    async def waits(seconds: float) -> bool:
        worker.begin()
        call = asyncio.create_task(worker.ended())
        await asyncio.sleep(0)
        is_waiting, clock.now = not call.done(), clock.now + seconds
        worker.end()
        await call
        return is_waiting

    async def scenario() -> list[bool]:
        found = [await waits(1.0)]
        clock.now += passes.SHARE - 0.1
        found.append(await waits(0.0))
        clock.now += 0.2
        return [*found, await waits(0.0)]

    assert asyncio.run(scenario()) == [True, False, True]


@pytest.mark.usefixtures("patient")
def test_a_caller_who_leaves_while_waiting_takes_nobody_along() -> None:
    worker = Passes()

    async def scenario() -> None:
        worker.begin()
        one, two = (asyncio.create_task(worker.ended()) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.sleep(0)
        worker.end()
        await asyncio.wait_for(two, PATIENCE)

    asyncio.run(scenario())


def rank(place: Place, pipe: Connection) -> None:
    """A worker that ranks until it is told to end."""
    own = Passes(place)
    own.begin()
    pipe.send("ranks")
    pipe.recv()
    own.end()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_see_each_other(method: str) -> None:
    one, two = places(2)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=rank, args=(two, theirs))
    process.start()
    assert ours.recv() == "ranks"
    assert list(one.under_way) == [0, 1]
    done = in_thread(Passes(one))
    ours.send("end")
    assert done.wait(PATIENCE)
    process.join()


def test_a_worker_that_was_killed_in_a_pass_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    parent = _Parent(Source(tmp_path, "no model"), None, None, Options(Limits()), 0.0)  # type: ignore[arg-type]
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    place = places(2)[1]
    Passes(place).begin()
    dead = SimpleNamespace(pid=0, exitcode=-9)
    parent._workers = [worker := _Worker(dead, ours, place, is_ready=True)]  # type: ignore[arg-type]
    parent._ended(worker)
    assert list(place.under_way) == [0, 0]
    assert parent._free == [place], "the next worker takes it"


@pytest.mark.usefixtures("patient")
def test_events_are_taken_after_a_pass(small: SmallModel, tmp_path: Path) -> None:
    app = server(small, tmp_path)
    served = app.models.current
    assert served is not None
    ranker = Watched(served.ranker)
    ranker.pipeline = served.ranker.pipeline  # type: ignore[attr-defined]
    app.models.current = replace(served, ranker=ranker)  # type: ignore[arg-type]

    async def scenario() -> None:
        ranker.go_on.clear()
        ranked = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await asyncio.to_thread(until, lambda: ranker.passes)
        taken = asyncio.create_task(reply(app, b"no JSON", page="/events"))
        await asyncio.sleep(0.05)
        assert not taken.done()
        ranker.go_on.set()
        assert (await ranked).status == 200
        assert (await taken).status == 400

    asyncio.run(scenario())
