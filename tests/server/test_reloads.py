"""Attempts to take up another model: one after the other, shared by those who ask, and none brings an older one."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.server import workers
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.options import Options
from mmoe_rec.server.reloading import NotFoundError, Reloads, Source, Watch
from mmoe_rec.server.running import Reloading
from mmoe_rec.server.sharing.passes import Mark
from mmoe_rec.server.worker import _Talk
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, until
from tests.server.asking import ask, element


class Address:
    """An address whose model a test changes; a find takes as long as a test wants, once the model is known."""

    def __init__(self) -> None:
        self.version: str | Exception = "1"
        self.finds = list[str]()
        self.go_on = threading.Event()
        self.go_on.set()

    def state(self) -> str:
        """As a `Finder`."""
        if isinstance(self.version, Exception):
            raise self.version
        return self.version

    def find(self) -> Source:
        """As a `Finder`."""
        found = Source(Path("unused"), self.state())
        self.finds.append(found.address)
        assert self.go_on.wait(PATIENCE)
        return found


class Taken(list[str]):
    """The models that were taken up; those of `broken` can't be."""

    broken = frozenset[str]()

    def __call__(self, source: Source) -> None:
        self.append(source.address)
        if source.address in self.broken:
            raise UserError(f"{source.address} is broken")


def test_a_slow_find_never_puts_an_older_model_back() -> None:
    address, taken = Address(), Taken()
    reloads = Reloads(address, taken)
    watch = Watch(address, reloads, 0)
    address.go_on.clear()
    asked = reloads.ask()
    until(lambda: address.finds == ["1"])
    address.version = "2"
    looking = threading.Thread(target=watch.look, daemon=True)
    looking.start()
    until(lambda: reloads._coming is not None or taken)
    assert not taken, "the second waits for the first"
    address.go_on.set()
    asked.result(PATIENCE)
    looking.join(PATIENCE)
    assert taken == ["1", "2"]
    assert reloads._coming is None


def test_those_who_ask_meanwhile_share_one_further_attempt() -> None:
    address, taken = Address(), Taken()
    reloads = Reloads(address, taken)
    address.go_on.clear()
    first = reloads.ask()
    until(lambda: address.finds == ["1"])
    address.version = "2"
    threads = threading.active_count()
    others = [reloads.ask() for _ in range(150)]
    assert threading.active_count() == threads

    async def leave() -> None:
        waiting = asyncio.wrap_future(reloads.ask())
        waiting.cancel()

    asyncio.run(leave())
    assert not any(each.done() for each in (first, *others))
    address.go_on.set()
    for each in (first, *others):
        each.result(PATIENCE)
    assert address.finds == taken == ["1", "2"]
    reloads.ask().result(PATIENCE)
    assert taken == ["1", "2", "2"], "and it goes on afterwards"


def test_an_attempt_that_fails_tells_all_who_wait_why() -> None:
    address, taken = Address(), Taken()
    taken.broken = frozenset("1")
    reloads = Reloads(address, taken)
    with pytest.raises(UserError, match="1 is broken"):
        reloads.ask().result(PATIENCE)
    address.version = OSError("no\nroom")
    with pytest.raises(NotFoundError, match="OSError: no room"):
        reloads.ask().result(PATIENCE)
    address.version = "3"
    reloads.ask().result(PATIENCE)
    assert taken == ["1", "3"]


# Workers: the parent's end of the pipe, and a worker's


class Sent:
    """A loaded model, of whose way to a worker only the address is left."""

    def __init__(self, source: Source) -> None:
        self.source, self.file = source, BytesIO()

    def send(self, process: object, pipe: Any) -> None:
        """As `Prepared`."""
        pipe.send(self.source.address)


class Loading:
    """A loading that ends at once; of model 3 with an error."""

    def __init__(self, source: Source, limits: Limits, is_stopping: Callable[[], bool]) -> None:
        self.source = source

    def has_ended(self) -> bool:
        """As `Preparing`."""
        return True

    def result(self) -> Sent:
        """As `Preparing`."""
        if self.source.address == "3":
            raise UserError("3 is broken")
        return Sent(self.source)


