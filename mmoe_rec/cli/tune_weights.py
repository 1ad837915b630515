"""mmoe-rec tune-weights --config configs/shop.yaml --goal bought

Tries other weights of the tasks in a model's score, and picks those that rank best for one task (`--goal`) while the
others lose no more NDCG@10 than they may (`--keep rebought=0.002`, else `evaluation.margin`). It reads the predictions
that `evaluate --split validation` and `evaluate` wrote: the validation rows choose, and the test rows say what the
choice gains and costs. Prints the front, weights that no others beat for all tasks, and writes a report of all weights.
Put the weights into the settings as `score_weight`, or send them with a request as `task_weights`.
"""

import re
from pathlib import Path

import click

from mmoe_rec.cli.main import Configuration, out_option, settings_command, show_report
from mmoe_rec.errors import UserError


@settings_command(__doc__)
@click.option("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
@click.option("--keep", multiple=True, metavar="TASK=LOSS...", help="NDCG@10 that another task may lose at most")
@click.option("--predictions", nargs=2, metavar="V T", help="of validation and test rows (default: in data.work)")
@out_option("data.work/tradeoffs")
def tune_weights(
    configuration: Configuration,
    goal: str | None,
    keep: tuple[str, ...],
    predictions: tuple[str, str] | None,
    out: Path | None,
) -> None:
    settings, margins = configuration.settings, dict[str, float]()
    for word in keep:
        if (found := re.fullmatch(r"([^=]+)=(\d*\.?\d+)", word)) is None:
            raise UserError(f"--keep takes TASK=LOSS, such as rebought=0.002; found '{word}'")
        margins[found[1]] = float(found[2])
    from mmoe_rec.evaluation.tradeoffs import choose_weights
    from mmoe_rec.report.report_files import PAGE, write_report

    report = choose_weights(settings, goal or next(iter(settings.tasks)), margins, predictions)
    out = out or Path(settings.data.work) / "tradeoffs"
    write_report(report, out)
    show_report(report)
    print(f"report: {out / PAGE}")
