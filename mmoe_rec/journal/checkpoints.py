"""What duplicates are remembered after a segment: kept beside it, so that older segments can be removed.

FOLDER/duplicates-00000007.npz      after the last record of segment 7
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmoe_rec.atomic import atomic_file, flush_files
from mmoe_rec.errors import UserError
from mmoe_rec.journal.duplicates import FORGET_AFTER_DAYS, Duplicates, Taken, array_names
from mmoe_rec.journal.folder import FolderLock
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.segments import segment_numbers, segment_path
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema

_NAME = re.compile(r"duplicates-([0-9]{8})\.npz", re.ASCII)
_NEWEST = "/newest"
"""With which one array of each log ends."""
_LOOKS = 100
"""How often to look again for a file that was removed since it was listed."""


def checkpoint_path(folder: Path, segment: int) -> Path:
    """The file with what is remembered after a segment."""
    return folder / f"duplicates-{segment:08d}.npz"


def checkpoints(folder: Path) -> list[int]:
    """The segments after which it is known what was remembered."""
    return sorted(int(found[1]) for found in map(_NAME.fullmatch, os.listdir(folder)) if found)


@dataclass
class _Checkpoint:
    """What a file holds. Logs are called by their names, the interaction log `""`.

    arrays: as `Duplicates.to_arrays`, of the logs of all models that share the journal; through: log -> the segment up
    to which; files: log -> the last segment that gave a file; unknown: log of which some rows are in none of the
    arrays -> the first segment with such rows, None where that was not kept.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    through: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] | None = field(default_factory=dict)

    @staticmethod
    def read(folder: Path, segment: int) -> _Checkpoint:
        """Raises FileNotFoundError where it is not there, UserError where it is damaged."""
        path = checkpoint_path(folder, segment)
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[f"a{number}"] for number, name in enumerate(found["names"].tolist())}
                logs = [name.removesuffix(_NEWEST) for name in arrays if name.endswith(_NEWEST)]
                through, files = (
                    dict(zip(logs, found[name].tolist() if name in found else [segment] * len(logs), strict=True))
                    for name in ("through", "files")
                )
                unknown = None
                if "unknown_from" in found:
                    unknown = dict(zip(found["unknown"].tolist(), found["unknown_from"].tolist(), strict=True))
                return _Checkpoint(arrays, through, files, unknown)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"'{path}' is damaged ({error}); restore it from a copy") from None

    def write(self, folder: Path, segment: int) -> None:
        # Names of files in a zip archive: logs may be called anything, in which numpy would see folders.
        logs = [name.removesuffix(_NEWEST) for name in self.arrays if name.endswith(_NEWEST)]
        arrays = {f"a{number}": values for number, values in enumerate(self.arrays.values())}
        arrays["through"] = np.array([self.through[log] for log in logs], np.int64)
        arrays["files"] = np.array([self.files.get(log, 0) for log in logs], np.int64)
        if self.unknown is not None:
            arrays["unknown"] = np.array(list(self.unknown), np.str_)
            arrays["unknown_from"] = np.array(list(self.unknown.values()), np.int64)
        with atomic_file(checkpoint_path(folder, segment)) as temporary, open(temporary, "wb") as file:
            np.savez(file, names=np.array(list(self.arrays)), **arrays)  # type: ignore[arg-type]

    def lacks(self, log: str, first: int) -> bool:
        """Whether segments before the first one that is there had rows of a log that are in no file."""
        if self.unknown is None:
            return first > 1 and log not in self.through
        return self.unknown.get(log, first) < first


def _newest(folder: Path, most: int) -> tuple[int, _Checkpoint | None]:
    """The first segment that is there; and what is kept after a segment up to `most` from which on all are there."""
    for _ in range(_LOOKS):
        first = segment_numbers(folder)[0]
        known = [each for each in checkpoints(folder) if first - 1 <= each <= most]
        try:
            return first, _Checkpoint.read(folder, known[-1]) if known else None
        except FileNotFoundError:  # another process has just removed segments, and what was kept after them
            continue
    raise UserError(f"'{checkpoint_path(folder, known[-1])}' can't be opened; restore it from a copy")


