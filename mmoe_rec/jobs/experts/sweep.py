"""A model with fewer experts: how well it ranks, and how fast."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mmoe_rec.atomic import atomic_file
from mmoe_rec.evaluation.intervals import Interval
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.registry import find_model

if TYPE_CHECKING:
    from mmoe_rec.batches.batch import Batch
    from mmoe_rec.inference.loaded import LoadedRanker

REQUEST_ROWS = 500
RESAMPLES = 100
MOST_STEPS = 16


@dataclass(frozen=True)
class Swept:
    """One way of scoring. k: experts per row and gate; masked: the expert left out, if any; milliseconds: median
    latency of a request; tasks: task -> metric -> value, low and high.
    """

    k: int
    masked: int | None
    milliseconds: float
    tasks: dict[str, dict[str, Interval]]


def sweep(settings: Settings, address: str, out: Path, rows: int | None = None) -> list[Swept]:
    """Scores test rows with fewer and fewer experts, then without each; writes table and plot. rows: how many."""
    model = find_model(address, settings.tracking.address)
    from mmoe_rec.batches.encoded_rows import EncodedRows
    from mmoe_rec.inference.ranker import Ranker
    from mmoe_rec.jobs.truth import rows_to_measure
    from mmoe_rec.report.evaluation_figures import sweep_figure

    ranker = Ranker.load(model.folder)
    with rows_to_measure(settings, model.folder, ranker) as folder:
        encoded = EncodedRows(folder, ranker.layout)
        found = list(_each(ranker, encoded, settings.evaluation.batch_size, rows))
    with atomic_file(out / "sweep.json") as file:
        file.write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")
    by_k = [each for each in found if each.masked is None]
    figure = sweep_figure(
        [each.k for each in by_k], [each.milliseconds for each in by_k], [each.tasks for each in by_k]
    )
    figure.savefig(out / "sweep.png")
    with runs.open_run(
        settings.tracking.address, settings.experiment, run_name="sweep_experts", run_id=model.run_id
    ) as run:
        run.log_artifact(out / "sweep.json", "experts")
        run.log_figure(figure, "experts/sweep.png")
    return found


def sweep_table(swept: list[Swept]) -> Table:
    """One row for each way of scoring."""
    table = Table(caption="AUC ± half the 95% interval, bootstrap over users; ms for a request of 500 rows")
    for name in (
        "experts",
        *(f"{task} {metric}" for task in swept[0].tasks for metric in ("AUC", "GAUC", "calib.")),
        "ms",
    ):
        table.add_column(name, justify="right", no_wrap=name == "experts")
    for each in swept:
        cells = [f"{each.k}" if each.masked is None else f"all but {each.masked}"]
        for metrics in each.tasks.values():
            auc = metrics["auc"]
            cells += [_number(auc) + _half_width(auc), _number(metrics["gauc_user"]), _number(metrics["calibration"])]
        last_k = each.masked is None and each.k == 1
        table.add_row(*cells, f"{each.milliseconds:.2f}", end_section=last_k)
    return table


def _each(ranker: LoadedRanker, encoded: Any, batch_size: int, rows: int | None) -> Iterator[Swept]:
    experts = ranker.guarded.experts
    seen = int(ranker.model.visible_experts.sum(1).max())
    usual = ranker.model.mixture.gates[-1].experts_a_row() or seen
    example = _first_rows(ranker, encoded)
    steps = sorted({seen, usual, *_powers(seen)} if seen > MOST_STEPS else range(1, seen + 1), reverse=True)
    for k in steps:
        # The model's own number is not asked for: levels below may see more experts than the last one's gates.
        yield _measured(ranker, encoded, batch_size, rows, example, k, None if k == usual else k)
    for expert in range(experts) if experts > 1 else ():
        yield _measured(ranker, encoded, batch_size, rows, example, usual, None, expert)


def _measured(
    ranker: LoadedRanker,
    encoded: Any,
    batch_size: int,
    rows: int | None,
    example: Batch,
    k: int,
    asked: int | None,
    masked: int | None = None,
) -> Swept:
    """asked: the k that the model is asked for; None is its own number, which is then k."""
    from mmoe_rec.evaluation.scoring import score_rows
    from mmoe_rec.evaluation.summary import summarise

    usable = None if masked is None else ranker.guarded.all_but([masked])
    scored = score_rows(
        ranker.model,
        ranker.layout,
        encoded,
        batch_size,
        calibration=ranker.calibration,
        top_k=asked,
        usable=usable,
        first=rows,
    )
    summary = summarise(scored.measure(), RESAMPLES)
    tasks = {
        name: {metric: group.get(metric) for metric in ("auc", "gauc_user", "calibration", "logloss")}
        for name, group in summary.tasks.items()
        if group.kind == "binary"
    }
    return Swept(k, masked, _milliseconds(ranker, example, asked, usable), tasks)


def _first_rows(ranker: LoadedRanker, encoded: Any) -> Batch:
    from mmoe_rec.batches.batch import make_batch

    part, _ = next(encoded.stream(REQUEST_ROWS))
    return make_batch(part.encoded, ranker.layout, torchrec=False)


def _milliseconds(ranker: LoadedRanker, batch: Batch, k: int | None, usable: Any) -> float:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the server
    took = []
    try:
        with torch.inference_mode():
            for _ in range(30):
                started = time.perf_counter()
                ranker.model(batch, top_k=k, usable=usable)
                took.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return float(np.median(took) * 1000)


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _number(metric: Interval) -> str:
    return "-" if metric.value is None else f"{metric.value:.4f}"


def _half_width(metric: Interval) -> str:
    return "" if metric.low is None or metric.high is None else f" ±{(metric.high - metric.low) / 2:.4f}"
