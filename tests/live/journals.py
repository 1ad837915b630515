"""Small batches, journals of them, and a PostgreSQL server of a test run's own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest

from mmoe_rec.live.journal import Batch, Journal
from tests.processes import until

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
THOUSANDS = 1_000_000


def batch(*numbers: int, log_name: str | None = None, text: str = "x") -> Batch:
    """A batch of a row for each number, which need not mean anything to a schema."""
    return Batch(log_name, 7, pa.table({"number": pa.array(numbers, pa.int64()), "text": [text] * len(numbers)}))


def numbers_in(batches: list[Batch]) -> list[int]:
    """The numbers of batches of `batch`, in order."""
    return [number for item in batches for number in item.table["number"].to_pylist()]


def every_batch(journal: Journal, after: int = 0, max_rows: int = 1000) -> Iterator[Batch]:
    """All batches of a journal after a position."""
    while batches := journal.read(after, max_rows):
        yield from batches
        after = batches[-1].position


def all_numbers(journal: Journal) -> list[int]:
    """The numbers of all batches of a journal."""
    return numbers_in(list(every_batch(journal)))


class PostgreSQL:
    """A server of its own in a new folder, on a Unix socket."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # as which PostgreSQL does not run
            shutil.chown(self._folder, "postgres", "postgres")
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        words = ["--auth=trust", "--username=postgres", "--data-checksums", "--no-sync", "--no-instructions"]
        self._run("initdb", *words, "-D", self._folder / "data")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        settings = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={self._folder}"]
        program = [PROGRAMS[-1], "-D", self._folder / "data", *settings]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(program, cwd=self._folder, **quiet, **self._user)
        until(lambda: self._run("pg_isready", "-h", self._folder, check=False) == 0, "PostgreSQL does not start")

    def kill(self) -> None:
        """Ends it at once, as a crash does."""
        assert self._process is not None
        self._run("pg_ctl", "stop", "-D", self._folder / "data", "-m", "immediate")
        self._process.wait()

    def close(self) -> None:
        """Ends it, and removes what it held."""
        self.kill()
        shutil.rmtree(self._folder)

    def new_address(self) -> str:
        """The address of a new database."""
        name = f"journal_{uuid4().hex[:12]}"
        self._run("createdb", "-h", self._folder, "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self._folder}"

    def _run(self, program: str, *words: object, check: bool = True) -> int:
        command = [str(PROGRAMS[-1].with_name(program)), *map(str, words)]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, check=False, **self._user)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.returncode


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A server; the test is skipped where there is no PostgreSQL."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    server = PostgreSQL()
    try:
        yield server
    finally:
        server.close()


def append_and_tell(address: str, writer: int, count: int, threads: int) -> None:
    """Appends batches and tells which ones were acknowledged: batch k of writer w has the rows w * 1,000,000 + 2k and
    the next one. It is called in a process of its own."""
    journal = Journal(address)

    def append(number: int) -> None:
        first = writer * THOUSANDS + 2 * number
        position = journal.append(batch(first, first + 1, text="y" * (number % 50)))
        sys.stdout.write(f"{first} {position}\n")
        sys.stdout.flush()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(append, range(count)))


def follow_and_tell(address: str, rows: int, max_rows: int) -> None:
    """Reads until there are so many rows, and prints their numbers. It is called in a process of its own."""
    journal, after, numbers = Journal(address), 0, list[int]()
    while len(numbers) < rows:
        batches = until(lambda: journal.read(after, max_rows))  # noqa: B023
        assert batches[0].position == after + 1
        after = batches[-1].position
        numbers += numbers_in(batches)
    print(*numbers)
