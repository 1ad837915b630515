"""A server whose machine is behind a topic, or can't know how far, says so, waits only as long as it may, and loses
nothing."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.reloading import Source
from tests.inference.small_model import SmallModel
from tests.journal.journals import every_batch
from tests.journal.kafka.mock_brokers import Brokers, mock_brokers
from tests.log.small_logs import DAY, START
from tests.processes import PATIENCE, until
from tests.server.asking import Answer, ask
from tests.server.test_events import as_json, asked, later_log

Machine = Callable[..., Application]


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Brokers]:
    pytest.importorskip("confluent_kafka")
    with mock_brokers(tmp_path) as found:
        yield found


@pytest.fixture
def machine(small: SmallModel, tmp_path: Path, brokers: Brokers, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes servers, each with a folder of its own."""
    from mmoe_rec.journal.kafka.replica import Replica
    from mmoe_rec.server.live import joined

    monkeypatch.setattr(joined, "_PAUSE_SECONDS", 0.2)
    place = brokers.topic("events")

    def made(name: str, seconds: float = 9.0) -> Application:
        if not (tmp_path / name).exists():
            Replica(tmp_path / name, place, checks=False).close()
        models = Models(Limits(answer_seconds=seconds), tmp_path / name)
        models.load(Source(small.folder, "models:/small/7", "a_run"))
        return Application(models, Limits(answer_seconds=seconds), topic=KafkaTopic(place.file, "events"))

    return made


class Held:
    """Of a server, which reads as many messages of the topic as it is let, as over a slow network."""

    def __init__(self, app: Application, messages: int = 0) -> None:
        assert app.events is not None
        self.replica: Any = app.events._commit.journal._replica  # type: ignore[attr-defined]
        self._left, self._is_asked = messages, threading.Event()
        self._read, self.replica._topic.read = self.replica._topic.read, self._late
        assert self._is_asked.wait(PATIENCE)

    def let(self, messages: int = 100_000) -> None:
        self._left += messages

    def _late(self, seconds: float, most: int) -> Any:
        self._is_asked.set()
        if not self._left:
            time.sleep(0.01)
            return []
        found = self._read(0.01, 0)
        self._left -= len(found)
        return found


def _ranked(app: Application, after: str = "") -> Answer:
    page = f"/invocations?after={after}" if after else "/invocations"
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=page)
    assert isinstance(answer, Answer)
    return answer


def _sent(app: Application, *rows: dict[str, Any]) -> Answer:
    answer = ask(app, {"events": list(rows)}, page="/events")
    assert isinstance(answer, Answer)
    return answer


def _lag(app: Application) -> str | None:
    text = ask(app, b"", method="GET", page="/metrics").body.decode()
    found = [line for line in text.splitlines() if line.startswith("mmoe_rec_topic_lag ")]
    return found[0].split()[1] if found else None


def _version(app: Application) -> dict[str, Any]:
    tree: dict[str, Any] = ask(app, b"", method="GET", page="/version").tree
    return tree


def _warned(app: Application) -> str:
    return str(_ranked(app).tree["predictions"][0]["warnings"])


def test_a_lag_that_is_not_known_is_no_zero(machine: Machine, brokers: Brokers) -> None:
    one = machine("one")
    machine("two")
    for row in as_json(later_log(3, rows=5)):
        assert _sent(one, row).status == 200
    brokers.tell("down")
    late = machine("two", seconds=1.5)
    assert _version(late)["topic"]["lag"] is None
    assert "some events may not be counted: the topic 'events' has not been reached since" in _warned(late)
    until(lambda: "topic_heard" in ask(late, b"", method="GET", page="/metrics").body.decode())
    assert _lag(late) is None
    brokers.tell("up")
    assert until(lambda: _lag(late) == "0.0")


def test_a_machine_that_is_behind_says_so(machine: Machine) -> None:
    one, two = machine("one"), machine("two")
    held = Held(two)
    assert "events" not in _warned(two)
    for row in as_json(later_log(3, rows=5)):
        assert _sent(one, row).status == 200
    until(lambda: _lag(two) == "5.0")
    sentence = "this machine has yet to take in 5 messages of the topic 'events'"
    until(lambda: _version(two)["events_failure"] == sentence)
    assert f"some events are not counted: {sentence}" in _warned(two)
    held.let(2)
    until(lambda: _lag(two) == "3.0")
    assert _version(two)["topic"]["lag"] == 3
    held.let()
    until(lambda: _version(two)["events_failure"] is None)
    assert until(lambda: _lag(two) == "0.0")
    assert "events" not in _warned(two)


