"""The logs that a build reads, and how it is to read them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.database import MEMORY_GIB
from mmoe_rec.log.reader import EventRows, Log, none_usable
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import EngineName, ErrorOrKeep, FirstOrError

_NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class BuildOptions:
    """How features are built, as described in `mmoe_rec.settings.sections.Data`; no choice changes a feature."""

    engine: EngineName = "local"
    workers: int | None = None
    rows_in_memory: int = 1_048_576
    memory_gib: float = MEMORY_GIB
    as_of_days: float = 0
    skip_bad_files: bool = False
    duplicates: ErrorOrKeep = "error"
    future_times: ErrorOrKeep = "error"
    several_times: FirstOrError = "first"

    @property
    def unchecked(self) -> list[str]:
        """Settings by which a build does not look for rows that most logs hold only by mistake."""
        return [name for name in ("duplicates", "future_times") if getattr(self, name) == "keep"]

    @property
    def now(self) -> int | None:
        """The moment, microseconds, that no time of the log may lie after; None is the clock's."""
        return None if self.future_times == "error" else _NEVER

    def earliest_look_up(self, last: int) -> int:
        """The moment from which on requests can ask memories of a log whose last request was at `last`; both in
        microseconds. Nothing of what was known since may be dropped."""
        return last + 1 - round(self.as_of_days * MICROSECONDS_PER_DAY)


DEFAULTS = BuildOptions()


class Logs:
    """An interaction log with its logs of events. only_new: whether these are some of their files, see `rest`;
    events_alone: whether rows of events suffice then.

    types: of the columns of each of them, and more: further columns of the interaction log, as `Log` takes them.
    """

    only_new, events_alone = False, False

    def __init__(
        self,
        source: str,
        schema: Schema,
        options: BuildOptions,
        types: Sequence[Mapping[str, str]] | None = None,
        more: Mapping[str, Use] | None = None,
    ) -> None:
        self.schema, self.options = schema, options
        skip = options.skip_bad_files
        of_log, *of_events = types or [{}] * (1 + len(schema.events))
        self.log = Log(source, schema, skip_bad_files=skip, types=of_log, now=options.now, more=more)
        self.events = [
            EventRows(name, self.log, skip_bad_files=skip, types=each)
            for name, each in zip(schema.events, of_events, strict=True)
        ]

    @property
    def all(self) -> list[Log]:
        """The interaction log, then the logs of events."""
        return [self.log, *self.events]

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(each.rows for each in self.all)

    def without(self, bad: Sequence[BadFile]) -> Logs:
        """The same logs without further files. Raises UserError where nothing is left to read of one."""
        reasons = {error.address: str(error) for error in reversed(bad)}  # of several parts of a file, the first one's
        fewer = copy.copy(self)
        fewer.log, fewer.events = self.log.without(reasons), [each.without(reasons) for each in self.events]
        for log, before in zip(fewer.all, self.all, strict=True):
            needed = not self.only_new or (log is fewer.log and not self.events_alone)
            if before.files and not log.files and needed:
                raise none_usable(log.source, log.left_out)
        if not (fewer.rows if self.events_alone else fewer.log.rows):
            raise UserError(f"the log '{self.log.source}' has no rows")
        return fewer

    def rest(self, not_read: Sequence[Collection[str]], events_alone: bool = False) -> Logs:
        """The same logs without some of their files: addresses for each of `all`.

        events_alone: rows of events suffice. Raises UserError where the other files, of the interaction log if that is
        not so, have no rows.
        """
        rest = copy.copy(self)
        rest.only_new, rest.events_alone = True, events_alone
        rest.log = self.log.skip(not_read[0])
        rest.events = [each.skip(done) for each, done in zip(self.events, not_read[1:], strict=True)]
        if not (rest.rows if events_alone else rest.log.rows):
            raise UserError(f"the new files of the log '{self.log.source}' have no rows")
        return rest
