"""python -m pipelines.score --model models:/complete_journey@champion --input data/complete_journey/log --output scores

Scores a log, or lists of candidates, in Parquet: writes each row's request, user, candidate and time, every task's
prediction (predicted_TASK), the score, its rank within the request (1 is best) and the model's address and version, as
Parquet files in the order of the input, with a _manifest.json. The same command again goes on where it was cut short.

--as-of says what counters and histories know. `log`: what is known before each request in the log that is given, as in
an evaluation; it needs the columns of labels, null where nothing is known yet, and the past of the rows that matter.
`tables`: what the model itself remembers, as in the model server; it needs no labels. Settings are those that the model
was trained with; overrides may follow, such as --data.workers 2, --data.events.NAME.path P or --tracking.uri U.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from mmoe_rec.errors import exit_with_message
from mmoe_rec.jobs.commands.command import SentenceParser
from mmoe_rec.program import spelled
from mmoe_rec.settings.sections import EngineName


def _parser() -> argparse.ArgumentParser:
    doc = spelled(__doc__ or "")
    parser = SentenceParser(
        prog=" ".join(doc.split("--")[0].split()),
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="M", help="models:/NAME@ALIAS, runs:/..., or a model's folder"
    )
    parser.add_argument("--input", required=True, metavar="LOG", help="a folder of Parquet files, one file, or a glob")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder, or one with scores")
    parser.add_argument(
        "--as-of", choices=["log", "tables"], default="log", help="what counters and histories know (default: log)"
    )
    parser.add_argument("--start", metavar="T", help="score rows requested at that time or later; others are the past")
    parser.add_argument("--end", metavar="T", help="score rows requested before that time")
    parser.add_argument("--labels", action="store_true", help="write labels too (label_TASK), for the command metrics")
    parser.add_argument("--engine", choices=get_args(EngineName), help="local, or ray for a Ray cluster")
    return parser


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, overrides = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    from mmoe_rec.jobs.score import microseconds, score_log

    overrides += ["--data.engine", arguments.engine] if arguments.engine else []
    start, end = (None if each is None else microseconds(each) for each in (arguments.start, arguments.end))
    done = score_log(
        arguments.model, arguments.input, arguments.output, arguments.as_of, (start, end), overrides, arguments.labels
    )
    about = done.manifest
    if done.before:
        print("these rows were already scored, by the same model and settings")
    print(f"{about['rows']:,} rows scored by {about['model']} (version {about['model_version']})")
    print(f"note: {about['meaning']}")
    if learnt := about.get("learnt"):  # scores of before there was it do not say
        print(f"warning: the model {learnt}")
    print(f"scores: {done.folder}")
