"""python -m pipelines.evaluation.metrics --predictions scores --config configs/complete_journey.yaml

Metrics of predictions in Parquet files: those of `score --labels`, or of any other system. A row has a user, a request,
for each task a prediction (predicted_TASK) and a label (label_TASK, null where unobserved), and the score by which the
candidates of its request were ranked; --columns says where columns are called otherwise. Prints a table, and writes
`metrics.json` and the sums it was made from to --out.

The tasks are those of the settings, or of --tasks: NAME for a binary one, NAME:regression for another, each maybe with
its weight in what a row is worth, such as --tasks bought stars:regression=0.2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import SLICES, at_least, parsed, show
from mmoe_rec.progress import say


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--predictions", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="P", help="other predictions of the same rows, to compare them with"
    )
    parser.add_argument("--tasks", nargs="+", metavar="T", help="what was predicted, without a settings file")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="PART=COLUMN",
        help="names of columns: user, request (several joined by +), candidate, score, weight (by which rows count "
        "in metrics of tasks), predicted_TASK, label_TASK",
    )
    parser.add_argument("--slices", nargs="+", default=[], metavar="S", help=SLICES)
    parser.add_argument("--keep-duplicates", action="store_true", help="a request may hold a candidate more than once")
    parser.add_argument("--out", default="metrics", metavar="DIR", help="where metrics.json goes (default: metrics)")
    parser.add_argument("--resamples", type=at_least(20), metavar="N", help="redraws of the users, for the intervals")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parsed(__doc__ or "", argv, _add_arguments, config=False, engine=True, log=False)
    if (arguments.config is None) == (arguments.tasks is None):
        given = "neither is given" if arguments.tasks is None else "both are given"
        raise UserError(f"give the tasks by --config C or by --tasks, one of the two ({given}); --help says how")
    from pathlib import Path

    from mmoe_rec.evaluation.slices import SliceBy
    from mmoe_rec.jobs.measuring.asked import asked_by_settings, asked_by_words
    from mmoe_rec.jobs.metrics import How, measure_predictions
    from mmoe_rec.report.tables import show_results
    from mmoe_rec.settings.load import load_settings
    from mmoe_rec.settings.sections import Evaluation

    rules = Evaluation()
    if arguments.config is None:
        asked, how = asked_by_words(arguments.tasks), How(engine=arguments.engine or "local")
    else:
        settings = load_settings(arguments.config, arguments.overrides)
        asked, rules = asked_by_settings(settings), settings.evaluation
        is_weighed = any(each.startswith("weight=") for each in arguments.columns)
        if settings.training.sampling_correction == "weights" and not is_weighed:
            weight = settings.columns.weight
            what = "1" if weight is None else f"'{weight}'"
            raise UserError(
                f"the settings weigh rows by {what} / their sampling rate (training.sampling_correction): name a "
                "column that holds these weights with --columns weight=COLUMN, or set "
                "--training.sampling_correction to none"
            )
        how = How(settings.evaluation.resamples, 0, settings.data.engine, settings.data.workers)
    how = how if arguments.resamples is None else replace(how, resamples=arguments.resamples)
    asked = asked.with_columns(arguments.columns)
    asked = replace(asked, duplicates="keep") if arguments.keep_duplicates else asked
    asked = replace(asked, slices=tuple(SliceBy.of(each) for each in arguments.slices))
    if arguments.config is not None and settings.evaluation.slices and not arguments.slices:
        say("evaluation.slices of the settings are those of evaluate; --slices names some here")
    results = measure_predictions(asked, arguments.predictions, arguments.out, how, arguments.against, rules)
    show(show_results(results))
    for name, summary in results.summaries.items():
        if summary.facts["columns"]["score"] is None:
            print(f"note: without a column of scores in '{name}', the prediction ranks the candidates of a request")
        if summary.facts["columns"]["candidate"] is None and summary.rows > summary.requests:
            print(f"note: without a column of candidates in '{name}', rows that come twice can't be told")
    print(f"metrics: {Path(arguments.out) / 'metrics.json'}")
    print(f"report: {Path(arguments.out) / 'report.html'}")
