"""Files that a log has and features have not taken in: which they are, and whether what they hold can still be added.

Features, and the tables of a model, go on from what they remember, so new requests must be later than all that they
know. No old file is needed: one that is gone stays counted, one that was written again is refused. A file that was left
out counts as new once it is mended, so it is taken in where all its requests are later, and stays left out otherwise.
Since events may come late, those of a file that is gone could come again, in a file of another name or merged with
others: where new files hold as many events of its time as it did, they are refused. So are rows that came both by a
server's journal and in a file of another program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import BadFile, format_time
from mmoe_rec.log.parts import Noticed, cut
from mmoe_rec.log.reader import ROWS_PER_PART, Log, LogReader
from mmoe_rec.preprocessing.added.taken import Spans, Taken, TakenFile, of_journal
from mmoe_rec.preprocessing.checks import place
from mmoe_rec.preprocessing.count import Counted
from mmoe_rec.preprocessing.logs import Logs
from mmoe_rec.preprocessing.request_summaries import RequestSummaries, read_requests
from mmoe_rec.preprocessing.requests import Requests
from mmoe_rec.preprocessing.steps import Steps
from mmoe_rec.progress import say


@dataclass(frozen=True)
class Holder:
    """What took files in, for messages.

    what: such as "the features", with which a sentence goes on in the plural; where: the same with its place; anew:
    what to do where files can't be added; last: microseconds of the last request that it knows.
    """

    what: str
    where: str
    anew: str
    last: int


class NewFiles:
    """The new files of logs. logs: all files; taken: those that the holder knows.

    new: the same logs, but only new files are read; mended: addresses of new files of the interaction log that were
    left out before; gone: files that the holder knows and the logs don't have.

    Raises UserError where a file that was taken in has changed, or no new file can be used.
    """

    def __init__(self, logs: Logs, taken: Taken, holder: Holder) -> None:
        self.logs, self.taken, self.holder = logs, taken, holder
        self.changes = taken.changes(logs)
        self._check_unchanged()
        self.gone = [address for each in self.changes for address in each.gone]
        if not self.any and (bad := [left for each in self.changes for left in each.bad]):
            raise UserError(
                f"none of the new files of the log '{logs.log.source}' can be used; the first: {bad[0].reason}"
            )

    @property
    def any(self) -> bool:
        """Whether there is a new file."""
        return any(each.new for each in self.changes)

    def only(self, events_alone: bool = False) -> Logs:
        """The logs, of which only new files are read. events_alone: these may be of logs of events alone.

        Raises UserError where there are no rows to read.
        """
        old = [log.found.keys() - each.new for log, each in zip(self.logs.all, self.changes, strict=True)]
        return self.logs.rest(old, events_alone)

    def count(self, steps: Steps, statistics: bool, kept: Path, before: Path) -> Counted:
        """Counts the rows of the new files, without those that were mended and come too late.

        kept, before: folders of requests, see `Steps.count`. Raises UserError where rows can't be added.
        """
        has_requests = self.logs.schema.columns.request is not None

        def count() -> Counted:
            return steps.count(statistics=statistics, kept=kept, before=before if has_requests else None)

        # At first by the rows' own times: a row of such a file is no error where a journal has it again.
        if late := self._late_mended(self._spans_of_mended(steps.logs)):
            steps.leave_out(late)
        counted = count()
        if late := self._late_mended(counted.spans):
            steps.leave_out(late)
            counted = count()
        self._check_times(counted, steps.requests, steps.logs)
        self._check_events(counted, steps.logs)
        if steps.requests.continued and self.logs.options.duplicates == "error":
            self._check_repeats(steps.logs, before)
        return counted

    def begin(self, counted: Counted, requests: Requests) -> int:
        """Microseconds of the first new request."""
        return requests.begin if self.logs.schema.columns.request is not None else counted.first[0]

    def _check_unchanged(self) -> None:
        reasons = {each.address: each.reason for log in self.logs.all for each in log.left_out}
        for address in (address for each in self.changes for address in each.changed):
            what = f"can't be used any more ({reasons[address]})" if address in reasons else "has changed"
            raise UserError(
                f"'{address}' {what} since {self.holder.what} were built from it; put it back, or {self.holder.anew}"
            )

    def _spans_of_mended(self, new: Logs) -> Spans:
        """First and last time of the rows of files of the interaction log that were left out before."""
        reader, noticed = _key_reader(new.log), Noticed()
        for part in cut([file for file in new.log.files if file.address in self.changes[0].mended], ROWS_PER_PART):
            for _ in reader.read(part, noticed):
                pass
        return {(None, address): span for address, span in noticed.spans.items()}

    def _late_mended(self, spans: Spans) -> list[BadFile]:
        """Files that were left out and are good by now, but have requests that are not later than all before."""
        last, mended = self.holder.last, self.changes[0].mended
        return [
            BadFile(
                f"'{address}' was left out before and holds requests from {format_time(span[0])} on, but "
                f"{self.holder.what} hold requests up to {format_time(last)}, so what its rows could have known is no "
                "longer remembered; to take it in, set another `data.work`, where features are built anew from all "
                "files of the log",
                address,
            )
            for (source, address), span in sorted(spans.items(), key=lambda each: each[0][1])
            if source is None and address in mended and span[0] <= last
        ]

    def _check_events(self, counted: Counted, new: Logs) -> None:
        """Raises UserError where new files hold as many events of the time of a file that is gone as that one did."""
        for log, before, changes in zip(new.events, self.taken.logs[1:], self.changes[1:], strict=True):
            times: dict[str, np.ndarray] = {}
            for old in (before.files[address] for address in changes.gone):
                found: dict[str, int] = {}
                for file in log.files:
                    first, last = counted.spans.get((log.name, file.address), (0, -1))
                    if old.first is None or old.last is None or first > old.last or last < old.first:
                        continue
                    if file.address not in times:
                        times[file.address] = log.times(file)
                    inside = (times[file.address] >= old.first) & (times[file.address] <= old.last)
                    found[file.address] = int(inside.sum())
                if found and sum(found.values()) >= old.rows:
                    raise UserError(
                        f"'{max(found, key=lambda address: found[address])}' holds events '{log.name}' of the time of "
                        f"'{old.address}', which is gone, and there are as many as that file held ({old.rows:,}): if "
                        f"they are the same, they would count twice; put that file back, or {self.holder.anew}"
                    )

    def _check_repeats(self, new: Logs, requests: Path) -> None:
        """Raises UserError where rows of new files came before by the other way: by a server's journal, or in a file
        of another program that is still there.

        requests: folder with those that the holder knows. They say when any of their rows were, which tells the files
        to read: the same row may have other times in other files.
        """
        taken, reader = self.taken.logs[0].files, _key_reader(new.log)
        before = [file for file in self.logs.log.files if file.address in taken]
        if not any(of_journal(file.address) for file in (*before, *new.log.files)):
            return
        read = [
            np.unique(rows.request_hashes()) for part in cut(new.log.files, ROWS_PER_PART) for rows in reader.read(part)
        ]
        continued = _known_requests(requests, np.unique(np.concatenate([np.empty(0, np.uint64), *read])))
        known: dict[bool, list[np.ndarray]] = {True: [np.empty(0, np.uint64)], False: [np.empty(0, np.uint64)]}
        for file in before:
            if _may_hold(taken[file.address], continued):
                for part in cut([file], ROWS_PER_PART):
                    for rows in reader.read(part, Noticed()):
                        mine = rows.filter(_among(rows.request_hashes(), continued.request))
                        known[of_journal(file.address)].append(mine.row_hashes())
        keys = {way: np.unique(np.concatenate(each)) for way, each in known.items()}
        repeated, example, start = 0, -1, 0
        for file in new.log.files:
            row, others = start, keys[not of_journal(file.address)]
            for part in cut([file], ROWS_PER_PART) if len(others) else []:
                for rows in reader.read(part):
                    again = np.flatnonzero(_among(rows.row_hashes(), others))
                    if len(again):
                        repeated, example = repeated + len(again), row + int(again[0]) if example < 0 else example
                    row += len(rows)
            start += file.rows
        if repeated:
            raise UserError(
                f"{place(new.log, example)} repeats request and candidate of a row that {self.holder.what} hold, and "
                f"one of the two came by a server's journal; {repeated:,} rows of new files do so, and would count "
                "twice: remove them from these files, or set data.duplicates to keep if they are meant"
            )

    def _check_times(self, counted: Counted, requests: Requests, new: Logs) -> None:
        first, known = self.begin(counted, requests), self.holder.last
        if first > known:
            return
        spans = {address: span for (source, address), span in counted.spans.items() if source is None}
        if all(of_journal(address) for address, span in spans.items() if span[0] <= known):
            late = sum(int((rows.times() <= known).sum()) for rows in new.log.stream())
            say(
                f"{late:,} rows of a server's journal are of requests up to {format_time(known)}, so they came late: "
                "they count, but are no rows to train on, as what they could have known is no longer remembered"
            )
            return
        early, row, start = 0, -1, 0
        for rows in new.log.stream():
            early += int((rows.times() <= known).sum())
            if row < 0 and (rows.times() == first).any():
                row = start + int((rows.times() == first).argmax())
            start += len(rows)
        raise UserError(
            f"{place(new.log, row)} was requested {format_time(first)}, but {self.holder.where} hold requests up to "
            f"{format_time(known)} already, and so do {early:,} of {new.log.rows:,} new rows: what such rows could "
            f"have known is no longer remembered; {self.holder.anew}"
        )


def _known_requests(folder: Path, asked: np.ndarray) -> RequestSummaries:
    """Those of the requests in a folder that are among (R,) rising hashes."""
    if not len(asked):
        return RequestSummaries.none()
    some = [each.take(np.flatnonzero(_among(each.request, asked))) for each in read_requests(folder, 0, 1)]
    return RequestSummaries.none().merged(some)


def _may_hold(file: TakenFile, requests: RequestSummaries) -> bool:
    """True if a file has rows of the time of one of the requests."""
    if file.first is None or file.last is None:
        return False
    return bool(((requests.first <= file.last) & (requests.last >= file.first)).any())


def _among(values: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """(N,) bool: True for the values that are among those that rise."""
    if not len(rising):
        return np.zeros(len(values), bool)
    same: np.ndarray = rising[np.minimum(np.searchsorted(rising, values), len(rising) - 1)] == values
    return same


def _key_reader(log: Log) -> LogReader:
    """Reads request, user, candidate and time alone."""
    columns = log.schema.columns
    needed = {columns.request, columns.user, columns.candidate, columns.time}
    return replace(log.reader, uses={name: use for name, use in log.uses.items() if name in needed})
