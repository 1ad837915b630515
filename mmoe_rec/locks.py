"""Locks of folders: a process that writes or reads one says so until it is done, and others are told who it is.

Whoever holds a folder has locked the file `.NAME.lock` beside it: one writer, or any number of readers. The file says
who took it last. The locks are the system's (flock), so they are free as soon as their process has ended, in whatever
way. Between machines they hold where their file system passes locks on, as NFS does, and Lustre mounted with `flock`.
Where it does not, only processes of one machine see each other; where there are no locks at all, a note says so.
"""

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import TextIO

from mmoe_rec.atomic import find_temporary_paths
from mmoe_rec.errors import UserError
from mmoe_rec.progress import say

LOCK_TIMEOUT_SECONDS = 5.0
"""A process that was killed may need a moment to be gone, and with it its lock."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


@contextmanager
def write_lock(folder: Path, what: str, advice: str, *, wait: bool = False) -> Iterator[None]:
    """Lets one process write a folder that nobody else writes or reads, and removes what killed ones left beside it.

    what: kind of this process, for messages to others; advice: what to do where the folder is in use, besides waiting;
    queue: wait for another writer, for as long as it takes. Raises UserError where another process writes or reads the
    folder, or it can't be locked.
    """
    made = [each for each in Path(os.path.realpath(folder)).parents if not each.exists()]
    try:
        with _hold(folder, what, "writing", advice, wait):
            for left in find_temporary_paths(folder):
                shutil.rmtree(left, ignore_errors=True)
            yield
    finally:
        with suppress(OSError):  # a folder in which something was written stays
            for each in made:
                each.rmdir()


@contextmanager
def read_lock(folder: Path, what: str) -> Iterator[None]:
    """Keeps others from writing a folder while this process reads it, as any number may; first waits for a writer."""
    # Nobody writes to a folder for which no lock can be made, or to one that is not there.
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        yield
        return
    with _hold(folder, what, "reading", "try it again", wait=True):
        yield


def lock_file(folder: Path) -> Path:
    """A file that is there while a folder is locked."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.lock")


@contextmanager
def _hold(folder: Path, what: str, role: str, advice: str, wait: bool) -> Iterator[None]:
    path, told, file, give_up = lock_file(folder), False, None, time.monotonic() + LOCK_TIMEOUT_SECONDS
    while file is None:
        try:
            file = _lock(path, shared=role == "reading")
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"'{path}', which locks '{folder}', can't be made: {error.strerror}") from None
            say(f"note: the file system of '{folder}' has no locks, so see to it that nothing else writes there")
            path.unlink(missing_ok=True)
            file = StringIO()
        if file is None:
            with suppress(FileNotFoundError):
                holder, _, who = path.read_text(encoding="utf-8").partition(" ")
                if wait and holder == "writing":
                    if not told:
                        say(f"waiting for {who}, which is writing '{folder}'")
                    told, give_up = True, time.monotonic() + LOCK_TIMEOUT_SECONDS
                elif time.monotonic() > give_up:
                    raise UserError(f"'{folder}' is in use by {who}: wait until that has ended, or {advice}")
                time.sleep(0.1)
    with file:
        where = f"process {os.getpid()} on {socket.gethostname()}"
        file.truncate(0)
        file.write(f"{role} {what} ({where}, since {time.strftime('%Y-%m-%d %H:%M:%S')})")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # others still read, or there are no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)


def _lock(path: Path, shared: bool) -> TextIO | None:
    """The locked file; None where another process holds it, or has removed it meanwhile."""
    with ExitStack() as stack, suppress(BlockingIOError, FileNotFoundError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        with suppress(PermissionError):  # another user's, who lets all others lock it
            os.fchmod(file.fileno(), 0o666)
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            stack.pop_all()
            return file
    return None
