"""mmoe-rec refresh --config configs/complete_journey.yaml
mmoe-rec refresh --config configs/complete_journey.yaml --model models:/complete_journey@champion

Update a model's counters, histories and latest values with new files of the log and of the event logs. Register the
result as a new version with the same weights, calibration and vocabularies. The alias moves to the new version unless
another version has taken the alias. A server that runs with --poll loads the new version.

If there are no new files, the command does nothing. It reads only rows of new files, including late rows, and reports
the number of late rows. Features in `data.work_dir` don't change. Before the next training run, extend them with
`features --extend`. The command keeps `tracking.keep_versions` of its versions, and versions that an alias needs.

--journal A first writes the events that a server (serve --journal A) has accepted into files of `data.log` and of the
event logs. The features for the next training run read these files too.

--rebuild builds the tables from all files of the log, for example after an old file was corrected.
"""

from typing import Any

import click

from mmoe_rec.cli.main import Configuration, settings_command
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--model", metavar="M", help="models:/NAME@ALIAS (default: the settings' registered model and alias)")
@click.option("--rebuild", is_flag=True, help="whether to rebuild the tables from all files")
@click.option("--journal", metavar="A", help="URI of a server's journal to write into the logs first")
@click.option("--remove-events", is_flag=True, help="whether to remove journal events that the tables already include")
@click.option("--other-journal", is_flag=True, help="whether --journal replaces a journal that no longer exists")
def refresh(
    configuration: Configuration, model: str | None, rebuild: bool, journal: str | None, **options: Any
) -> None:
    settings = configuration.settings
    for name, is_given in options.items():
        if is_given and journal is None:
            raise UserError(f"--{name.replace('_', '-')} requires --journal. Add --journal A.")
    from mmoe_rec.live import refresh as live_refresh
    from mmoe_rec.log.checks import format_time

    model_uri = model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    result = live_refresh.refresh(settings, model_uri, rebuild=rebuild, journal=journal, **options)
    previous, tables, current = result.previous, result.tables, result.current
    new_version = result.new_version
    alias = f"'{previous.alias}' of '{previous.version.name}'"
    if tables is None:
        reason = "rebuilt tables are identical" if rebuild else f"no new files in '{settings.data.log}'"
        as_of = previous.artifact.tables_as_of
        print(f"{reason}, so {alias} stays version {previous.version.number} with tables as of {as_of}")
        return
    print(f"version {new_version}: tables as of {format_time(tables.as_of)} (before: {previous.artifact.tables_as_of})")
    print(f"read {tables.files:,} files, {tables.rows:,} rows and {tables.events:,} events")
    if tables.missing:
        print(f"removed files that remain in the tables: {len(tables.missing):,}, such as '{tables.missing[0]}'")
    if current is not None and current.number == new_version:
        print(f"{alias} is version {current.number} now")
    else:
        target = "no version" if current is None else f"version {current.number}"
        print(
            f"{alias} has moved to {target} in the meantime, so version {new_version} is registered without the alias"
        )
