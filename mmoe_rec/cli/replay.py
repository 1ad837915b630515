"""mmoe-rec replay --config configs/complete_journey.yaml --from 2017-09-11 --to 2017-09-18

Compares what a server read of each feature for its requests, which it has logged, with what the log says of these
requests: the features that training and evaluation see. Says which features, requests and rows differ; the exit code is
1 where any does, 0 where none does.

The period begins with --from, and --to is no part of it. Without --requests, the log's own requests and events of the
period are fed to the model in this process, with tables as of --from. mmoe_rec/server/README.md is its guide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.main import FOLDER, Configuration, settings_command, show
from mmoe_rec.errors import UserError

DIFFERS = 1
"""Exit code where something that was served differs."""


@settings_command(__doc__)
@click.option("--from", "start", required=True, metavar="DAY", help="first request time, such as 2017-09-11")
@click.option("--to", "end", required=True, metavar="DAY", help="end of the request times, which is no part of them")
@click.option("--model", metavar="M", help="models:/NAME@ALIAS, runs:/..., or a folder (default: the settings' alias)")
@click.option("--requests", type=FOLDER, metavar="DIR", help="requests that `serve --log-requests DIR` logged")
@click.option("--ids-only", is_flag=True, help="send ids and context alone, so that the model completes attributes")
@click.option("--values", is_flag=True, help="show the values on both sides where a feature differs")
@click.option("--keep", type=FOLDER, metavar="FOLDER", help="where replay.json goes")
def replay(
    configuration: Configuration, start: str, end: str, model: str | None, requests: Path | None, **options: Any
) -> None:
    if requests is not None and options["ids_only"]:
        raise UserError("--ids-only is for requests of the log, and --requests were sent: leave one of them out")
    from mmoe_rec.jobs.score import microseconds
    from mmoe_rec.live import replay as job
    from mmoe_rec.live.served_rows import describe

    settings = configuration.settings
    address = model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    period = microseconds(start), microseconds(end)
    report = job.replay(settings, *period, address, requests, **options)
    show(describe(report))
    if report["mismatches"]:
        raise SystemExit(DIFFERS)
