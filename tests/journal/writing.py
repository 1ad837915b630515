"""A process that appends to a journal and tells what was acknowledged: FOLDER WRITER BATCHES SEGMENT_BYTES [GROUP]."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmoe_rec.journal.group_commit import GroupCommit
from mmoe_rec.journal.journal import Journal
from tests.journal.journals import batch

THOUSANDS = 1_000_000


def main() -> None:
    """Batch k of writer w has the rows w * 1,000,000 + 2k and the next one."""
    folder, writer, count, segment_bytes = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    journal = Journal(folder, segment_bytes)
    group = GroupCommit(journal)

    def append(number: int) -> None:
        first = writer * THOUSANDS + 2 * number
        position = group.append(batch(first, first + 1, text="y" * (number % 50)))
        sys.stdout.write(f"{first} {position}\n")
        sys.stdout.flush()

    if "GROUP" in sys.argv:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(append, range(count)))
    else:
        for number in range(count):
            append(number)


if __name__ == "__main__":
    main()