def test_a_lag_is_told_with_its_age_while_brokers_are_away(
    machine: Machine, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies say what is not known, and don't call it lost."""
    one = machine("one")
    assert _sent(one, as_json(later_log(3, rows=1))[0]).status == 200
    until(lambda: _lag(one) == "0.0")
    assert "events" not in _warned(one)
    brokers.tell("down")
    heard = until(lambda: _version(one)["topic"]["age_seconds"] > 1.5 and _version(one)["topic"]["heard"])
    sentence = (
        r"some events may not be counted: no broker of the topic 'events' of the Kafka cluster '.*' has answered for "
        r"\d+ seconds; the topic 'events' was last heard of \d+ seconds ago, and this machine has all up to there"
    )
    with monkeypatch.context() as during:
        during.setattr("mmoe_rec.journal.kafka.replica._LATE_SECONDS", 1.0)
        until(lambda: re.search(sentence, _warned(one)))  # brokers may have answered after they told where it ends
    assert _lag(one) == "0.0"
    assert _version(one)["topic"]["heard"] == heard
    brokers.tell("up")
    until(lambda: _version(one)["events_failure"] is None)
    assert "events" not in _warned(one)


def test_messages_count_one_by_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many were read at once."""
    one, two = machine("one"), machine("two")
    held = Held(two)
    for row in as_json(later_log(3, rows=5)):
        assert _sent(one, row).status == 200
    seen, put = list[int](), Journal.put

    def looked(journal: Journal, *what: Any) -> Any:
        if journal is held.replica._journal:
            seen.append(held.replica.status().next)
        return put(journal, *what)

    monkeypatch.setattr(Journal, "put", looked)
    held.replica._topic.read = held._read
    until(lambda: held.replica.status().next == 5)
    assert seen == [0, 1, 2, 3, 4]


def test_rows_that_the_topic_keeps_are_not_to_be_sent_again(machine: Machine, tmp_path: Path) -> None:
    """Once the machine is known to be behind, nothing is sent in vain."""
    one, two = machine("one"), machine("two", seconds=6.0)
    held = Held(two)
    *rows, mine, other = as_json(later_log(3, rows=6))
    for row in rows:
        assert _sent(one, row).status == 200
    answer = _sent(two, mine)
    assert answer.status == 202, answer.tree
    assert answer.tree["accepted"] == 1
    assert answer.tree["position"] is None
    assert (
        "they will count here as well, once this machine has read so far: do not send them again"
        in (answer.tree["warning"])
    )
    until(lambda: held.replica.status().behind > 2.0)
    answer = _sent(two, other)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "5"
    assert "no row was taken: this machine is behind the topic of events" in answer.message
    held.let()
    until(lambda: held.replica.status().next == 5)
    assert sum(len(each.table) for each in every_batch(tmp_path / "two")) == 5, "what was kept, and no more"
    until(lambda: not held.replica.status().behind)
    assert _sent(two, other).status == 200


def test_nothing_is_sent_behind_a_large_lag(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe_rec.journal.kafka.replica._MOST_LAG", 3)
    one, two = machine("one"), machine("two", seconds=600.0)
    held = Held(two)
    *rows, mine = as_json(later_log(3, rows=5))
    for row in rows:
        assert _sent(one, row).status == 200
    until(lambda: held.replica.status().lag == 4)
    assert "this machine is behind the topic" in _sent(two, mine).message
    held.let()
    until(lambda: held.replica.status().lag == 0)
    assert _sent(two, mine).status == 200


def test_a_call_that_has_waited_for_too_long_sends_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    one = machine("one")
    monkeypatch.setattr("mmoe_rec.server.live.accepting.PART_OF_ANSWER", 0.0)
    assert "no row was taken: calls before this one have waited" in _sent(one, as_json(later_log(3, rows=1))[0]).message
    assert one.events._commit.journal._replica.status().next == 0  # type: ignore[union-attr]


def test_others_get_the_lock_between_a_few_messages(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though many were read at once."""
    monkeypatch.setattr("mmoe_rec.journal.kafka.replica._MESSAGES_HELD", 4)
    monkeypatch.setattr("mmoe_rec.journal.kafka.replica._HELD_SECONDS", 600.0)
    one, two = machine("one"), machine("two")
    held = Held(two)
    for row in as_json(later_log(3, rows=10)):
        assert _sent(one, row).status == 200
    times, alone = list[int](), held.replica._journal.alone

    @contextmanager
    def counted() -> Iterator[Any]:
        before = held.replica.status().next
        with alone() as end:
            yield end
        times.append(held.replica.status().next - before)

    held.replica._journal.alone = counted
    held.replica._topic.read = held._read
    until(lambda: held.replica.status().next == 10)
    until(lambda: sum(times) == 10)
    assert max(times) == 4


def test_what_a_row_leaves_out_is_what_another_machine_has_acknowledged(machine: Machine, tmp_path: Path) -> None:
    """However late the other machine reads it; or the call is refused."""
    one, two = machine("one"), machine("two")
    first, told, silent, another = as_json(later_log(3, rows=4))
    _ranked(two, _sent(one, first).tree["position"])
    held = Held(two)
    assert _sent(one, {**told, "item": 777, "brand": "NEW"}).status == 200
    silent = {**silent, "item": 777, "user": 77, "time": told["time"]}
    del silent["brand"]
    with pytest.MonkeyPatch.context() as during:
        during.setattr("mmoe_rec.server.live.following.PART_OF_ANSWER", 0.02)
        answer = _sent(two, silent)
    assert answer.status == 503
    assert "this machine has not taken in in time what the topic of events holds; come again" in answer.message
    late = threading.Timer(0.5, held.let)
    late.start()
    answer = _sent(two, silent)
    late.join()
    assert answer.status == 200, answer.tree
    rows = [row for each in every_batch(tmp_path / "two") for row in each.table.to_pylist()]
    assert [row["brand"] for row in rows if row["item"] == 777] == ["NEW", "NEW"]
    assert _sent(two, another).status == 200


def test_rows_that_lack_something_are_refused_while_no_broker_tells(machine: Machine, brokers: Brokers) -> None:
    one = machine("one")
    (row,) = as_json(later_log(3, rows=1))
    del row["brand"]
    assert _sent(one, row).status == 200
    brokers.tell("down")
    answer = _sent(one, row)
    assert answer.status == 503
    assert "the topic of events does not say in time up to where it goes; come again" in answer.message


def test_a_position_beyond_the_topics_end_is_refused(machine: Machine, tmp_path: Path) -> None:
    """One of another machine, whose events are on their way, is waited for."""
    one, two = machine("one"), machine("two", seconds=600.0)
    position = _sent(one, as_json(later_log(3, rows=1))[0]).tree["position"]
    assert _ranked(two, position).status == 200
    segment, offset = map(int, position.split("-"))
    for wrong, sentence in (
        (f"{segment}-{offset + 999_999}", "lies beyond the journal's end"),
        (f"{segment + 3}-{offset}", "lies beyond the journal's end"),
        (f"{segment}-{offset - 8}", "is not the end of a record of the journal"),
    ):
        for each in (one, two):
            answer = _ranked(each, wrong)
            assert answer.status == 400
            assert f"'after': position {wrong} {sentence}" in answer.message
            assert str(tmp_path) not in answer.message
    held = Held(two)
    position = _sent(one, as_json(later_log(4, rows=1))[0]).tree["position"]
    late = threading.Timer(0.5, held.let)
    late.start()
    assert _ranked(two, position).status == 200
    late.join()


def test_a_position_is_waited_for_while_later_messages_are_lacking(machine: Machine) -> None:
    one, two = machine("one"), machine("two", seconds=600.0)
    held = Held(two)
    first, *_, last = [_sent(one, row).tree["position"] for row in as_json(later_log(3, rows=4))]
    held.let(1)
    assert _ranked(two, first).status == 200
    assert held.replica.status().next == 1
    held.let(3)
    assert _ranked(two, last).status == 200
