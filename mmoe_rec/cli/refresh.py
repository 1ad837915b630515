"""mmoe-rec refresh --config configs/complete_journey.yaml
mmoe-rec refresh --config configs/complete_journey.yaml --model models:/complete_journey@champion

Takes new files of the log, and of logs of events, into what a model's counters, histories and latest values know, and
registers the result as a new version: the same weights, calibration and vocabularies, new tables. The alias moves to
it, if no other version has taken it meanwhile; a server that was started with --poll goes on with the new version.
Where there are no new files, nothing happens. Only rows of new files are read; those that come late count, too, and
are told. Features in `data.work_dir` stay as they are: days are added to them for the next training. Of
the versions that refreshes made, `tracking.keep_versions` stay besides those that an alias needs.

--journal A first writes what a server (serve --journal A) has accepted into files of `data.log` and of the logs of
events, which the features for the next training then take as well.

--rebuild makes the tables of all files that the log has now, as where an old file was put right.
"""

from typing import Any

import click

from mmoe_rec.cli.main import Configuration, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--model", metavar="M", help="models:/NAME@ALIAS (default: the settings' registered model and alias)")
@click.option("--rebuild", is_flag=True, help="make tables of all files, instead of going on")
@click.option("--journal", metavar="A", help="address of a server's journal, whose events come into the logs first")
@click.option("--remove-events", is_flag=True, help="remove from the journal what the tables held already")
@click.option("--other-journal", is_flag=True, help="go over to this journal: the one that the tables hold is gone")
def refresh(
    configuration: Configuration,
    model: str | None,
    rebuild: bool,
    journal: str | None,
    **options: Any,
) -> None:
    settings = configuration.settings
    for name, is_given in options.items():
        if is_given and journal is None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --journal A, which is missing")
    from mmoe_rec.live import refresh as tables
    from mmoe_rec.log.checks import format_time

    address = model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    refreshed = tables.refresh(settings, address, rebuild=rebuild, journal=journal, **options)
    previous, made, now = refreshed.previous, refreshed.tables, refreshed.current
    new_version = refreshed.new_version
    holder = f"'{previous.alias}' of '{previous.version.name}'"
    if made is None:
        why = "tables of all files are the same" if rebuild else f"no new files in '{settings.data.log}'"
        print(
            f"{why}: {holder} stays version {previous.version.number}, with tables as of "
            f"{previous.artifact.tables_as_of}"
        )
        return
    print(f"version {new_version}: tables as of {format_time(made.as_of)}, before {previous.artifact.tables_as_of}")
    print(f"read {made.files:,} files, {made.rows:,} rows and {made.events:,} events")
    if made.missing:
        print(f"files that are gone from the log stay counted: {len(made.missing):,}, such as '{made.missing[0]}'")
    if now is not None and now.number == new_version:
        print(f"{holder} is version {now.number} now")
    else:
        moved = "no version" if now is None else f"version {now.number}"
        print(f"{holder} has moved to {moved} meanwhile and stays there: version {new_version} is only registered")
