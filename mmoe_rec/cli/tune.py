"""mmoe-rec tune --config configs/complete_journey.yaml --minutes 30
mmoe-rec tune --config configs/complete_journey.yaml --trials 20

Searches for better settings (Optuna's tree-structured Parzen estimator) under `tuning.search` of the settings. Without
it, varies epochs, batch, learning rates, weight decay, dropout, crosses and experts around the settings' own values.
Trials that fall behind the median are cut short, and values that don't go together are left out.

A least-squares fit over the trials estimates what each value gives. The best trial or the best values by the fit,
whichever new runs on the selecting validation rows prefer, is compared with the settings by further runs on the judging
rows. If it is better, the command prints the overrides to adopt, and `data.work_dir`/tuning/best.yaml has them;
otherwise best.yaml has the settings as they are. Test rows play no part.

--minutes covers trials and confirmation. In a short time the fit chooses alone and fewer runs confirm, but at least 3,
for which the command may take longer. After a stop, repeat the command: complete trials and runs stay.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command, show_report


@settings_command(__doc__)
@click.option("--minutes", type=NumberBetween(min=0, min_open=True), metavar="M", help="time (default: no limit)")
@click.option("--trials", type=COUNT, metavar="N", help="number of trials (default: 20, with --minutes no limit)")
@click.option("--seeds", type=COUNT, default=5, metavar="N", help="runs that confirm the result (default: 5)")
def tune(configuration: Configuration, minutes: float | None, trials: int | None, seeds: int) -> None:
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(settings).logs  # a log that is missing is reported before torch is loaded
    from mmoe_rec.experiments.compare import make_report
    from mmoe_rec.experiments.tuning import BEST_FILE, TUNING_FOLDER, tune_settings
    from mmoe_rec.report.report_files import REPORT_PAGE

    trials = 20 if trials is None and minutes is None else trials
    show_report(make_report(tune_settings(settings, minutes, trials, seeds)))
    folder = Path(settings.data.work_dir) / TUNING_FOLDER
    print(f"report: {folder / REPORT_PAGE}")
    print(f"next: mmoe-rec train --config {folder / BEST_FILE}")
