"""Folder locks: one writer, or any number of readers.

To lock a folder, a process locks the file `.NAME.lock` beside the folder. The file names the last process that locked
it, so that other processes can name it in messages. The locks are the operating system's (flock), so they end with
their process. Locks work across machines if the file system supports it, such as NFS, or Lustre mounted with `flock`.
Otherwise they work only between processes of one machine. If the file system supports no locks at all, a note is
printed.
"""

import enum
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
"""Seconds to wait for a lock, because a killed process may need a moment to release its lock."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}


class LockMode(enum.StrEnum):
    """How a process uses a folder. The member's value is the first word in the lock file."""

    WRITE = "writing"
    READ = "reading"


@contextmanager
def write_lock(folder: Path, what: str, advice: str, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder for writing, and remove temporary paths that killed processes left beside it.

    Args:
        folder: Folder to lock. It may not exist yet.
        what: Activity of this process, such as "a training", for the messages of other processes.
        advice: Alternative to waiting if the folder is in use, as an imperative.
        wait: Whether to wait without a time limit if another process writes.

    Raises:
        UserError: Another process writes or reads the folder, or it can't be locked.
    """
    new_parents = [parent for parent in Path(os.path.realpath(folder)).parents if not parent.exists()]
    try:
        with _hold(folder, what, LockMode.WRITE, advice, wait):
            for leftover in find_temporary_paths(folder):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    finally:
        with suppress(OSError):  # Remove the created parent folders, as far as they are empty.
            for parent in new_parents:
                parent.rmdir()


@contextmanager
def read_lock(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for reading, together with any number of other readers. Wait for a writer to end.

    Args:
        folder: Folder to lock.
        what: Activity of this process, such as "an evaluation", for the messages of other processes.

    Raises:
        UserError: The folder can't be locked.
    """
    # If no lock file can be created in the parent folder, writers can't lock the folder either, so no lock is needed.
    if not (folder.parent.is_dir() and os.access(folder.parent, os.W_OK)):
        yield
        return
    with _hold(folder, what, LockMode.READ, "try again", wait=True):
        yield


def lock_file(folder: Path) -> Path:
    """Return the path of a folder's lock file, which exists while the folder is locked."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.lock")


@contextmanager
def _hold(folder: Path, what: str, mode: LockMode, advice: str, wait: bool) -> Iterator[None]:
    path, announced, file, deadline = lock_file(folder), False, None, time.monotonic() + LOCK_TIMEOUT_SECONDS
    while file is None:
        try:
            file = _lock(path, shared=mode is LockMode.READ)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"The lock file '{path}' can't be created: {error.strerror}.") from None
            say(f"note: the file system of '{folder}' has no locks. Make sure that nothing else writes there.")
            path.unlink(missing_ok=True)
            file = StringIO()
        if file is None:
            with suppress(FileNotFoundError):
                current_mode, _, who = path.read_text(encoding="utf-8").partition(" ")
                if wait and current_mode == LockMode.WRITE:
                    if not announced:
                        say(f"waiting for {who}, which is writing '{folder}'")
                    announced, deadline = True, time.monotonic() + LOCK_TIMEOUT_SECONDS
                elif time.monotonic() > deadline:
                    raise UserError(f"'{folder}' is in use by {who}. Wait until it has ended, or {advice}.")
                time.sleep(0.1)
    with file:
        process = f"process {os.getpid()} on {socket.gethostname()}"
        file.truncate(0)
        file.write(f"{mode} {what} ({process}, since {time.strftime('%Y-%m-%d %H:%M:%S')})")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # This fails if other readers remain, or if the file system has no locks.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)


def _lock(path: Path, shared: bool) -> TextIO | None:
    """Lock a file and return it. Return None if another process has locked the file, or has just removed it."""
    with ExitStack() as stack, suppress(BlockingIOError, FileNotFoundError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        with suppress(PermissionError):  # If another user owns the lock file, that user has already made it writable.
            os.fchmod(file.fileno(), 0o666)
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            stack.pop_all()
            return file
    return None
