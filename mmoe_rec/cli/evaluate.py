"""mmoe-rec evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Scores the test rows with a model (its address in MLflow, or its folder) and writes a report,
`metrics.json` and calibration plots to `data.work`/evaluation; logs them to MLflow, in the run that trained the model.

`--split validation` measures the rows that chose the model's state instead, to look at without using up the test rows.
`--predictions DIR` writes the rows with what the model predicts, as `metrics` reads them, for metrics of your own.

`--slices` measures parts of the rows too, by columns of the log, in place of `evaluation.slices`.

`--experts-per-row 8 4 2` also says how good and how fast the model is with so many experts per row and gate. A number
that serves well enough goes into a request's `gate_top_k`, or into `model.gates.serving_top_k`.

With `--against` it scores the same rows with other models, prints the differences of all metrics with intervals, and
says whether the model is better: by `evaluation.decide_by`, with no loss for any task (`evaluation.margin`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mmoe_rec.cli.main import (
    COUNT,
    FOLDER,
    Configuration,
    model_option,
    out_option,
    settings_command,
    show,
    slices_option,
)
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.settings.sections import Settings

REQUEST_ROWS = 500
RESAMPLES = 100
METRICS = ("auc", "gauc_user", "calibration", "logloss")


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
        show([table_of(measure_fewer_experts(settings, model, out, experts_per_row, split))])
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")


def measure_fewer_experts(
    settings: Settings, address: str, out: Path, numbers: Sequence[int], split: str = "test"
) -> list[dict[str, Any]]:
    """Writes `experts.json` to a folder and to the model's run, and gives what it holds: for each number of experts per
    row and gate `k`, `milliseconds` (median time of one thread for 500 rows without their features) and `tasks` (binary
    task -> metric -> interval). Raises UserError where the model does not have so many experts."""
    from mmoe_rec.atomic import write_text
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.jobs.evaluate import rows_to_measure
    from mmoe_rec.tracking import runs
    from mmoe_rec.tracking.registry import find_model

    model = find_model(address, settings.tracking.address)
    ranker = Ranker.load(model.folder)
    seen = int(ranker.model.mixture.gates[-1].visible.sum(1).max())
    if (most := max(numbers)) > seen:
        raise UserError(f"--experts-per-row names {most}, and a gate of the model sees {seen} experts")
    # The model's own number is not asked for: levels below may see more experts than the last one's gates.
    own, size, measured = ranker.model.mixture.gates[-1].experts_a_row() or seen, settings.evaluation.batch_size, []
    with rows_to_measure(settings, model.folder, ranker, split) as folder:
        rows = EncodedRows(folder, ranker.layout)
        for k in numbers:
            top_k = None if k == own else k
            scored = score_rows(ranker.model, ranker.layout, rows, size, calibration=ranker.calibration, top_k=top_k)
            tasks = {
                name: {metric: group.get(metric) for metric in METRICS}
                for name, group in summarise(scored.measure(), RESAMPLES).tasks.items()
                if group.kind == "binary"
            }
            measured.append({"k": k, "milliseconds": _milliseconds(ranker, rows, top_k), "tasks": tasks})
    write_text(out / "experts.json", json.dumps(measured, indent=1, default=asdict))
    uri, experiment = settings.tracking.address, settings.experiment
    with runs.open_run(uri, experiment, run_name="fewer experts", run_id=model.run_id) as run:
        run.log_artifact(out / "experts.json", "experts")
    return measured


def _milliseconds(ranker: Ranker, rows: EncodedRows, k: int | None) -> float:
    import numpy as np
    import torch

    from mmoe_rec.batches.batch import make_batch
    from mmoe_rec.devices import limit_threads

    part, _ = next(rows.stream(REQUEST_ROWS))
    batch, seconds = make_batch(part.encoded, ranker.layout, torchrec=False), []
    with limit_threads(1), torch.inference_mode():  # as in the server
        for _ in range(30):
            started = time.perf_counter()
            ranker.model(batch, top_k=k)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds) * 1000)


def table_of(measured: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each number of experts."""
    from rich.table import Table

    table = Table(caption="AUC ± half the 95% interval, bootstrap over users; ms for a request of 500 rows")
    for name in ("experts", *(f"{task} AUC" for task in measured[0]["tasks"]), "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in measured:
        cells = []
        for auc in (task["auc"] for task in each["tasks"].values()):
            interval = "" if auc.low is None else f" ±{(auc.high - auc.low) / 2:.4f}"
            cells.append("-" if auc.value is None else f"{auc.value:.4f}{interval}")
        table.add_row(str(each["k"]), *cells, f"{each['milliseconds']:.2f}")
    return table
