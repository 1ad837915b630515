"""Commands on a trained model: `baselines`, `promote`, `tune-weights` and `report`."""

import re
from pathlib import Path

import click

from mmoe_rec.cli.main import MODEL, Configuration, out_option, settings_command, show, show_report
from mmoe_rec.errors import UserError


@settings_command()
@click.option("--model", metavar="M", help=f"{MODEL} to compare with")
@out_option("data.work_dir/baselines")
def baselines(configuration: Configuration, model: str | None, out: Path | None) -> None:
    """mmoe-rec baselines --config configs/shop.yaml --model models:/shop@champion

    Train two baselines on the same encoded rows, popularity and gradient-boosted trees (LightGBM) for each task, and
    measure them on the test rows. With `--model`, add the model, the differences of all metrics and a verdict. The
    command writes `report.html`, `metrics.json` and other files to `data.work_dir`/baselines.

    Trees read all inputs except placement and ID lists (histories). Validation rows select the number of trees, at most
    1,000, and their size if there are at most 500,000 training rows. They also select the inputs: trees without IDs,
    with IDs numbered by falling frequency, with the mean label of each ID in other requests, or the mean of the best
    two. The same rows calibrate the trees as `training.calibration` says. Trees learn from the last two million
    training rows, or from fewer rows if there are more than a hundred inputs. This takes about 7 GB of memory.
    """
    from mmoe_rec.evaluation.evaluate import evaluate_model
    from mmoe_rec.preprocessing.build_inputs import check_output_folder, short_names
    from mmoe_rec.training.baselines import measure_baselines

    settings = configuration.settings
    work = Path(settings.data.work_dir)
    out = out or work / "baselines"
    check_output_folder(out, settings)
    evaluated, name = None, ""
    if model is not None:
        name = short_names([model])[model]
        evaluated = evaluate_model(settings, model, work / "evaluation")
    from mmoe_rec.evaluation.results_report import make_report

    show_report(make_report(measure_baselines(settings, out, evaluated, name)))
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")


REFUSED_EXIT_CODE = 1


@settings_command()
@click.option("--challenger", metavar="V", help="number or alias of the version to promote")
@click.option("--rollback", is_flag=True, help="whether to return the alias to the previous version")
@out_option("data.work_dir/promotion")
def promote(configuration: Configuration, challenger: str | None, rollback: bool, out: Path | None) -> None:
    """mmoe-rec promote --config configs/complete_journey.yaml --challenger challenger

    Give the alias (`tracking.alias`) to a version of the registered model if that version is significantly better than
    the current version. Neither version may have seen the test rows of the settings. The metric is
    `evaluation.primary_metric`, and no task may lose more than `evaluation.max_metric_drop`. The command writes a
    report to `data.work_dir`/promotion and saves the verdict with the version. The exit code is 0 if the version has
    the alias, and 1 if it was refused.

    `--rollback` returns the alias to the previous version.
    """
    if (challenger is None) != rollback:
        raise UserError("Give either --challenger V or --rollback.")
    from mmoe_rec.evaluation.promotion import promote_version, roll_back

    settings = configuration.settings
    if challenger is None:
        show(roll_back(settings).reasons)
        return
    out = out or Path(settings.data.work_dir) / "promotion"
    decision = promote_version(settings, challenger, out)
    if decision.results is not None:
        from mmoe_rec.evaluation.results_report import make_report

        show_report(make_report(decision.results))
        print(f"report: {out / 'report.html'}")
    show(decision.reasons)
    if not decision.promoted:
        raise SystemExit(REFUSED_EXIT_CODE)


@settings_command()
@click.option("--goal", metavar="TASK", help="task whose ranking to improve (default: the first task)")
@click.option("--max-drop", multiple=True, metavar="TASK=LOSS...", help="largest loss of NDCG@10 for another task")
@click.option(
    "--predictions", nargs=2, metavar="V T", help="files of validation and test predictions (default: in data.work_dir)"
)
@out_option("data.work_dir/tradeoffs")
def tune_weights(
    configuration: Configuration,
    goal: str | None,
    max_drop: tuple[str, ...],
    predictions: tuple[str, str] | None,
    out: Path | None,
) -> None:
    """mmoe-rec tune-weights --config configs/shop.yaml --goal bought

    Choose the task weights in a model's score that rank best for one task (`--goal`). Limit the NDCG@10 that other
    tasks may lose (`--max-drop rebought=0.002`, default: `evaluation.max_metric_drop`). The command reads the
    predictions of `evaluate --split validation` and `evaluate`. Validation rows select the weights, and test rows
    measure the gains and losses. The command prints the Pareto front of the weights and writes a report of all weights.
    Put the weights into the settings as `score_weight`, or send them with a request as `task_weights`.
    """
    settings, margins = configuration.settings, dict[str, float]()
    for argument in max_drop:
        if (match := re.fullmatch(r"([^=]+)=(\d*\.?\d+)", argument)) is None:
            raise UserError(f"--max-drop takes TASK=LOSS, such as rebought=0.002, not '{argument}'")
        margins[match[1]] = float(match[2])
    from mmoe_rec.evaluation.tradeoffs import choose_weights
    from mmoe_rec.report.report_files import REPORT_PAGE, write_report

    report = choose_weights(settings, goal or next(iter(settings.tasks)), margins, predictions)
    out = out or Path(settings.data.work_dir) / "tradeoffs"
    write_report(report, out)
    show_report(report)
    print(f"report: {out / REPORT_PAGE}")


@settings_command()
@out_option("data.work_dir/report")
def report(configuration: Configuration, out: Path | None) -> None:
    """mmoe-rec report --config configs/complete_journey.yaml

    Combine all results of one `data.work_dir` into one page, verdicts first. The page covers the data (`inspect`), the
    last training run, evaluations, baselines, comparisons of variants and the search for settings. It names missing
    results with the command that makes them. It marks results as out of date if features, the model or settings have
    changed. The command computes nothing new. It writes a self-contained `report.html` to `data.work_dir`/report.
    """
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import check_output_folder
    from mmoe_rec.report.report_files import write_report
    from mmoe_rec.training.combined_report import combine_reports

    out = out or Path(settings.data.work_dir) / "report"
    check_output_folder(out, settings)
    combined = combine_reports(settings, lambda name, *options: f"mmoe-rec {name} {configuration.options(*options)}")
    write_report(combined, out)
    show_report(combined)
    print(f"report: {out / 'report.html'}")
