"""python -m pipelines.evaluation.baselines --config configs/shop.yaml --model models:/shop@champion

Trains what a model has to beat on the same encoded rows, popularity and gradient-boosted trees for each task, and
measures them on the test rows. With `--model` the model stands beside them, with the differences of all metrics and a
verdict. Writes `report.html`, `metrics.json` and others to `data.work`/baselines.

Trees get all inputs but placement and lists of ids; of an id the 254 most frequent values. They stop growing by the
validation rows, and learn from the last two million training rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import read_command, show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="the model beside them: models:/NAME@ALIAS, runs:/..., or a folder"
    )
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: data.work/baselines)")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    from pathlib import Path

    from mmoe_rec.jobs.baselines import measure_baselines
    from mmoe_rec.jobs.evaluate import evaluate_model
    from mmoe_rec.jobs.places import check_out, short_names
    from mmoe_rec.report.tables import show_results

    check_out(Path(arguments.out or Path(settings.data.work) / "baselines"), settings)
    out, evaluated, name = Path(arguments.out or Path(settings.data.work) / "baselines"), None, ""
    if arguments.model is not None:
        (name,) = short_names([arguments.model])
        evaluated = evaluate_model(settings, arguments.model, Path(settings.data.work) / "evaluation")
    show(show_results(measure_baselines(settings, out, evaluated, name)))
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
