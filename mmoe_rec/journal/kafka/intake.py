"""What messages of a topic become in a journal: this follows from them alone, so that it is the same everywhere."""

from __future__ import annotations

import logging
import struct
from collections import Counter

import pyarrow as pa

from mmoe_rec.errors import RequestError
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.progress import Progress
from mmoe_rec.journal.kafka.topic import CLOSE, ROWS, Message
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import decode, with_about
from mmoe_rec.journal.segments import MOST_PAYLOAD_BYTES

_log = logging.getLogger(__name__)


class Intake:
    """Takes messages into a journal, one after the other, while nobody else appends. name: of the topic, for people."""

    def __init__(self, journal: Journal, progress: Progress, name: str) -> None:
        self._journal, self._progress, self._name = journal, progress, name
        self.skipped: Counter[str] = Counter()
        """Messages that were left out here, by why: of other types, none of ours."""
        self._taking = 0  # the offset that is taken in
        journal.before_segment = self._before_segment

    def take(self, message: Message, end: Position) -> Position:
        """Takes in the message whose turn it is; gives the journal's end then, which was `end`."""
        self._taking, following = message.offset, message.offset + 1
        if message.kind == CLOSE:
            after = self._journal.close_last()
        else:
            payload = record_of(message)
            batches = None if payload is None else decode(pa.py_buffer(payload))
            if payload is not None and batches and all(map(len, batches)):
                try:
                    after = self._journal.put(batches, payload)
                    self._progress.note(after, following)
                    return after
                except RequestError as error:
                    self._skip(message, "types", str(error))
            else:
                self._skip(message, "foreign", "it is no message of a journal")
            after = end
        if self._progress.next(after) < following:
            self._progress.write(after, following)
        return after

    def _before_segment(self, begin: Position) -> None:
        self._progress.write(begin, self._taking)

    def _skip(self, message: Message, why: str, sentence: str) -> None:
        self.skipped[why] += 1
        _log.warning("offset %d of %s is left out on all machines: %s", message.offset, self._name, sentence)


def record_of(message: Message) -> bytes | None:
    """The payload of the record that a message becomes; None where it is none of a journal."""
    if message.kind != ROWS or len(message.value) > MOST_PAYLOAD_BYTES - 1_024:
        return None
    try:
        return with_about(message.value, offset=message.offset)
    except (struct.error, ValueError, TypeError):
        return None
