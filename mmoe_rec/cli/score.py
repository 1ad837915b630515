"""mmoe-rec score --model models:/complete_journey@champion --input data/complete_journey/log --output scores

Score a log or lists of candidates in Parquet. Each output row has the request, user, candidate, time, the prediction of
each task (predicted_TASK), the score, the rank within the request (1 is best), and the model's URI and version. The
command writes Parquet files in the order of the input, and a _manifest.json. If the output is already complete, the
command scores nothing.

--as-of selects the events that counters and histories see. `log`: the events of the log before each request, as in an
evaluation. The log then needs label columns (null if a label is unavailable), and rows before the scored rows.
`tables`: the events stored with the model, as in the model server. This needs no labels.

The command uses the settings that the model was trained with. Add overrides such as --data.workers 2,
--data.events.NAME.path P or --tracking.uri U.
"""

from typing import Literal, get_args

import click

from mmoe_rec.cli.main import command, model_option, overrides_argument
from mmoe_rec.settings.sections import EngineName


@command(__doc__, section="data")
@model_option
@click.option("--input", "log", required=True, metavar="LOG", help="folder of Parquet files, one file, or a glob")
@click.option("--output", required=True, metavar="DIR", help="folder that is new, empty or has scores")
@click.option(
    "--as-of", type=click.Choice(["log", "tables"]), default="log", help="history that counters include (default: log)"
)
@click.option("--start", metavar="T", help="time of the first request to score (earlier rows are history)")
@click.option("--end", metavar="T", help="end of the requests to score, exclusive")
@click.option("--labels", is_flag=True, help="whether to add labels (label_TASK), for evaluate --predictions")
@click.option("--keep", multiple=True, metavar="COLUMN...", help="columns of the log to write as well, for slices")
@click.option("--engine", type=click.Choice(get_args(EngineName)), help="local, or ray for a Ray cluster")
@overrides_argument
def score(
    model: str,
    log: str,
    output: str,
    as_of: Literal["log", "tables"],
    start: str | None,
    end: str | None,
    labels: bool,
    keep: tuple[str, ...],
    engine: str | None,
    overrides: tuple[str, ...],
) -> None:
    from mmoe_rec.inference.batch_scoring import score_log
    from mmoe_rec.log.request_values import parse_time

    setting_overrides = [*overrides, *(["--data.engine", engine] if engine else [])]
    period = (None if start is None else parse_time(start), None if end is None else parse_time(end))
    result = score_log(model, log, output, as_of, period, setting_overrides, labels, keep)
    manifest = result.manifest
    if result.reused:
        print("these rows were already scored by the same model and settings")
    print(f"{manifest['rows']:,} rows scored by {manifest['model']} (version {manifest['model_version']})")
    print(f"note: {manifest['meaning']}")
    if manifest["seen_in_training"] is not None:
        print(f"warning: the model {manifest['seen_in_training']}")
    print(f"scores: {result.folder}")
