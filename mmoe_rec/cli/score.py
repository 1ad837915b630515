"""mmoe-rec score --model models:/complete_journey@champion --input data/complete_journey/log --output scores

Scores a log, or lists of candidates, in Parquet: writes each row's request, user, candidate and time, every task's
prediction (predicted_TASK), the score, its rank within the request (1 is best) and the model's address and version, as
Parquet files in the order of the input, with a _manifest.json. The same command again scores nothing if the output is
complete.

--as-of says what counters and histories know. `log`: what is known before each request in the log that is given, as in
an evaluation; it needs the columns of labels, null where nothing is known yet, and the past of the rows that matter.
`tables`: what the model itself remembers, as in the model server; it needs no labels. Settings are those that the model
was trained with; overrides may follow, such as --data.workers 2, --data.events.NAME.path P or --tracking.uri U.
"""

from typing import Literal, get_args

import click

from mmoe_rec.cli.main import command, model_option, overrides_argument
from mmoe_rec.settings.sections import EngineName


@command(__doc__, section="data")
@model_option
@click.option("--input", "log", required=True, metavar="LOG", help="a folder of Parquet files, one file, or a glob")
@click.option("--output", required=True, metavar="DIR", help="a new or empty folder, or one with scores")
@click.option("--as-of", type=click.Choice(["log", "tables"]), default="log", help="what counters know (log)")
@click.option("--start", metavar="T", help="score rows requested at that time or later; others are the past")
@click.option("--end", metavar="T", help="score rows requested before that time")
@click.option("--labels", is_flag=True, help="write labels too (label_TASK), for evaluate --predictions")
@click.option("--keep", multiple=True, metavar="COLUMN...", help="further columns of the log to write, to slice by")
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

    words = [*overrides, *(["--data.engine", engine] if engine else [])]
    period = (None if start is None else parse_time(start), None if end is None else parse_time(end))
    done = score_log(model, log, output, as_of, period, words, labels, keep)
    about = done.manifest
    if done.reused:
        print("these rows were already scored, by the same model and settings")
    print(f"{about['rows']:,} rows scored by {about['model']} (version {about['model_version']})")
    print(f"note: {about['meaning']}")
    if about["seen_in_training"] is not None:
        print(f"warning: the model {about['seen_in_training']}")
    print(f"scores: {done.folder}")
