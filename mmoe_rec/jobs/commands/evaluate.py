"""python -m pipelines.evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Scores the test rows with a model (its address in MLflow, or its folder) and writes `metrics.json`, the sums it was made
from, and calibration plots to `data.work`/evaluation; logs them to MLflow, in the run that trained the model.

`--split validation` measures the rows that chose the model's state instead, to look at without using up the test rows.
`--predictions DIR` writes the rows with what the model predicts for them, as `metrics` reads them, for metrics of your
own.

`--slices` measures parts of the rows too, by columns of the log, in place of `evaluation.slices`.

With `--against` it scores the same rows with other models, prints the differences of all metrics with intervals, and
says whether the model is better: by `evaluation.decide_by`, with no loss for any task (`evaluation.margin`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import SLICES, read_command, show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder"
    )
    parser.add_argument("--against", nargs="+", default=[], metavar="M", help="other models to compare it with")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="rows to measure (test)")
    parser.add_argument("--slices", nargs="+", metavar="S", help=SLICES)
    parser.add_argument("--predictions", metavar="DIR", help="new or empty folder for the rows with their predictions")
    parser.add_argument(
        "--out", metavar="DIR", help="where metrics.json goes (default: data.work/evaluation, or evaluation_validation)"
    )


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if arguments.slices is not None:
        rules = settings.evaluation.model_copy(update={"slices": tuple(arguments.slices)})
        settings = settings.model_copy(update={"evaluation": rules})
    from pathlib import Path

    from mmoe_rec.jobs.evaluate import evaluate_model, place_of
    from mmoe_rec.report.tables import show_results

    out = Path(arguments.out or Path(settings.data.work) / place_of(arguments.split))
    asked = arguments.predictions
    predictions = None if asked is None else Path(asked)
    evaluated = evaluate_model(settings, arguments.model, out, arguments.against, arguments.split, predictions)
    show(show_results(evaluated.results))
    if predictions is not None:
        print(f"predictions: {predictions / 'rows.parquet'}")
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
