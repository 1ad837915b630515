"""mmoe-rec metrics --predictions scores --config configs/complete_journey.yaml

Metrics of predictions in Parquet files: those of `score --labels`, or of any other system. A row has a user, a request,
for each task a prediction (predicted_TASK) and a label (label_TASK, null where unobserved), and the score by which the
candidates of its request were ranked; --columns says where columns are called otherwise. Prints a table, and writes
`metrics.json` and the sums it was made from to --out.

The tasks are those of the settings, or of --tasks: NAME for a binary one, NAME:regression for another, each maybe with
its weight in what a row is worth, such as --tasks bought stars:regression=0.2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from mmoe_rec.cli.command import FOLDER, Configuration, NumberBetween, settings_command, show, slices_option
from mmoe_rec.errors import UserError
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import EngineName, Evaluation


@settings_command(__doc__, required=False)
@click.option("--predictions", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
@click.option(
    "--against", multiple=True, metavar="P...", help="other predictions of the same rows, to compare them with"
)
@click.option("--tasks", multiple=True, metavar="T...", help="what was predicted, without a settings file")
@click.option(
    "--columns",
    multiple=True,
    metavar="PART=COLUMN...",
    help="names of columns: user, request (several joined by +), candidate, score, weight (by which rows count "
    "in metrics of tasks), predicted_TASK, label_TASK",
)
@slices_option
@click.option("--keep-duplicates", is_flag=True, help="a request may hold a candidate more than once")
@click.option("--out", type=FOLDER, default="metrics", metavar="DIR", help="where metrics.json goes (default: metrics)")
@click.option("--resamples", type=click.IntRange(min=20), metavar="N", help="redraws of the users, for the intervals")
@click.option("--engine", type=click.Choice(get_args(EngineName)), help="local, or ray for a Ray cluster")
@click.option(
    "--memory-gib",
    type=NumberBetween(0.01, 1e6),
    metavar="X",
    help="memory in which requests are checked, the rest on disk (default: data.memory_gib, or 4)",
)
def metrics(
    configuration: Configuration | None,
    predictions: str,
    against: tuple[str, ...],
    tasks: tuple[str, ...],
    columns: tuple[str, ...],
    slices: tuple[str, ...],
    keep_duplicates: bool,
    out: Path,
    resamples: int | None,
    engine: EngineName | None,
    memory_gib: float | None,
) -> None:
    """Runs the command."""
    if (configuration is None) != bool(tasks):
        given = "both are given" if tasks else "neither is given"
        raise UserError(f"give the tasks by --config C or by --tasks, one of the two ({given}); --help says how")
    from mmoe_rec.evaluation.slices import SliceBy
    from mmoe_rec.jobs.metrics import measure_predictions
    from mmoe_rec.jobs.places import build_options
    from mmoe_rec.jobs.prediction_files import columns_of_settings, columns_of_tasks
    from mmoe_rec.preprocessing.logs import DEFAULTS
    from mmoe_rec.report.tables import show_results

    rules, options = Evaluation(), DEFAULTS
    if configuration is None:
        rows = columns_of_tasks(tasks)
    else:
        settings = configuration.settings
        rows, rules, options = columns_of_settings(settings), settings.evaluation, build_options(settings)
        weighed = settings.training.sampling_correction == "weights"
        if weighed and not any(each.startswith("weight=") for each in columns):
            weight = settings.columns.weight
            what = "1" if weight is None else f"'{weight}'"
            raise UserError(
                f"the settings weigh rows by {what} / their sampling rate (training.sampling_correction): name a "
                "column that holds these weights with --columns weight=COLUMN, or set "
                "--training.sampling_correction to none"
            )
        if rules.slices and not slices:
            say("evaluation.slices is a setting of evaluate; name columns by --slices here")
    rules = rules if resamples is None else rules.model_copy(update={"resamples": resamples})
    options = replace(options, engine=engine or options.engine, memory_gib=memory_gib or options.memory_gib)
    rows = replace(rows.with_columns(columns), slices=tuple(SliceBy.of(each) for each in slices))
    rows = replace(rows, duplicates="keep") if keep_duplicates else rows
    results = measure_predictions(rows, predictions, out, rules, options, against)
    show(show_results(results))
    for name, summary in results.summaries.items():
        if summary.facts["columns"]["score"] is None:
            print(f"note: without a column of scores in '{name}', the prediction ranks the candidates of a request")
        if summary.facts["columns"]["candidate"] is None and summary.rows > summary.requests:
            print(f"note: without a column of candidates in '{name}', rows that come twice can't be told")
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
