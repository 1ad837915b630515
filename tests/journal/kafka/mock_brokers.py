"""A Kafka cluster of librdkafka's own mock brokers, in a process of its own.

The process prints the brokers' address, then does what each line of its input says, and ends with its input:
create TOPIC PARTITIONS; delete TOPIC; cut TOPIC OFFSET, as retention does; down; up.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmoe_rec.journal.kafka.settings import KafkaTopic

ROOT = Path(__file__).parents[3]


def _library() -> ctypes.CDLL:
    import confluent_kafka

    beside = Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs"
    (path,) = beside.glob("librdkafka*")
    found = ctypes.CDLL(str(path))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(found, name).restype = ctypes.c_void_p
    found.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return found


def main() -> None:
    """Keeps a cluster of one broker until its input ends."""
    library, error = _library(), ctypes.create_string_buffer(512)
    client = ctypes.c_void_p(library.rd_kafka_new(0, ctypes.c_void_p(library.rd_kafka_conf_new()), error, 512))
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(client, 1))
    library.rd_kafka_mock_set_controller_id(cluster, 1)
    print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
    for line in sys.stdin:
        what, *words = line.split()
        name = words[0].encode() if words else b""
        if what == "create":
            code = library.rd_kafka_mock_topic_create(cluster, name, int(words[1]), 1)
        elif what == "delete":
            code = library.rd_kafka_mock_topic_delete(cluster, name)
        elif what == "cut":
            code = library.rd_kafka_mock_partition_delete_records(cluster, name, 0, ctypes.c_int64(int(words[1])))
        else:
            code = getattr(library, f"rd_kafka_mock_broker_set_{what}")(cluster, 1)
        print(code, flush=True)


class Brokers:
    """A running cluster. address: of its brokers."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        assert process.stdout is not None
        self.address = process.stdout.readline().strip()

    def tell(self, *words: object) -> None:
        """Has the cluster do something."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "0\n", words

    def topic(self, name: str, partitions: int = 1) -> KafkaTopic:
        """Makes a topic."""
        self.tell("create", name, partitions)
        return self.named(name)

    def named(self, name: str, **more: object) -> KafkaTopic:
        """How a topic is reached."""
        # The mock brokers answer no fetch before its time is over.
        keys = {"bootstrap.servers": self.address, "fetch.wait.max.ms": 10, **more}
        file = self._folder / f"{name}.properties"
        file.write_text("".join(f"{key.replace('_', '.')}={value}\n" for key, value in keys.items()))
        return KafkaTopic(file, name)


@contextmanager
def mock_brokers(folder: Path) -> Iterator[Brokers]:
    """A cluster of its own. folder: where the files go that say how it is reached."""
    words = [sys.executable, "-m", "tests.journal.kafka.mock_brokers"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        yield Brokers(process, folder)
    finally:
        process.kill()
        process.wait()
        for each in (process.stdin, process.stdout):
            assert each is not None
            each.close()


if __name__ == "__main__":
    main()
