"""What a served model has learnt of the journal, and how it learns what is new.

Its tables hold a part of the journal already, up to a position that the artifact names; of a journal that it does not
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
from mmoe_rec.live.duplicates import Duplicates, NewRows
from mmoe_rec.live.journal import ROWS_AT_A_TIME, Journal
from mmoe_rec.live.journal_files import duplicates_at, logs_beyond
from mmoe_rec.log.checks import format_time
from mmoe_rec.log.rows import LogRows
from mmoe_rec.log.stand_ins import require_all
from mmoe_rec.point_in_time.memory import NEVER
from mmoe_rec.settings.schema import Schema

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker

_log = logging.getLogger(__name__)


@dataclass
class _Read:
    """What was read and is to be learnt. position: of the journal, up to where."""

    new: dict[str | None, NewRows]
    position: int
    accepted_at: list[int]


@dataclass(frozen=True)
class Learnt:
    """What the model can take. counts: rows by outcome; accepted_at: of the batches, microseconds."""

    prepared: Any
    position: int
    accepted_at: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Learning:
    """Of one model. `read` and `take` alternate, in whatever thread. position: up to where the model knows the journal.

    Raises UserError for an address that holds no journal.
    """

    def __init__(self, ranker: Ranker, address: str, features: Path) -> None:
        """address: of the journal; features: the folder with the model's tables."""
        self.ranker, self.journal = ranker, Journal(address, create=False)
        self.schema = ranker.pipeline.schema
        require_all(self.schema, "a journal of events")
        self._waiting: _Read | None = None
        self._error: Exception | None = None
        self._has_ended = False
        self._lock = threading.Lock()
        self.gap: str | None = None
        """What the model does not know of the journal and can't learn, as a sentence."""
        _check_same_log(self.journal, self.schema)
        self._told_of = set[str]()
        self._tell_of(self.journal.column_types())
        about = ranker.about.journal
        self._is_known = about is not None and about["id"] == self.journal.id
        if about is not None and not self._is_known:
            _log.warning(
                "the model's tables hold another journal than '%s': of this one, what is no later than they are (%s) "
                "is taken for known",
                self.journal.name,
                ranker.about.tables_as_of,
            )
        through = int(about["through"]) if about is not None and self._is_known else 0
        self.position = max(through, self.journal.removed())
        self._duplicates = self._begin(through, last_segments(features, self.journal.id, self.schema.events))
        if lacking := logs_beyond(self.journal, self.schema, through):
            self.gap = self._describe_gap(through, lacking)
            _log.warning("%s", self.gap)

    def _begin(self, through: int, held: Mapping[str | None, int] | None) -> Duplicates:
        """What is remembered at the position from which the model goes on.

        Of logs of events of which the tables lack rows up to there, as no model that has them was refreshed, it learns
        these first. held: log -> the last cut whose file the tables hold.
        """
        lacking: dict[str | None, list[NewRows]] = {}

        def add(cut: int, rows: Mapping[str | None, NewRows]) -> None:
            for source, each in rows.items():
                if source is not None and cut > (through if held is None else held[source]):
                    lacking.setdefault(source, []).append(each)

        duplicates = duplicates_at(self.journal, self.schema, self.position, missing=add)
        if lacking:
            together = {source: NewRows.together(each) for source, each in lacking.items()}
            self._waiting = _Read(together, self.position, [])
        return duplicates

    def _describe_gap(self, through: int, logs: list[str | None]) -> str:
        """Says what was removed from the journal that the tables do not know; a later version's refresh removed it."""
        removed = self.journal.removed()
        if not self._is_known:
            return (
                f"the journal begins after position {removed}: what came before, the model knows only up to "
                f"{self.ranker.about.tables_as_of}, as far as its tables hold it"
            )
        newest = max(self._duplicates.newest(source) for source in logs)
        up_to = "" if newest == NEVER else f", the latest of {format_time(newest)}"
        return (
            f"the model's tables hold the journal up to position {through}, and what came up to position {removed} was "
            f"removed since, so it does not know that{up_to}; the logs' files hold it: mmoe-rec refresh --config FILE "
            "--model models:/NAME@ALIAS, without --journal, makes a version that knows it"
        )

    def let_go(self) -> None:
        """Closes what it reads the journal by, before the process is forked; the next look opens it again."""
        self.journal.close()

    def _tell_of(self, logs: Iterable[str]) -> None:
        """Says once which logs of events the journal has that the model does not read; other models may."""
        if others := sorted({log for log in logs if log} - set(self.schema.events) - self._told_of):
            self._told_of.update(others)
            _log.warning(
                "the journal '%s' holds rows of logs of events that the model's settings do not have, so it learns "
                "nothing of them: %s",
                self.journal.name,
                ", ".join(map(repr, others)),
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """A time in which it learns nothing."""
        with self._lock:
            yield

    def close(self) -> None:
        """Learns no more; for a model whose place another one has taken, within `held`."""
        self._has_ended = True
        self.journal.close()

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
                if not (batches := self.journal.read(self.position, most_rows)):
                    return None
                try:
                    new = self._duplicates.filter(batches)
                except Exception as error:
                    self._error = error
                    raise
                self._tell_of(self._duplicates.unknown)
                self._waiting = _Read(new, batches[-1].position, [each.accepted_at for each in batches])
            read, counts = self._waiting, dict[str, int]()
            rows: dict[str | None, LogRows] = {}
            for source, each in read.new.items():
                for name in fields(each.counts):
                    counts[name.name] = counts.get(name.name, 0) + getattr(each.counts, name.name)
                counts["late"] = counts.get("late", 0) + each.late(self.schema, self.as_of)
                rows[source] = self._beyond_tables(each.rows(self.schema), counts)
            prepared = self.ranker.prepared({source: each for source, each in rows.items() if len(each)})
            counts = {name: number for name, number in counts.items() if number}
            return Learnt(prepared, read.position, read.accepted_at, counts)

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


def _check_same_log(journal: Journal, schema: Schema) -> None:
    """Raises UserError for a journal with rows of other logs than the model's."""
    types = journal.column_types()
    for source in (None, *schema.events):
        held = types.get(source or "")
        names = schema.columns
        needed = (names.user, names.candidate, names.time) if source is None else (schema.events[source].time,)
        if held and (missing := [name for name in needed if name not in held]):
            what = "the interaction log" if source is None else f"events '{source}'"
            raise UserError(
                f"the journal '{journal.name}' holds rows of {what} without a column '{missing[0]}', so it is another "
                "model's: give another address with --journal"
            )
