"""Replicas of a topic are the same to the byte, whoever appends, and whoever is killed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from mmoe_rec.errors import KeptError, NotAcknowledgedError, RequestError, UserError
from mmoe_rec.journal.checkpoints import checkpoint_path, remove_through
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import CLOSE, ROWS, Topic
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import decode, encode
from mmoe_rec.journal.segments import segment_numbers, segment_path
from tests.journal.journals import all_numbers, batch, numbers_in
from tests.journal.kafka.mock_brokers import ROOT, Brokers
from tests.processes import until


def _sent(place: KafkaTopic) -> list[int]:
    """The numbers of a topic's rows, read without a replica."""
    topic = Topic(place, 10.0)
    low, high = topic.range()
    found = list[int]()
    for offset in range(low, high):
        message = topic.at(offset)
        assert message is not None
        if message.kind == ROWS:
            found += numbers_in(decode(pa.py_buffer(message.value)) or [])
    topic.close()
    return found


def _same(one: Path, other: Path) -> int:
    """How many segments two folders have, which are the same to the byte."""
    names = sorted(path.name for path in one.glob("*.journal"))
    assert names == sorted(path.name for path in other.glob("*.journal"))
    for name in (*names, "journal.json", "types.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return len(names)


def test_rows_of_either_machine_are_on_both(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    one, other = Replica(tmp_path / "one", place), Replica(tmp_path / "other", place)
    assert one.id == other.id
    for number in range(0, 20, 2):
        position = one.append(batch(number), batch(100 + number, source="clicks"))
        assert numbers_in([batch(*all_numbers(one.folder))])[-2:] == [number, 100 + number]
        assert other.append(batch(number + 1)) > position
        assert all_numbers(other.folder)[-1] == number + 1, "it was acknowledged, so it is on this machine's disk"
    assert one.append() == one.end()
    assert one.catch_up() == other.catch_up()
    assert one.close_segment() == 1
    other.catch_up()
    assert other.close_segment() == 1, "it was closed before, and is empty since"
    one.append(batch(7))
    other.catch_up()
    assert _same(one.folder, other.folder) == 2
    assert one.status().lag == 0
    assert one.status().failure is None
    for each in (one, other):
        each.close()
    assert all_numbers(one.folder) == _sent(place)


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_leave_replicas_the_same_and_lose_nothing(brokers: Brokers, tmp_path: Path, seed: int) -> None:
    """Two processes of each of two machines append and close segments; all are killed at any time, and started anew."""
    place, chance = brokers.topic("events"), random.Random(seed)
    folders, writer = [tmp_path / "one", tmp_path / "other"], 0
    acknowledged = list[int]()
    for last in (False, False, False, True):
        processes, outputs = [], list[Path]()
        for folder in (*folders, *folders):
            writer += 1
            words = [folder, place.file, place.name, writer, 30, 2000]
            outputs.append(tmp_path / f"writer-{writer}")
            with outputs[-1].open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.journal.kafka.replicating", *map(str, words)],
                        cwd=ROOT,
                        stdout=output,
                    )
                )
        waits = sorted(chance.uniform(0.6, 2.5) for _ in processes)
        chance.shuffle(processes)
        for before, after, process in zip([0.0, *waits], waits, processes, strict=False):
            if not last:
                try:
                    process.wait(after - before)
                except subprocess.TimeoutExpired:
                    process.kill()
            assert process.wait(300) in ((0,) if last else (0, -9))
        acknowledged += [
            int(line) for path in outputs for line in path.read_text().splitlines(True) if line[-1] == "\n"
        ]
    replicas = [Replica(folder, place, segment_bytes=2000) for folder in folders]
    assert replicas[0].catch_up() == replicas[1].catch_up()
    for each in replicas:
        each.close()
    assert _same(*folders) > 10
    found = all_numbers(folders[0])
    assert found == _sent(place), "the topic's rows, in its order"
    assert len(found) == len(set(found))
    assert len(acknowledged) >= 120
    assert set(acknowledged) <= set(found)


