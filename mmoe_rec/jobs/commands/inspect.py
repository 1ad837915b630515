"""python -m pipelines.inspect --config configs/complete_journey.yaml

The health of a data set before one trains on it: rows, labels by split and week, and for each feature its coverage, ids
that training does not know, drift, and how well it alone predicts each task, which finds leaks. Prepares the features
as training would, or takes existing ones; writes `health.html` and `health.json` to `data.work`/inspection.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import read_command
from mmoe_rec.program import spelled


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: data.work/inspection)")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    from pathlib import Path

    from rich.console import Console

    from mmoe_rec.inspection.health import inspect
    from mmoe_rec.jobs.places import features_in_use
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.report.terminal import show

    out = Path(arguments.out or Path(settings.data.work) / "inspection")
    with features_in_use(settings, "an inspection") as prepared:
        dims = {table.name: table.dim for table in ModelLayout.of(prepared.layout, settings).tables}
        health = inspect(settings.name, prepared, settings.schema_, dims)
    # matplotlib and Jinja2 are for what there is to be shown.
    from mmoe_rec.report.health import write

    write(health, out)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for part in show(health, console.width):
        console.print(part)
    print(f"report: {out / 'health.html'}")
    print(f"numbers: {out / 'health.json'}")
    print(
        spelled(f"next: python -m pipelines.train {shlex.join(['--config', arguments.config, *arguments.overrides])}")
    )
