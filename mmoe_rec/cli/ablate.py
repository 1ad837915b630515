"""mmoe-rec ablate --config configs/complete_journey.yaml --model models:/complete_journey@champion

What each feature, and each group of features, is worth to a model, what it costs in serving, and what to leave out.

A feature's inputs are exchanged together among rows, so that it says nothing of its row, and the model ranks again:
what `evaluation.decide_by` loses, and each task, with intervals over users. Features that may be left out are
exchanged together once more. It tells what this model uses: of two features that say the same, both may seem needed.
--retrain trains models that never had each group, or each of --features, which takes long: --seeds trainings for each,
and as many with all. Those that have ended stay, so that the same command goes on after an interruption.

The validation rows are taken, so that the test rows stay fresh, at most --rows of them. Milliseconds are those of a
request of --candidates, bytes those of the model in memory. Writes `report.html`, `ablation.json` and
`ablation.parquet` to `data.work`/ablation, and logs them to the run that trained the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmoe_rec.cli.main import COUNT, Configuration, model_option, out_option, settings_command, show
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@model_option
@click.option("--features", multiple=True, metavar="F...", help="only these, and no groups")
@click.option("--split", type=click.Choice(["validation", "test"]), default="validation", help="rows (validation)")
@click.option("--rows", type=COUNT, default=100_000, metavar="N", help="rows of whole users, at most about (100000)")
@click.option("--repeats", type=COUNT, metavar="N", help="permutations of each feature (2 to 10, the fewer the rows)")
@click.option("--margin", type=click.FloatRange(0, 1), default=0.001, help="loss of what decides that is none (.001)")
@click.option("--candidates", type=COUNT, default=500, metavar="N", help="of the request that is timed (500)")
@click.option("--retrain", is_flag=True, help="train without each group, or each of --features, too")
@click.option("--seeds", type=click.IntRange(min=2), metavar="N", help="of --retrain, trainings of each (3)")
@click.option("--at-once", type=COUNT, metavar="N", help="of --retrain, how many run at a time (1)")
@out_option("data.work/ablation")
def ablate(
    configuration: Configuration,
    model: str,
    retrain: bool,
    seeds: int | None,
    at_once: int | None,
    out: Path | None,
    **options: Any,
) -> None:
    if not retrain and (seeds or at_once):
        raise UserError("--seeds and --at-once belong to --retrain; exchanging features trains nothing")
    settings = configuration.settings
    from mmoe_rec.jobs.ablation import PLACE, Ablation, ablate_model

    out = out or Path(settings.data.work) / PLACE
    trainings = (seeds or 3) if retrain else 0
    report = ablate_model(settings, model, out, Ablation(**options, seeds=trainings, at_once=at_once or 1))
    from mmoe_rec.report.ablation import FILE, PAGE, terminal_parts

    show(terminal_parts(report))
    print(f"all values: {out / FILE}")
    print(f"report: {out / PAGE}")
