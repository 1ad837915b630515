"""mmoe-rec promote --config configs/complete_journey.yaml --challenger challenger

Gives the alias (`tracking.alias`) to a version of the registered model, if that is shown to be better than the version
that holds it: on the settings' test rows, which neither may have seen, by `evaluation.decide_by`, with no loss for any
task (`evaluation.margin`). Writes the report of both to `data.work`/promotion, and keeps the verdict with the version.
The exit code is 0 where the version holds the alias, and 1 where it was refused.

`--rollback` gives the alias back to the version that held it before.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import Configuration, out_option, settings_command, show, show_report
from mmoe_rec.errors import UserError

REFUSED = 1


@settings_command(__doc__)
@click.option("--challenger", metavar="V", help="number of the version, or an alias that it holds")
@click.option("--rollback", is_flag=True, help="give the alias back to the version before")
@out_option("data.work/promotion")
def promote(configuration: Configuration, challenger: str | None, rollback: bool, out: Path | None) -> None:
    if (challenger is None) != rollback:
        raise UserError("give the version that is to be promoted with --challenger, or --rollback alone")
    from mmoe_rec.evaluation.promotion import promote_version, roll_back

    settings = configuration.settings
    if challenger is None:
        show(roll_back(settings).reasons)
        return
    out = out or Path(settings.data.work) / "promotion"
    decision = promote_version(settings, challenger, out)
    if decision.results is not None:
        from mmoe_rec.evaluation.results_report import make_report

        show_report(make_report(decision.results))
        print(f"report: {out / 'report.html'}")
    show(decision.reasons)
    if not decision.promoted:
        raise SystemExit(REFUSED)
