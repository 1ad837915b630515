"""A worker's replica of a topic, which need not answer for the worker to rank: it is joined as soon as it does."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.journal.kafka.replica import SECONDS, Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import AwayError
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.records import Batch
from mmoe_rec.server.reloading import sentence_of

_PAUSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Joined:
    """Appends to a replica. Raises UserError where the topic is not one that it can join.

    seconds: within which it appends, or gives up.
    """

    def __init__(self, folder: Path, place: KafkaTopic, seconds: float) -> None:
        self._folder, self._place, self._seconds = folder, place, min(SECONDS, seconds)
        self._replica: Replica | None = None
        self._failure, self._since = "", time.time()
        try:
            self._join()
        except AwayError as error:
            self._failure = str(error)
            _log.error("no events are taken: %s", error)
            threading.Thread(target=self._try_again, name="joining", daemon=True).start()

    def _join(self) -> None:
        self._replica = Replica(self._folder, self._place, seconds=self._seconds)

    def _try_again(self) -> None:
        while self._replica is None:
            time.sleep(_PAUSE_SECONDS)
            try:
                self._join()
                _log.info("the topic '%s' answers: events are taken", self._place.name)
            except Exception as error:  # whatever it is, nobody else would try again
                if self._failure != (told := sentence_of(error)):
                    _log.error("no events are taken: %s", told)
                self._failure = told

    def append(self, *batches: Batch) -> Position:
        """As `Replica.append`. Raises UserError as long as the topic does not answer."""
        if self._replica is None:
            raise UserError(self._failure)
        return self._replica.append(*batches)

    def end(self) -> int:
        """The offset of the topic's next message.

        Raises UserError where no broker tells in time, and at once where it is known that none does.
        """
        if self._replica is None or self.failure is not None:
            raise UserError(self.failure or self._failure)
        return self._replica.topic_end(self._seconds)

    def has_taken(self, offset: int) -> bool:
        """Whether this machine has all messages before an offset."""
        return self._replica is not None and self._replica.status().next >= offset

    @property
    def failure(self) -> str | None:
        """Why no more of what other machines accept comes here, as a sentence; None where it does."""
        return self._failure if self._replica is None else self._replica.status().failure

    @property
    def lacking(self) -> tuple[bool, str] | None:
        """Whether it is known for certain that some of what other machines have accepted is not known here, and why, as
        a sentence; None where all is, but for what may be on its way."""
        topic = f"the topic '{self._place.name}'"
        if self._replica is None:
            return False, f"{topic} has not been reached since this server started: {self._failure}"
        status = self._replica.status()
        if status.failure is None and status.is_current and not status.behind:
            return None
        lacked = f"this machine has yet to take in {status.lag:,} messages of {topic}"
        if not status.lag:
            lacked = f"{topic} was last heard of {status.age:,.0f} seconds ago, and this machine has all up to there"
        return status.lag > 0, lacked if status.failure is None else f"{status.failure}; {lacked}"

    def numbers(self) -> tuple[int | None, float]:
        """Messages of the topic that this machine lacked when a broker has last told up to where it goes; and when that
        was, seconds since 1970 UTC. As long as none has, None, and when it was first asked."""
        if self._replica is None:
            return None, self._since
        status = self._replica.status()
        return status.lag, status.heard

    def about(self) -> dict[str, Any]:
        """The same for people."""
        told: dict[str, Any] = {"lag": None, "heard": None, "age_seconds": None}
        if self._replica is not None:
            status = self._replica.status()
            heard = datetime.fromtimestamp(status.heard, UTC).isoformat(timespec="seconds")
            told = {"lag": status.lag, "heard": heard, "age_seconds": round(status.age, 1)}
        return {"name": self._place.name, **told, "failure": self.failure}