def save_checkpoint(
    folder: Path,
    segment: int,
    duplicates: Duplicates,
    files: Mapping[str | None, int] | None = None,
    unknown: Mapping[str, int] | None = None,
) -> None:
    """Keeps what is remembered after a segment, unless it is kept already.

    What an earlier checkpoint, or this one, holds of other models' logs is kept with it, as far as it goes.

    files: log -> the last segment that has a file of it; unknown: log that the schema does not have -> the first
    segment that was read with rows of it.
    """
    mine = {source or "" for source in duplicates.sources}
    with _alone(folder):
        known = [each for each in checkpoints(folder) if each <= segment]
        before = _Checkpoint.read(folder, known[-1]) if known else _Checkpoint()
        last = dict(before.files)
        for source, number in (files or {}).items():
            last[source or ""] = max(last.get(source or "", 0), number)
        is_kept = all(before.through.get(log) == segment for log in mine) and last == before.files
        if known and known[-1] == segment and is_kept:
            return
        others = {log: through for log, through in before.through.items() if log not in mine}
        carried = {name: before.arrays[name] for log in others for name in array_names(log)}
        lacking = None
        if before.unknown is not None:
            new = {log: first for log, first in (unknown or {}).items() if first > others.get(log, 0)}
            lacking = {log: first for log, first in (new | before.unknown).items() if log not in mine}
        through = others | dict.fromkeys(mine, segment)
        _Checkpoint(duplicates.to_arrays() | carried, through, last, lacking).write(folder, segment)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process changes what is kept, or the journal."""
    lock = FolderLock(folder)
    try:
        with lock.alone():
            yield
    finally:
        lock.close()


def removed_files(folder: Path, schema: Schema, through: int) -> list[str | None]:
    """The schema's logs of which segments later than `through` gave files before they were removed.

    Tables that know the journal through that segment know all that counted of the other ones. All logs, where what
    was kept of them is gone.
    """
    first = segment_numbers(folder)[0]
    if first - 1 <= through:
        return []
    _, kept = _newest(folder, first - 1)
    logs = [None, *schema.events]
    return logs if kept is None else [source for source in logs if kept.files.get(source or "", 0) > through]


def duplicates_after(
    folder: str | Path,
    schema: Schema,
    segment: int,
    forget_after_days: int = FORGET_AFTER_DAYS,
    unknown: Callable[[int, Mapping[str | None, Taken]], None] | None = None,
) -> tuple[Duplicates, Follower]:
    """What is remembered after a closed segment, 0 for none, and what reads on from there.

    unknown: is given, with the number of their segment, the rows of this and earlier segments that are not kept as
    written into files, such as those of a log that only other models than those refreshed so far have.

    Raises UserError where the segment is not there, or what came before is known no more.
    """
    folder = Path(os.path.realpath(folder))
    follower = Follower(folder)
    numbers = segment_numbers(folder)
    if not numbers[0] - 1 <= segment < numbers[-1]:
        last = f"{numbers[0] - 1} to {numbers[-1] - 1}"
        raise UserError(
            f"the journal '{folder}' can't be read after segment {segment}: its closed segments allow {last}"
        )
    duplicates = Duplicates(schema, forget_after_days)
    first, found = _newest(folder, segment)
    if found is None and first > 1:
        raise UserError(
            f"'{checkpoint_path(folder, first - 1)}' is not there, so it is not known which rows came in the segments "
            "that were removed; restore it from a copy"
        )
    kept = found or _Checkpoint()
    duplicates.restore(kept.arrays)
    # Another model, with other logs of events, may have written it: rows of a log are read from where it is known.
    known_through = {source: kept.through.get(source or "", 0) for source in duplicates.sources}
    for source in known_through:
        if kept.lacks(source or "", first):
            say(
                f"events of the log '{source}' came in segments of the journal '{folder}' that another model's refresh "
                "has removed: those are in no file of this log, and would count again if they came once more"
            )
    begin = max(min(known_through.values()), first - 1)
    follower.position = Position.begin(begin + 1)
    for number in range(begin + 1, segment + 1):
        while batches := follower.read(through=number):
            taken = duplicates.take([each for each in batches if known_through.get(each.source, number) < number])
            if unknown is not None:
                unknown(number, taken)
    follower.position = Position.begin(segment + 1)
    return duplicates, follower


def remove_through(folder: str | Path, segment: int) -> list[int]:
    """Removes the segments up to a closed one, and gives their numbers. Positions after them stay as they are.

    Raises UserError where it is not kept what is remembered after this segment, or it is not closed.
    """
    folder = Path(os.path.realpath(folder))
    with _alone(folder):
        return _remove_through(folder, segment)


def _remove_through(folder: Path, segment: int) -> list[int]:
    numbers = segment_numbers(folder)
    removed = [number for number in numbers if number <= segment]
    if not removed:
        return []
    if segment >= numbers[-1]:
        raise UserError(f"segment {segment} of the journal '{folder}' is not closed, so it can't be removed")
    if segment not in (known := checkpoints(folder)):
        ways = ", ".join(map(str, known)) or "none; write its files first"
        raise UserError(
            f"the segments up to {segment} of the journal '{folder}' can't be removed, as it is not kept which rows "
            f"they held, so that these would count again; possible are: {ways}"
        )
    for number in removed:  # the oldest first, so that no gap is left
        segment_path(folder, number).unlink(missing_ok=True)
    for each in known:
        if each < segment:
            checkpoint_path(folder, each).unlink(missing_ok=True)
    flush_files([folder])
    return removed
