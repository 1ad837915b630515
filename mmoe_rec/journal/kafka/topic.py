"""A topic of one partition: what it holds from where to where, sending a message, and reading on from an offset."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmoe_rec.errors import NotAcknowledgedError, RequestError, UserError
from mmoe_rec.journal.kafka.settings import (
    KafkaTopic,
    admin_settings,
    consumer_settings,
    producer_settings,
    read_properties,
    refused,
)

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Producer

ROWS, CLOSE = b"rows 1", b"close 1"
"""Kinds of messages, as their header says: a record, and that a segment is closed here."""
CALLED = {ROWS: "the rows", CLOSE: "the message that closes the segment"}
_HEADER = "mmoe-rec"
_IDS = uuid.UUID("c5d3a0de-3f0c-4b5f-8f55-6f0a7f6b1c2e")
_NO_ID = "A" * 22  # all bits zero
_TICK_SECONDS = 0.05
_ASKED_SECONDS = 3.0  # of a broker that need not tell how a topic is set up
_OVERHEAD_BYTES = 1_024
"""Of a message beside its value, at most."""


class AwayError(UserError):
    """No broker has answered: later one may."""


@dataclass(frozen=True)
class Message:
    """kind: `ROWS`, `CLOSE`, or anything else of messages that others have sent."""

    offset: int
    kind: bytes
    value: bytes


class _Told:
    """What clients have run into last. No part of a topic, as a client that refers to its topic would outlive it."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, error: Any) -> None:
        self.last = error.str()


