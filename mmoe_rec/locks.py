"""Locks of folders: a process that writes or reads one says so until it is done; who would disturb it is told its name.

The lock is the system's (flock), on a hidden file beside the folder, so it is free as soon as its process has ended,
in whatever way. Between machines it holds where their file system passes locks on, as NFS does, and Lustre mounted
with `flock`. Where it does not, only processes of one machine see each other; where there are no locks at all, a note
says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mmoe_rec.errors import UserError
from mmoe_rec.progress import say

# A process that was killed may need a moment to be gone, and with it its lock.
SECONDS_TO_LET_GO = 5.0
_SECONDS_BETWEEN_TRIES = 0.1
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock. what: kind of process; writes: whether it alone may hold it; since: local time."""

    what: str
    writes: bool
    process: int
    host: str
    since: str

    @staticmethod
    def here(what: str, writes: bool) -> Holder:
        """This process."""
        return Holder(what, writes, os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def may_live(self) -> bool:
        """False where it is known to have ended."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def __str__(self) -> str:
        return f"{self.what} (process {self.process} on {self.host}, since {self.since})"


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
    descriptor = _take(folder, Holder.here(what, writes=True), lambda holder: queue and holder.writes, advice)
    try:
        yield
    finally:
        _let_go(folder, descriptor)
        with suppress(OSError):  # a folder in which something was written stays
            for each in made:
                each.rmdir()


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Keeps others from writing a folder while this process reads it, as any number may; first waits for a writer."""
    descriptor = None
    # Nobody writes to a folder for which no lock can be made, or to one that is not there.
    if folder.parent.is_dir() and os.access(folder.parent, os.W_OK):
        descriptor = _take(folder, Holder.here(what, writes=False), lambda holder: holder.writes, "try it again")
    try:
        yield
    finally:
        _let_go(folder, descriptor)


def _take(folder: Path, me: Holder, waits_for: Callable[[Holder], bool], advice: str) -> int | None:
    """The descriptor whose closing lets go; None on a file system without locks."""
    file, told = lock_file(folder), False
    give_up = time.monotonic() + SECONDS_TO_LET_GO
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _try(file, me)
        except FileNotFoundError:
            descriptor = None  # another process has just removed the folder that it had made
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"'{file}', which locks '{folder}', can't be made: {error.strerror}") from None
            say(f"note: the file system of '{folder}' has no locks, so see to it that nothing else writes there")
            return None
        if descriptor is not None:
            return descriptor
        holders = _holders(file)
        if holders and all(map(waits_for, holders)):
            if not told:
                say(f"waiting for {holders[0]}, which is writing '{folder}'")
            told, give_up = True, time.monotonic() + SECONDS_TO_LET_GO
        elif time.monotonic() > give_up:
            who = " and by ".join(map(str, holders)) or "another process"
            raise UserError(f"'{folder}' is in use by {who}: wait until that has ended, or {advice}")
        time.sleep(_SECONDS_BETWEEN_TRIES)


def lock_file(folder: Path) -> Path:
    """The file that locks a folder, there while it is locked."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.lock")


def _try(file: Path, me: Holder) -> int | None:
    """Takes the lock if it is free, and says in its file who has it."""
    descriptor = _open(file)
    try:
        try:
            # Whoever is alone clears away what killed ones have left.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        if not me.writes:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        elif not alone:
            raise BlockingIOError
        if not _is_at(descriptor, file):
            raise BlockingIOError  # it was removed when the one before let go
        with suppress(OSError):  # another user's file, which may be locked but not written
            if alone:
                os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{json.dumps(asdict(me))}\n".encode())
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holders(file: Path) -> list[Holder]:
    """The processes that say they hold the lock, without those that have ended."""
    try:
        found = [Holder(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError):
        return []
    return [holder for holder in found if holder.may_live]


def _let_go(folder: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, file := lock_file(folder)):
            file.unlink(missing_ok=True)
    except OSError:
        pass  # others read it still
    finally:
        os.close(descriptor)
