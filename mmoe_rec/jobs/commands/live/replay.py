"""python -m pipelines.replay --config configs/complete_journey.yaml --from 2017-09-11 --to 2017-09-18

Feeds a period of the log through a running server, events and requests in the order of their times, and compares each
served counter, history and score with what the log says: the values that training and evaluation see. Prints a table of
what differs, with examples; the exit code is 1 where anything does, 0 where nothing does.

The period begins with --from, and --to is no part of it. The server is one of its own, with tables as of --from, unless
--url names one, which must serve the same weights with tables as of --from, or the live events since then.
mmoe_rec/jobs/replay/README.md is its guide.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import count, read_command

DIFFERS = 1
"""Exit code where something that was served differs."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="start", required=True, metavar="DAY", help="first request time, such as 2017-09-11")
    add("--to", dest="end", required=True, metavar="DAY", help="end of the request times, which is no part of them")
    add("--model", metavar="M", help="models:/NAME@ALIAS, runs:/..., or a folder (default: the settings' alias)")
    add(
        "--workers",
        type=count,
        default=2,
        metavar="N",
        help="calls at a time, and processes of an own server (default: %(default)s)",
    )
    add("--url", metavar="URL", help="a running server instead of an own one, such as http://127.0.0.1:8000")
    add("--token-file", metavar="F", help="file with that server's token (default: MMOE_REC_TOKEN)")
    add("--ids-only", action="store_true", help="send ids and context alone, so that the server completes attributes")
    add("--keep", metavar="FOLDER", help="where replay.json and mismatches.parquet go")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.token_file is not None and arguments.url is None:
        raise UserError("--token-file belongs to --url URL, which is missing")
    from rich.console import Console

    from mmoe_rec.jobs.replay.run import Asked, replay
    from mmoe_rec.jobs.replay.showing import show
    from mmoe_rec.jobs.score import microseconds

    asked = Asked(
        start=microseconds(arguments.start),
        end=microseconds(arguments.end),
        model=arguments.model or f"models:/{settings.registered_model}@{settings.tracking.alias}",
        workers=arguments.workers,
        url=arguments.url,
        keep=None if arguments.keep is None else Path(arguments.keep),
        ids_only=arguments.ids_only,
        token_file=arguments.token_file,
    )
    found = replay(settings, asked)
    console = Console()
    for each in show(found):
        console.print(each)
    events = "".join(f", {number:,} events '{name}'" for name, number in found["events"].items())
    print(
        f"{found['requests']:,} requests with {found['rows']:,} rows{events} in {found['seconds']:,.0f} s: "
        f"{found['compared']:,} values compared, {found['mismatches']:,} mismatches"
    )
    if asked.keep is not None:
        print(f"report: {asked.keep}")
    if found["mismatches"]:
        raise SystemExit(DIFFERS)
