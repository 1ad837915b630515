"""What a server has accepted, as files of the logs, so that tables and the next training know it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError
from mmoe_rec.jobs.places import build_options
from mmoe_rec.jobs.refreshing.new_tables import as_of
from mmoe_rec.jobs.refreshing.provisional import Provisional
from mmoe_rec.jobs.refreshing.refresh import Journal, Served
from mmoe_rec.preprocessing.added.held import HeldRows
from mmoe_rec.preprocessing.added.tables import taken_by
from mmoe_rec.progress import say
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings


def from_journal(folder: Path, settings: Settings, remove: bool = False, other: bool = False) -> Journal:
    """Closes the journal's segment, and writes the files of closed ones that the served tables do not hold.

    remove: segments that the tables hold already are removed; other: the model may know another journal, of which
    nothing is to come any more. Raises UserError where there is no journal, it is damaged, the model knows another one,
    or the logs' places take no files.
    """

    def write(served: Served, provisional: Provisional, anew: bool) -> Mapping[str, Any]:
        from mmoe_rec.journal.checkpoints import checkpoints, remove_through
        from mmoe_rec.journal.journal import Journal as Opened
        from mmoe_rec.journal.parquet_files import check_columns, write_files

        schema, features = settings.schema_, served.folder / "features"
        taken = taken_by(features)
        journal = Opened(folder, create=False)
        try:
            known = served.about.journal
            if known is not None and known["id"] != journal.id and not other:
                raise UserError(
                    f"the model's tables hold another journal ({known['id']}) than '{folder}' ({journal.id}): name the "
                    "folder of that one, as what it has not told them yet would be lost; if it is gone, and this one "
                    "takes its place, add --other-journal"
                )
            is_known = known is not None and known["id"] == journal.id
            held_through = int(known["through"]) if known is not None and is_known else 0
            first = _first_segment(folder, schema, held_through)
            held_files = {} if taken is None else taken.last_segments(journal.id, schema.events)
            check_columns(journal.id, schema, settings.data.log, held_files)
            through = journal.close_segment()
        finally:
            journal.close()
        # Files of segments that the tables hold are there, unless a refresh was killed before it had written all.
        after = max((each for each in checkpoints(folder) if each <= max(held_through, first - 1)), default=0)
        # Else the tables may hold what is no later than they are, by files that another program wrote.
        later_than = None if is_known else as_of(served.about)
        options = build_options(settings)
        held = HeldRows(settings.data.log, schema, features, taken, options, anew, provisional.doubted)
        rest = provisional.noting(held)
        written = write_files(folder, schema, through, settings.data.log, after, later_than=later_than, rest=rest)
        for log, rows in written.unknown.items():
            say(f"{rows:,} rows of a log of events '{log}' are in no file: the settings have no such log")
        for source, counts in written.counts.items():
            if counts.conflict:
                name = "the interaction log" if source is None else f"log '{source}'"
                say(f"{counts.conflict:,} rows of {name} came again with other labels: the first ones count")
        for left_out, why in (
            (held.repeated, "the log's files hold them already"),
            (held.other_user, "the log's files hold their requests with another user"),
        ):
            if left_out.rows:
                say(f"{left_out.rows:,} rows of the journal are left out, as {why}; the first: {left_out.first}")
        if written.early:
            say(
                f"{written.early:,} rows of the journal are no later than the model's tables "
                f"({served.about.tables_as_of}), which know nothing of this journal: they are taken for known, as by a "
                "server, and are in no file"
            )
        if remove and after:
            remove_through(folder, after)
        return {"id": journal.id, "through": through}

    return write


def _first_segment(folder: Path, schema: Schema, through: int) -> int:
    """The first segment that is there. Raises UserError where removed ones have rows that the tables, which know the
    journal through a segment, do not hold."""
    from mmoe_rec.journal.checkpoints import removed_files
    from mmoe_rec.journal.segments import segment_numbers

    first = segment_numbers(folder)[0]
    if removed_files(folder, schema, through):
        raise UserError(
            f"the journal '{folder}' begins with segment {first}, and the model's tables know it through segment "
            f"{through} only: what was removed is in the log's files, so run refresh without --journal first, and then "
            "with it"
        )
    return first
