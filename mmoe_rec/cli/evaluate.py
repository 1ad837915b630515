"""mmoe-rec evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Scores the test rows with a model (its address in MLflow, or its folder) and writes `metrics.json`, the sums it was made
from, and calibration plots to `data.work`/evaluation; logs them to MLflow, in the run that trained the model.

`--split validation` measures the rows that chose the model's state instead, to look at without using up the test rows.
`--predictions DIR` writes the rows with what the model predicts for them, as `metrics` reads them, for metrics of your
own.

`--slices` measures parts of the rows too, by columns of the log, in place of `evaluation.slices`.

`--experts-per-row 8 4 2` also says how good and how fast the model is with so many experts per row and gate. A number
that serves well enough goes into a request's `gate_top_k`, or into `model.gates.serving_top_k`.

With `--against` it scores the same rows with other models, prints the differences of all metrics with intervals, and
says whether the model is better: by `evaluation.decide_by`, with no loss for any task (`evaluation.margin`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mmoe_rec.cli.command import (
    COUNT,
    FOLDER,
    Configuration,
    model_option,
    out_option,
    settings_command,
    show,
    slices_option,
)


@settings_command(__doc__)
@model_option
@click.option("--against", multiple=True, metavar="M...", help="other models to compare it with")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="rows to measure (test)")
@slices_option
@click.option("--predictions", type=FOLDER, metavar="DIR", help="new or empty folder for rows and their predictions")
@click.option("--experts-per-row", type=COUNT, multiple=True, metavar="K...", help="also measure with fewer experts")
@out_option("data.work/evaluation, or evaluation_validation", "where metrics.json goes")
def evaluate(
    configuration: Configuration,
    model: str,
    against: tuple[str, ...],
    split: Literal["test", "validation"],
    slices: tuple[str, ...],
    predictions: Path | None,
    experts_per_row: tuple[int, ...],
    out: Path | None,
) -> None:
    """Runs the command."""
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
    if experts_per_row:
        from mmoe_rec.jobs.experts import measure_fewer_experts, table_of

        show([table_of(measure_fewer_experts(settings, model, out, experts_per_row, split))])
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
