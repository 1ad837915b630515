"""Topics and replicas with rows, as machines that came before have left them."""

from pathlib import Path

from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import ROWS, Topic
from mmoe_rec.journal.records import encode
from tests.journal.journals import batch
from tests.journal.kafka.mock_brokers import Brokers


def filled(folder: Path, place: KafkaTopic, *numbers: int) -> None:
    """Appends one row after the other by a replica."""
    replica = Replica(folder, place)
    for number in numbers:
        replica.append(batch(number))
    replica.close()


def sends(place: KafkaTopic, *numbers: int) -> None:
    """As another machine."""
    topic = Topic(place, 10.0)
    for number in numbers:
        topic.send(ROWS, encode([batch(number)]))
    topic.close()


def make_anew(brokers: Brokers, name: str = "events") -> None:
    """Removes a topic, and makes another one of its name."""
    brokers.tell("delete", name)
    brokers.tell("create", name, 1)
