"""Measures models on the rows of a split: scores encoded rows, and gives the metrics and predictions for people."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmoe_rec.atomic import atomic_file
from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset, LabeledRows, ValidationPart, row_weights
from mmoe_rec.devices import device_of, keeping_freed_memory
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.messages import describe_verdicts, find_suspicious_results
from mmoe_rec.evaluation.results_report import write_results
from mmoe_rec.evaluation.slices import RowSlicer
from mmoe_rec.evaluation.summary import MeasuredModel, find_objective_metric, flatten, measure_model
from mmoe_rec.evaluation.sums import MeasuredTask, PredictedRows
from mmoe_rec.inference.artifact import ResolvedModel, artifact_version, read_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import ROW_NUMBER_COLUMN
from mmoe_rec.inference.scored_files import format_split_value
from mmoe_rec.locks import read_lock, write_lock
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import (
    UNCALIBRATED,
    Calibration,
    add_joint_predictions,
    compute_log_scores,
    predictions,
    scores_from_log_scores,
)
from mmoe_rec.preprocessing.build_inputs import BuildInputs, check_output_folder, open_model_logs, short_names
from mmoe_rec.preprocessing.prepare import FeatureFolder, compute_fingerprint, encode_splits, find_existing_features
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.log_columns import Columns
from mmoe_rec.settings.schema import Schema
from mmoe_rec.settings.sections import Settings, diff_settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.registry import describe_version, get_version, resolve_model
from mmoe_rec.tracking.runs import bullet_list, code_block, command_line, describe_datasets

PROMOTION_FOLDER = "promotion"
"""Folder of a run's files, of what `promote` measures."""
PREDICTIONS_FILE = "predictions.parquet"
"""File of an evaluation: the measured rows of the model in question, as `evaluate --predictions` reads them."""
ID_COLUMNS = ("user", "request", "candidate")
ROWS_AT_A_TIME = 65_536


