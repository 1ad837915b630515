"""Files and folders that appear whole or not at all: a killed job leaves either the old or the new.

Both contexts yield a hidden temporary path beside the target, where a rename suffices. What was written there is
flushed to disk and renamed over the target when the block ends without an exception; otherwise it is removed and the
target stays as it was. A job killed outright leaves a `.NAME.*.tmp` beside the target, which nothing reads;
`mmoe_rec.locks.writing` removes it.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_file(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write one file to; it replaces `path` when the block succeeds.

    Missing parent folders are created, a symbolic link is followed. replace: False leaves a file that another process
    has put there first. Raises UserError where `path` is a folder, or its parent cannot be created.
    """
    target = _real(path)
    if target.is_dir():
        raise UserError(f"{path} is a folder, but a file is to be written there: remove it or name another place")
    temporary = _temporary(target)
    try:
        yield temporary
        fsync_path(temporary)
        if replace:
            os.replace(temporary, target)
        else:
            try:
                os.link(temporary, target)
            except OSError:  # it is there, or the file system has no links
                if not target.exists():
                    os.replace(temporary, target)
        fsync_path(target.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a full disk does not name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file of text, as `atomic_file` does."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it replaces `path`, with all it held, when the block succeeds.

    Missing parent folders are created, a symbolic link is followed. Raises UserError where `path` is a file, or no
    folder can be created there.
    """
    target = _real(path)
    if target.exists() and not target.is_dir():
        raise UserError(f"{path} is a file, but a folder is to be written there: remove it or name another place")
    temporary = _temporary(target)
    try:
        _make_folder(temporary)
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path) -> None:
    """Flushes a filled folder beside the target to disk, several files at a time, and renames it over the target."""
    with ThreadPoolExecutor(8) as pool:
        for parent, _, names in os.walk(temporary, topdown=False):
            list(pool.map(fsync_path, (Path(parent, name) for name in names)))
            fsync_path(Path(parent))
    _put_folder(temporary, target)
    fsync_path(target.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # after an exchange it is the old one


def _real(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    _make_folder(target.parent)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be made a folder: {error.strerror}") from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def find_temporary_paths(path: str | Path) -> list[Path]:
    """What processes that were killed left beside the file or folder `path`, or others are writing for it by now."""
    target = _real(path)
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.tmp")
    return [each for each in target.parent.iterdir() if name.fullmatch(each.name)]


def _put_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # A kill between the two renames leaves the old folder under a hidden name.
        aside = _temporary(target)
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot (Linux's renameat2 is not POSIX)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*values: Any) -> str:
    """The first 16 digits of the SHA-256 of values that JSON can hold, by which what depends on them is found again."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def checksum(file: Path) -> str:
    """The first 32 digits of the SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:32]
