"""python -m pipelines.refresh --config configs/complete_journey.yaml
python -m pipelines.refresh --config configs/complete_journey.yaml --model models:/complete_journey@champion
python -m pipelines.refresh --config configs/complete_journey.yaml --train-every-days 7

Takes new files of the log, and of logs of events, into what a model's counters, histories and latest values know, and
registers the result as a new version: the same weights, calibration and vocabularies, new tables. The alias moves to
it, if no other version has taken it meanwhile; a server that was started with --poll goes on with the new version.
Where there are no new files, nothing happens. Only rows of new files are read, and these must be later than those
before. Features in `data.work` stay as they are: days are added to them for the next training.

--journal A first writes what a server (serve --journal A) has accepted into files of `data.log` and of the logs of
events, which the features for the next training then take as well. Rows that came late count, too, but no model is
trained on them.

--anew makes the tables of all files that the log has now, as where an old file was put right.

--train-every-days N then trains where the newest training lies N days or more behind the log: it adds the files since
to the features, trains on their rows but the newest days, starting from the model that holds the alias, judges both on
the rows of these days, and leaves the alias to the better one. So one line for a scheduler does it all; it may be
started again at any time, and a part that fails ends it with a sentence and leaves the alias where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import count, read_command

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.jobs.refreshing.refresh import Refreshed


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.remove_events and arguments.journal is None:
        raise UserError("--remove-events belongs to --journal A, which is missing")
    if arguments.other_journal and arguments.journal is None:
        raise UserError("--other-journal belongs to --journal A, which is missing")
    if arguments.validation_days is not None and arguments.train_every_days is None:
        raise UserError("--validation-days belongs to --train-every-days N, which is missing")
    from rich.console import Console

    from mmoe_rec.jobs.refreshing.refresh import refresh

    address = arguments.model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    every, days = arguments.train_every_days, 0
    if every is not None:
        from mmoe_rec.jobs.refreshing.training import days_of_validation, train_when_due

        days = days_of_validation(settings, address, every, arguments.validation_days)
    journal = None
    if arguments.journal is not None:
        from mmoe_rec.jobs.refreshing.from_journal import from_journal

        journal = from_journal(arguments.journal, settings, arguments.remove_events, arguments.other_journal)
    refreshed = refresh(settings, address, anew=arguments.anew, journal=journal)
    name, alias = refreshed.before.version.name, refreshed.before.alias
    if refreshed.tables is None:
        log = settings.data.log
        why = f"tables made anew of all files in '{log}' are the same" if arguments.anew else f"no new files in '{log}'"
        print(
            f"{why}: '{alias}' of '{name}' stays version "
            f"{refreshed.before.version.number}, with tables as of {refreshed.before.about.tables_as_of}"
        )
    else:
        Console().print(_table(refreshed))
        if refreshed.tables.gone:
            gone = refreshed.tables.gone
            print(f"files that are gone from the log stay counted: {len(gone):,}, such as '{gone[0]}'")
        now = refreshed.after
        if now is not None and now.number == refreshed.number:
            print(f"'{alias}' of '{name}' is version {now.number} now")
        else:
            print(
                f"'{alias}' of '{name}' has moved to {'no version' if now is None else f'version {now.number}'} "
                f"meanwhile, so it stays there: version {refreshed.number} is registered without it"
            )
    if every is not None:
        for sentence in train_when_due(settings, address, every, days):
            print(sentence)


def _table(refreshed: Refreshed) -> Table:
    from rich.table import Table

    from mmoe_rec.jobs.refreshing.new_tables import as_of
    from mmoe_rec.log.checks import format_time

    assert refreshed.tables is not None
    table = Table("", "before", "now")
    table.add_row("version", refreshed.before.version.number, str(refreshed.number))
    known = as_of(refreshed.before.about), refreshed.tables.as_of
    table.add_row("tables as of", *map(format_time, known))
    for name in ("files", "rows", "events"):
        table.add_row(f"{name} read", "", f"{getattr(refreshed.tables, name):,}")
    return table


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="models:/NAME@ALIAS (default: the settings' registered model and alias)"
    )
    parser.add_argument("--anew", action="store_true", help="make tables of all files, instead of going on")
    parser.add_argument(
        "--journal",
        metavar="A",
        help="address of a server's journal: first write what it has accepted into files of the logs",
    )
    parser.add_argument(
        "--remove-events",
        action="store_true",
        help="remove what the journal holds and the tables, by an earlier refresh, held already",
    )
    parser.add_argument(
        "--other-journal",
        action="store_true",
        help="go over to this journal from the one that the tables hold, which is gone; else that is refused",
    )
    parser.add_argument("--train-every-days", type=count, metavar="N", help="then train, if a training is due")
    parser.add_argument(
        "--validation-days",
        type=count,
        metavar="V",
        help="newest days that such a training is judged by (default: one more than labels take to mature)",
    )
