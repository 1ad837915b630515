"""python -m pipelines.replay --config configs/complete_journey.yaml --from 2017-09-11 --to 2017-09-18

Compares what a server read of each feature for its requests, which it has logged, with what the log says of these
requests: the features that training and evaluation see. Says which features, requests and rows differ; the exit code is
1 where any does, 0 where none does.

The period begins with --from, and --to is no part of it. Without --requests, the log's own requests and events of the
period are fed to a server of the replay's own, with tables as of --from. mmoe_rec/server/README.md is its guide.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import count, read_command, show

DIFFERS = 1
"""Exit code where something that was served differs."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="start", required=True, metavar="DAY", help="first request time, such as 2017-09-11")
    add("--to", dest="end", required=True, metavar="DAY", help="end of the request times, which is no part of them")
    add("--model", metavar="M", help="models:/NAME@ALIAS, runs:/..., or a folder (default: the settings' alias)")
    add("--requests", metavar="DIR", help="requests that `serve --log-requests DIR` logged, which the log holds by now")
    add("--workers", type=count, default=2, metavar="N", help="processes of an own server (default: %(default)s)")
    add("--ids-only", action="store_true", help="send ids and context alone, so that the server completes attributes")
    add("--values", action="store_true", help="show the values on both sides where a feature differs")
    add("--keep", metavar="FOLDER", help="where replay.json goes")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.requests is not None and arguments.ids_only:
        raise UserError("--ids-only says what an own server is sent, and --requests needs none: leave one of them out")
    from mmoe_rec.jobs.replay import ReplayOptions, describe, replay
    from mmoe_rec.jobs.score import microseconds

    options = ReplayOptions(
        start=microseconds(arguments.start),
        end=microseconds(arguments.end),
        model=arguments.model or f"models:/{settings.registered_model}@{settings.tracking.alias}",
        requests=None if arguments.requests is None else Path(arguments.requests),
        workers=arguments.workers,
        ids_only=arguments.ids_only,
        values=arguments.values,
        keep=None if arguments.keep is None else Path(arguments.keep),
    )
    report = replay(settings, options)
    show(describe(report))
    if report["mismatches"]:
        raise SystemExit(DIFFERS)
