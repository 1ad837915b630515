"""mmoe-rec join-labels --config C --requests DIR --events DIR --out DIR

Joins the requests that `serve --log-requests` wrote with events into an interaction log that training takes as it is:
what was shown, in which place, and what happened then. Section `labels` of the settings says where labels come from
and how long after a request an event counts.

A request is written once, as soon as all its windows have ended and the logs of events have gone on that far; later
ones wait for the next run, which adds files with later requests, as `mmoe-rec features --extend` takes them.
A run that is killed leaves nothing; the next one does the same.
"""

import click

from mmoe_rec.cli.main import Configuration, settings_command


@settings_command(__doc__)
@click.option("--requests", required=True, metavar="DIR", help="folder of logged requests")
@click.option("--events", metavar="DIR", help="holds a folder for each log (default: data.events.NAME.path)")
@click.option("--out", required=True, metavar="DIR", help="folder of the interaction log that is added to")
@click.option("--until", metavar="T", help="time up to which all events are there (default: each log's last event)")
def join_labels(configuration: Configuration, requests: str, events: str | None, out: str, until: str | None) -> None:
    from mmoe_rec.live import label_join
    from mmoe_rec.log.request_values import parse_time

    end = None if until is None else parse_time(until)
    joined = label_join.join_labels(configuration.settings, requests, events, out, until=end)
    for line in label_join.describe(joined):
        print(line)
