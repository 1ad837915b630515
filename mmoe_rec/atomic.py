"""Atomic writes: a killed job leaves either the old or the new file or folder, never a partial one.

`atomic_file` and `atomic_folder` are context managers that yield a hidden temporary path beside the target. If the
block succeeds, the content of this path is flushed to disk, and the path is renamed over the target. Otherwise the path
is removed, and the target stays as it was. A job that is killed leaves `.NAME.*.tmp` beside the target. Nothing reads
this path, and `mmoe_rec.locks.write_lock` removes it.
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
    """Yield a temporary path to write one file to. It replaces `path` when the block succeeds.

    Missing parent folders are created, and a symbolic link is followed.

    Args:
        path: Path of the file.
        replace: Whether to replace an existing file. If not, a file that exists at the end of the block is kept.

    Raises:
        UserError: `path` is a folder, or its parent can't be created.
    """
    target = _resolve(path)
    if target.is_dir():
        raise UserError(f"'{path}' is a folder, so no file can be written there. Remove it or give another path.")
    temporary = _temporary(target)
    try:
        yield temporary
        _fsync_path(temporary)
        if replace:
            os.replace(temporary, target)
        else:
            try:
                os.link(temporary, target)
            except OSError:  # The target exists, or the file system doesn't support hard links.
                if not target.exists():
                    os.replace(temporary, target)
        _fsync_path(target.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # The error of a full disk names no file.
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Raises the same errors as `atomic_file`.

    Args:
        path: Path of the file.
        text: Content of the file.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill. It replaces the folder `path` when the block succeeds.

    Missing parent folders are created, and a symbolic link is followed.

    Raises:
        UserError: `path` is a file, or no folder can be created there.
    """
    target = _resolve(path)
    if target.exists() and not target.is_dir():
        raise UserError(f"'{path}' is a file, so no folder can be written there. Remove it or give another path.")
    temporary = _temporary(target)
    try:
        _make_folder(temporary)
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path) -> None:
    """Flush a folder to disk and rename it over another one.

    Args:
        temporary: The filled folder, beside the target.
        target: Folder to replace. It may not exist yet.
    """
    with ThreadPoolExecutor(8) as pool:
        for parent, _, names in os.walk(temporary, topdown=False):
            list(pool.map(_fsync_path, (Path(parent, name) for name in names)))
            _fsync_path(Path(parent))
    _put_folder(temporary, target)
    _fsync_path(target.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # If both paths were swapped, this is now the old folder.


def _resolve(path: str | Path) -> Path:
    """Follow symbolic links and create the parent folder."""
    target = Path(os.path.realpath(path))
    _make_folder(target.parent)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder '{error.filename or folder}' can't be created: {error.strerror}.") from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def find_temporary_paths(path: str | Path) -> list[Path]:
    """Return the temporary paths beside the file or folder `path`, which killed or running processes have created."""
    target = _resolve(path)
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.tmp")
    return [sibling for sibling in target.parent.iterdir() if name.fullmatch(sibling.name)]


def _put_folder(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # If the process is killed between the two renames, the old folder remains under a hidden name.
        aside = _temporary(target)
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically. Return False if the system doesn't support it (renameat2 of Linux)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*values: Any) -> str:
    """Return a key for a cache: the first 16 hex digits of the SHA-256 of the values as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def checksum(file: Path) -> str:
    """Return the first 32 hex digits of the SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:32]
