"""Whether a topic is still the one that a folder is a replica of, and goes on from what is there."""

from __future__ import annotations

from mmoe_rec.errors import UserError
from mmoe_rec.journal.folder import made_of, note_made
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.intake import record_of
from mmoe_rec.journal.kafka.progress import Progress, offset_in
from mmoe_rec.journal.kafka.topic import Topic


class SameTopic:
    """A topic and the journal that is a replica of it. made: the topic's id as it was first told, empty until then."""

    def __init__(self, topic: Topic, journal: Journal, progress: Progress) -> None:
        self._topic, self._journal, self._progress = topic, journal, progress
        self._folder = journal.folder
        self.made = made_of(self._folder)

    def check(self, made: str | None = None) -> tuple[int, int]:
        """The offset that comes next here, and that of the topic's next message.

        made: the topic's id, asked for before, if it was.

        Raises UserError where the topic does not go on from what is there.
        """
        made = self._topic.made() if made is None else made
        self.check_id(made)
        with self._journal.alone() as end:
            following = self._progress.next(end)
            payload = self._progress.last_payload(end)
        # Asked last, as other processes go on to take messages in.
        low, high = self._topic.range()
        if following > high:
            raise self.other_topic(f"it ends at offset {high:,}")
        if following < low:
            raise UserError(
                f"{self._topic.name} begins with offset {low:,} now, but the journal '{self._folder}' goes up to "
                f"{following:,}, so rows between would be missing: replace the folder by a copy of another machine's, "
                "and let the topic keep its messages for longer (retention.ms)"
            )
        if payload is not None:
            offset = offset_in(payload)
            found = self._topic.at(offset) if offset >= low else None
            if offset >= low and (found is None or record_of(found) != payload):
                raise self.other_topic(f"it holds another message at offset {offset:,}")
        if made and not self.made:  # of a topic that has just been found to hold what is here
            with self._journal.alone():
                self.made = made_of(self._folder)  # by another process
                self.check_id(made)
                if not self.made:
                    note_made(self._folder, made)
                    self.made = made
        return following, high

    def check_id(self, made: str) -> None:
        """Raises UserError where the topic has another id than it had."""
        if self.made and made not in ("", self.made):
            raise self.other_topic(f"its id is '{made}', and was '{self.made}'")

    def unknown_id(self) -> str:
        """What is not found out where the topic's id is unknown."""
        return (
            f"no broker tells the id of {self._topic.name}: until one does, that it was made anew is found out by the "
            f"last record of '{self._folder}' alone"
        )

    def other_topic(self, why: str) -> UserError:
        """The error that it is another one."""
        return UserError(
            f"{self._topic.name} is not the one that the journal '{self._folder}' is a replica of, though it is called "
            f"so: {why}; it was made anew, or has lost messages: name a new folder, or a topic of another name"
        )
