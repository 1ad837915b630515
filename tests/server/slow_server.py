"""python -m tests.server.slow_server FOLDER ARGUMENTS OF serve: a server whose passes can be made to wait.

A pass with a request of user 999 writes the file `started` into FOLDER and waits until there is a file `go_on`.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmoe_rec.inference.ranker import Ranker
from tests.commands import run

SLOW_USER = 999


def wait_where_told(folder: Path) -> None:
    """Makes the passes of this process wait."""
    rank_many = Ranker.rank_many

    def waiting(ranker: Ranker, requests: Sequence[Any]) -> Any:
        if any(each.user.get("user") == SLOW_USER for each in requests):
            (folder / "started").touch()
            while not (folder / "go_on").exists():
                time.sleep(0.01)
        return rank_many(ranker, requests)

    Ranker.rank_many = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    logging.root.handlers.clear()  # of libraries that `tests.fork_server` has imported, and a server need not have
    wait_where_told(Path(sys.argv[1]))
    run("serve", *sys.argv[2:])
