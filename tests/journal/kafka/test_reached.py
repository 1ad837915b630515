"""What is known of a topic's end grows old, by a clock that the tests set."""

import pytest

from mmoe_rec.journal.kafka.reached import BEHIND_SECONDS, Reached


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def test_the_end_that_was_told_grows_old_whatever_else_brokers_answer(clock: _Clock) -> None:
    reached = Reached(clock)
    clock.now += 7
    reached.tell(5)
    heard = reached.heard
    assert (reached.age, reached.silence) == (0, 0)
    clock.now += 20
    reached.hear()
    reached.advance(3)
    assert (reached.age, reached.silence) == (20, 0)
    assert reached.heard == heard
    reached.tell(5)
    assert reached.age == 0


def test_who_has_all_that_was_told_long_ago_may_still_be_behind(clock: _Clock) -> None:
    reached = Reached(clock)
    reached.tell(5)
    assert reached.behind == 0
    clock.now += BEHIND_SECONDS + 1
    assert reached.behind == BEHIND_SECONDS + 1
    reached.advance(5)
    assert reached.behind == BEHIND_SECONDS + 1
    reached.tell(5)
    assert reached.behind == 0
    reached.tell(6)
    reached.advance(6)
    clock.now += 99
    assert reached.behind == 0, "it had all while that was new"
