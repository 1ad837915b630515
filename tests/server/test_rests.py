"""How long the thread that learns rests: never so long that events stay unseen, whatever a step had to wait for."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.server.live import following
from mmoe_rec.server.live.following import Following
from tests.inference.small_model import SmallModel
from tests.server.test_after import server

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
        return SimpleNamespace(ends=[], accepted_at=[], counts={})

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
