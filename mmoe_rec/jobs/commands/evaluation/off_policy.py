"""python -m pipelines.evaluation.off_policy --log data/shown --tasks clicked --columns target=p_new

What another policy would have gained, from a log of what was shown and with which probability: SNIPS and, where a
model's expectations are there, doubly robust estimates of the mean label, with intervals over users, for weights
clipped at several caps. A row has a `user`, the `propensity` with which the logging policy chose what it shows, the
probability with which the `target` policy would choose the same, and label_TASK; maybe predicted_TASK, what a model
expects of what was shown, and expected_TASK, what it expects of the target's choices. `--columns` says what they are
called, `--where COLUMN=VALUE` which rows count, such as those of a randomised part.

There is no estimate, and a sentence says why, where the log can't have shown what the target shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import count, parsed, show


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log", required=True, metavar="P", help="a folder of Parquet files, one, or a glob")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help="whose mean label is estimated")
    parser.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN", help="names of columns")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="the rows that count")
    parser.add_argument(
        "--resamples", type=count, default=1000, metavar="N", help="redraws of the users (default: 1000)"
    )
    parser.add_argument("--out", default="off_policy", metavar="DIR", help="where off_policy.json goes")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = parsed(__doc__ or "", argv, _add_arguments, config=False)
    from pathlib import Path

    from mmoe_rec.jobs.off_policy import PolicyQuestion, estimate_policy
    from mmoe_rec.report.tables import show_estimates

    asked = PolicyQuestion.of(arguments.tasks, arguments.columns, arguments.where)
    show(show_estimates(estimate_policy(asked, arguments.log, Path(arguments.out), arguments.resamples)))
    print(f"estimates: {Path(arguments.out) / 'off_policy.json'}")