class NotFiniteError(UserError):
    """A model gives predictions that are not finite numbers. name: of the model."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@torch.inference_mode()
def predict_rows(
    model: RankingModel,
    layout: ModelLayout,
    parts: Iterable[LabeledRows],
    calibration: Calibration,
    name: str = "the model",
) -> tuple[np.ndarray, np.ndarray]:
    """Predict encoded rows as the model is served: without placement, in fp32, on the model's device.

    Returns:
        Predictions (N, T), and log scores (N,) by the model's own weights.

    Raises:
        NotFiniteError: A prediction is not a finite number. It names the model.
    """
    kinds, names = [task.kind for task in layout.tasks], [task.name for task in layout.tasks]
    weights, found = [task.score_weight for task in layout.tasks], list[tuple[np.ndarray, np.ndarray]]()
    model.eval()
    for rows in parts:
        logits = model(make_batch(rows.encoded, layout, torchrec=False).to(device_of(model))).logits.cpu()
        if not logits.isfinite().all():
            raise NotFiniteError(f"'{name}' gives predictions that are not finite numbers", name)
        logits = calibration.apply(logits, names)
        found.append((predictions(logits, kinds).numpy(), compute_log_scores(logits, kinds, weights).numpy()))
    predicted, score = (np.concatenate(each) for each in zip(*found, strict=True))
    return predicted, score


def score_rows(
    settings: Settings,
    model: RankingModel,
    layout: ModelLayout,
    rows: EncodedDataset,
    calibration: Calibration = UNCALIBRATED,
    name: str = "the model",
) -> PredictedRows:
    """Predict all rows, see `predict_rows`, to be measured against what the settings say that labels are worth.

    layout: the model's; name: what the model is called where it gives predictions that are not finite. By
    `training.sampling_correction` metrics are those of the log before it was sampled.
    """
    read, more = list[tuple[np.ndarray, pa.Table]](), [f"label.{outcome}" for outcome in layout.joint_outcomes]
    more += rows.weight_columns(settings.training.sampling_correction == "weights")

    def parts() -> Iterator[LabeledRows]:
        with bar() as progress, keeping_freed_memory():
            task = progress.add_task("scoring", total=rows.rows)
            for part, table in rows.stream(settings.evaluation.batch_size, (*ID_COLUMNS, *more)):
                yield part
                read.append((part.labels, table))
                progress.advance(task, len(part))

    values, score = predict_rows(model, layout, parts(), calibration, name)
    return collect_labels(settings, layout, read).with_predictions(add_joint_predictions(values, layout), score)


def read_labels(
    settings: Settings, prepared: FeatureFolder, split: str, part: ValidationPart | None = None
) -> PredictedRows:
    """Read the rows of a split, or of one part of its users, without inputs and predictions."""
    weighted, layout = settings.training.sampling_correction == "weights", ModelLayout.of(prepared.layout, settings)
    rows = EncodedDataset(prepared.split(split), replace(layout, tables=(), ids=(), dense=(), attention=()), part=part)
    columns = (*ID_COLUMNS, *(f"label.{name}" for name in layout.joint_outcomes), *rows.weight_columns(weighted))
    return collect_labels(
        settings, layout, [(part.labels, table) for part, table in rows.stream(ROWS_AT_A_TIME, columns)]
    )


def collect_labels(
    settings: Settings, layout: ModelLayout, read: Sequence[tuple[np.ndarray, pa.Table]]
) -> PredictedRows:
    """Join parts of rows, their labels (n, T) and the columns beside them, without predictions.

    Each task is measured over the rows of its own label, each outcome over all rows. An outcome has no weight in the
    score, which multiplies already.
    """
    beside, labels = pa.concat_tables([table for _, table in read]), np.concatenate([of for of, _ in read])
    users, requests, candidates = (beside.column(name).combine_chunks() for name in ID_COLUMNS)
    tasks = [MeasuredTask(task.name, task.kind, settings.tasks[task.name].score_weight) for task in layout.tasks]
    known = {task.name: of for task, of in zip(tasks, labels.T, strict=True)}
    known |= {name: beside.column(f"label.{name}").to_numpy() for name in layout.joint_outcomes}
    tasks += [MeasuredTask(name, weight=0.0) for name in layout.joint_outcomes]
    row = None if settings.columns.has_candidate else candidates  # the number in a log without candidates
    candidates = candidates if row is None else None
    score = np.zeros(len(users))
    return PredictedRows(tuple(tasks), users, requests, candidates, {}, known, score, row_weights(beside), row)


@contextmanager
def open_encoded_split(settings: Settings, artifact: Path, ranker: Ranker, split: str = "test") -> Iterator[Path]:
    """Encoded test rows, which nobody replaces meanwhile: existing ones that the model's features made, or new ones.

    artifact: where the ranker was loaded from; split: of the rows. Raises UserError where its tasks are not the same.
    """
    check_tasks(settings, ranker.pipeline.schema)
    work, what = Path(settings.data.work_dir), "an evaluation"
    with read_lock(work / "features", what):
        prepared = find_existing_features(BuildInputs.of(settings))
        if prepared is not None and prepared.manifest["fingerprint"] == ranker.info.fingerprint:
            prepared.require_rows(split)
            yield prepared.split(split)
            return
    logs, encoded = open_model_logs(settings, ranker.pipeline), work / "evaluation" / "encoded"
    if missing := FeatureFolder(work / "features").missing(logs):
        files = (
            f"1 is gone, '{missing[0]}'" if len(missing) == 1 else f"{len(missing):,} are gone, such as '{missing[0]}'"
        )
        told = "the features that the model was trained on are not there, so counters and histories are rebuilt from"
        say(f"{told} the files that are left in the log: {files}")
    with write_lock(encoded, what, "set `data.work_dir` to another folder", wait=True):
        encode_splits(artifact / "features", logs, {split: settings.split.windows()[split]}, encoded)
        yield encoded / split


def check_tasks(settings: Settings, schema: Schema) -> None:
    """Raises UserError where a model's schema has other tasks than the settings, or ones that mean something else."""
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    its, ours = ({"tasks": each.identity()["tasks"]} for each in (schema, settings.schema_))
    for where, before, now in diff_settings(its, ours):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it predicts something "
            "else than these labels: set it back, or train a model with it"
        )


