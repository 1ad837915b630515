"""mmoe-rec join-labels --config C --requests DIR --events DIR --out DIR

Build training rows from logged requests and later events. The requests come from `serve --log-requests`. The rows form
an interaction log with the candidates that were shown, their placement and their labels. Section `labels` of the
settings defines each label, and how long after a request an event counts.

The command writes a request once all its attribution windows have ended and the event logs reach that far. Later
requests wait for the next run, which adds files that `mmoe-rec features --extend` can read. An interrupted run writes
nothing. To resume, repeat the command.
"""

import click

from mmoe_rec.cli.main import Configuration, settings_command


@settings_command(__doc__)
@click.option("--requests", required=True, metavar="DIR", help="folder of logged requests")
@click.option(
    "--events", metavar="DIR", help="folder with a folder for each event log (default: data.events.NAME.path)"
)
@click.option("--out", required=True, metavar="DIR", help="folder of the interaction log to extend")
@click.option("--until", metavar="T", help="time up to which all events have arrived (default: last event)")
def join_labels(configuration: Configuration, requests: str, events: str | None, out: str, until: str | None) -> None:
    from mmoe_rec.live import label_join
    from mmoe_rec.log.request_values import parse_time

    end = None if until is None else parse_time(until)
    result = label_join.join_labels(configuration.settings, requests, events, out, until=end)
    for line in label_join.describe(result):
        print(line)
