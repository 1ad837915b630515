"""mmoe-rec evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Measure ranking quality and prediction quality. Print a table. Write a report and `metrics.json` to --out (default:
`data.work_dir`/evaluation, or evaluation_validation).

`--model M` scores the rows of a split with a model, named by its MLflow URI or its folder. The command writes the
scored rows to `predictions.parquet` and logs the metrics to the run that trained the model. `--split validation`
measures the rows that selected the model's checkpoint, which keeps the test rows fresh.

`--predictions P` measures Parquet files of predictions instead. The files come from `score --labels`, from `evaluate
--model` or from any other system. Each row has a user, a request, a prediction (predicted_TASK) and a label
(label_TASK, null if unobserved) for each task, and the score that ranked the candidates. Without a score column, the
weighted predictions rank the candidates. A row may also have a candidate, and a weight in the metrics of tasks. If
columns have other names, map them with `--columns`, such as request=day+basket. Name the tasks in the settings or with
`--tasks`. Write NAME for a binary task, NAME:regression for a regression task, and =WEIGHT for its weight in a row's
relevance, such as `--tasks bought stars:regression=0.2`.

`--compare-to` compares with other models, or with other predictions of the same rows. The command prints the
differences of all metrics with intervals, and names the better model. A better model has the better
`evaluation.primary_metric` and no loss beyond `evaluation.max_metric_drop` for any task. `--slices` (default:
`evaluation.slices`) also measures groups of rows, by columns of the log or of the files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mmoe_rec.cli.main import FOLDER, MODEL, Configuration, settings_command, show_report, slices_option
from mmoe_rec.errors import UserError

if TYPE_CHECKING:
    from mmoe_rec.evaluation.comparison import Results
    from mmoe_rec.settings.sections import Evaluation, Settings


@settings_command(__doc__, needs_file=False)
@click.option("--model", metavar="M", help=MODEL)
@click.option("--predictions", metavar="P", help="folder, file or glob of predictions, instead of --model")
@click.option("--compare-to", multiple=True, metavar="M...", help="other models or predictions for a comparison")
@click.option(
    "--split", type=click.Choice(["test", "validation"]), help="split to measure with --model (default: test)"
)
@slices_option
@click.option("--tasks", multiple=True, metavar="T...", help="predicted tasks, without a settings file")
@click.option("--columns", multiple=True, metavar="PART=COLUMN...", help="column names in --predictions")
@click.option("--compare-to-columns", multiple=True, metavar="PART=COLUMN...", help="column names in --compare-to")
@click.option("--keep-duplicates", is_flag=True, help="whether requests of --predictions may repeat candidates")
@click.option("--out", type=FOLDER, metavar="DIR", help="folder for results (default with --predictions: metrics)")
@click.option("--resamples", type=click.IntRange(min=20), metavar="N", help="number of bootstrap resamples")
def evaluate(
    configuration: Configuration | None,
    model: str | None,
    predictions: str | None,
    compare_to: tuple[str, ...],
    split: Literal["test", "validation"] | None,
    slices: tuple[str, ...],
    out: Path | None,
    resamples: int | None,
    **file_options: Any,
) -> None:
    if (model is None) == (predictions is None):
        raise UserError(f"Give {'only one' if model else 'one'} of --model and --predictions.")
    from mmoe_rec.settings.sections import Evaluation

    changes = {name: value for name, value in (("resamples", resamples), ("slices", slices)) if value}
    settings = None if configuration is None else configuration.settings
    rules = (Evaluation() if settings is None else settings.evaluation).model_copy(update=changes)
    if predictions is not None:
        if split is not None:
            raise UserError("--split requires --model. Leave --split out with --predictions.")
        out = out or Path("metrics")
        results = _measure_files(settings, rules, predictions, out, compare_to, **file_options)
    else:
        if file_option := next((name for name, value in file_options.items() if value), None):
            raise UserError(f"--{file_option.replace('_', '-')} requires --predictions. Leave it out with --model.")
        if settings is None or model is None:
            raise UserError("--model requires the settings. Add --config C.")
        from mmoe_rec.preprocessing.build_inputs import short_names
        from mmoe_rec.tracking.registry import resolve_model

        short = short_names([model, *compare_to])
        models = {name: resolve_model(uri, settings.tracking.resolved_uri) for uri, name in short.items()}
        from mmoe_rec.evaluation.evaluate import PREDICTIONS_FILE, evaluate_models, evaluation_folder

        split = split or "test"
        out = out or Path(settings.data.work_dir) / evaluation_folder(split)
        settings = settings.model_copy(update={"evaluation": rules})
        results = evaluate_models(settings, models, out, split)
    from mmoe_rec.evaluation.results_report import make_report

    show_report(make_report(results))
    if model is not None:
        print(f"predictions: {out / PREDICTIONS_FILE}")
    print(f"metrics: {out / 'metrics.json'}")
    print(f"report: {out / 'report.html'}")


def _measure_files(
    settings: Settings | None,
    rules: Evaluation,
    predictions: str,
    out: Path,
    compare_to: tuple[str, ...],
    *,
    tasks: tuple[str, ...],
    columns: tuple[str, ...],
    compare_to_columns: tuple[str, ...],
    keep_duplicates: bool,
) -> Results:
    """Measure predictions in files, with the tasks of the settings or of the option `--tasks`."""
    if (settings is None) != bool(tasks):
        problem = "both are given" if tasks else "neither is given"
        raise UserError(f"Name the tasks with either --config C or --tasks ({problem}).")
    if compare_to_columns and not compare_to:
        raise UserError("--compare-to-columns requires --compare-to. Add --compare-to.")
    from mmoe_rec.evaluation.prediction_files import columns_from_settings, evaluate_predictions, parse_tasks
    from mmoe_rec.evaluation.slices import SliceSpec

    if settings is not None:
        _check_weights(settings, columns)
    if rules.guardrail_slices is not None:  # The files don't say which users and candidates were in training.
        guarded = tuple(text for text in rules.guardrail_slices if text in rules.slices)
        rules = rules.model_copy(update={"guardrail_slices": guarded})
    rows = parse_tasks(tasks) if settings is None else columns_from_settings(settings)
    rows = replace(rows.with_columns(columns), slices=tuple(SliceSpec.parse(text) for text in rules.slices))
    rows = replace(rows, duplicates="keep") if keep_duplicates else rows
    return evaluate_predictions(rows, predictions, out, rules, compare_to, compare_to_columns)


def _check_weights(settings: Settings, columns: tuple[str, ...]) -> None:
    """Raise UserError if the settings weight rows by their sampling rate and `columns` names no weight column."""
    is_weighted = settings.training.sampling_correction == "weights"
    if is_weighted and not any(column.startswith("weight=") for column in columns):
        weight = settings.columns.weight
        raise UserError(
            f"The settings weight rows by {'1' if weight is None else repr(weight)} / sampling rate "
            "(training.sampling_correction). Name the weight column with --columns weight=COLUMN, or set "
            "--training.sampling_correction to none."
        )
