"""The files of a join: those of requests and events that it reads, and the folder that it writes.

Of old files only what is late enough is read. The output is a folder with one folder of files for each run, which
appears whole or not at all:

    OUT/run-000001/part-00000.parquet      rows, by time
    OUT/run-000001/_state.json             up to when requests are written, and from what
    OUT/.database/, OUT/.run-000002.*.tmp/ of a run that has not ended, or was killed; removed by the next one
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import LeftOut, LogFile, check_files, open_parquet, words_of
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import find_files, is_remote, takes_in
from mmoe_rec.log.reader import Piece, read_piece
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.sections import Settings

BEGIN = -(2**62)
"""Before all times."""
_RUN, _LEFT = re.compile(r"run-\d{6}"), re.compile(r"\.database|\.run-\d{6}\..*\.tmp")
_STATE = "_state.json"


@dataclass(frozen=True)
class OutcomeSource:
    """Files whose columns are good, as far as their footers tell.

    uses: columns to read; time: the one by which old rows are left out; unit: of integers in it; types: of the columns
    in all files; left_out: files that can't be used.
    """

    uses: dict[str, Use]
    time: str
    unit: str | None
    files: list[LogFile]
    types: dict[str, pa.DataType]
    left_out: list[LeftOut]

    @staticmethod
    def open(settings: Settings, address: str, setting: str, uses: dict[str, Use], time: str) -> OutcomeSource:
        """Reads all footers. setting: holds the address, for messages. Raises UserError, as `Log` does."""
        unit, skip = settings.columns.time_unit, settings.data.skip_bad_files
        files, types, left_out = check_files(find_files(address, setting), uses, unit, skip, {})
        if not files:
            raise UserError(f"none of the files of '{address}' can be used; the first: {left_out[0].reason}")
        return OutcomeSource(uses, time, unit, files, types, left_out)

    def name(self, column: str) -> str:
        """The name of a column in a database."""
        return f"c{list(self.uses).index(column)}"

    @property
    def schema(self) -> pa.Schema:
        """The columns in a database, with times as microseconds, and any type where all values are null; the number of
        each row, and whether its file is new."""
        types = [pa.int64() if use == "time" else self.types.get(name, pa.int8()) for name, use in self.uses.items()]
        columns = {f"c{place}": kind for place, kind in enumerate(types)}
        return pa.schema(columns | {"number": pa.int64(), "is_new": pa.bool_()})

    def read(self, after: int) -> Iterator[tuple[LogFile, pa.Table | int]]:
        """Batches of rows, of all row groups that may hold a time (microseconds) later than `after`; of other groups
        the number of their rows. Raises BadFile."""
        types = words_of(self.types)
        for file in self.files:
            with open_parquet(file.address) as parquet:
                late = [n for n in range(parquet.metadata.num_row_groups) if self._may_be_later(parquet, n, after)]
            rows = sum(file.group_rows[group] for group in late)
            if rows < file.rows:
                yield file, file.rows - rows
            for _, run in groupby(enumerate(late), lambda each: each[1] - each[0]):
                groups = tuple(group for _, group in run)
                piece = Piece(file.address, groups, file.in_path, sum(file.group_rows[group] for group in groups))
                yield from ((file, table) for _, table in read_piece(piece, self.uses, self.unit, types))

    def _may_be_later(self, parquet: pq.ParquetFile, group: int, after: int) -> bool:
        place = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)].index(self.time)
        statistics = parquet.metadata.row_group(group).column(place).statistics
        if statistics is None or not statistics.has_min_max:
            return True
        try:
            last = canonical(self.time, "time", pa.array([statistics.max]), self.unit)
        except (UserError, pa.ArrowException, OverflowError):
            return True
        return int(last.cast(pa.int64())[0].as_py()) > after


@dataclass(frozen=True)
class JoinState:
    """What the last run left. through: time of the latest requests that may have been written, microseconds; settings:
    by which they were; files: seen by then, with their sizes."""

    through: int = BEGIN
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


class Runs:
    """An output folder, locked by `open_runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = max((each.name for each in folder.iterdir() if _RUN.fullmatch(each.name)), default="run-000000")

    def state(self) -> JoinState:
        """What the last run left. Raises UserError where it can't be read."""
        path = self.folder / self._last / _STATE
        if not path.parent.exists():
            return JoinState()
        try:
            return JoinState(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"'{path}' is missing or damaged, so it is not known which requests are written: restore it, or join "
                "into another folder"
            ) from None

    @contextmanager
    def add(self, state: JoinState) -> Iterator[Path]:
        """A folder for the files of a new run, which leaves a state; it gets a name of its own once it is whole."""
        with atomic_folder(self.next) as folder:
            yield folder
            (folder / _STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    @property
    def next(self) -> Path:
        """The folder of the next run."""
        return self.folder / f"run-{int(self._last[-6:]) + 1:06d}"


@contextmanager
def open_runs(folder: str | Path, sources: dict[str, str]) -> Iterator[Runs]:
    """An output folder, which no other join writes meanwhile. sources: setting -> address that is read.

    Raises UserError for a folder that holds something else, lies within what is read, or is in use.
    """
    if is_remote(str(folder)):
        raise UserError(f"--out '{folder}' must be a folder of this machine, or one mounted like one")
    real = Path(os.path.realpath(folder))
    for setting, source in sources.items():
        if takes_in(source, [real / "run-000001" / "part-00000.parquet"]):
            raise UserError(f"{setting} '{source}' takes in the files of --out '{folder}'; give a folder outside it")
    if real.exists() and not real.is_dir():
        raise UserError(f"--out '{folder}' is a file; give a new or empty folder, or one with joined outcomes")
    there = sorted(each.name for each in real.iterdir()) if real.is_dir() else []
    if other := [name for name in there if not _RUN.fullmatch(name) and not _LEFT.fullmatch(name)]:
        raise UserError(
            f"--out '{folder}' holds something else, such as '{other[0]}'; give a new or empty folder, or one with "
            "joined outcomes"
        )
    with writing(real, "a join of outcomes", "give another folder with --out"):
        real.mkdir(parents=True, exist_ok=True)
        for left in real.iterdir():
            if _LEFT.fullmatch(left.name):
                shutil.rmtree(left)
        yield Runs(real)
