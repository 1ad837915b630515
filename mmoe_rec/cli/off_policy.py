"""mmoe-rec off-policy --log data/shown --tasks clicked --columns target=p_new

What another policy would have gained, from a log of what was shown and with which probability: SNIPS and, where a
model's expectations are there, doubly robust estimates of the mean label, with intervals over users, for weights
clipped at several caps. A row has a `user`, the `propensity` with which the logging policy chose what it shows, the
probability with which the `target` policy would choose the same, and label_TASK; maybe predicted_TASK, what a model
expects of what was shown, and expected_TASK, what it expects of the target's choices. `--columns` says what they are
called, `--where COLUMN=VALUE` which rows count, such as those of a randomised part.

There is no estimate, and a sentence says why, where the log can't have shown what the target shows.
"""

from __future__ import annotations

from pathlib import Path

import click

from mmoe_rec.cli.command import COUNT, FOLDER, show
from mmoe_rec.cli.main import command


@command(__doc__)
@click.option("--log", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
@click.option("--tasks", multiple=True, required=True, metavar="T...", help="whose mean label is estimated")
@click.option("--columns", multiple=True, metavar="PART=COLUMN...", help="names of columns")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE...", help="the rows that count")
@click.option("--resamples", type=COUNT, default=1000, metavar="N", help="redraws of the users (default: 1000)")
@click.option("--out", type=FOLDER, default="off_policy", metavar="DIR", help="where off_policy.json goes")
def off_policy(
    log: str,
    tasks: tuple[str, ...],
    columns: tuple[str, ...],
    where: tuple[str, ...],
    resamples: int,
    out: Path,
) -> None:
    """Runs the command."""
    from mmoe_rec.jobs.off_policy import PolicyQuestion, estimate_policy
    from mmoe_rec.report.tables import show_estimates

    question = PolicyQuestion.of(tasks, columns, where)
    show(show_estimates(estimate_policy(question, log, out, resamples)))
    print(f"estimates: {out / 'off_policy.json'}")
