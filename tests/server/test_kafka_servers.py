"""Servers of two machines that share a topic: what either accepts, both know; and they rank while brokers are away."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.inference.small_model import SmallModel
from tests.journal.journals import every_batch
from tests.journal.kafka.mock_brokers import mock_brokers
from tests.processes import until
from tests.server.test_events import as_json, later_log
from tests.server.test_events_and_processes import ASKED, _asked, _check, _ready, _sent
from tests.server.test_processes import Running, served

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def _version(running: Running) -> dict[str, object]:
    return running.send(None, "/version", "GET")[1]


def test_what_one_machine_accepts_is_known_to_the_other(small: SmallModel, tmp_path: Path) -> None:
    pytest.importorskip("confluent_kafka")
    table = later_log(21, rows=120)
    rows = as_json(table)
    folders = [tmp_path / name for name in ("one", "other")]
    for each in folders:
        each.mkdir()
    with mock_brokers(tmp_path) as brokers:
        place = brokers.topic("events")

        def serving(folder: Path, workers: int) -> tuple[str, ...]:
            topic = ("--kafka", str(place.file), "--kafka-topic", "events")
            return (
                "--workers",
                str(workers),
                "--journal",
                str(folder / "journal"),
                *topic,
                "--serving.answer_seconds=9",
            )

        with served(small.folder, folders[0], *serving(folders[0], 2)) as one:
            workers = _ready(one)
            with served(small.folder, folders[1], *serving(folders[1], 1)) as other:
                for number, start in enumerate(range(0, 60, 6)):
                    sender, asked = (one, other) if number % 2 else (other, one)
                    position = _sent(sender, rows[start : start + 6])
                    if number % 4 == 1:
                        os.kill(sorted(workers)[number // 4 % 2], signal.SIGKILL)
                        workers = _ready(one)
                    _check(small, _asked(asked, position), table.slice(0, start + 6))
                told = _version(other)
                assert told["position"] == position
                about = told["topic"]
                assert about == {"name": "events", "lag": 0, "failure": None} | {
                    key: about[key] for key in ("heard", "age_seconds")
                }
                assert "mmoe_rec_topic_lag 0.0" in other.send(None, "/metrics", "GET")[1]
            position = _sent(one, rows[60:90])  # while the other one is not there
            brokers.tell("down")
            status, reply = one.send({"events": rows[90:]}, "/events")
            assert status == 503
            assert "it may keep them: send them again" in reply["message"]
            status, reply = one.send(ASKED, "/invocations")
            assert status == 200
            # A server that starts meanwhile ranks with what this machine has.
            with served(small.folder, folders[1], *serving(folders[1], 1)) as other:
                assert other.send(ASKED, "/invocations")[0] == 200
                status, reply = other.send({"events": rows[90:]}, "/events")
                assert (status, reply["message"]) == (503, "the topic of events takes none; the log says why")
                assert "no broker of" in _version(other)["topic"]["failure"]
                assert "some events may not be counted: the topic 'events' has not been reached since" in str(
                    other.send(ASKED, "/invocations")[1]
                )
                brokers.tell("up")
                last = _sent(other, rows[90:])
                for each in (one, other):
                    _check(small, _asked(each, last), table)
                assert other.log.read_text().count("does not tell how the topic 'events'") == 1
            until(lambda: _version(one)["topic"]["failure"] is None)
            assert one.log.read_text().count("does not tell how the topic 'events'") == 1, "of three processes and more"
    assert [batch.table for batch in every_batch(folders[0] / "journal")] == [
        batch.table for batch in every_batch(folders[1] / "journal")
    ]
    with suppress(FileNotFoundError):
        assert (folders[0] / "journal" / "segment-00000001.journal").read_bytes() == (
            folders[1] / "journal" / "segment-00000001.journal"
        ).read_bytes()
