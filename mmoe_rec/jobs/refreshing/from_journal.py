"""What a server has accepted, as files of the logs, so that tables and the next training know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.refreshing.new_tables import as_of
from mmoe_rec.jobs.refreshing.refresh import Journal, Served
from mmoe_rec.log.files import find_files
from mmoe_rec.preprocessing.files import Taken, of_journal
from mmoe_rec.preprocessing.tables import taken_by
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings


def from_journal(address: str, settings: Settings, remove: bool = False, other: bool = False) -> Journal:
    """Writes files of what the journal holds and the served tables do not.

    remove: batches that the tables hold already are removed; other: the model may know another journal, of which
    nothing is to come any more. Raises UserError where there is no journal, it is damaged, the model knows another one,
    or the logs' places take no files.
    """

    def write(served: Served) -> Mapping[str, Any]:
        from mmoe_rec.live import journal_files as files
        from mmoe_rec.live.journal import Journal as Opened

        schema, known = settings.schema_, served.about.journal
        taken, journal = taken_by(served.folder / "features"), Opened(address, create=False)
        if known is not None and known["id"] != journal.id and not other:
            raise UserError(
                f"the model's tables hold another journal ({known['id']}) than '{journal.name}' ({journal.id}): give "
                "the address of that one, as what it has not told them yet would be lost; if it is gone, and this one "
                "takes its place, add --other-journal"
            )
        is_known = known is not None and known["id"] == journal.id
        held = int(known["through"]) if known is not None and is_known else 0
        if files.logs_beyond(journal, schema, held):
            raise UserError(
                f"the journal '{journal.name}' begins after position {journal.removed()}, and the model's tables know "
                f"it up to {held} only: what was removed is in the log's files, so run refresh without --journal first,"
                " and then with it"
            )
        held_files = {} if taken is None else taken.last_segments(journal.id, schema.events)
        files.check_columns(journal.id, schema, settings.data.log, held_files)
        _check_one_way(settings, taken)
        through = files.cut_journal(journal)
        after = max(held, journal.removed())
        # Else the tables may hold what is no later than they are, by files that another program wrote.
        later_than = None if is_known else as_of(served.about)
        written = files.write_files(journal, schema, through, settings.data.log, after, later_than=later_than)
        for log, rows in written.unknown.items():
            say(f"{rows:,} rows of a log of events '{log}' are in no file: the settings have no such log")
        for source, counts in written.counts.items():
            if counts.conflict:
                name = "the interaction log" if source is None else f"log '{source}'"
                say(f"{counts.conflict:,} rows of {name} came again with other labels: the first ones count")
        if written.early:
            say(
                f"{written.early:,} rows of the journal are no later than the model's tables "
                f"({served.about.tables_as_of}), which know nothing of this journal: they are taken for known, as by a "
                "server, and are in no file"
            )
        if remove and held:
            files.remove_batches(journal, held)
        journal.close()
        return {"id": journal.id, "through": through}

    return write


def _check_one_way(settings: Settings, taken: Taken | None) -> None:
    """Raises UserError for new files of another program where rows that came both ways could not be told.

    Where requests have ids, the tables tell such rows.
    """
    if settings.schema_.columns.request is not None or taken is None:
        return
    recorded = taken.logs[0].files.keys() | taken.logs[0].left_out.keys()
    for file in find_files(settings.data.log):
        if file.address not in recorded and not of_journal(file.address):
            raise UserError(
                f"'{file.address}' is new in the log, and no file of the journal: as requests have no ids, rows that "
                "came both ways would count twice; if none did, run refresh without --journal once, which takes the "
                "file in, else remove it"
            )
