"""Attempts to take up another model: one after the other, shared by those who ask, and none brings an older one."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, NotFoundError, Reloads, Source, Watch
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
