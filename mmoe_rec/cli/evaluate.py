"""mmoe-rec evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Scores the test rows with a model (its address in MLflow, or its folder) and writes a report,
`metrics.json` and calibration plots to `data.work`/evaluation; logs them to MLflow, in the run that trained the model.

`--split validation` measures the rows that chose the model's state instead, to look at without using up the test rows.
`--predictions DIR` writes the rows with what the model predicts, as `metrics` reads them, for metrics of your own.

`--slices` measures parts of the rows too, by columns of the log, in place of `evaluation.slices`.

With `--against` it scores the same rows with other models, prints the differences of all metrics with intervals, and
says whether the model is better: by `evaluation.decide_by`, with no loss for any task (`evaluation.margin`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mmoe_rec.cli.main import FOLDER, Configuration, model_option, out_option, settings_command, show, slices_option


@settings_command(__doc__)
@model_option
@click.option("--against", multiple=True, metavar="M...", help="other models to compare it with")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="rows to measure (test)")
@slices_option
@click.option("--predictions", type=FOLDER, metavar="DIR", help="new or empty folder for rows and their predictions")
@out_option("data.work/evaluation, or evaluation_validation", "where metrics.json goes")
def evaluate(
    configuration: Configuration,
    model: str,
    against: tuple[str, ...],
    split: Literal["test", "validation"],
    slices: tuple[str, ...],
    predictions: Path | None,
    out: Path | None,
) -> None:
    settings = configuration.settings
    if slices:
        rules = settings.evaluation.model_copy(update={"slices": slices})
        settings = settings.model_copy(update={"evaluation": rules})
    from mmoe_rec.jobs.evaluate import evaluate_model, place_of
    from mmoe_rec.report.tables import show_results

    out = out or Path(settings.data.work) / place_of(split)
    show(show_results(evaluate_model(settings, model, out, against, split, predictions).results))
    if predictions is not None:
        print(f"predictions: {predictions / 'rows.parquet'}")
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