def log_evaluation(
    settings: Settings, model: ResolvedModel, results: Results, out: Path, artifact_path: str, split: str
) -> None:
    """Log to the run of a model, or to a new one if that is unknown or the rows are not of its training's log.

    Args:
        settings: Settings that name the rows.
        model: The first of the measured models.
        results: Results of the models.
        out: Folder of the files.
        artifact_path: Folder of the run's files.
        split: Split of the rows.

    Raises:
        UnreachableError: MLflow does not answer.
    """
    summary, first, inputs = results.first.summary, results.first, BuildInputs.of(settings)
    prepared = find_existing_features(inputs)
    fingerprints = {compute_fingerprint(inputs.logs, inputs.windows)}
    fingerprints |= set() if prepared is None else {prepared.manifest["fingerprint"]}
    run_id = model.run_id if read_artifact(model.folder, verify=False).fingerprint in fingerprints else None
    uri, name = settings.tracking.resolved_uri, f"evaluate {model.uri}"
    with runs.open_run(uri, settings.experiment, run_name=name, run_id=run_id) as run:
        if prepared is not None:
            run.log_inputs(describe_datasets(settings, prepared.manifest, split))
        heading = "Evaluation" if split == "test" else f"Evaluation on {split} rows"
        section = "test" if split == "test" else f"{split}_rows"  # `validation` has charts by step
        sentences = bullet_list(
            [*describe_verdicts(results), *(each.message for each in find_suspicious_results(results))]
        )
        of_rows = ("log", "rows", "requests", "caution")
        facts = "\n".join(f"- {fact}: {results.facts[fact]}" for fact in of_rows if fact in results.facts)
        page = f"Report: `{artifact_path}/report.html` of the artifacts."
        run.write_section(heading, f"{sentences}\n\n{facts}\n\n{page}\n\n{code_block(command_line())}")
        numbers = {  # the ends of intervals get a section of charts of their own
            f"{section}/{'intervals/' if metric.endswith(('.low', '.high')) else ''}{metric}": value
            for metric, value in flatten(summary).items()
        }
        run.log_metrics(numbers)
        run.log_artifact(out / "metrics.json", artifact_path)
        run.log_artifact(out / "report.html", artifact_path)
    if split != "test" or first.training_overlap:  # what it has learnt says nothing of it
        return
    if (registered := re.fullmatch(r"models:/([^/@]+)/(\d+)", model.uri)) is not None:
        rows = f"{summary.rows:,} rows of {settings.data.log}"
        sentences = f"{'; '.join(describe_verdicts(results))} ({rows})"
        report = {"report": f"runs:/{run.run_id}/{artifact_path}/report.html", "evaluated": sentences}
        version = get_version(registered[1], registered[2], uri)
        describe_version(version, "", report, uri)


def evaluate_model(
    settings: Settings, address: str, out: str | Path, against: Sequence[str] = (), split: str = "test"
) -> Results:
    """Score the rows of a split with a model, measure them, and write metrics, plots and predictions.

    Waits while another evaluation writes to the same folder.

    Args:
        settings: Settings that name the rows and say what their labels are worth.
        address: URI of the model, or its folder.
        out: Folder for the results, which are also logged to MLflow.
        against: URIs of other models, to compare with on the same rows.
        split: Split of the rows, `test` or `validation`.
    """
    short = short_names([address, *against])
    models = {name: resolve_model(each, settings.tracking.resolved_uri) for each, name in short.items()}
    return evaluate_models(settings, models, Path(out), split)


def evaluation_folder(split: str) -> str:
    """The folder, in `data.work_dir` and among a run's files, of what is measured on a split."""
    return "evaluation" if split == "test" else f"evaluation_{split}"


def evaluate_models(
    settings: Settings,
    models: Mapping[str, ResolvedModel],
    out: Path,
    split: str = "test",
    artifact_path: str | None = None,
) -> Results:
    """Does what `evaluate_model` does for models by their names; the first one is compared with the others.

    artifact_path: folder of the run's files, None for that of the split.
    """
    rules, artifact_path = settings.evaluation, artifact_path or evaluation_folder(split)
    check_output_folder(out, settings)
    find_objective_metric(rules.primary_metric)
    measured: dict[str, MeasuredModel] = {}
    (first, *_) = models.values()
    with write_lock(out, "an evaluation", "give another folder with --out", wait=True):
        slicing = RowSlicer(settings, first.folder)
        for name, model in models.items():
            rows, about = score_split(settings, model, name, split), read_artifact(model.folder, verify=False)
            if model is first:
                first_rows = rows
            told = {
                "sampling_correction": settings.training.sampling_correction,
                "relevance_weights": {each: task.score_weight for each, task in settings.tasks.items()},
                "score_weights": {task.name: task.score_weight for task in about.tasks},
            }
            measured[name] = measure_model(
                rows,
                rules.resamples,
                slicing.find(rows),
                told,
                address=model.uri,
                training_overlap=describe_training_overlap(settings, model.folder),
                undertraining=about.undertraining,
            )
        title = f"{'Promotion' if artifact_path == PROMOTION_FOLDER else 'Evaluation'} of {settings.name}"
        title += "" if split == "test" else f" on {split} rows"
        facts = _facts(settings, split) | {"artifact": artifact_version(first.folder)}
        results = Results(measured, tuple(settings.tasks), rules, title, facts)
        write_results(results, out)
        write_predictions(first_rows, settings.columns, out)
        try:
            log_evaluation(settings, first, results, out, artifact_path, split)
        except UserError as error:
            all_of_it = "" if isinstance(error, UnreachableError) else "all of it "
            say(f"{error}: the evaluation is in '{out}', but not {all_of_it}in MLflow")
    return results


