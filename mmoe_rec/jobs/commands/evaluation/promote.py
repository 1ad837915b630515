"""python -m pipelines.evaluation.promote --config configs/complete_journey.yaml --challenger challenger

Gives the alias (`tracking.alias`) to a version of the registered model, if that is shown to be better than the version
that holds it: on the settings' test rows, which neither may have seen, by `evaluation.decide_by`, with no loss for any
task (`evaluation.margin`), and answering as fast. Writes the report of both to `data.work`/promotion, and keeps the
verdict with the version. The exit code is 0 where the version holds the alias, and 1 where it was refused.

`--rollback` gives the alias back to the version that held it before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.jobs.commands.command import number_between, read_command, show

REFUSED = 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--challenger", metavar="V", help="number of the version, or an alias that it holds")
    parser.add_argument("--name", metavar="N", help="registered model (default: that of the settings)")
    parser.add_argument("--rollback", action="store_true", help="give the alias back to the version before")
    parser.add_argument(
        "--slower-at-most",
        type=number_between(0.1, 1000),
        default=1.5,
        metavar="X",
        help="how many times as long the version may take to answer (default: 1.5)",
    )
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: data.work/promotion)")


@exit_with_message()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments, settings = read_command(__doc__ or "", argv, _add_arguments)
    if (arguments.challenger is None) != arguments.rollback:
        raise UserError("give the version that is to be promoted with --challenger, or --rollback alone")
    from pathlib import Path

    from mmoe_rec.jobs.promote import PromotionRequest, promote_version, roll_back
    from mmoe_rec.report.tables import show_results

    name, uri = arguments.name or settings.registered_model, settings.tracking.address
    if arguments.rollback:
        show(roll_back(name, settings.tracking.alias, uri).reasons)
        return
    out = Path(arguments.out or Path(settings.data.work) / "promotion")
    asked = PromotionRequest(name, arguments.challenger, settings.tracking.alias, arguments.slower_at_most)
    decision = promote_version(settings, asked, out)
    if decision.results is not None:
        show(show_results(decision.results))
        print(f"report: {out / 'report.html'}")
    show(decision.reasons)
    if not decision.promoted:
        raise SystemExit(REFUSED)
