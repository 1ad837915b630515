"""mmoe-rec refresh --config configs/complete_journey.yaml
mmoe-rec refresh --config configs/complete_journey.yaml --model models:/complete_journey@champion
mmoe-rec refresh --config configs/complete_journey.yaml --train-every-days 7

Takes new files of the log, and of logs of events, into what a model's counters, histories and latest values know, and
registers the result as a new version: the same weights, calibration and vocabularies, new tables. The alias moves to
it, if no other version has taken it meanwhile; a server that was started with --poll goes on with the new version.
Where there are no new files, nothing happens. Only rows of new files are read; those that come late count, too, and
are told. Features in `data.work` stay as they are: days are added to them for the next training. Of
the versions that refreshes made, `tracking.keep_versions` stay besides those that an alias needs.

--journal A first writes what a server (serve --journal A) has accepted into files of `data.log` and of the logs of
events, which the features for the next training then take as well.

--anew makes the tables of all files that the log has now, as where an old file was put right.

--train-every-days N then trains where the newest training lies N days or more behind the log: it adds the files since
to the features, trains on their rows but the newest days, starting from the model that holds the alias, judges both on
the rows of these days, and leaves the alias to the better one. So one line for a scheduler does it all; it may be
started again at any time, and a part that fails ends it with a sentence and leaves the alias where it was.
"""

from __future__ import annotations

from typing import Any

import click

from mmoe_rec.cli.main import COUNT, Configuration, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--model", metavar="M", help="models:/NAME@ALIAS (default: the settings' registered model and alias)")
@click.option("--anew", is_flag=True, help="make tables of all files, instead of going on")
@click.option("--journal", metavar="A", help="address of a server's journal, whose events come into the logs first")
@click.option("--remove-events", is_flag=True, help="remove from the journal what the tables held already")
@click.option("--other-journal", is_flag=True, help="go over to this journal: the one that the tables hold is gone")
@click.option("--train-every-days", type=COUNT, metavar="N", help="then train, if a training is due")
@click.option("--validation-days", type=COUNT, metavar="V", help="newest days that judge it (default: 1 + to mature)")
def refresh(
    configuration: Configuration,
    model: str | None,
    anew: bool,
    journal: str | None,
    train_every_days: int | None,
    validation_days: int | None,
    **options: Any,
) -> None:
    settings = configuration.settings
    for option, is_given, other, is_there in (
        ("--remove-events", options["remove_events"], "--journal A", journal),
        ("--other-journal", options["other_journal"], "--journal A", journal),
        ("--validation-days", validation_days is not None, "--train-every-days N", train_every_days),
    ):
        if is_given and is_there is None:
            raise UserError(f"{option} belongs to {other}, which is missing")
    from mmoe_rec.live import refresh as tables
    from mmoe_rec.log.checks import format_time

    address = model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    every, days = train_every_days, 0
    if every is not None:
        days = tables.choose_validation_days(settings, address, every, validation_days)
    refreshed = tables.refresh(settings, address, anew=anew, journal=journal, **options)
    before, made, now = refreshed.before, refreshed.tables, refreshed.after
    holder = f"'{before.alias}' of '{before.version.name}'"
    if made is None:
        log = settings.data.log
        why = f"tables made anew of all files in '{log}' are the same" if anew else f"no new files in '{log}'"
        print(f"{why}: {holder} stays version {before.version.number}, with tables as of {before.about.tables_as_of}")
    else:
        was, now_as_of = map(format_time, (tables.as_of(before.about), made.as_of))
        print(f"version {refreshed.number}: tables as of {now_as_of}; version {before.version.number}: as of {was}")
        print(f"read {made.files:,} files, {made.rows:,} rows and {made.events:,} events")
        if made.gone:
            print(f"files that are gone from the log stay counted: {len(made.gone):,}, such as '{made.gone[0]}'")
        if now is not None and now.number == refreshed.number:
            print(f"{holder} is version {now.number} now")
        else:
            print(
                f"{holder} has moved to {'no version' if now is None else f'version {now.number}'} meanwhile, so "
                f"the alias stays there: version {refreshed.number} is registered without it"
            )
    if every is not None:
        for sentence in tables.train_when_due(settings, address, every, days):
            print(sentence)
