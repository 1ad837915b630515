"""The output of joins: a folder with one folder of files for each run, which appears whole or not at all.

    OUT/run-000001/part-00000.parquet      rows, by time
    OUT/run-000001/_state.json             up to when requests are written, and from what
    OUT/.work/                             of a run that has not ended, or was killed; removed by the next one

A run goes on where the last one stands: its requests are later than all that are written. So each request is written
once, and files that are new are later than those before, as `features --extend` needs them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import put_folder
from mmoe_rec.errors import UserError
from mmoe_rec.locks import writing
from mmoe_rec.log.files import is_remote, local_path
from mmoe_rec.log.local_files import would_find

_RUN = re.compile(r"run-(\d{6})")
_STATE, _WORK = "_state.json", ".work"
BEGIN = -(2**62)
"""Before all times."""


@dataclass(frozen=True)
class State:
    """What the last run left. through: time of the latest requests that may have been written, microseconds; settings:
    by which they were; files: seen by then, with their sizes."""

    through: int = BEGIN
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


class Runs:
    """An output folder, locked by `open_runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.work = self.folder / _WORK

    @property
    def made(self) -> Path:
        """Where the files of a new run are written."""
        return self.work / "run"

    def state(self) -> State:
        """What the last run left. Raises UserError where it can't be read."""
        numbers = self._numbers()
        if not numbers:
            return State()
        path = self._run(numbers[-1]) / _STATE
        try:
            return State(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"'{path}' is missing or damaged, so it is not known which requests are written: restore it, or join "
                "into another folder"
            ) from None

    def begin(self) -> None:
        """Makes an empty place for a new run."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.made.mkdir(parents=True)

    def commit(self, state: State) -> Path:
        """Adds the new run; gives its folder."""
        (self.made / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        target = self._run((self._numbers() or [0])[-1] + 1)
        put_folder(self.made, target)
        self.end()
        return target

    def end(self) -> None:
        """Removes what is not of a run."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _run(self, number: int) -> Path:
        return self.folder / f"run-{number:06d}"

    def _numbers(self) -> list[int]:
        found = [_RUN.fullmatch(each.name) for each in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(each[1]) for each in found if each)


@contextmanager
def open_runs(folder: Path, sources: dict[str, str]) -> Iterator[Runs]:
    """An output folder, which no other join writes meanwhile. sources: setting -> address that is read.

    Raises UserError for a folder that holds something else, lies within what is read, or is in use.
    """
    if is_remote(str(folder)):
        raise UserError(f"--out '{folder}' must be a folder of this machine, or one mounted like one")
    runs = Runs(folder)
    _check(runs, str(folder), sources)
    with writing(runs.folder, "a join of outcomes", "give another folder with --out"):
        _check(runs, str(folder), sources)
        runs.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield runs
        finally:
            runs.end()


def _check(runs: Runs, name: str, sources: dict[str, str]) -> None:
    planted = [runs.folder / "run-000001" / "part-00000.parquet"]
    for setting, source in sources.items():
        if not is_remote(source) and would_find(local_path(source), planted):
            raise UserError(f"{setting} '{source}' takes in the files of --out '{name}'; give a folder outside it")
    if runs.folder.exists() and not runs.folder.is_dir():
        raise UserError(f"--out '{name}' is a file; give a new or empty folder, or one with joined outcomes")
    if runs.folder.is_dir():
        other = sorted(each.name for each in runs.folder.iterdir() if not _RUN.fullmatch(each.name))
        if other := [each for each in other if each != _WORK]:
            raise UserError(
                f"--out '{name}' holds something else, such as '{other[0]}'; give a new or empty folder, or one with "
                "joined outcomes"
            )
