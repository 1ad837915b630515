"""What is wrong with a topic, its brokers or a folder is told in one sentence, and nothing is lost without one."""

import gc
import logging
import os
import shutil
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.errors import NotAcknowledgedError, RequestError, UserError
from mmoe_rec.jobs.serve import _open_journal
from mmoe_rec.journal.group_commit import GroupCommit
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic, read_properties
from mmoe_rec.journal.kafka.topic import ROWS, AwayError, Topic
from mmoe_rec.journal.opening import open_journal, topic_of
from mmoe_rec.journal.segments import segment_path
from mmoe_rec.server.live.joined import Joined
from tests.journal.journals import all_numbers, batch
from tests.journal.kafka.filled import filled, sends
from tests.journal.kafka.mock_brokers import Brokers
from tests.processes import until


def test_what_retention_has_removed_is_not_passed_over(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    filled(tmp_path / "one", place, 1, 2)
    sends(place, 3, 4, 5)
    brokers.tell("cut", "events", 4)
    with pytest.raises(UserError, match=r"begins with offset 4 now, but the journal '.*one' goes up to 2, so rows"):
        Replica(tmp_path / "one", place)
    with pytest.raises(UserError, match=r"begins with offset 4 now, but the journal '.*two' goes up to 0, so rows"):
        Replica(tmp_path / "two", place)


def test_a_copy_of_another_machines_folder_goes_on(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    filled(tmp_path / "one", place, 1, 2, 3)
    brokers.tell("cut", "events", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    filled(tmp_path / "two", place, 4)
    one = Replica(tmp_path / "one", place)
    one.catch_up()
    one.close()
    assert all_numbers(tmp_path / "one") == all_numbers(tmp_path / "two") == [1, 2, 3, 4]


def test_while_brokers_are_away_nothing_is_acknowledged_and_then_it_goes_on(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = brokers.topic("events")
    replica = Replica(tmp_path / "one", place, seconds=2.0)
    group = GroupCommit(replica)
    group.append(batch(1))
    brokers.tell("down")
    errors, sent, send = list[BaseException](), list[bytes](), Topic.send

    def counted(topic: Topic, kind: bytes, value: bytes) -> int:
        sent.append(value)
        return send(topic, kind, value)

    monkeypatch.setattr(Topic, "send", counted)

    def fails(number: int) -> None:
        try:
            group.append(batch(number))
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=fails, args=(100 + number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(errors) == len(threads)
    assert all(isinstance(each, NotAcknowledgedError) for each in errors), errors
    assert "it may have kept them" in str(errors[0])
    # Those that wait together are sent, and told, together, and not one after the other.
    assert len(sent) <= len(threads) / 2
    brokers.tell("up")
    until(lambda: not _fails(replica))
    assert replica.status().failure is None
    found = all_numbers(replica.folder)
    assert found[0] == 1
    assert len(found) == len(set(found)) >= 2
    replica.close()


def _fails(replica: Replica) -> bool:
    try:
        replica.append(batch(2))
    except UserError:
        return True
    return False


def test_brokers_that_have_not_answered_for_long_are_told(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(tmp_path / "one", brokers.topic("events"), seconds=1.0)
    assert replica.status().failure is None
    monkeypatch.setattr("mmoe_rec.journal.kafka.replica._LATE_SECONDS", 0.5)
    brokers.tell("down")
    told = until(lambda: replica.status().failure)
    assert "no broker of the topic 'events'" in told
    with pytest.raises(UserError, match=r"no broker of the topic 'events' of .* has answered for") as error:
        replica.append(batch(1))
    assert not isinstance(error.value, NotAcknowledgedError), "nothing was sent, and nobody waited for it"
    replica.close()


def test_rows_that_a_message_does_not_hold_are_refused(brokers: Brokers, tmp_path: Path) -> None:
    brokers.tell("create", "events", 1)
    place = brokers.named("events", message_max_bytes=20_000)
    replica = Replica(tmp_path / "one", place)
    with pytest.raises(RequestError, match=r"the rows take .* bytes, and a message of the topic holds at most 18,976"):
        replica.append(batch(*range(3000)))
    with pytest.raises(RequestError, match="holds at most 18,976"):
        replica._topic.send(ROWS, b"x" * 21_000)
    group = GroupCommit(replica)
    group.append(batch(1))
    assert all_numbers(replica.folder) == [1]
    replica.close()


def test_a_full_disk_of_this_machine_is_no_refusal(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The topic has the rows, so they come, here as well as on other machines."""
    replica = Replica(tmp_path / "one", brokers.topic("events"))
    replica.append(batch(1))

    def full(payload: bytes) -> None:
        raise UserError("nothing was appended: no space left")

    with monkeypatch.context() as during:
        during.setattr(replica._journal, "_write", full)
        with pytest.raises(
            NotAcknowledgedError, match="the topic has taken the rows, but this machine can't keep them"
        ):
            replica.append(batch(2))
        until(lambda: "no space left" in (replica.status().failure or ""))
    until(lambda: all_numbers(replica.folder) == [1, 2])
    replica.append(batch(3))
    assert all_numbers(replica.folder) == [1, 2, 3]
    assert replica.status().failure is None
    replica.close()


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"cleanup.policy": "compact"}, "is compacted, which removes rows: set its cleanup.policy to delete"),
        ({"cleanup.policy": "compact,delete"}, "is compacted, which removes rows"),
        ({"cleanup.policy": "delete", "max.message.bytes": "20000"}, "holds at most 18,976: send fewer at a time"),
    ],
)
def test_how_a_topic_is_set_up_is_asked(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, str], sentence: str
) -> None:
    """As brokers tell it; mock ones do not."""
    from confluent_kafka.admin import AdminClient

    def describe(admin: object, asked: list[object], **options: object) -> dict[object, Future[object]]:
        found: Future[object] = Future()
        found.set_result({name: SimpleNamespace(value=value) for name, value in told.items()})
        return {asked[0]: found}

    monkeypatch.setattr(AdminClient, "describe_configs", describe)
    place = brokers.topic("events")
    with pytest.raises(UserError, match=sentence):
        Replica(tmp_path / "one", place).append(batch(*range(3000)))


@pytest.mark.parametrize("told", [None, {}])
def test_that_a_topics_settings_are_not_told_is_said_once(
    brokers: Brokers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    told: dict[object, object] | None,
) -> None:
    """By a broker that does not answer, as mock ones don't, and one that answers without telling anything."""
    from confluent_kafka.admin import AdminClient

    def describe(admin: object, asked: list[object], **options: object) -> dict[object, Future[object]]:
        found: Future[object] = Future()
        found.set_result(told)
        return {asked[0]: found}

    if told is not None:
        monkeypatch.setattr(AdminClient, "describe_configs", describe)
    place = brokers.topic("events")
    for says in (False, True, False):
        Replica(tmp_path / "one", replace(place, says=says)).close()
    assert caplog.text.count("does not tell how the topic 'events'") == 1
    assert "see that its cleanup.policy is delete, that its retention is longer than any machine may be" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Topic, "range", lambda topic: (3, 3))
    with pytest.raises(UserError, match="rows between would be missing"):
        Replica(tmp_path / "one", place)
    assert "does not tell" not in caplog.text, "who tries again and again would say it each time"


def test_what_commands_lack_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("bootstrap.servers=127.0.0.1:9\n")
    assert topic_of(None, None, "journal") is None
    assert topic_of(str(file), "events", "journal") == KafkaTopic(file, "events")
    for words, sentence in (
        ((str(file), None, "journal"), "--kafka needs --kafka-topic NAME as well"),
        ((None, "events", "journal"), "--kafka-topic needs --kafka FILE as well"),
        ((str(file), "events", None), "--kafka needs --journal FOLDER as well"),
        ((str(tmp_path / "none"), "events", "journal"), "can't be read: No such file"),
    ):
        with pytest.raises(UserError, match=sentence):
            topic_of(*words)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(UserError, match="needs the package confluent-kafka: install the extra `kafka`"):
        open_journal(tmp_path / "journal", KafkaTopic(file, "events"))
    assert not (tmp_path / "journal").exists()


def test_topics_and_brokers_that_do_not_fit_are_told(brokers: Brokers, tmp_path: Path) -> None:
    several = brokers.topic("several", partitions=3)
    with pytest.raises(UserError, match="the topic 'several' has 3 partitions, among which rows have no order"):
        Replica(tmp_path / "one", several)
    assert not (tmp_path / "one").exists()
    place = brokers.named("events")
    nobody = tmp_path / "nobody.properties"
    nobody.write_text("bootstrap.servers=127.0.0.1:9\n")
    with pytest.raises(UserError, match=r"no broker of '127.0.0.1:9' has answered within 0.5 seconds"):
        Replica(tmp_path / "one", KafkaTopic(nobody, "events"), seconds=0.5)
    with pytest.raises(UserError, match="is no name of a Kafka topic"):
        KafkaTopic(place.file, "no name")


def test_who_serves_has_workers_say_what_it_could_not(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = brokers.topic("events")
    assert _open_journal(tmp_path / "one", place) == replace(place, says=False)

    def away(topic: Topic) -> str:
        raise AwayError("nobody answers")

    monkeypatch.setattr(Topic, "_checked_cluster", away)
    assert _open_journal(tmp_path / "one", place) == place


def test_a_folder_that_can_not_be_a_replica_is_refused_though_no_broker_answers(
    brokers: Brokers, tmp_path: Path
) -> None:
    """By `serve`, too, which else goes on with what is there."""
    Replica(tmp_path / "replica", brokers.topic("others"), checks=False).close()
    Journal(tmp_path / "own").close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    place = KafkaTopic(tmp_path / "nobody.properties", "events")
    place.file.write_text("bootstrap.servers=127.0.0.1:9\n")
    for name, sentence in (
        ("own", r"own' holds a journal of its own, which can't become a replica of the topic 'events': name a new"),
        ("replica", r"is a replica of the topic 'others' of the Kafka cluster .*, not of the topic 'events': name a"),
        ("other", "holds something else than a journal"),
    ):
        before = sorted(path.name for path in (tmp_path / name).iterdir())
        for joins in (partial(Replica, seconds=0.1), partial(Joined, seconds=0.1), _open_journal):
            with pytest.raises(UserError, match=sentence):
                joins(tmp_path / name, place)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux tells them")
@pytest.mark.parametrize("fails", ["brokers", "topic", "journal", "range"])
def test_what_can_not_be_joined_leaves_nothing_behind(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """As a server tries it again and again."""
    place = brokers.topic("events") if fails != "topic" else brokers.named("none")
    if fails == "brokers":
        place = KafkaTopic(tmp_path / "nobody.properties", "events")
        place.file.write_text("bootstrap.servers=127.0.0.1:9\n")
    elif fails == "journal":
        filled(tmp_path / "one", place, 1)
        segment_path(tmp_path / "one", 1).write_bytes(b"")
    elif fails == "range":
        monkeypatch.setattr(Topic, "range", lambda topic: (3, 3))

    def there() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def attempt() -> None:
        with pytest.raises(UserError):
            Replica(tmp_path / "one", place, seconds=0.1 if fails == "brokers" else 5.0, checks=False)

    gc.collect()
    gc.disable()  # which comes seldom in a server
    try:
        attempt()
        before = there()
        for _ in range(5):
            attempt()
        until(lambda: all(now <= then for now, then in zip(there(), before, strict=True)))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a=b\n", "does not say where Kafka is: add bootstrap.servers"),
        ("bootstrap.servers=\n", "does not say where Kafka is: add bootstrap.servers"),
        ("bootstrap.servers: ,\n", "does not say where Kafka is: add bootstrap.servers"),
        ("bootstrap.servers=x\nacks 1\n", "sets 'acks', which a journal needs otherwise"),
        ("bootstrap.servers=x\n=secret!\n", "line 2, is not KEY=VALUE"),
        ("bootstrap.servers=a,\\\n  b\nwhat\n", "line 3, is not KEY=VALUE"),
        ("bootstrap.servers=x\nwhat\n", "line 2, is not KEY=VALUE"),
        ("bootstrap.servers=x\nbootstrap.servers=y\n", "line 2, gives a key for the second time"),
        ("bootstrap.servers=x\nacks=1\n", "sets 'acks', which a journal needs otherwise"),
        ("bootstrap.servers=x\nrequest.required.acks=1\n", "sets 'request.required.acks', which a journal needs"),
        ("bootstrap.servers=x\nenable.idempotence=false\n", "sets 'enable.idempotence'"),
        ("bootstrap.servers=x\ntransactional.id=me\n", "sets 'transactional.id'"),
        (
            "bootstrap.servers=x\nsasl.jaas.config=secret!\n",
            "has a key of Java's clients: Java JAAS configuration is not",
        ),
        ("bootstrap.servers=x\nwhat.is.this=secret!\n", "sets 'what.is.this', a key or value that librdkafka"),
        ("bootstrap.servers=x\nsecurity.protocol=secret!\n", "sets 'security.protocol', a key or value that"),
        (
            "bootstrap.servers=x\nsecurity.protocol=ssl\nssl.key.location=/secret!\n",
            "do not go together, or can't be used on this machine",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told_without_their_values(tmp_path: Path, text: str, sentence: str) -> None:
    pytest.importorskip("confluent_kafka")
    file = tmp_path / "client.properties"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        Replica(tmp_path / "one", KafkaTopic(file, "events"), seconds=0.5)
    assert "secret!" not in str(error.value)


def test_properties_are_read_as_kafkas_own_tools_do(tmp_path: Path) -> None:
    file = tmp_path / "client.properties"
    file.write_text("# comment\n! comment\n\nbootstrap.servers = a:1,b:2 \nacks=-1\nsasl.password=a=b#c\n")
    assert read_properties(file) == {"bootstrap.servers": "a:1,b:2", "acks": "-1", "sasl.password": "a=b#c"}
    file.write_text(
        "bootstrap.servers: a:1,\\\n    b:2\nsasl.username me\nsasl.password=a\\\\\nclient.id\\ = \\u0041\\:\\tb\n"
        "empty=\nlast x\\\n"
    )
    assert read_properties(file) == {
        "bootstrap.servers": "a:1,b:2",
        "sasl.username": "me",
        "sasl.password": "a\\",
        "client.id ": "A:\tb",
        "empty": "",
        "last": "x",
    }
    with pytest.raises(UserError, match="can't be read: No such file"):
        read_properties(tmp_path / "none")


def test_no_log_holds_a_secret(brokers: Brokers, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    brokers.tell("create", "events", 1)
    place = brokers.named("events", sasl_password="secret!", sasl_username="secret!", ssl_key_password="secret!")
    with caplog.at_level(logging.DEBUG):
        replica = Replica(tmp_path / "one", place)
        replica.append(batch(1))
        replica.close()
    assert "secret!" not in caplog.text
    for path in (tmp_path / "one").iterdir():
        assert b"secret!" not in path.read_bytes()


def test_a_forked_process_is_told_to_make_its_own(brokers: Brokers, tmp_path: Path) -> None:
    replica = Replica(tmp_path / "one", brokers.topic("events"))
    replica._process -= 1
    with pytest.raises(UserError, match="can't be used by a forked process"):
        replica.append(batch(1))
    replica.close()
