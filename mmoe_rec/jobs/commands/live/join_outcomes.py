"""python -m pipelines.join_outcomes --config C --requests DIR --events DIR --out DIR

Joins the requests that `serve --log-requests` wrote with events into an interaction log that training takes as it is:
what was shown, in which place, and what happened then. Section `outcomes` of the settings says where labels come from
and how long after a request an event counts.

A request is written once, as soon as all its windows have ended and the logs of events have gone on that far; later
ones wait for the next run, which adds files with later requests, as `python -m pipelines.features --extend` takes them.
A run that is killed leaves nothing; the next one does the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import read_command


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    from mmoe_rec.jobs.score import microseconds
    from mmoe_rec.live.outcomes import about, join_outcomes

    until = None if arguments.until is None else microseconds(arguments.until)
    joined = join_outcomes(settings, arguments.requests, arguments.events, arguments.out, until=until)
    for line in about(joined):
        print(line)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", required=True, metavar="DIR", help="folder of logged requests")
    parser.add_argument(
        "--events",
        metavar="DIR",
        help="folder with a folder for each of outcomes.events (default: data.events.NAME.path)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the interaction log that is added to")
    parser.add_argument(
        "--until", metavar="T", help="time up to which all events are there (default: each log's last event)"
    )
