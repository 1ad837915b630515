"""A topic that was removed and made anew under its name is no longer the one that a folder is a replica of."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.journal.folder import made_of
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.topic import Topic
from mmoe_rec.journal.segments import segment_path
from tests.journal.journals import all_numbers, batch
from tests.journal.kafka.filled import filled, make_anew, sends
from tests.journal.kafka.mock_brokers import Brokers
from tests.processes import until


@pytest.fixture(params=[True, False], ids=["ids", "no ids"])
def tells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether brokers have ids of topics, as Kafka has since 2.8."""
    if not request.param:
        monkeypatch.setattr(Topic, "made", lambda topic: "")
    return bool(request.param)


def test_a_topic_that_was_made_anew_is_found_out(brokers: Brokers, tmp_path: Path, tells: bool) -> None:
    place = brokers.topic("events")
    filled(tmp_path / "one", place, 1, 2, 3)
    before = segment_path(tmp_path / "one", 1).read_bytes()
    make_anew(brokers)
    with pytest.raises(UserError, match="it was made anew" if tells else "it ends at offset 0; it was made anew"):
        Replica(tmp_path / "one", place)
    sends(place, 11, 12, 13, 14)
    with pytest.raises(UserError, match="it was made anew" if tells else "it holds another message at offset 2"):
        Replica(tmp_path / "one", place)
    assert segment_path(tmp_path / "one", 1).read_bytes() == before


def test_a_topic_that_is_made_anew_under_a_running_replica_is_found_out(
    brokers: Brokers, tmp_path: Path, tells: bool
) -> None:
    place = brokers.topic("events")
    replica = Replica(tmp_path / "one", place)
    for number in range(5):
        replica.append(batch(number))
    make_anew(brokers)
    until(lambda: replica.status().failure)
    with pytest.raises(UserError, match=r"made anew|can't be read any further"):
        replica.append(batch(7))
    until(lambda: "made anew" in (replica.status().failure or ""))
    assert all_numbers(replica.folder) == list(range(5))
    replica.close()


def test_an_id_that_was_not_told_at_first_is_written_down_later(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = brokers.topic("events")
    with monkeypatch.context() as during:
        during.setattr(Topic, "made", lambda topic: "")
        replica = Replica(tmp_path / "one", place)
        replica.append(batch(1))
        replica.close_segment()
        replica.close()
    assert "no broker tells the id of the topic 'events'" in caplog.text
    assert made_of(tmp_path / "one") == ""
    Replica(tmp_path / "one", place).close()
    made = made_of(tmp_path / "one")
    assert made
    Replica(tmp_path / "other", place).close()
    assert (tmp_path / "one" / "journal.json").read_bytes() == (tmp_path / "other" / "journal.json").read_bytes()
    make_anew(brokers)
    sends(place, *range(11, 20))
    with pytest.raises(UserError, match=f"was there before \\('{re.escape(made)}', now '.*it was made anew"):
        Replica(tmp_path / "one", place)


def test_a_running_replica_writes_down_an_id_as_soon_as_it_is_told(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MADE_SECONDS", "_ASK_SECONDS"):
        monkeypatch.setattr(f"mmoe_rec.journal.kafka.replica.{name}", 0.05)
    with monkeypatch.context() as during:
        during.setattr(Topic, "made", lambda topic: "")
        replica = Replica(tmp_path / "one", brokers.topic("events"))
        replica.append(batch(1))
    until(lambda: made_of(replica.folder))
    replica.append(batch(2))
    assert replica.status().failure is None
    replica.close()


def test_the_last_record_is_looked_for_before_an_empty_segment(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `refresh` leaves it, of a broker that has no ids of topics."""
    monkeypatch.setattr(Topic, "made", lambda topic: "")
    place = brokers.topic("events")
    replica = Replica(tmp_path / "one", place)
    replica.append(batch(1))
    replica.append(batch(2))
    replica.close_segment()
    replica.close()
    Replica(tmp_path / "one", place).close()
    make_anew(brokers)
    sends(place, *range(11, 20))
    with pytest.raises(UserError, match="it holds another message at offset 1; it was made anew"):
        Replica(tmp_path / "one", place)


def test_a_topic_that_outgrows_its_former_end_at_once_is_found_out_by_its_id(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody has asked for its end, or read from it."""
    read, is_held = Topic.read, True

    def held(topic: Topic, seconds: float, most: int) -> Any:
        return time.sleep(0.01) or [] if is_held else read(topic, seconds, most)

    monkeypatch.setattr(Topic, "read", held)
    replica = Replica(tmp_path / "one", brokers.topic("events"))
    replica.append(batch(1))
    replica.append(batch(2))
    asks = replica._topic.range
    with monkeypatch.context() as during:
        asked = threading.Event()

        def late(seconds: float | None = None) -> tuple[int, int]:
            asked.wait()
            return asks(seconds)

        during.setattr(replica._topic, "range", late)
        make_anew(brokers)
        sends(replica._topic.place, *range(11, 20))
        is_held = False
        asked.set()
        until(lambda: "its id is" in (replica.status().failure or ""))
    replica.close()
    with pytest.raises(UserError, match="it was made anew"):
        Replica(tmp_path / "one", brokers.named("events"))
