"""Files of a journal that lack rows for the sake of a log's new files, as long as no version holds both.

Rows of a journal that new files of another program hold are in no file of the journal. If such a new file is refused,
and then mended or removed, these rows would be nowhere. So the folder `data.work` remembers for the sake of which files
rows were left out. Until a version holds these, the journal's files that were written since are removed if the refresh
fails, and also if it was killed and then finds other files than it relied on. The next refresh writes them anew.

    <data.work>/journal_files.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.log.files import FoundFile, find_files
from mmoe_rec.preprocessing.added.held import HeldRows
from mmoe_rec.preprocessing.added.taken import Taken, of_journal
from mmoe_rec.progress import say


class Provisional:
    """What is remembered in the folder `work` about the journal's files in the log at `source`.

    taken: files that the served tables hold, whose version stays as it is; doubted: addresses of new files that tables
    did not take in, so nothing is to be left out for their sake.
    """

    def __init__(self, work: Path, source: str, taken: Taken | None) -> None:
        self.path, self.source, self.doubted = work / "journal_files.json", source, set[str]()
        self._known = set() if taken is None else set(taken.logs[0].files)
        self._there, self._relied_on = set[str](), dict[str, tuple[int, str]]()
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                self._there = set(found["there"])
                self._relied_on = {address: (size, version) for address, size, version in found["relied_on"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"'{self.path}' is damaged ({error}): it said which files of a journal lack rows that other new "
                    f"files of the log '{source}' held. Remove the files journal-*.parquet there that no model and no "
                    "features hold yet, and then this file: the next refresh writes them anew"
                ) from None

    def noting(self, held: HeldRows) -> Callable[[pa.Table], pa.Table]:
        """As `held.rest`, but remembers new files for whose sake rows are left out, before anything is written."""
        there = {address for address in self._found() if of_journal(address)}

        def rest(table: pa.Table) -> pa.Table:
            left = held.rest(table)
            now = {address: (file.bytes, file.version) for address, file in held.relied_on.items()}
            if not now.items() <= self._relied_on.items():
                if not self._relied_on:
                    self._there = there
                self._relied_on |= now
                self._write()
            return left

        return rest

    def settle(self) -> None:
        """Removes the journal's files of a refresh that was killed, if not all that it relied on is as it was."""
        if self._relied_on:
            found = self._found()
            now = {address: (file.bytes, file.version) for address, file in found.items()}
            if not self._relied_on.items() <= now.items():
                self.undo()

    def doubt(self, taken: Taken | None) -> bool:
        """Whether tables that hold these files lack one that was relied on. The journal's files are removed then.

        Raises UserError where they hold one that has changed since.
        """
        files = {} if taken is None else taken.logs[0].files
        for address, now in self._relied_on.items():
            if address in files and (files[address].bytes, files[address].version) != now:
                raise UserError(f"'{address}' has changed since the log was opened; start again")
        lacking = sorted(self._relied_on.keys() - files.keys())
        if lacking:
            say(
                f"the tables leave out '{lacking[0]}'{f' and {len(lacking) - 1:,} more' if lacking[1:] else ''}, so "
                "rows of the journal that were left out because of what it holds are written after all"
            )
            self.undo()
            self.doubted |= set(lacking)
        return bool(lacking)

    def undo(self) -> None:
        """Removes the journal's files that were written since rows were left out, but none that the tables hold."""
        if self._relied_on:
            found = self._found()
            for address in found:
                if of_journal(address) and address not in self._there and address not in self._known:
                    Path(address).unlink(missing_ok=True)
            if not found:  # perhaps as the folder can't be read now
                return
        self.forget()

    def forget(self) -> None:
        """A version holds all that was relied on."""
        self._there, self._relied_on = set(), {}
        self.path.unlink(missing_ok=True)

    def _found(self) -> dict[str, FoundFile]:
        try:
            return {file.address: file for file in find_files(self.source)}
        except UserError:  # there is no file
            return {}

    def _write(self) -> None:
        relied_on = [[address, size, version] for address, (size, version) in sorted(self._relied_on.items())]
        tree = {"there": sorted(self._there), "relied_on": relied_on}
        os.makedirs(self.path.parent, exist_ok=True)
        with atomic_file(self.path) as file:
            file.write_text(json.dumps(tree), encoding="utf-8")
