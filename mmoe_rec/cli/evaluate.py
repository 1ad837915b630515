"""mmoe-rec evaluate --config configs/complete_journey.yaml --model models:/complete_journey@champion

Measures how well candidates are ranked and behavior is predicted. Prints a table, and writes a report and
`metrics.json` to --out (default: `data.work_dir`/evaluation, or evaluation_validation).

`--model M` scores the rows of a split with a model: its URI in MLflow, or its folder. The scored rows are written to
`predictions.parquet`, and the metrics are logged to the run that trained the model. `--split validation` takes the rows
that chose the model's state instead, so that the test rows stay fresh.

`--predictions P` measures Parquet files of predictions instead: the files of `score --labels`, of `evaluate --model` or
of any other system. A row has a user, a request, for each task a prediction (predicted_TASK) and a label (label_TASK,
null where unobserved), and the score by which the candidates of its request were ranked. Without a score, the
predictions rank them, by the weights of the tasks. A row may have a candidate, and a weight by which it counts in
metrics of tasks. `--columns` names columns that are called otherwise, such as request=day+basket. The tasks are those
of the settings, or of `--tasks`: NAME for a binary task, NAME:regression for another, each maybe with its weight in
what a row is worth, such as `--tasks bought stars:regression=0.2`.

`--compare-to` compares with other models, or with other predictions of the same rows. It prints the differences of all
metrics with intervals, and says which is better: by `evaluation.primary_metric`, with no loss for any task
(`evaluation.max_metric_drop`). `--slices` (default: `evaluation.slices`) measures parts of the rows too, by columns of
the log or of the files.
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
@click.option("--predictions", metavar="P", help="instead of a model: a folder of Parquet files, one, or a glob")
@click.option("--compare-to", multiple=True, metavar="M...", help="other models, or predictions, to compare with")
@click.option("--split", type=click.Choice(["test", "validation"]), help="rows of a model to measure (test)")
@slices_option
@click.option("--tasks", multiple=True, metavar="T...", help="what was predicted, without a settings file")
@click.option("--columns", multiple=True, metavar="PART=COLUMN...", help="names of columns of --predictions")
@click.option("--compare-to-columns", multiple=True, metavar="PART=COLUMN...", help="names that differ in --compare-to")
@click.option("--keep-duplicates", is_flag=True, help="a request of --predictions may hold a candidate twice")
@click.option("--out", type=FOLDER, metavar="DIR", help="where metrics.json goes (of --predictions: metrics)")
@click.option("--resamples", type=click.IntRange(min=20), metavar="N", help="redraws of the users, for the intervals")
def evaluate(
    configuration: Configuration | None,
    model: str | None,
    predictions: str | None,
    compare_to: tuple[str, ...],
    split: Literal["test", "validation"] | None,
    slices: tuple[str, ...],
    out: Path | None,
    resamples: int | None,
    **of_files: Any,
) -> None:
    if (model is None) == (predictions is None):
        raise UserError(f"give {'one' if model else 'either'} of --model and --predictions; --help says how")
    from mmoe_rec.settings.sections import Evaluation

    changes = {name: value for name, value in (("resamples", resamples), ("slices", slices)) if value}
    settings = None if configuration is None else configuration.settings
    rules = (Evaluation() if settings is None else settings.evaluation).model_copy(update=changes)
    if predictions is not None:
        if split is not None:
            raise UserError("--split chooses rows of the log for --model; name files with --predictions")
        out = out or Path("metrics")
        results = measure_files(settings, rules, predictions, out, compare_to, **of_files)
    else:
        if given := next((name for name, value in of_files.items() if value), None):
            raise UserError(f"--{given.replace('_', '-')} is an option of --predictions; leave it out with --model")
        if settings is None or model is None:
            raise UserError("--model needs the settings that name its rows: give --config C")
        from mmoe_rec.preprocessing.build_inputs import short_names
        from mmoe_rec.tracking.registry import resolve_model

        short = short_names([model, *compare_to])
        models = {name: resolve_model(each, settings.tracking.resolved_uri) for each, name in short.items()}
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


def measure_files(
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
    """Measure predictions in files, by the tasks of settings or of the options, which are those of the command."""
    if (settings is None) != bool(tasks):
        given = "both are given" if tasks else "neither is given"
        raise UserError(f"give the tasks by --config C or by --tasks, one of the two ({given}); --help says how")
    if compare_to_columns and not compare_to:
        raise UserError("--compare-to-columns names columns of the files of --compare-to, which is not given")
    from mmoe_rec.evaluation.prediction_files import columns_from_settings, evaluate_predictions, parse_tasks
    from mmoe_rec.evaluation.slices import SliceSpec

    if settings is not None:
        _check_weights(settings, columns)
    if rules.guardrail_slices is not None:  # users and candidates of training are unknown
        guarded = tuple(each for each in rules.guardrail_slices if each in rules.slices)
        rules = rules.model_copy(update={"guardrail_slices": guarded})
    rows = parse_tasks(tasks) if settings is None else columns_from_settings(settings)
    rows = replace(rows.with_columns(columns), slices=tuple(SliceSpec.parse(each) for each in rules.slices))
    rows = replace(rows, duplicates="keep") if keep_duplicates else rows
    return evaluate_predictions(rows, predictions, out, rules, compare_to, compare_to_columns)


def _check_weights(settings: Settings, columns: tuple[str, ...]) -> None:
    """Raise UserError where settings weigh rows by their sampling rate, and no column of weights is named."""
    weighed = settings.training.sampling_correction == "weights"
    if weighed and not any(each.startswith("weight=") for each in columns):
        weight = settings.columns.weight
        raise UserError(
            f"the settings weigh rows by {'1' if weight is None else repr(weight)} / their sampling rate "
            "(training.sampling_correction): name a column that holds these weights with --columns weight=COLUMN, or "
            "set --training.sampling_correction to none"
        )