def test_a_worker_is_told_after_the_model_that_was_looked_for_when_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Preparing", Loading)
    address = Address()
    parent = workers._Parent(address.find(), address, cast(Any, None), Options(Limits()), 0)
    ours, theirs = multiprocessing.Pipe()
    worker = workers._Worker(cast(Any, None), ours, Mark(bytearray(1)))
    parent._workers.append(worker)
    told = []

    def step() -> None:
        """A turn of the parent's loop."""
        parent._prepare()
        while not parent._todo.empty():
            parent._todo.get()()
        while theirs.poll():
            told.append(theirs.recv())

    def until_told(*expected: Any) -> None:
        def is_told() -> bool:
            step()
            return len(told) >= len(expected)

        until(is_told)
        assert told == list(expected)
        told.clear()

    until_told(("load",), "1")
    address.go_on.clear()
    parent._heard(worker, "reload", 7)
    until(lambda: len(address.finds) == 2)
    address.version = "2"
    parent._heard(worker, "reload", 8)
    parent._heard(worker, "reload", 9)
    address.go_on.set()
    first = [("load",), "1", ("reloaded", 7, None)]
    until_told(*first, ("load",), "2", ("reloaded", 8, None), ("reloaded", 9, None))
    address.version = "3"
    parent._heard(worker, "reload", 10)
    until_told(("failed", "3 is broken"), ("reloaded", 10, "3 is broken"))
    address.version = UserError("nothing there")
    parent._heard(worker, "reload", 11)
    until_told(("reloaded", 11, "nothing there"))
    address.version = "4"
    parent._heard(worker, "reload", 12)
    until_told(("load",), "4", ("reloaded", 12, None))


def test_a_caller_is_not_answered_for_an_earlier_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()
    talk = _Talk(theirs, cast(Reloading, None))
    mapped: list[str | None] = [None, "too old", None]
    monkeypatch.setattr(talk, "_mapped", lambda: mapped.pop(0))
    ended = Future[None]()

    async def scenario() -> None:
        threading.Thread(target=talk.run, args=(asyncio.get_running_loop(), lambda: ended.set_result(None))).start()
        first, second, third = [asyncio.create_task(talk.reload()) for _ in range(3)]
        await asyncio.sleep(0)
        assert [ours.recv() for _ in range(3)] == [("reload", number) for number in range(3)]
        for message in (("load",), ("reloaded", 0, None), ("load",)):
            ours.send(message)
        await first
        assert [ours.recv(), ours.recv()] == [("loaded", None), ("loaded", "too old")]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not second.done(), "the model that came belongs to another attempt"
        ours.send(("reloaded", 1, None))
        with pytest.raises(UserError, match="too old"):
            await second
        assert not third.done()
        ours.send(("load",))
        ours.send(("reloaded", 2, "not found"))
        with pytest.raises(UserError, match="not found"):
            await third
        ours.close()
        await asyncio.wrap_future(ended)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


# The memory of a model is free once another one is served


def nothing(app: Application) -> None:
    """Asks nothing."""


def schema(app: Application) -> None:
    """Asks for the page that holds the model's example."""
    assert ask(app, b"", page="/openapi.json", method="GET").status == 200


def call(app: Application) -> None:
    """Asks for a ranking."""
    assert ask(app, {"inputs": [element()]}).status == 200


@pytest.mark.parametrize("asked", [nothing, schema, call])
def test_a_model_is_gone_once_another_one_is_served(small: SmallModel, asked: Callable[[Application], None]) -> None:
    models = Models(Limits())
    models.load(Source(small.folder, "models:/small/1"))
    app = Application(models, Limits())
    asked(app)
    assert models.current is not None
    before = weakref.ref(models.current.ranker)
    models.load(Source(small.folder, "models:/small/2"))

    def is_gone() -> bool:
        gc.collect()
        return before() is None

    until(is_gone)
    assert any(each.name == "ranking" for each in threading.enumerate())
    asked(app)
