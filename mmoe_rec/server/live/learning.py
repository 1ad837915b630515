"""What a served model has learnt of the journal, and how it learns what is new.

Its tables hold a part of the journal already, up to a segment that the artifact names; of a journal that it does not
name, what is no later than its tables. The rest it learns in the journal's order, so that every worker, and a server
that starts again, comes to the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import last_segments
from mmoe_rec.journal.checkpoints import duplicates_after, removed_files
from mmoe_rec.journal.duplicates import Duplicates, Taken
from mmoe_rec.journal.follower import ROWS_AT_A_TIME, Follower
from mmoe_rec.journal.journal import column_types
from mmoe_rec.journal.position import Position
from mmoe_rec.journal.segments import segment_numbers
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import LogRows
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.point_in_time.memory import NEVER
from mmoe_rec.server.live.held import HeldRequests
from mmoe_rec.settings.schema import Schema

if TYPE_CHECKING:
    from mmoe_rec.inference.loaded import LoadedRanker

_log = logging.getLogger(__name__)


@dataclass
class _Read:
    """What was read and is to be learnt. position: of the journal, up to where; ends: of the records."""

    taken: dict[str | None, Taken]
    position: Position
    ends: list[Position]
    accepted_at: list[int]


@dataclass(frozen=True)
class Learnt:
    """What the model can take. ends: of the records that were read; counts: rows by outcome; accepted_at: of the
    batches, microseconds."""

    prepared: Any
    position: Position
    ends: list[Position] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Learning:
    """Of one model. `read` and `take` alternate, in whatever thread. position: up to where the model knows the journal.

    Raises UserError for a folder that holds no journal.
    """

    def __init__(self, ranker: LoadedRanker, folder: Path, features: Path) -> None:
        """features: the folder with the model's tables."""
        self.ranker, self.folder = ranker, folder
        self.schema = ranker.pipeline.schema
        require_all(self.schema, "a journal of events")
        self._waiting: _Read | None = None
        self._error: Exception | None = None
        self._has_ended = False
        self._lock = threading.Lock()
        self.gap: str | None = None
        """What the model does not know of the journal and can't learn, as a sentence."""
        follower = Follower(folder)
        _check_same_log(folder, self.schema)
        self._held = HeldRequests.of(features, self.as_of)
        self._told_of = set[str]()
        self._tell_of(column_types(folder))
        about = ranker.about.journal
        self._is_known = about is not None and about["id"] == follower.id
        if about is not None and self._is_known:
            follower.close()
            self._duplicates, follower = self._after(int(about["through"]), follower.id, features)
        else:
            self._duplicates = Duplicates(self.schema)
            if about is not None:
                _log.warning(
                    "the model's tables hold another journal than '%s': of this one, what is no later than they are "
                    "(%s) is taken for known",
                    folder,
                    ranker.about.tables_as_of,
                )
            if removed_files(folder, self.schema, 0):
                self.gap = (
                    f"the journal begins with segment {follower.position.segment}: what came in those before, the "
                    f"model knows only up to {ranker.about.tables_as_of}, as far as its tables hold it"
                )
                _log.warning("%s", self.gap)
        self._follower: Follower | None = follower
        self.position = follower.position

    def _after(self, through: int, journal: str, features: Path) -> tuple[Duplicates, Follower]:
        """What goes on after the segment through which the tables hold the journal, or after those that were removed
        since then by a refresh of a later version, which this one then does not know.

        Of logs of events of which the tables lack these segments, as no model that has them was refreshed, it learns
        their rows first.
        """
        held = last_segments(features, journal, self.schema.events)
        lacking: dict[str | None, list[Taken]] = {}

        def unknown(segment: int, rows: Mapping[str | None, Taken]) -> None:
            for source, each in rows.items():
                if source is not None and segment > (through if held is None else held[source]):
                    lacking.setdefault(source, []).append(each)

        removed = segment_numbers(self.folder)[0] - 1
        found = duplicates_after(self.folder, self.schema, max(through, removed), unknown=unknown)
        if lacking:
            together = {source: Taken.together(each) for source, each in lacking.items()}
            self._waiting = _Read(together, found[1].position, [], [])
        if gave_files := removed_files(self.folder, self.schema, through):
            newest = max(found[0].newest(source) for source in gave_files)
            one = removed == through + 1
            which = f"segment {removed} was" if one else f"segments {through + 1} to {removed} were"
            up_to = "" if newest == NEVER else f", the latest of {format_time(newest)}"
            self.gap = (
                f"the model's tables hold the journal through segment {through}, and {which} removed since, so "
                f"it does not know what came there{up_to}; the logs' files hold it: mmoe-rec refresh --config FILE "
                "--model models:/NAME@ALIAS, without --journal, makes a version that knows it"
            )
            _log.warning("%s", self.gap)
        return found

    def let_go(self) -> None:
        """Closes what it reads the journal by, before the process is forked; the next look opens it again."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    def _tell_of(self, logs: Iterable[str]) -> None:
        """Says once which logs of events the journal has that the model does not read; other models may."""
        if others := sorted({log for log in logs if log} - set(self.schema.events) - self._told_of):
            self._told_of.update(others)
            _log.warning(
                "the journal '%s' holds rows of logs of events that the model's settings do not have, so it learns "
                "nothing of them: %s",
                self.folder,
                ", ".join(map(repr, others)),
            )

    def _reader(self) -> Follower:
        if self._follower is None:
            self._follower = Follower(self.folder, self.position)
        return self._follower

    @contextmanager
    def held(self) -> Iterator[None]:
        """A time in which it learns nothing."""
        with self._lock:
            yield

    def close(self) -> None:
        """Learns no more; for a model whose place another one has taken, within `held`."""
        self._has_ended = True
        if self._follower is not None:
            self._follower.close()

    @property
    def live_rows(self) -> int:
        """Rows of events that the model holds beside its tables."""
        return self.ranker.live_rows

    @property
    def as_of(self) -> int:
        """The time of the last request that the tables know, microseconds."""
        return self.ranker.tables_known

    def newest(self, source: str | None) -> int:
        """The latest time of a log's rows so far, microseconds; `NEVER` before there are any."""
        return self._duplicates.newest(source)

    def end(self) -> Position:
        """Up to where the journal goes now."""
        follower = Follower(self.folder)
        try:
            return follower.end()
        finally:
            follower.close()

    def check(self, position: Position) -> None:
        """Raises RequestError for a position that is none of this journal, or not there yet.

        A position in a segment that was removed can't be looked up any more. The model knows what came before it, or
        says that it does not (`gap`).
        """
        follower = Follower(self.folder)
        try:
            if position.segment >= follower.position.segment or position > self.position:
                follower.check(position)
        finally:
            follower.close()

    def catch_up(self) -> None:
        """Learns all that there is; for a model that nobody asks yet."""
        while (learnt := self.read()) is not None:
            self.take(learnt)

    def read(self, most_rows: int = ROWS_AT_A_TIME) -> Learnt | None:
        """Reads what is new, and prepares what the model is to take; None where nothing is new.

        Raises UserError where the journal is damaged. What was read is tried again after an error, but not where it
        could not be told from duplicates: then the error comes again and again, until a model is loaded anew.
        """
        with self._lock:
            if self._has_ended:
                return None
            if self._error is not None:
                raise self._error
            if self._waiting is None:
                reader = self._reader()
                if not (batches := reader.read(most_rows)):
                    self.position = max(self.position, reader.position)  # the begin of the next segment
                    return None
                try:
                    taken = self._duplicates.take(batches)
                except Exception as error:
                    self._error = error
                    raise
                self._tell_of(self._duplicates.unknown)
                self._waiting = _Read(taken, reader.position, reader.ends, [each.accepted_at for each in batches])
            read, counts = self._waiting, dict[str, int]()
            rows: dict[str | None, LogRows] = {}
            for source, each in read.taken.items():
                for name in fields(each.counts):
                    counts[name.name] = counts.get(name.name, 0) + getattr(each.counts, name.name)
                counts["late"] = counts.get("late", 0) + each.late(self.schema, self.as_of)
                rows[source] = self._beyond_tables(each.rows(self.schema), counts)
                if source is None:
                    before, rows[source] = len(rows[source]), self._held.rest(rows[source])
                    counts["accepted"] -= before - len(rows[source])
                    counts["conflict"] += before - len(rows[source])
            prepared = self.ranker.prepared({source: each for source, each in rows.items() if len(each)})
            counts = {name: number for name, number in counts.items() if number}
            return Learnt(prepared, read.position, read.ends, read.accepted_at, counts)

    def taken_for_known(self, times: np.ndarray) -> int:
        """How many rows of (N,) times, microseconds, the tables may hold, so that they are not learnt."""
        return 0 if self._is_known else int(np.sum(times <= self.as_of))

    def _beyond_tables(self, rows: LogRows, counts: dict[str, int]) -> LogRows:
        """The rows that the tables do not hold; of a journal that the artifact names, all."""
        if self._is_known:
            return rows
        later = rows.times() > self.as_of
        counts["in_tables"] = counts.get("in_tables", 0) + int(np.sum(~later))
        return rows.filter(later)

    def take(self, learnt: Learnt) -> None:
        """Has the model take what was prepared; no pass may be under way."""
        with self._lock:
            if not self._has_ended:
                self.ranker.take(learnt.prepared)
                self.position, self._waiting = learnt.position, None


def _check_same_log(folder: Path, schema: Schema) -> None:
    """Raises UserError for a journal with rows of other logs than the model's."""
    for source in (None, *schema.events):
        held = column_types(folder).get(source or "")
        names = schema.columns
        needed = (names.user, names.candidate, names.time) if source is None else (schema.events[source].time,)
        if held and (missing := [name for name in needed if name not in held]):
            what = "the interaction log" if source is None else f"events '{source}'"
            raise UserError(
                f"the journal '{folder}' holds rows of {what} without a column '{missing[0]}', so it is another's: "
                "name another folder with --journal"
            )
