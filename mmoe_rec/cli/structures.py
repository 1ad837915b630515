"""mmoe-rec structures --config configs/shop.yaml --seeds 5

Tells which structure of the network the log rewards, and which tasks help each other: trains a shared bottom (one
expert), one gate for all tasks, a gate for each (MMoE), two levels of experts (PLE), each task alone, all tasks but
one, and boosted trees, each with several seeds on the same features, and compares them with the settings' own structure
on the test rows. The verdicts come first, by intervals over trainings and users, corrected for the number of questions
(Holm); then what to write into the settings, if something simpler is as good; then the table.

All have the same rows, steps and rates, and experts with as many units. Trees beside the network
(`model.trees`) take no part: they hide what structures are worth. Nothing is registered. Trainings that have ended stay
in `data.work`/structures: the same command goes on after a stop or a kill.
"""

from __future__ import annotations

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, settings_command, show


@settings_command(__doc__)
@click.option("--seeds", type=click.IntRange(min=2), default=5, metavar="N", help="trainings of each (default: 5)")
@click.option("--at-once", type=COUNT, default=1, metavar="N", help="how many run at a time (default: 1)")
def structures(configuration: Configuration, seeds: int, at_once: int) -> None:
    from mmoe_rec.jobs.structures import FILE, FOLDER, PAGE, compare_structures
    from mmoe_rec.report.structures import terminal_parts

    settings = configuration.settings
    show(terminal_parts(compare_structures(settings, seeds, at_once)))
    folder = Path(settings.data.work) / FOLDER
    print(f"all values: {folder / FILE}")
    print(f"report: {folder / PAGE}")
