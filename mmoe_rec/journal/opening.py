"""The journal of a folder, be it one of its own or a replica of a topic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.journal.journal import Journal

if TYPE_CHECKING:
    from mmoe_rec.journal.kafka.replica import Replica
    from mmoe_rec.journal.kafka.settings import KafkaTopic


def open_journal(folder: str | Path, topic: KafkaTopic | None = None, create: bool = True) -> Journal | Replica:
    """A journal to append to. topic: of which the folder is a replica, None for a journal of its own.

    Raises UserError as the two do.
    """
    if topic is None:
        return Journal(folder, create=create)
    from mmoe_rec.journal.kafka.replica import Replica

    return Replica(folder, topic, create=create)


def topic_of(file: str | None, name: str | None, journal: str | None) -> KafkaTopic | None:
    """The topic that a command's --kafka and --kafka-topic name. Raises UserError where one of them is missing."""
    if file is None and name is None:
        return None
    if file is None or name is None:
        missing, given = ("--kafka FILE", "--kafka-topic") if file is None else ("--kafka-topic NAME", "--kafka")
        raise UserError(f"{given} needs {missing} as well")
    if journal is None:
        raise UserError("--kafka needs --journal FOLDER as well, where this machine keeps its replica of the topic")
    from mmoe_rec.journal.kafka.settings import KafkaTopic, read_properties

    topic = KafkaTopic(Path(file), name)
    read_properties(topic.file)
    return topic
