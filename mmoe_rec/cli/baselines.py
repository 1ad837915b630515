"""mmoe-rec baselines --config configs/shop.yaml --model models:/shop@champion

Trains what a model has to beat on the same encoded rows, popularity and gradient-boosted trees (LightGBM) for each
task, and measures them on the test rows. With `--model` the model stands beside them, with the differences of all
metrics and a verdict. Writes `report.html`, `metrics.json` and others to `data.work`/baselines.

Trees get all inputs but placement and lists of ids (histories). The selecting validation rows choose how many trees
there are, at most 1,000, how large they are, where training rows are at most 500,000, and what stands: trees without
ids, with ids, numbered by falling frequency, with the mean label of each id in other requests, or the mean of the best
two; and they calibrate all, as `training.calibration` says of a model. Trees learn from the last two million training
rows, or fewer of more than a hundred inputs, which takes some seven gigabytes.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import MODEL, Configuration, out_option, settings_command, show_report


@settings_command(__doc__)
@click.option("--model", metavar="M", help=f"the model beside them: {MODEL}")
@out_option("data.work/baselines")
def baselines(configuration: Configuration, model: str | None, out: Path | None) -> None:
    from mmoe_rec.evaluation.evaluate import evaluate_model
    from mmoe_rec.preprocessing.logs import check_out, short_names
    from mmoe_rec.training.baselines import measure_baselines

    settings = configuration.settings
    work = Path(settings.data.work)
    out = out or work / "baselines"
    check_out(out, settings)
    evaluated, name = None, ""
    if model is not None:
        name = short_names([model])[model]
        evaluated = evaluate_model(settings, model, work / "evaluation")
    from mmoe_rec.evaluation.results_report import make_report

    show_report(make_report(measure_baselines(settings, out, evaluated, name)))
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")
