"""The folder of logged requests: files that appear whole, under names of their own, and its size.

Files are called `requests-TIME-HOST-PROCESS-RANDOM.parquet` by the time at which they were written, UTC, so that names
in order are times in order, and any number of processes and machines write into one folder. Nothing else in the folder
is touched, and other programs may move or remove files at any time.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_OURS = re.compile(r"requests-\d{8}T\d{6}\.\d{6}Z-.+\.parquet")
_LEFT = re.compile(r"\.requests-.+\.parquet\.[0-9a-f]{12}\.tmp")
_SECONDS_LEFT = 86_400


@dataclass(frozen=True)
class LogOptions:
    """How requests are logged. share: of requests, 0 to 1; seconds: between files; most_bytes: of the folder's files,
    beyond which the oldest are removed, None keeps all."""

    folder: Path
    share: float = 0.1
    seconds: float = 300.0
    most_bytes: int | None = None


def check_folder(folder: Path) -> None:
    """Makes the folder, and raises UserError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"requests can't be logged in '{folder}': {error.strerror}") from None


def write_file(folder: Path, rows: pa.Table) -> Path:
    """Writes rows into a new file of the folder, which appears whole. Raises OSError."""
    import pyarrow.parquet as pq

    if not folder.is_dir():  # it may be a disk that has gone, so it is not made again on the one below
        raise FileNotFoundError(2, "the folder is gone")
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    host = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40] or "host"
    path = folder / f"requests-{moment}-{host}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
    with atomic_file(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=131_072)
    return path


def make_room(folder: Path, most_bytes: int) -> list[Path]:
    """Removes the oldest files of logged requests, so that all of them have at most so many bytes; gives those removed.

    The newest stays. What writers have left that were killed more than a day ago is removed as well.
    """
    sizes: dict[Path, int] = {}
    with os.scandir(folder) as found:
        for each in found:
            with suppress(FileNotFoundError):  # another server has just removed it
                if _OURS.fullmatch(each.name):
                    sizes[Path(each.path)] = each.stat().st_size
                elif _LEFT.fullmatch(each.name) and time() - each.stat().st_mtime > _SECONDS_LEFT:
                    os.unlink(each.path)
    total, removed = sum(sizes.values()), []
    for path in sorted(sizes)[:-1]:
        if total <= most_bytes:
            break
        total -= sizes[path]
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed
