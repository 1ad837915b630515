"""A worker joins its topic as soon as that can be, whatever went wrong before."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmoe_rec.journal.kafka.reached import Status
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import AwayError
from mmoe_rec.server.live import joined
from tests.processes import until


def test_it_goes_on_after_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [AwayError("nobody answers"), OSError("no more files"), MemoryError()]
    told = list[str | None]()

    def replica(*words: object, **more: object) -> SimpleNamespace:
        if told:
            told.append(found.failure)
        else:
            told.append(None)
        if errors:
            raise errors.pop(0)
        return SimpleNamespace(status=lambda: SimpleNamespace(failure=None))

    monkeypatch.setattr(joined, "Replica", replica)
    monkeypatch.setattr(joined, "_PAUSE_SECONDS", 0.2)
    found = joined.Joined(tmp_path, KafkaTopic(tmp_path / "file", "events"), 3.0)
    until(lambda: found.failure is None)
    assert told == [None, "nobody answers", "OSError: no more files", "MemoryError:"]
    assert "no events are taken: OSError: no more files" in caplog.text


class _Replica:
    """One whose state tests set."""

    told = Status(next=5, lag=0, heard=1.0, age=0.4, is_current=True, behind=0.0, failure=None)

    def __init__(self, *words: object, **more: object) -> None:
        pass

    def status(self) -> Status:
        return self.told


@pytest.mark.parametrize(
    ("status", "is_certain", "why"),
    [
        ({}, None, ""),
        ({"lag": 3}, None, ""),
        ({"lag": 3, "behind": 2.0}, True, "this machine has yet to take in 3 messages of the topic 'events'"),
        (
            {"lag": 3, "age": 20.0, "is_current": False},
            True,
            "this machine has yet to take in 3 messages of the topic 'events'",
        ),
        (
            {"age": 20.0, "is_current": False},
            False,
            "the topic 'events' was last heard of 20 seconds ago, and this machine has all up to there",
        ),
        (
            {"age": 21.0, "is_current": False, "failure": "nobody answers"},
            False,
            "nobody answers; the topic 'events' was last heard of 21 seconds ago, and this machine has all up to there",
        ),
        (
            {"age": 20.0, "is_current": False, "lag": 3, "failure": "nobody answers"},
            True,
            "nobody answers; this machine has yet to take in 3 messages of the topic 'events'",
        ),
    ],
)
def test_what_is_known_to_be_lacking_is_told_apart_from_what_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], is_certain: bool | None, why: str
) -> None:
    monkeypatch.setattr(joined, "Replica", _Replica)
    found = joined.Joined(tmp_path, KafkaTopic(tmp_path / "file", "events"), 3.0)
    replica: Any = found._replica
    replica.told = replace(_Replica.told, **status)
    assert found.lacking == (None if is_certain is None else (is_certain, why))
    assert found.about() == {
        "name": "events",
        "lag": replica.told.lag,
        "heard": "1970-01-01T00:00:01+00:00",
        "age_seconds": replica.told.age,
        "failure": replica.told.failure,
    }
    assert found.numbers() == (replica.told.lag, 1.0)


def test_a_topic_that_was_never_reached_has_no_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*words: object, **more: object) -> None:
        raise AwayError("nobody answers")

    monkeypatch.setattr(joined, "Replica", nobody)
    found = joined.Joined(tmp_path, KafkaTopic(tmp_path / "file", "events"), 3.0)
    assert found.lacking == (
        False,
        "the topic 'events' has not been reached since this server started: nobody answers",
    )
    assert found.about() == {
        "name": "events",
        "lag": None,
        "heard": None,
        "age_seconds": None,
        "failure": "nobody answers",
    }
    assert found.numbers()[0] is None
