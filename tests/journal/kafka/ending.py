"""A process that takes a topic in and ends, as if killed, around some step: FOLDER FILE TOPIC STEP NUMBER.

STEP: a method of the replica's journal, of its intake, or of its progress; NUMBER: the call of it that is the last one.
Even ones end before it, odd ones after it. Exit code 7; 0 where there were fewer calls.
"""

import os
import sys
from pathlib import Path
from typing import Any

from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.kafka.intake import Intake
from mmoe_rec.journal.kafka.progress import Progress
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic

ENDED = 7


def main() -> None:
    """Takes in all, or ends."""
    folder, file, topic, step, last = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
    kind: Any = Intake if step == "before_segment" else Journal if hasattr(Journal, step) else Progress
    name = "_before_segment" if step == "before_segment" else step
    real, calls = getattr(kind, name), 0

    def ending(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        # Of one call in each process, as the next process goes on from there.
        if calls == 1 + last // 2 % 3 and last % 2 == 0:
            os._exit(ENDED)
        result = real(*arguments)
        if calls == 1 + last // 2 % 3 and last % 2 == 1:
            os._exit(ENDED)
        return result

    setattr(kind, name, ending)
    replica = Replica(folder, KafkaTopic(file, topic), segment_bytes=900, checks=False)
    replica.catch_up()
    replica.close()


if __name__ == "__main__":
    main()
