"""mmoe-rec tune --config configs/complete_journey.yaml --minutes 30
mmoe-rec tune --config configs/complete_journey.yaml --trials 20

Search for better settings under `tuning.search` of the settings (Optuna's tree-structured Parzen estimator). Without
`tuning.search`, vary batch size, learning rates, weight decay, dropout, crosses, experts and, unless
`training.epochs` is auto, epochs around the current values. The search stops trials that fall behind the median, and
skips invalid combinations.

Validation rows are divided by user into selection and evaluation rows. A least-squares fit over the trials estimates
the effect of each value. New runs on the selection rows choose between the best trial and the best values by the fit.
More runs compare the choice with the settings, on the evaluation rows. If the choice is better, the command prints the
overrides to adopt and writes them to `data.work_dir`/tuning/best.yaml. Otherwise best.yaml contains the settings
unchanged. The search never reads test rows.

--minutes limits trials and confirmation together. Confirmation has up to half of the time, for up to three times
--seeds runs. If little time is left, the fit alone chooses the values, and fewer runs confirm the choice. At least 3
runs confirm it even if they exceed the time. To resume after an interruption, repeat the command. Finished trials and
runs are kept.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import COUNT, Configuration, NumberBetween, settings_command, show_report


@settings_command(__doc__)
@click.option(
    "--minutes", type=NumberBetween(min=0, min_open=True), metavar="M", help="time limit in minutes (default: no limit)"
)
@click.option("--trials", type=COUNT, metavar="N", help="number of trials (default: 20, or no limit with --minutes)")
@click.option("--seeds", type=COUNT, default=5, metavar="N", help="number of runs that confirm the result (default: 5)")
def tune(configuration: Configuration, minutes: float | None, trials: int | None, seeds: int) -> None:
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import BuildInputs

    _ = BuildInputs.of(settings).logs  # Report a missing log before importing torch.
    from mmoe_rec.experiments.compare import make_report
    from mmoe_rec.experiments.tuning import BEST_FILE, TUNING_FOLDER, tune_settings
    from mmoe_rec.report.report_files import REPORT_PAGE

    trials = 20 if trials is None and minutes is None else trials
    show_report(make_report(tune_settings(settings, minutes, trials, seeds)))
    folder = Path(settings.data.work_dir) / TUNING_FOLDER
    print(f"report: {folder / REPORT_PAGE}")
    print(f"next: mmoe-rec train --config {folder / BEST_FILE}")