@pytest.mark.parametrize("step", ["before_segment", "put", "close_last", "write", "note"])
def test_a_kill_between_any_two_steps_is_harmless(
    brokers: Brokers, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each number of steps of one kind the process ends, on the other machine nothing happens."""
    place = brokers.topic("events")
    whole = Replica(tmp_path / "whole", place, segment_bytes=900)
    topic = Topic(place, 10.0)
    whole.append(batch(1))
    for number in range(4):
        whole.append(batch(10 * number), batch(10 * number + 1))
        whole.append(batch(10 * number + 2))  # in a segment of its own, as the one before is full
        topic.send(b"what is this", b"?")
        whole.close_segment()
        topic.send(CLOSE, b"")
        topic.send(ROWS, encode([batch(5, text=7)]))  # type: ignore[arg-type]
    whole.append(batch(99))
    whole.close()
    topic.close()
    kills = 0
    for after in range(1, 40):
        words = [tmp_path / "cut", place.file, place.name, step, after]
        run = subprocess.run(
            [sys.executable, "-m", "tests.journal.kafka.ending", *map(str, words)], cwd=ROOT, check=False, timeout=300
        )
        if run.returncode == 0:
            break
        assert run.returncode == 7
        kills += 1
    assert kills > 0
    again = Replica(tmp_path / "cut", place, segment_bytes=900)
    again.catch_up()
    again.close()
    assert _same(tmp_path / "whole", tmp_path / "cut") > 8


def test_a_column_of_another_type_is_refused_wherever_it_comes_from(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    one, other = Replica(tmp_path / "one", place), Replica(tmp_path / "other", place)
    one.append(batch(1))
    sentence = "column 'text' holds int64, but string in earlier rows of this journal"
    offset = other._topic.send(ROWS, encode([batch(2, text=5)]))  # type: ignore[arg-type]
    other.catch_up()
    with pytest.raises(RequestError, match=sentence):
        other.append(batch(2, text=5))  # type: ignore[arg-type]
    one.append(batch(3))
    assert one.catch_up() == other.catch_up()
    assert all_numbers(one.folder) == all_numbers(other.folder) == [1, 3]
    assert one.skipped == other.skipped == {"types": 1}
    assert one.status().next == offset + 2
    _same(one.folder, other.folder)
    one.close()
    other.close()
    late = Replica(tmp_path / "late", place)
    late.catch_up()
    assert late.skipped == {"types": 1}
    late.close()
    assert _same(one.folder, late.folder) == 1


def test_the_producer_of_a_conflict_that_it_could_not_know_is_told(brokers: Brokers, tmp_path: Path) -> None:
    """Both machines send a column for the first time, at once, with two types: the one that came first stays."""
    place = brokers.topic("events")
    one, other = Replica(tmp_path / "one", place), Replica(tmp_path / "other", place)
    send = other._topic.send

    def overtaken(kind: bytes, value: bytes) -> int:
        one.append(batch(1, text=5))  # type: ignore[arg-type]
        return send(kind, value)

    other._topic.send = overtaken  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="column 'text' holds string, but int64 in earlier rows"):
        other.append(batch(2))
    assert one.catch_up() == other.catch_up()
    assert all_numbers(one.folder) == all_numbers(other.folder) == [1]
    _same(one.folder, other.folder)
    one.close()
    other.close()


def test_what_is_no_message_of_a_journal_is_left_out(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    one = Replica(tmp_path / "one", place)
    whole = encode([batch(1)])
    foreign = [
        (b"", whole),
        (b"rows 2", whole),
        (ROWS, b""),
        (ROWS, b"\0"),
        (ROWS, whole[:-8]),
        (ROWS, whole + b"\0"),
        (ROWS, b"[]      " + whole),
        (ROWS, encode([batch()])),
        (ROWS, encode([batch(1), batch()])),
        (ROWS, b"\2\0\0\0\0\0\0\0[]"),
    ]
    topic = Topic(place, 10.0)
    for kind, value in foreign:
        topic.send(kind, value)
    topic.close()
    one.append(batch(2))
    other = Replica(tmp_path / "other", place)
    assert one.catch_up() == other.catch_up()
    assert all_numbers(one.folder) == all_numbers(other.folder) == [2]
    assert one.skipped == other.skipped == {"foreign": len(foreign)}
    for each in (one, other):
        each.close()
    _same(one.folder, other.folder)


def test_what_was_left_out_is_not_looked_at_again(brokers: Brokers, tmp_path: Path) -> None:
    """So that a topic may forget it."""
    place = brokers.topic("events")
    one = Replica(tmp_path / "one", place)
    one.append(batch(1))
    one.close_segment()
    for _ in range(3):
        one.close_segment()
    topic = Topic(place, 10.0)
    last = topic.send(b"", b"?")
    topic.close()
    one.catch_up()
    one.close()
    brokers.tell("cut", place.name, last + 1)
    again = Replica(tmp_path / "one", place)
    assert not again.skipped
    assert again.status().next == last + 1
    again.append(batch(2))
    again.close()
    assert all_numbers(tmp_path / "one") == [1, 2]


def test_segments_may_be_removed_though_the_last_one_is_empty(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    one, other = Replica(tmp_path / "one", place), Replica(tmp_path / "other", place)
    one.append(batch(1))
    one.append(batch(2))
    closed = one.close_segment()
    checkpoint_path(one.folder, closed).touch()
    one.close()
    assert remove_through(one.folder, closed) == [1]
    assert segment_numbers(one.folder) == [2]
    again = Replica(tmp_path / "one", place)
    assert again.end() == Position.begin(2)
    assert again.append(batch(3)) == other.catch_up()
    for each in (again, other):
        each.close()
    assert all_numbers(one.folder) == [3]
    assert segment_path(one.folder, 2).read_bytes() == segment_path(other.folder, 2).read_bytes()


def test_a_close_that_did_not_come_here_is_told_as_one(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Topic, "read", lambda topic, seconds, most: time.sleep(0.05) or [])
    place = brokers.topic("events")
    topic = Topic(place, 10.0)
    topic.send(ROWS, encode([batch(1)]))
    topic.close()
    one = Replica(tmp_path / "one", place)
    sentence = (
        "the topic has taken the message that closes the segment, but this machine has not read so far within 10 "
        r"seconds \(it is behind\): all machines close their segment when they come to this message; try again once "
        "this one holds what the topic does"
    )
    monkeypatch.setattr(one._reached, "wait", lambda offset, seconds: False)
    with pytest.raises(KeptError, match=sentence):
        one.close_segment()
    monkeypatch.undo()
    one.catch_up()
    assert one.close_segment() == 1, "it is closed, and nothing has come since"
    one.close()


def test_a_close_that_this_machine_can_not_write_is_told_with_why(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Replica(tmp_path / "one", brokers.topic("events"))
    one.append(batch(1))

    def full() -> Position:
        raise UserError("no space left")

    with monkeypatch.context() as during:
        during.setattr(one._journal, "close_last", full)
        with pytest.raises(
            KeptError, match="closes the segment, but this machine can't keep it: no space left: all mac"
        ):
            one.close_segment()
    until(lambda: one.end() == Position.begin(2))
    one.close()


def test_a_close_that_no_broker_acknowledges_may_have_been_made(
    brokers: Brokers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Replica(tmp_path / "one", brokers.topic("events"), seconds=10.0)
    one.append(batch(1))
    brokers.tell("down")
    with pytest.raises(
        NotAcknowledgedError, match=r"not known whether the segment was closed: .*; it may have kept it; if so, all mac"
    ) as error:
        one.close_segment()
    assert not isinstance(error.value, KeptError)
    one.close()


def test_a_replica_is_appended_to_by_its_topic_alone(brokers: Brokers, tmp_path: Path) -> None:
    place = brokers.topic("events")
    Replica(tmp_path / "one", place).close()
    with pytest.raises(Exception, match=r"'events' of the Kafka cluster '.*', and nothing else may be appended to it"):
        Journal(tmp_path / "one")
    (tmp_path / "one" / "kafka.json").unlink()
    with pytest.raises(Exception, match="nothing else may be appended"):
        Journal(tmp_path / "one")
    with pytest.raises(Exception, match=r"does not say which offset of the topic follows 1-32"):
        Replica(tmp_path / "one", place)
    Journal(tmp_path / "own").close()
    with pytest.raises(
        Exception, match="holds a journal of its own, which can't become a replica of the topic 'events'"
    ):
        Replica(tmp_path / "own", place)
    with pytest.raises(Exception, match=r"is a replica of the topic 'events' of .*, not of the topic 'others'"):
        Replica(tmp_path / "one", brokers.topic("others"))
