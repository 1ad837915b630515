"""The folder of a journal: made whole, recognised by its id, and locked by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import flush_files, flush_tree
from mmoe_rec.errors import UserError
from mmoe_rec.journal.segments import FORMAT, segment_begin, segment_path

LOCK_SECONDS = 60.0
"""How long to wait for a process that holds the lock: it may have been stopped, and would be waited for in vain."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.005
_ELSEWHERE = ("nfs", "cifs", "smb", "9p", "fuse.sshfs")


def open_folder(folder: Path, create: bool) -> bytes:
    """The id of the journal in a folder, 16 bytes; with `create`, a folder that is not there, or is empty, becomes one.

    Raises UserError where there is none, the folder holds something else, or a journal of another format.
    """
    try:
        if create and not (folder / "journal.json").exists():
            _create(folder)
        text = (folder / "journal.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"'{folder}' holds no journal (journal.json)") from None
    except OSError as error:
        raise UserError(f"there can be no journal in '{folder}': {error.strerror}") from None
    return _id_in(text, folder / "journal.json")


def _id_in(text: str, path: Path) -> bytes:
    found, journal_id = None, b""
    with suppress(ValueError, KeyError, TypeError):
        about = json.loads(text)
        found = about["format"]
        journal_id = bytes.fromhex(about["id"])
    if isinstance(found, int) and found != FORMAT:
        raise UserError(f"'{path}' is of format {found}, this version reads {FORMAT}")
    if found != FORMAT or len(journal_id) != 16:
        raise UserError(f"'{path}' is damaged: it does not give a format and an id; restore it from a copy")
    return journal_id


def _create(folder: Path) -> None:
    _check_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (kind := _file_system(folder.parent)).startswith(_ELSEWHERE):
        raise UserError(f"'{folder}' lies on a file system of another machine ({kind}); a journal needs a local disk")
    journal_id = uuid.uuid4().bytes
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        about = {"format": FORMAT, "id": journal_id.hex()}
        (temporary / "journal.json").write_text(json.dumps(about), encoding="utf-8")
        segment_path(temporary, 1).write_bytes(segment_begin(journal_id, 1))
        flush_tree(temporary)
        os.rename(temporary, folder)  # fails where another process has put one there meanwhile
        flush_files([folder.parent])
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' holds something else than a journal; name a new folder")


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on, as the kernel calls it; empty where that is not known."""
    place, found = os.path.realpath(folder), (0, "")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, mount, kind, *_ = line.split(" ")
            inside = mount in ("/", place) or place.startswith(f"{mount}/")
            if inside and len(mount) >= found[0]:
                found = len(mount), kind
    return found[1]


class FolderLock:
    """Lets one thread of one process at a time write a journal.

    The lock is the system's (flock), on the folder itself: there is no lock file that could be removed or replaced.
    It is free as soon as its process has ended, in whatever way. A forked child gets a lock of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._threads = threading.Lock()
        self._descriptor: int | None = None
        _locks.add(self)

    @contextmanager
    def alone(self, shared: bool = False) -> Iterator[bool]:
        """While nobody else writes; gives whether the folder is another one than the time before.

        shared: others that only read may do so at the same time.

        Raises UserError where another process has held the lock for `LOCK_SECONDS`, or the folder is gone.
        """
        with self._threads:
            changed = False
            while True:
                if self._descriptor is None:
                    self._descriptor, changed = self._open(), True
                self._take(self._descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                if self._is_there(self._descriptor):
                    break
                self.close()
            try:
                yield changed
            finally:
                if self._descriptor is not None:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _open(self) -> int:
        try:
            return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"the journal '{self.folder}' can't be opened: {error.strerror}") from None

    def _take(self, descriptor: int, kind: int) -> None:
        give_up, pause = time.monotonic() + LOCK_SECONDS, _FIRST_PAUSE
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                raise UserError(f"the journal '{self.folder}' can't be locked: {error.strerror}") from None
            if time.monotonic() > give_up:
                raise UserError(
                    f"another process has held the lock of the journal '{self.folder}' for {LOCK_SECONDS:g} seconds; "
                    "see what became of it"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.folder))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Closes the folder; the lock opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def forked(self) -> None:
        """In a forked child: lets go of what is the parent's, without unlocking it there."""
        self._threads = threading.Lock()
        self.close()


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _forked() -> None:
    for lock in list(_locks):
        lock.forked()


os.register_at_fork(after_in_child=_forked)
