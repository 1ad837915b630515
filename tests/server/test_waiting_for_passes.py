"""Work on events lets passes of all workers end first, but not for ever."""

from __future__ import annotations

import asyncio
import errno
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.server import ranking_queue as passes
from mmoe_rec.server.ranking_queue import Passes, marks
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, until
from tests.server.asking import element, reply
from tests.server.test_batching import Watched
from tests.server.test_following import server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up."""
    monkeypatch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that goes on where it is told to."""
    own = SimpleNamespace(now=100.0, monotonic=lambda: own.now)
    monkeypatch.setattr(passes, "time", own)
    return own


def in_thread(waiting: Passes) -> tuple[threading.Event, threading.Event]:
    """Set once a thread begins to wait, and once it has waited."""
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        waiting.wait()
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    return begun, done


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("ranking", [0, 1])
def test_a_thread_waits_for_a_pass_of_any_worker(ranking: int) -> None:
    own, _ = both = [Passes(each) for each in marks(2)]
    assert in_thread(own)[1].wait(PATIENCE), "nobody ranks"
    both[ranking].begin()
    begun, done = in_thread(own)
    assert begun.wait(PATIENCE)
    assert not done.wait(0.05)
    both[ranking].end()
    assert done.wait(PATIENCE)


def test_a_thread_gives_up_on_others_until_none_ranks() -> None:
    one, two = (Passes(each) for each in marks(2))
    two.begin()
    assert in_thread(one)[1].wait(PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
        assert in_thread(one)[1].wait(PATIENCE), "others have been waited for in vain"
        one.begin()
        begun, done = in_thread(one)
        assert begun.wait(PATIENCE)
        assert not done.wait(0.05), "its own passes are looked for"
        one.end()
        assert done.wait(PATIENCE)
        two.end()
        assert in_thread(one)[1].wait(PATIENCE)
        two.begin()
        begun, done = in_thread(one)
        assert begun.wait(PATIENCE)
        assert not done.wait(0.05), "there was a moment without passes"
        two.end()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("ranking", [0, 1])
def test_calls_wait_for_a_pass_of_any_worker(ranking: int) -> None:
    own, _ = both = [Passes(each) for each in marks(2)]

    async def scenario() -> None:
        await own.let_end()  # nobody ranks
        both[ranking].begin()
        calls = [asyncio.create_task(own.let_end()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in calls)
        both[ranking].end()
        await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)

    asyncio.run(scenario())


@pytest.mark.parametrize("ranking", [0, 1])
def test_passes_that_do_not_end_are_not_waited_for_again_and_again(
    ranking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = both = [Passes(each) for each in marks(2)]
    both[ranking].begin()

    async def scenario() -> None:
        await asyncio.wait_for(own.let_end(), PATIENCE)
        monkeypatch.setattr(passes, "LONGEST_WAIT_SECONDS", 2 * PATIENCE)
        await asyncio.wait_for(own.let_end(), PATIENCE)

    monkeypatch.setattr(passes, "PAUSE_PER_WAIT", 1e6)
    asyncio.run(scenario())


@pytest.mark.usefixtures("patient")
def test_calls_do_not_wait_soon_after_a_wait(clock: SimpleNamespace) -> None:
    worker = Passes()

    async def waits(seconds: float) -> bool:
        """Whether a call waits for a pass that ends so much later; another one comes just before its end."""
        worker.begin()
        one = asyncio.create_task(worker.let_end())
        for _ in range(5):  # it creates a task of its own
            await asyncio.sleep(0)
        is_waiting, clock.now = not one.done(), clock.now + seconds
        two = asyncio.create_task(worker.let_end())
        await asyncio.sleep(0)
        worker.end()
        await asyncio.gather(one, two)
        return is_waiting

    async def scenario() -> list[bool]:
        found = [await waits(1.0)]
        clock.now += passes.PAUSE_PER_WAIT - 0.1
        found.append(await waits(0.0))
        clock.now += 0.2
        return [*found, await waits(0.0)]

    assert asyncio.run(scenario()) == [True, False, True]


@pytest.mark.usefixtures("patient")
def test_a_call_that_is_cancelled_takes_no_other_along() -> None:
    worker = Passes()

    async def scenario() -> None:
        worker.begin()
        one, two = (asyncio.create_task(worker.let_end()) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.sleep(0)
        assert one.cancelled()
        assert not two.done()
        worker.end()
        await asyncio.wait_for(two, PATIENCE)

    asyncio.run(scenario())


def test_without_shared_memory_workers_look_at_themselves(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/shm")

    monkeypatch.setattr(passes, "RawArray", missing)
    one, two = (Passes(each) for each in marks(2))
    two.begin()
    one.wait()
    assert one._have_ended()
    assert not two._have_ended()
    assert "workers can't see of each other whether they rank: No such file or directory" in caplog.text


@pytest.mark.usefixtures("patient")
def test_events_are_taken_after_a_pass(small: SmallModel, tmp_path: Path) -> None:
    app = server(small, tmp_path)
    served = app.models.current
    assert served is not None
    assert app.events is not None
    ranker = Watched(served.ranker)
    ranker.pipeline = served.ranker.pipeline  # type: ignore[attr-defined]
    app.models.current = replace(served, ranker=ranker)  # type: ignore[arg-type]

    async def scenario() -> None:
        ranker.go_on.clear()
        ranked = asyncio.create_task(reply(app, {"inputs": [element()]}))
        await asyncio.to_thread(until, lambda: ranker.passes)
        taken = asyncio.create_task(reply(app, b"no JSON", page="/events"))
        while not app.events.places.taken:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert not taken.done()
        ranker.go_on.set()
        assert (await ranked).status == 200
        assert (await taken).status == 400
        assert not app.events.places.taken

    asyncio.run(scenario())
