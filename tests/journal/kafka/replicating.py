"""A process that appends to a replica and tells what was kept: FOLDER FILE TOPIC WRITER BATCHES SEGMENT_BYTES."""

import sys
from pathlib import Path

from mmoe_rec.journal.group_commit import GroupCommit
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from tests.journal.journals import batch
from tests.journal.writing import THOUSANDS


def main() -> None:
    """Batch k of writer w has the rows w * 1,000,000 + 2k and the next one; each seventh is followed by a close."""
    folder, file, topic = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    writer, count, segment_bytes = map(int, sys.argv[4:7])
    replica = Replica(folder, KafkaTopic(file, topic), segment_bytes=segment_bytes, checks=False)
    group = GroupCommit(replica)
    for number in range(count):
        first = writer * THOUSANDS + 2 * number
        group.append(batch(first, first + 1, text="y" * (number % 50)))
        sys.stdout.write(f"{first}\n")
        sys.stdout.flush()
        if number % 7 == 6:
            replica.close_segment()
    replica.close()


if __name__ == "__main__":
    main()
