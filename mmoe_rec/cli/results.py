"""Commands on a trained model: `baselines`, `promote`, `tune-weights` and `report`."""

import re
from pathlib import Path

import click

from mmoe_rec.cli.main import MODEL, Configuration, out_option, settings_command, show, show_report
from mmoe_rec.errors import UserError


@settings_command()
@click.option("--model", metavar="M", help=f"the model beside them: {MODEL}")
@out_option("data.work_dir/baselines")
def baselines(configuration: Configuration, model: str | None, out: Path | None) -> None:
    """mmoe-rec baselines --config configs/shop.yaml --model models:/shop@champion

    Trains what a model has to beat on the same encoded rows, popularity and gradient-boosted trees (LightGBM) for each
    task, and measures them on the test rows. With `--model` the model stands beside them, with the differences of all
    metrics and a verdict. Writes `report.html`, `metrics.json` and others to `data.work_dir`/baselines.

    Trees get all inputs but placement and lists of ids (histories). The selecting validation rows choose how many trees
    there are, at most 1,000, how large they are, where training rows are at most 500,000, and what stands: trees
    without ids, with ids, numbered by falling frequency, with the mean label of each id in other requests, or the mean
    of the best two; and they calibrate all, as `training.calibration` says of a model. Trees learn from the last two
    million training rows, or fewer of more than a hundred inputs, which takes some seven gigabytes.
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
@click.option("--challenger", metavar="V", help="number of the version, or an alias that it holds")
@click.option("--rollback", is_flag=True, help="give the alias back to the version before")
@out_option("data.work_dir/promotion")
def promote(configuration: Configuration, challenger: str | None, rollback: bool, out: Path | None) -> None:
    """mmoe-rec promote --config configs/complete_journey.yaml --challenger challenger

    Gives the alias (`tracking.alias`) to a version of the registered model, if that is shown to be better than the
    version that holds it: on the settings' test rows, which neither may have seen, by `evaluation.primary_metric`, with
    no loss for any task (`evaluation.max_metric_drop`). Writes the report of both to `data.work_dir`/promotion, and
    keeps the verdict with the version. The exit code is 0 where the version holds the alias, and 1 where it was
    refused.

    `--rollback` gives the alias back to the version that held it before.
    """
    if (challenger is None) != rollback:
        raise UserError("give the version that is to be promoted with --challenger, or --rollback alone")
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
@click.option("--goal", metavar="TASK", help="the task that is to be served better (default: the first one)")
@click.option("--max-drop", multiple=True, metavar="TASK=LOSS...", help="NDCG@10 that another task may lose at most")
@click.option("--predictions", nargs=2, metavar="V T", help="of validation and test rows (default: in data.work_dir)")
@out_option("data.work_dir/tradeoffs")
def tune_weights(
    configuration: Configuration,
    goal: str | None,
    max_drop: tuple[str, ...],
    predictions: tuple[str, str] | None,
    out: Path | None,
) -> None:
    """mmoe-rec tune-weights --config configs/shop.yaml --goal bought

    Tries other weights of the tasks in a model's score, and picks those that rank best for one task (`--goal`) while
    the others lose no more NDCG@10 than they may (`--max-drop rebought=0.002`, else `evaluation.max_metric_drop`). It
    reads the predictions that `evaluate --split validation` and `evaluate` wrote: the validation rows choose, and the
    test rows say what the choice gains and costs. Prints the front, weights that no others beat for all tasks, and
    writes a report of all weights. Put the weights into the settings as `score_weight`, or send them with a request as
    `task_weights`.
    """
    settings, margins = configuration.settings, dict[str, float]()
    for word in max_drop:
        if (found := re.fullmatch(r"([^=]+)=(\d*\.?\d+)", word)) is None:
            raise UserError(f"--max-drop takes TASK=LOSS, such as rebought=0.002; found '{word}'")
        margins[found[1]] = float(found[2])
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

    All that is known of one `data.work_dir` on one page, the verdicts first: its data (`inspect`), the last training,
    evaluations, baselines, comparisons of variants, and the search for settings. It says what is missing, with the
    command that makes it, and what is out of date, as features were built anew since, another model was trained, or
    settings changed. Nothing is computed: it reads what those commands have left, and writes `report.html`, one file
    that needs nothing else, to `data.work_dir`/report.
    """
    settings = configuration.settings
    from mmoe_rec.preprocessing.build_inputs import check_output_folder
    from mmoe_rec.report.report_files import write_report
    from mmoe_rec.training.combined_report import combine_reports

    out = out or Path(settings.data.work_dir) / "report"
    check_output_folder(out, settings)
    joined = combine_reports(settings, lambda word, *words: f"mmoe-rec {word} {configuration.options(*words)}")
    write_report(joined, out)
    show_report(joined)
    print(f"report: {out / 'report.html'}")
