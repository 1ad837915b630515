"""Locks of folders: a process that writes or reads one says so until it is done, and others are told who it is.

Whoever holds a folder has a locked file beside it, `.NAME.lock.ID.writer` or `.NAME.lock.ID.reader`, which says who it
is. `.NAME.lock` is locked for a moment by whoever comes or goes, and is there while anybody holds the folder. The locks
are the system's (flock), so they are free as soon as their process has ended, in whatever way. Between machines they
hold where their file system passes locks on, as NFS does, and Lustre mounted with `flock`. Where it does not, only
processes of one machine see each other; where there are no locks at all, a note says so.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mmoe_rec.errors import UserError
from mmoe_rec.progress import say

SECONDS_TO_LET_GO = 5.0
"""A process that was killed may need a moment to be gone, and with it its lock."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


@contextmanager
def writing(folder: Path, what: str, advice: str, *, queue: bool = False) -> Iterator[None]:
    """Lets one process write a folder while nobody else writes or reads it.

    Args:
        what: kind of this process, for messages to others.
        advice: what to do where the folder is in use, besides waiting.
        queue: wait for another writer, for as long as it takes.

    Raises:
        UserError: another process writes or reads the folder, or it can't be locked.
    """
    made = [each for each in Path(os.path.realpath(folder)).parents if not each.exists()]
    try:
        with _hold(folder, what, "writer", advice, queue):
            yield
    finally:
        with suppress(OSError):  # a folder in which something was written stays
            for each in made:
                each.rmdir()


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Keeps others from writing a folder while this process reads it, as any number may; first waits for a writer."""
    # Nobody writes to a folder for which no lock can be made, or to one that is not there.
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        yield
        return
    with _hold(folder, what, "reader", "try it again", queue=True):
        yield


def lock_file(folder: Path) -> Path:
    """A file that is there while a folder is locked."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.lock")


@contextmanager
def _hold(folder: Path, what: str, role: str, advice: str, queue: bool) -> Iterator[None]:
    gate = lock_file(folder)
    mine, told, give_up = gate.with_name(f"{gate.name}.{uuid.uuid4().hex}.{role}"), False, _give_up()
    lock = _lock(mine)
    while not lock.is_locked:
        try:
            gate.parent.mkdir(parents=True, exist_ok=True)
            with _pass(gate):
                others = [file for file in _find_holders(gate) if "writer" in (role, file.suffix[1:])]
                holders = sorted(file.read_text(encoding="utf-8") for file in others)
                if not holders:
                    lock.acquire()
                    where = f"process {os.getpid()} on {socket.gethostname()}"
                    mine.write_text(f"{what} ({where}, since {time.strftime('%Y-%m-%d %H:%M:%S')})", encoding="utf-8")
                    break
        except FileNotFoundError:
            continue  # another process has just removed the folder that it had made
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"'{gate}', which locks '{folder}', can't be made: {error.strerror}") from None
            say(f"note: the file system of '{folder}' has no locks, so see to it that nothing else writes there")
            break
        if queue and all(file.suffix == ".writer" for file in others):
            if not told:
                say(f"waiting for {holders[0]}, which is writing '{folder}'")
            told, give_up = True, _give_up()
        elif time.monotonic() > give_up:
            who = " and by ".join(holders)
            raise UserError(f"'{folder}' is in use by {who}: wait until that has ended, or {advice}")
        time.sleep(0.1)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError), _pass(gate):  # somebody may have removed the folder
                mine.unlink(missing_ok=True)
            lock.release()


def _give_up() -> float:
    return time.monotonic() + SECONDS_TO_LET_GO


@contextmanager
def _pass(gate: Path) -> Iterator[None]:
    """Lets one process at a time look for holders, come or go."""
    with _lock(gate):
        yield
        if not _holder_files(gate):
            gate.unlink(missing_ok=True)


def _find_holders(gate: Path) -> Iterator[Path]:
    """The files of those who hold a folder; those of killed processes are removed."""
    for file in _holder_files(gate):
        try:
            with _lock(file).acquire(timeout=0):
                file.unlink()
        except Timeout:
            yield file


def _holder_files(gate: Path) -> list[Path]:
    return [file for file in gate.parent.iterdir() if file.name.startswith(f"{gate.name}.")]


def _lock(file: Path) -> FileLock:
    return FileLock(file, mode=0o666, thread_local=False, fallback_to_soft=False)
