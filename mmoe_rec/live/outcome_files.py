"""The files of a join: those of requests and events that it reads, and the folder that it writes.

Of old files only what is late enough is read. The output is a folder with one folder of files for each run, which
appears whole or not at all:

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import put_folder
from mmoe_rec.errors import UserError
from mmoe_rec.live import logged_requests as names
from mmoe_rec.locks import writing
from mmoe_rec.log.checks import BadFile, LeftOut, LogFile, check_files, open_parquet, words_of
from mmoe_rec.log.columns import canonical, column_uses
from mmoe_rec.log.files import find_files, is_remote, local_path, would_find
from mmoe_rec.log.reader import Piece, read_piece
from mmoe_rec.log.values import columns_of
from mmoe_rec.settings.columns import Role, Use
from mmoe_rec.settings.outcomes import OutcomeEvents, label_columns
from mmoe_rec.settings.sections import Settings

EVENT_ID = "event_id"
BEGIN = -(2**62)
"""Before all times."""
_RUN = re.compile(r"run-(\d{6})")
_STATE, _WORK = "_state.json", ".work"


@dataclass(frozen=True)
class Source:
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
    def open(
        address: str, setting: str, uses: Mapping[str, Use], time: str, unit: str | None, skip_bad_files: bool
    ) -> Source:
        """Reads all footers. setting: holds the address, for messages. Raises UserError, as `Log` does."""
        files, types, left_out = check_files(find_files(address, setting), dict(uses), unit, skip_bad_files, {})
        if not files:
            raise UserError(f"none of the files of '{address}' can be used; the first: {left_out[0].reason}")
        return Source(dict(uses), time, unit, files, types, left_out)

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
            if late:
                piece = Piece(file.address, tuple(late), file.in_path, rows)
                yield from ((file, table) for _, table in read_piece(piece, self.uses, self.unit, types))

    def _may_be_later(self, parquet: pq.ParquetFile, group: int, after: int) -> bool:
        place = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)].index(self.time)
        found = parquet.metadata.row_group(group).column(place).statistics
        if found is None or not found.has_min_max:
            return True
        try:
            last = canonical(self.time, "time", pa.array([found.max]), self.unit)
        except (UserError, pa.ArrowException, OverflowError):
            return True
        return int(last.cast(pa.int64())[0].as_py()) > after


@dataclass(frozen=True)
class Events:
    """A log of events: its settings, its files, whether rows have an `event_id`, and the longest window in which they
    count, microseconds."""

    settings: OutcomeEvents
    source: Source
    has_ids: bool
    window: int


@dataclass(frozen=True)
class Plan:
    """The settings, and what is read. inputs: columns that features read, with their roles; placement: of them, those
    that events or ranks say."""

    settings: Settings
    requests: Source
    events: dict[str, Events]
    inputs: dict[str, Role]
    placement: list[str]


def open_plan(settings: Settings, requests: str, events: str | None) -> Plan:
    """Opens all files. requests, events: addresses of folders. Raises UserError where something is missing."""
    outcomes, schema = settings.outcomes, settings.schema_
    for column, tasks in label_columns(schema).items():
        if column not in outcomes.labels:
            raise UserError(
                f"outcomes.labels does not say where column '{column}' comes from, which task '{tasks[0]}' reads; add "
                f"outcomes.labels.{column} with the log of events and within_days"
            )
    inputs, uses = schema.input_columns(), column_uses(schema)
    placement = [name for name, role in inputs.items() if role == "placement"]
    if outcomes.shown is None and (unknown := [name for name in placement if name != outcomes.rank]):
        raise UserError(
            f"features read column '{unknown[0]}' of role placement, but nothing says where candidates were shown: set "
            "outcomes.shown to a log of events with that column, or outcomes.rank where it is the rank in the reply"
        )
    source = _open_requests(settings, requests, {name: uses[name] for name in inputs if name not in placement})
    logs = {}
    for name in dict.fromkeys(each.events for each in outcomes.windows):
        logs[name] = _open_events(settings, name, events, {column: uses[column] for column in placement})
        _check_types(settings, name, logs[name], source)
    return Plan(settings, source, logs, inputs, placement)


def _open_requests(settings: Settings, address: str, columns: Mapping[str, Use]) -> Source:
    own: dict[str, Use] = {names.REQUEST: "key", names.AT: "time", names.RANK: "number", names.SHARE: "number"}
    time = settings.columns.time
    try:
        return Source.open(
            address, "--requests", {**columns, **own}, time, settings.columns.time_unit, settings.data.skip_bad_files
        )
    except BadFile as problem:
        raise BadFile(
            f"{problem}. These are requests as `serve --log-requests` writes them, with the columns that the features "
            "of the model read that ranked them; the settings ask for others, so move requests of other models away, "
            "or join with the settings of that model",
            problem.address,
        ) from None


def _open_events(settings: Settings, name: str, folder: str | None, placement: Mapping[str, Use]) -> Events:
    outcomes, columns = settings.outcomes, settings.columns
    section = outcomes.events[name]
    address, setting = _address(settings, name, folder)
    uses: dict[str, Use] = {columns.user: "key", columns.candidate: "key"}
    if section.request is not None:
        uses[section.request] = "key"
    for each in outcomes.labels.values():
        if each.events == name and each.value is not None:
            uses[each.value] = "number"
    if outcomes.shown is not None and outcomes.shown.events == name:
        uses |= placement
    if section.time in uses:
        raise UserError(f"column '{section.time}' of events '{name}' is the time and something else; add a column")
    has_ids = any(EVENT_ID in columns_of(file.address) for file in find_files(address, setting))
    if has_ids:
        uses[EVENT_ID] = "key"
    uses[section.time] = "time"
    source = Source.open(address, setting, uses, section.time, columns.time_unit, settings.data.skip_bad_files)
    window = max(each.microseconds for each in outcomes.windows if each.events == name)
    return Events(section, source, has_ids, window)


def _address(settings: Settings, name: str, folder: str | None) -> tuple[str, str]:
    """Where a log of events lies, and the argument or setting that says so."""
    if folder is not None and is_remote(folder):
        return f"{folder.rstrip('/')}/{name}", "--events"
    if folder is not None and Path(folder, name).exists():
        return str(Path(folder, name)), "--events"
    if name in settings.data.events:
        return settings.data.events[name].path, f"data.events.{name}.path"
    where = "give --events FOLDER with a" if folder is None else f"--events '{folder}' has no"
    raise UserError(f"{where} folder '{name}' of Parquet files; or say where they are in data.events.{name}.path")


def _check_types(settings: Settings, name: str, events: Events, requests: Source) -> None:
    """Raises UserError where a column by which events are joined has another type than in the requests; one that is
    null everywhere gets the other's."""
    columns = settings.columns
    pairs = {columns.user: columns.user, columns.candidate: columns.candidate}
    if events.settings.request is not None:
        pairs[events.settings.request] = names.REQUEST
    for mine, theirs in pairs.items():
        one = events.source.types.setdefault(mine, requests.types.get(theirs, pa.int8()))
        other = requests.types.setdefault(theirs, one)
        if one != other:
            raise UserError(
                f"column '{mine}' of events '{name}' holds {one}, and column '{theirs}' of the requests {other}: no "
                "event would belong to any request; write both with one type"
            )


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
