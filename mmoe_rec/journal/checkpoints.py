"""What duplicates are remembered after a segment: kept beside it, so that older segments can be removed.

FOLDER/duplicates-00000007.npz      after the last record of segment 7
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import numpy as np

from mmoe_rec.atomic import atomic_file, flush_files
from mmoe_rec.errors import UserError
from mmoe_rec.journal.duplicates import FORGET_AFTER_DAYS, Duplicates
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.segments import segment_numbers, segment_path
from mmoe_rec.schema import Schema

_NAME = re.compile(r"duplicates-([0-9]{8})\.npz", re.ASCII)


def checkpoint_path(folder: Path, segment: int) -> Path:
    """The file with what is remembered after a segment."""
    return folder / f"duplicates-{segment:08d}.npz"


def checkpoints(folder: Path) -> list[int]:
    """The segments after which it is known what was remembered."""
    return sorted(int(found[1]) for found in map(_NAME.fullmatch, os.listdir(folder)) if found)


def save_checkpoint(folder: Path, segment: int, duplicates: Duplicates) -> None:
    """Keeps what is remembered after a segment, unless it is kept already."""
    path = checkpoint_path(folder, segment)
    if path.exists():
        return
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **_encoded(duplicates))  # type: ignore[arg-type]


def _encoded(duplicates: Duplicates) -> dict[str, np.ndarray]:
    # Names of files in a zip archive: logs may be called anything, in which numpy would see folders.
    names, arrays = [], {}
    for number, (name, values) in enumerate(duplicates.to_arrays().items()):
        names.append(name)
        arrays[f"a{number}"] = values
    return {"names": np.array(names), **arrays}


def _load(folder: Path, segment: int, duplicates: Duplicates) -> None:
    path = checkpoint_path(folder, segment)
    try:
        with np.load(path, allow_pickle=False) as found:
            names = found["names"].tolist()
            duplicates.restore({name: found[f"a{number}"] for number, name in enumerate(names)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is damaged ({error}); restore it from a copy") from None


def duplicates_after(
    folder: str | Path, schema: Schema, segment: int, forget_after_days: int = FORGET_AFTER_DAYS
) -> tuple[Duplicates, Follower]:
    """What is remembered after a closed segment, 0 for none, and what reads on from there.

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
    known = [each for each in checkpoints(folder) if numbers[0] - 1 <= each <= segment]
    begin = 0
    if known:
        begin = known[-1]
        _load(folder, begin, duplicates)
    elif numbers[0] > 1:
        raise UserError(
            f"'{checkpoint_path(folder, numbers[0] - 1)}' is not there, so it is not known which rows came in the "
            "segments that were removed; restore it from a copy"
        )
    follower.position = Position.begin(begin + 1)
    while batches := follower.read(through=segment):
        duplicates.take(batches)
    follower.position = Position.begin(segment + 1)
    return duplicates, follower


def remove_through(folder: str | Path, segment: int) -> list[int]:
    """Removes the segments up to a closed one, and gives their numbers. Positions after them stay as they are.

    Raises UserError where it is not kept what is remembered after this segment, or it is not closed.
    """
    folder = Path(os.path.realpath(folder))
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
