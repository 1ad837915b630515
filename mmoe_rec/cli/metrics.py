"""mmoe-rec metrics --predictions scores --config configs/complete_journey.yaml

Metrics of predictions in Parquet files: those of `score --labels`, or of any other system. A row has a user, a request,
for each task a prediction (predicted_TASK) and a label (label_TASK, null where unobserved), and the score by which the
candidates of its request were ranked (without it, the predictions rank them, by the weights of the tasks); maybe a
candidate, and a weight by which it counts in metrics of tasks. --columns says where columns are called otherwise, such
as request=day+basket. Prints a table, and writes a report and `metrics.json` to --out.

The tasks are those of the settings, or of --tasks: NAME for a binary one, NAME:regression for another, each maybe with
its weight in what a row is worth, such as --tasks bought stars:regression=0.2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from mmoe_rec.cli.main import FOLDER, NumberBetween, command, overrides_argument, show, slices_option
from mmoe_rec.errors import UserError
from mmoe_rec.progress import say
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import EngineName, Evaluation


@command(__doc__, section="")
@click.option("--config", metavar="C", help="settings file, whose tasks and names of columns are taken")
@overrides_argument
@click.option("--predictions", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
@click.option("--against", multiple=True, metavar="P...", help="other predictions of the same rows, to compare with")
@click.option("--tasks", multiple=True, metavar="T...", help="what was predicted, without a settings file")
@click.option("--columns", multiple=True, metavar="PART=COLUMN...", help="names of columns")
@click.option("--against-columns", multiple=True, metavar="PART=COLUMN...", help="names that differ in --against")
@slices_option
@click.option("--keep-duplicates", is_flag=True, help="a request may hold a candidate more than once")
@click.option("--out", type=FOLDER, default="metrics", metavar="DIR", help="where metrics.json goes (default: metrics)")
@click.option("--resamples", type=click.IntRange(min=20), metavar="N", help="redraws of the users, for the intervals")
@click.option("--engine", type=click.Choice(get_args(EngineName)), help="local, or ray for a Ray cluster")
@click.option("--memory-gib", type=NumberBetween(0.01, 1e6), metavar="X", help="memory to check requests in (4)")
def metrics(
    config: str | None,
    overrides: tuple[str, ...],
    predictions: str,
    against: tuple[str, ...],
    tasks: tuple[str, ...],
    columns: tuple[str, ...],
    against_columns: tuple[str, ...],
    slices: tuple[str, ...],
    keep_duplicates: bool,
    out: Path,
    resamples: int | None,
    **changes: Any,
) -> None:
    if config is None and overrides:
        raise UserError(f"'{overrides[0]}' is no option; where it is a setting, --config is missing")
    if (config is None) != bool(tasks):
        given = "both are given" if tasks else "neither is given"
        raise UserError(f"give the tasks by --config C or by --tasks, one of the two ({given}); --help says how")
    if against_columns and not against:
        raise UserError("--against-columns names columns of the files of --against, which is not given")
    from mmoe_rec.evaluation.slices import SliceBy
    from mmoe_rec.jobs.metrics import measure_predictions
    from mmoe_rec.jobs.places import build_options
    from mmoe_rec.jobs.prediction_files import columns_of_settings, columns_of_tasks
    from mmoe_rec.preprocessing.logs import DEFAULTS
    from mmoe_rec.report.tables import show_results

    rules, options, placement = Evaluation(), DEFAULTS, tuple[str, ...]()
    if config is None:
        rows = columns_of_tasks(tasks)
    else:
        settings = load_settings(config, overrides)
        rows, rules, options = columns_of_settings(settings), settings.evaluation, build_options(settings)
        placement = settings.roles.placement
        if rules.guarded_slices is not None:
            if against and (left := [each for each in rules.guarded_slices if each not in slices]):
                say(f"evaluation.guarded_slices names '{left[0]}', which guards nothing here unless --slices names it")
            sliced = tuple(each for each in rules.guarded_slices if each in slices)
            rules = rules.model_copy(update={"guarded_slices": sliced})
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
    options = replace(options, **{name: value for name, value in changes.items() if value is not None})
    rows = replace(rows.with_columns(columns), slices=tuple(SliceBy.of(each) for each in slices))
    rows = replace(rows, duplicates="keep") if keep_duplicates else rows
    results = measure_predictions(rows, predictions, out, rules, options, against, placement, against_columns)
    show(show_results(results))
    for name, summary in results.summaries.items():
        if summary.facts["columns"]["score"] is None:
            what = "the prediction" if len(summary.tasks) == 1 else "the sum of each task's weight x log(prediction)"
            print(f"note: without a column of scores in '{name}', {what} ranks the candidates of a request")
        if summary.facts["columns"]["candidate"] is None and summary.rows > summary.requests:
            print(f"note: without a column of candidates in '{name}', rows that come twice can't be told")
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