class Topic:
    """A topic that there is. Threads may share it, but for `read`, which one may call; a forked process may not use it.

    Raises UserError where confluent-kafka is missing, no broker answers within so many seconds, there is no such topic,
    or it is set up otherwise than a journal needs it.
    """

    def __init__(self, place: KafkaTopic, seconds: float) -> None:
        try:
            import confluent_kafka
            import confluent_kafka.admin
        except ImportError:
            raise UserError(
                "a journal in a Kafka topic needs the package confluent-kafka: install the extra `kafka`, such as "
                "pip install 'confluent-kafka>=2.16,<3'"
            ) from None
        self._kafka, self.place, self.seconds = confluent_kafka, place, seconds
        self._given = read_properties(place.file)
        self._told = _Told()
        self._partition = confluent_kafka.TopicPartition(place.name, 0)
        self._admin_module = confluent_kafka.admin
        self._reader: Consumer | None = None
        self._producer: Producer | None = None
        self._lock = threading.Lock()
        self._admin = self._client(confluent_kafka.admin.AdminClient, admin_settings(self._given))
        self._asking = self._client(confluent_kafka.Consumer, consumer_settings(self._given))
        try:
            self.cluster = self._checked_cluster()
        except BaseException:
            self.close()
            raise
        self.name = f"the topic '{place.name}' of the Kafka cluster '{self.cluster}'"
        self.id = uuid.uuid5(_IDS, f"{self.cluster}\n{place.name}").bytes
        self.most_bytes = int(self._given.get("message.max.bytes", 1_000_000)) - _OVERHEAD_BYTES

    def _client(self, kind: Callable[[dict[str, Any]], Any], settings: dict[str, Any]) -> Any:
        try:
            return kind({**settings, "error_cb": self._told})
        except (self._kafka.KafkaException, ValueError, TypeError) as error:
            raise refused(self.place.file, error) from None

    def _away(self, seconds: float) -> str:
        told = f" ({self._told.last})" if self._told.last else ""
        return f"no broker of '{self._given['bootstrap.servers']}' has answered within {seconds:g} seconds{told}"

    def _checked_cluster(self) -> str:
        """The cluster's id. Raises UserError where the topic is not as it has to be."""
        try:
            found = self._asking.list_topics(timeout=self.seconds)
        except self._kafka.KafkaException:
            raise AwayError(self._away(self.seconds)) from None
        name = self.place.name
        if (topic := found.topics.get(name)) is None or topic.error is not None:
            raise UserError(
                f"the Kafka cluster '{found.cluster_id}' has no topic '{name}' that may be read; make it, with one "
                f"partition: kafka-topics --create --topic {name} --partitions 1"
            )
        if len(topic.partitions) != 1:
            raise UserError(
                f"the topic '{name}' has {len(topic.partitions)} partitions, among which rows have no order: make one "
                "with one partition"
            )
        return str(found.cluster_id)

    def check_settings(self) -> str | None:
        """Why this can't be checked, as where a broker does not tell, in one sentence; None where all is well.

        Raises UserError where the topic loses messages by its settings.
        """
        kinds = self._admin_module.ConfigResource
        try:
            (future,) = self._admin.describe_configs(
                [kinds(kinds.Type.TOPIC, self.place.name)], request_timeout=_ASKED_SECONDS
            ).values()
            found = {name: each.value for name, each in future.result(2 * _ASKED_SECONDS).items()}
            why = "it names no cleanup.policy"
        except (self._kafka.KafkaException, TimeoutError) as error:
            found, why = {}, _words(error)
        if not found.get("cleanup.policy"):
            return (
                f"the broker does not tell how {self.name} is set up ({why}): see that its cleanup.policy is delete, "
                "that its retention is longer than any machine may be away, and max.message.bytes large enough"
            )
        if "compact" in found["cleanup.policy"]:
            raise UserError(f"{self.name} is compacted, which removes rows: set its cleanup.policy to delete")
        if found.get("max.message.bytes") and "message.max.bytes" not in self._given:
            self._given["message.max.bytes"] = found["max.message.bytes"]
            self.most_bytes = int(found["max.message.bytes"]) - _OVERHEAD_BYTES
        return None

    def made(self) -> str:
        """The id that the topic got when it was made; empty where the broker does not tell."""
        names = self._kafka.TopicCollection([self.place.name])
        try:
            (future,) = self._admin.describe_topics(names, request_timeout=_ASKED_SECONDS).values()
            found = str(future.result(2 * _ASKED_SECONDS).topic_id)
        except (self._kafka.KafkaException, TimeoutError):
            return ""
        return "" if found == _NO_ID else found

    def range(self, seconds: float | None = None) -> tuple[int, int]:
        """The first offset that is there, and the next one. Raises UserError where no broker says so in time."""
        limit = self.seconds if seconds is None else seconds
        try:
            low, high = self._asking.get_watermark_offsets(self._partition, timeout=limit)
        except self._kafka.KafkaException as error:
            raise AwayError(f"{self._away(limit)}: {_words(error)}") from None
        return int(low), int(high)

    def send(self, kind: bytes, value: bytes) -> int:
        """Sends a message; gives its offset once it is kept by as many brokers as the topic asks for.

        Raises:
            RequestError: it is too large.
            NotAcknowledgedError: it is not known whether it was kept.
        """
        done, found = threading.Event(), list[Any]()

        def delivered(error: Any, message: Any) -> None:
            found[:] = [error, message.offset()]
            done.set()

        with self._lock:
            if self._producer is None:
                self._producer = self._client(self._kafka.Producer, producer_settings(self._given, self.seconds))
            producer = self._producer
        try:
            producer.produce(self.place.name, value, partition=0, headers=[(_HEADER, kind)], on_delivery=delivered)
            give_up = time.monotonic() + 3 * self.seconds + 1  # librdkafka gives up before, and says so
            while not done.is_set() and time.monotonic() < give_up:
                producer.poll(_TICK_SECONDS)
        except (self._kafka.KafkaException, BufferError) as raised:
            found[:] = [raised.args[0], -1]
        error: Any = found[0] if found else None
        offset = found[1] if found else -1
        if error is None and offset >= 0:
            return int(offset)
        is_known = isinstance(error, self._kafka.KafkaError)
        if is_known and error.code() in (self._kafka.KafkaError.MSG_SIZE_TOO_LARGE, self._kafka.KafkaError._BAD_MSG):
            raise self.too_large(len(value))
        if is_known and error.fatal():  # this producer sends no more
            with self._lock:
                self._producer = None
        why, them = error.str() if is_known else error or "no answer", "them" if kind == ROWS else "it"
        raise NotAcknowledgedError(
            f"{self.name} has not said within {self.seconds:g} seconds that it keeps {CALLED.get(kind, 'a message')} "
            f"({why}); it may have kept {them}"
        )

    def too_large(self, size: int) -> RequestError:
        """The error of rows that no message can hold."""
        return RequestError(
            f"the rows take {size:,} bytes, and a message of the topic holds at most {self.most_bytes:,}: send fewer "
            "at a time, or raise max.message.bytes of the topic"
        )

    def read_from(self, offset: int) -> None:
        """What `read` gives begins there."""
        if self._reader is None:
            self._reader = self._client(self._kafka.Consumer, consumer_settings(self._given))
        self._reader.assign([self._kafka.TopicPartition(self.place.name, 0, offset)])

    def read(self, seconds: float, most: int) -> list[Message]:
        """The next messages, once there are any within so many seconds. Raises UserError where it can't go on.

        Then what was read is lost, until `read_from` begins anew.
        """
        assert self._reader is not None
        first = self._reader.poll(seconds)
        if first is None:
            return []
        found = list[Message]()
        for each in (first, *self._reader.consume(most, 0)):
            if (error := each.error()) is None:
                found.append(_message(each))
            elif not error.retriable() and error.code() not in self._passing():
                raise UserError(f"{self.name} can't be read any further: {error.str()}")
        return found

    def _passing(self) -> tuple[int, ...]:
        """Errors that librdkafka tries to get over by itself."""
        codes = self._kafka.KafkaError
        return codes._TRANSPORT, codes._ALL_BROKERS_DOWN, codes._RESOLVE, codes._TIMED_OUT

    def at(self, offset: int) -> Message | None:
        """The message of an offset; None where there is none. Raises UserError where no broker says so in time."""
        low, high = self.range()
        if not low <= offset < high:
            return None
        consumer = self._client(self._kafka.Consumer, consumer_settings(self._given))
        try:
            consumer.assign([self._kafka.TopicPartition(self.place.name, 0, offset)])
            give_up = time.monotonic() + self.seconds
            while time.monotonic() < give_up:
                found = consumer.poll(_TICK_SECONDS)
                if found is not None and found.error() is None:
                    return _message(found) if found.offset() == offset else None
        finally:
            consumer.close()
        raise AwayError(f"{self.name}: {self._away(self.seconds)}")

    def close(self) -> None:
        """Ends its clients."""
        for each in (self._asking, self._reader):
            if each is not None:
                each.close()
        with self._lock:
            self._reader, producer, self._producer = None, self._producer, None
        if producer is not None:
            producer.purge()
            producer.poll(0)
        self._admin = None  # which has no other way to end its threads


def _words(error: Exception) -> str:
    told = error.args[0] if error.args else error
    return str(told.str() if hasattr(told, "str") else told) or "it does not answer"


def _message(found: Any) -> Message:
    kinds = [value for name, value in found.headers() or () if name == _HEADER]
    return Message(found.offset(), kinds[0] if kinds and kinds[0] else b"", found.value() or b"")
