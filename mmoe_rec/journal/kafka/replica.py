"""A replica of a topic: a journal in a folder of this machine that holds the topic's rows, in the topic's order.

All replicas are the same to the byte: id, records, positions, and where segments end. Which messages become records
follows from the messages alone, so that no machine has to ask another one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

from mmoe_rec.errors import BehindError, KeptError, NotAcknowledgedError, UserError, one_line
from mmoe_rec.journal.folder import Origin, check_replica
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.intake import Intake
from mmoe_rec.journal.kafka.progress import FILE, Progress, told
from mmoe_rec.journal.kafka.reached import BEHIND_SECONDS, Reached, Status
from mmoe_rec.journal.kafka.same_topic import SameTopic
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import CALLED, CLOSE, ROWS, Message, Topic
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import Batch, encode
from mmoe_rec.journal.segments import SEGMENT_BYTES

SECONDS = 10.0
"""How long brokers may take for an answer."""
_MESSAGES_AT_A_TIME = 500
_READ_SECONDS, _ASK_SECONDS, _PAUSE_SECONDS = 0.2, 3.0, 1.0
_MADE_SECONDS = 60.0  # between questions for the topic's id while none is told
_MESSAGES_HELD, _HELD_SECONDS, _LET_IN_SECONDS = 32, 0.05, 0.006
"""Messages that are taken in at a time, and for how long at most, before others of this machine get the lock, too."""
_MOST_LAG = 1_000
"""Messages that may be lacking while more are sent: many more would be waited for in vain."""
_STOP_SECONDS = 2.0
_LATE_SECONDS = 15.0  # since a broker has answered, or has told where the topic ends, after which it is told

_log = logging.getLogger(__name__)


class Replica:
    """Appends to a topic, as `Journal` does to a folder, and takes in what others have sent to it.

    Threads may share it. Processes of one machine may have one each of the same folder; a forked one makes its own.

    folder: made if it is not there; seconds: how long a broker may take for an answer; segment_bytes: the same on all
    machines; checks: whether to ask, too, how the topic is set up.

    Raises UserError where no broker answers, the topic is set up otherwise than a journal needs it, does not hold what
    follows in the folder, or the folder is no replica of it.
    """

    def __init__(
        self,
        folder: str | Path,
        place: KafkaTopic,
        *,
        seconds: float = SECONDS,
        segment_bytes: int = SEGMENT_BYTES,
        create: bool = True,
        checks: bool = True,
    ) -> None:
        check_replica(Path(folder), f"the topic '{place.name}'")  # whether or not a broker answers
        self._topic, self._process = Topic(place, seconds), os.getpid()
        with ExitStack() as undo:
            undo.callback(self._topic.close)
            unknown = self._topic.check_settings() if checks else None
            self._begin(folder, segment_bytes, create, undo)
            undo.pop_all()
        if place.says and unknown is not None:
            _log.warning("%s", unknown)
        if place.says and not self._same.made:
            _log.warning("%s", self._same.unknown_id())

    def _begin(self, folder: str | Path, segment_bytes: int, create: bool, undo: ExitStack) -> None:
        """The rest of the beginning. undo: closes what was opened, if that fails."""
        made = self._topic.made()
        files = {FILE: told(Position.begin(), 0)}
        origin = Origin(self._topic.id, self._topic.name, made, files)
        self._journal = Journal(folder, segment_bytes, create, origin)
        undo.callback(self._journal.close)
        self.folder = self._journal.folder
        self._progress = Progress(self.folder, self._topic.id)
        self._intake = Intake(self._journal, self._progress, self._topic.name)
        self.skipped = self._intake.skipped
        self._same = SameTopic(self._topic, self._journal, self._progress)
        self._failure: str | None = None
        self._made_asked = time.monotonic()
        self._reached, self._is_closed = Reached(), threading.Event()
        self._go_on(made)
        self._thread = threading.Thread(target=self._follow, name="replica", daemon=True)
        self._thread.start()
        _following.add(self)

    @property
    def id(self) -> str:
        """The journal's id on every machine, 32 hexadecimal digits."""
        return self._journal.id

    @property
    def torn(self) -> int:
        """As `Journal.torn`."""
        return self._journal.torn

    def status(self) -> Status:
        """How far it is behind the topic, as far as that is known."""
        reached, failure, age = self._reached, self._failure, self._reached.age
        if failure is None and (silence := reached.silence) > _LATE_SECONDS:
            failure = f"no broker of {self._topic.name} has answered for {silence:,.0f} seconds"
        lag, is_current = max(reached.high - reached.next, 0), age <= _LATE_SECONDS
        return Status(reached.next, lag, reached.heard, age, is_current, reached.behind, failure)

    def append(self, *batches: Batch) -> Position:
        """Appends batches as one message; gives a position of this machine's journal that is not before its end, once
        the message is in the topic and on this machine's disk.

        Raises:
            RequestError: nothing was appended: a column is of another type than in earlier rows, or it is too much.
            NotAcknowledgedError: it is not known whether the rows were appended; they may be sent again.
            KeptError: the topic has them, but within `seconds` of the call they have not come here. They will, unless a
                column turns out to be of another type.
            BehindError: nothing was appended, as it would end so.
            UserError: nothing was appended.
        """
        self._check_process()
        give_up = time.monotonic() + self._topic.seconds
        batches = tuple(each for each in batches if len(each))
        if not batches:
            return self._journal.end()
        payload = encode(batches)
        if len(payload) > self._topic.most_bytes:
            raise self._topic.too_large(len(payload))
        with self._journal.alone() as end:
            self._journal.check_types(batches)  # so that it need not be sent in vain
            least = self._progress.next(end)
        self._check_failure()
        self._check_behind()
        offset = self._sent(ROWS, payload, least)
        self._wait_for(ROWS, offset, give_up)
        with self._journal.alone() as end:
            # Types are never changed: they say now what they said when the message's turn came.
            self._journal.check_types(batches)
            return end

    def close_segment(self) -> int:
        """Closes the last segment on all machines, unless it is empty; gives the number of the last closed one, or 0.

        Raises KeptError where it will be closed once the message comes here, NotAcknowledgedError where it is not known
        whether it was closed, or another UserError.
        """
        self._check_process()
        with self._journal.alone() as end:
            least = self._progress.next(end)
        self._check_failure()
        give_up = time.monotonic() + self._topic.seconds
        try:
            self._wait_for(CLOSE, self._sent(CLOSE, b"", least), give_up)
        except KeptError as error:
            raise KeptError(
                f"{error}: all machines close their segment when they come to this message; try again once this one "
                "holds what the topic does"
            ) from None
        except NotAcknowledgedError as error:
            raise NotAcknowledgedError(
                f"it is not known whether the segment was closed: {error}; if so, all machines do it: try again, as "
                "soon as the topic answers"
            ) from None
        return self._journal.end().segment - 1

    def end(self) -> Position:
        """The position after the last record on this machine."""
        return self._journal.end()

    def catch_up(self, seconds: float = 60.0) -> Position:
        """Ends once it has taken in all that the topic holds now; gives the journal's end.

        Raises UserError where it gets no further for so many seconds.
        """
        _, high = self._topic.range()
        last = time.monotonic()
        while (before := self._reached.next) < high:
            if self._reached.wait(before + 1, min(seconds, 0.5)):
                last = time.monotonic()
            elif time.monotonic() - last > seconds:
                why = self._failure or "it gets no further"
                raise UserError(f"{self._topic.name} was taken in up to offset {before:,} of {high:,}: {why}")
        return self._journal.end()

    def topic_end(self, seconds: float) -> int:
        """The offset of the topic's next message. Raises UserError where no broker tells within so many seconds."""
        _, high = self._topic.range(seconds)
        self._reached.hear()
        return high

    def stop(self) -> None:
        """Ends its thread; for a process that ends, whose clients the thread must not use any more."""
        self._is_closed.set()
        self._thread.join(_STOP_SECONDS)

    def close(self) -> None:
        """Ends its thread and closes the files; it can't be used any more."""
        self._is_closed.set()
        self._thread.join()
        self._topic.close()
        self._journal.close()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise UserError("a replica of a topic can't be used by a forked process: let each make its own")

    def _check_failure(self) -> None:
        """Raises UserError where it is known that brokers are away: callers need not wait for that one by one."""
        if (failure := self.status().failure) is not None:
            raise UserError(failure)

    def _check_behind(self) -> None:
        """Raises BehindError where it is known that what is sent now would not come here in time."""
        status = self.status()
        if status.lag > _MOST_LAG or status.behind > self._topic.seconds:
            raise BehindError(f"this machine has yet to take in {status.lag:,} messages of {self._topic.name}")

    def _go_on(self, made: str | None = None) -> None:
        """Reads on from what is here. made: the topic's id, if it is known. Raises UserError where it can't."""
        self._topic.read_from(self._checked(made))

    def _checked(self, made: str | None = None) -> int:
        following, high = self._same.check(made)
        self._reached.advance(following)
        self._reached.tell(high)
        return following

    def _sent(self, kind: bytes, value: bytes, least: int) -> int:
        """Sends a message, and takes it in where it is the next one; gives its offset."""
        offset = self._topic.send(kind, value)
        self._reached.hear()
        if offset < least:
            self._failure = str(self._same.other_topic(f"it has put a message at offset {offset:,}"))
            raise NotAcknowledgedError(self._failure)
        try:
            with self._journal.alone() as end:
                if self._progress.next(end) == offset:  # need not be read
                    self._intake.take(Message(offset, kind, value), end)
                    self._reached.advance(offset + 1)
        except UserError as error:
            them = "them" if kind == ROWS else "it"
            raise KeptError(
                f"the topic has taken {CALLED[kind]}, but this machine can't keep {them}: {error}"
            ) from None
        return offset

    def _wait_for(self, kind: bytes, offset: int, give_up: float) -> None:
        with self._journal.alone() as end:
            if self._progress.next(end) > offset:
                return
        if not self._reached.wait(offset + 1, give_up - time.monotonic()):
            raise KeptError(
                f"the topic has taken {CALLED[kind]}, but this machine has not read so far within "
                f"{self._topic.seconds:g} seconds ({self._failure or 'it is behind'})"
            )

    # What follows is the thread that takes messages in.

    def _follow(self) -> None:
        waiting, asked, must_check, reached = list[Message](), 0.0, False, self._reached
        while not self._is_closed.is_set():
            try:
                if must_check:  # whether the topic is still the one that it was, and goes on from here
                    self._go_on()
                    must_check = False
                if time.monotonic() - asked > (BEHIND_SECONDS if reached.behind else _ASK_SECONDS):
                    asked = time.monotonic()
                    self._ask()
                if not waiting and (waiting := self._topic.read(_READ_SECONDS, _MESSAGES_AT_A_TIME)):
                    reached.hear()
                if waiting:
                    self._take_some(waiting)
                if waiting:
                    time.sleep(_LET_IN_SECONDS)
                self._recover()
            except Exception as error:  # whatever it is, it is told, and tried again
                self._fail(str(error) if isinstance(error, UserError) else one_line(error))
                must_check = not waiting
                self._is_closed.wait(_PAUSE_SECONDS)

    def _recover(self) -> None:
        if self._failure is not None:
            _log.info("the journal '%s' is taken in again", self.folder)
            self._failure = None

    def _fail(self, sentence: str) -> None:
        if sentence != self._failure:
            _log.error("no more of the topic is taken in: %s", sentence)
        self._failure = sentence

    def _ask(self) -> None:
        before = self._reached.next  # as it may go on while a broker is asked
        try:
            _, high = self._topic.range(_READ_SECONDS * 5)
        except UserError:
            return  # `status` tells how long that has been so
        self._reached.hear()
        if self._same.made:
            self._same.check_id(self._topic.made())
        elif time.monotonic() - self._made_asked > _MADE_SECONDS:
            self._made_asked = time.monotonic()
            self._checked()
        if high < before:
            raise self._same.other_topic(f"it ends at offset {high:,}")
        self._reached.tell(high)

    def _take_some(self, messages: list[Message]) -> None:
        """Takes in the first ones, and removes them from the list."""
        give_up, taken = time.monotonic() + _HELD_SECONDS, 0
        with self._journal.alone() as end:
            for each in messages[:_MESSAGES_HELD]:
                if each.offset >= self._progress.next(end):
                    end = self._intake.take(each, end)  # noqa: PLW2901
                self._reached.advance(max(self._progress.next(end), each.offset + 1))
                taken += 1
                if time.monotonic() > give_up:
                    break
        del messages[:taken]


_following: weakref.WeakSet[Replica] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for replica in list(_following):
        replica.stop()
