"""A process that follows a journal until it has so many rows, and prints their numbers: FOLDER ROWS MOST_ROWS."""

import sys
from pathlib import Path

from mmoe_rec.journal.follower import Follower
from tests.journal.journals import numbers_in

if __name__ == "__main__":
    follower, found = Follower(Path(sys.argv[1])), list[int]()
    while len(found) < int(sys.argv[2]):
        follower.wait(60)
        before = follower.position
        batches = follower.read(int(sys.argv[3]))
        assert follower.position >= before
        found += numbers_in(batches)
    print(*found)