def score_split(settings: Settings, model: ResolvedModel, name: str, split: str = "test") -> PredictedRows:
    """The rows of a split as a model scores them. Raises UserError where its tasks mean something else."""
    ranker = Ranker.load(model.folder)
    with open_encoded_split(settings, model.folder, ranker, split) as folder:
        rows = EncodedDataset(folder, ranker.layout)
        return score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration, name)


def _facts(settings: Settings, split: str) -> dict[str, str]:
    """What a reader wants to know of the rows."""
    rows, facts = settings.split, {"log": settings.data.log}
    if rows.column is not None:
        facts["rows"] = f"those with {' or '.join(map(str, getattr(rows, split)))} in column '{rows.column}'"
    else:
        ends = rows.train_end, rows.validation_end, rows.test_end
        begin, end = ends[1:] if split == "test" else ends[:2]
        until = "the end of the log" if end is None else f"{end:%Y-%m-%d %H:%M} UTC"
        facts["requests"] = f"from {begin:%Y-%m-%d %H:%M} UTC to {until}"
    if split == "validation":
        facts["caution"] = "these rows chose the state of the model, so it looks better on them than on others"
    facts["decides"] = f"{settings.evaluation.primary_metric}, margin {settings.evaluation.max_metric_drop:g}"
    return facts


def write_predictions(rows: PredictedRows, columns: Columns, out: Path) -> None:
    """Write `user`, `request`, `candidate`, `predicted_NAME` and `label_NAME` of each task and outcome, `score`, and
    `weight` where rows have one. Unobserved labels are null.

    Args:
        rows: Rows to write.
        columns: Columns of the log. What it does not have is left out: without candidates, `row` is the number of each
            row in the log.
        out: Folder that gets the file `PREDICTIONS_FILE`.
    """
    has_request = columns.has_user or columns.request is not None
    written: dict[str, Any] = {
        ROW_NUMBER_COLUMN: rows.row,
        "user": rows.users if columns.has_user else None,
        "request": rows.requests if has_request else None,
        "candidate": rows.candidates,
    }
    written |= {f"predicted_{name}": values for name, values in rows.predictions.items()}
    written |= {f"label_{name}": pa.array(values, from_pandas=True) for name, values in rows.labels.items()}
    written |= {"score": scores_from_log_scores(rows.score), "weight": rows.weight}
    with atomic_file(out / PREDICTIONS_FILE) as path:
        pq.write_table(pa.table({name: of for name, of in written.items() if of is not None}), path, compression="zstd")


def describe_training_overlap(settings: Settings, artifact: Path, split: str = "test") -> list[str]:
    """Say what the training of a model had to do with the rows that it is measured on.

    Args:
        settings: Settings whose rows measure it.
        artifact: Its folder, whose own settings say on which rows it was trained.
        split: Split of the rows, `test` or `validation`. Of the latter, judging rows have chosen no state of a model.

    Returns:
        Sentences without their subject, none if it has not seen these rows.
    """
    of_test = split == "test"
    its, now = load_settings(artifact / "settings.yaml").split, settings.split
    if now.column != its.column:
        ways = ["times" if each is None else f"column '{each}'" for each in (its.column, now.column)]
        rows = f"rows that {ways[0]} split, and those that it is measured on {ways[1]}"
        return [f"was trained on {rows}: it may have seen labels that it is measured by"]
    rows, (end, begin) = "", ((each.validation_end if of_test else each.train_end) for each in (its, now))
    if now.column is not None:
        seen = {format_split_value(each) for each in (*its.train, *(its.validation if of_test else ()))}
        if both := ", ".join(repr(each) for each in getattr(now, split) if format_split_value(each) in seen):
            rows = f"on rows with {both} in column '{now.column}', which are those that it is measured on"
    elif begin is not None and end is not None and end > begin:
        rows = f"on requests before {end:%Y-%m-%d %H:%M}, and is measured on those from {begin:%Y-%m-%d %H:%M} UTC on"
    return [f"was trained, or its best state chosen, {rows}: it has seen labels that it is measured by"] if rows else []
