"""Evaluate models on the rows of a split, and write metrics, reports and predictions."""

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
"""Folder of a run's files for the results of `promote`."""
PREDICTIONS_FILE = "predictions.parquet"
"""File with the predictions of the first model, in the format of `evaluate --predictions`."""
ID_COLUMNS = ("user", "request", "candidate")
ROWS_AT_A_TIME = 65_536


class NotFiniteError(UserError):
    """Predictions of the model `name` are not finite numbers."""

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
    """Predict encoded rows as in serving: without placement, in fp32, on the model's device.

    Args:
        model: Model that predicts T tasks.
        layout: Layout of the model.
        parts: N encoded rows in parts.
        calibration: Calibration of the model.
        name: Name of the model in errors.

    Returns:
        Predictions (N, T), and log scores (N,), in which tasks have the model's `score_weight`s.

    Raises:
        NotFiniteError: A prediction is not a finite number.
    """
    kinds, names = [task.kind for task in layout.tasks], [task.name for task in layout.tasks]
    weights, outputs = [task.score_weight for task in layout.tasks], list[tuple[np.ndarray, np.ndarray]]()
    model.eval()
    for rows in parts:
        logits = model(make_batch(rows.encoded, layout, torchrec=False).to(device_of(model))).logits.cpu()
        if not logits.isfinite().all():
            raise NotFiniteError(f"'{name}' gives predictions that are not finite numbers", name)
        logits = calibration.apply(logits, names)
        outputs.append((predictions(logits, kinds).numpy(), compute_log_scores(logits, kinds, weights).numpy()))
    predicted, score = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
    return predicted, score


def score_rows(
    settings: Settings,
    model: RankingModel,
    layout: ModelLayout,
    rows: EncodedDataset,
    calibration: Calibration = UNCALIBRATED,
    name: str = "the model",
) -> PredictedRows:
    """Predict all rows as `predict_rows` does, and attach the labels.

    If `training.sampling_correction` is `weights`, rows get weights that undo the sampling of the log. Metrics then
    estimate the metrics of the log before sampling.

    Args:
        settings: Settings with the tasks' `score_weight`, which weigh the labels in a row's relevance.
        model: Model that predicts.
        layout: Layout of the model.
        rows: Encoded rows.
        calibration: Calibration of the model.
        name: Name of the model in errors.

    Raises:
        NotFiniteError: A prediction is not a finite number.
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
    """Read the labels, IDs and weights of a split's rows. The result has no predictions.

    Args:
        settings: As in `score_rows`.
        prepared: Folder of features.
        split: Name of the split.
        part: Part of the split's users, None for all users.
    """
    weighted, layout = settings.training.sampling_correction == "weights", ModelLayout.of(prepared.layout, settings)
    rows = EncodedDataset(prepared.split(split), replace(layout, tables=(), ids=(), dense=(), attention=()), part=part)
    columns = (*ID_COLUMNS, *(f"label.{name}" for name in layout.joint_outcomes), *rows.weight_columns(weighted))
    read = [(labeled.labels, table) for labeled, table in rows.stream(ROWS_AT_A_TIME, columns)]
    return collect_labels(settings, layout, read)


def collect_labels(
    settings: Settings, layout: ModelLayout, read: Sequence[tuple[np.ndarray, pa.Table]]
) -> PredictedRows:
    """Concatenate the labels, IDs and weights of rows. The result has no predictions.

    A task with `conditional_on` also has a joint outcome: whether the labels of both tasks are 1. Its weight is 0,
    because the score already multiplies the predictions of both tasks.

    Args:
        settings: As in `score_rows`.
        layout: Layout with T tasks.
        read: Parts of the rows: labels (n, T), and a table with IDs, labels of joint outcomes and weights.
    """
    columns = pa.concat_tables([table for _, table in read])
    label_matrix = np.concatenate([part_labels for part_labels, _ in read])
    users, requests, candidates = (columns.column(name).combine_chunks() for name in ID_COLUMNS)
    tasks = [MeasuredTask(task.name, task.kind, settings.tasks[task.name].score_weight) for task in layout.tasks]
    labels_by_task = {task.name: values for task, values in zip(tasks, label_matrix.T, strict=True)}
    labels_by_task |= {name: columns.column(f"label.{name}").to_numpy() for name in layout.joint_outcomes}
    tasks += [MeasuredTask(name, weight=0.0) for name in layout.joint_outcomes]
    row = None if settings.columns.has_candidate else candidates  # the row number, in a log without candidates
    candidates = candidates if row is None else None
    score, weights = np.zeros(len(users)), row_weights(columns)
    return PredictedRows(tuple(tasks), users, requests, candidates, {}, labels_by_task, score, weights, row)


@contextmanager
def open_encoded_split(settings: Settings, artifact: Path, ranker: Ranker, split: str = "test") -> Iterator[Path]:
    """Yield a folder of a split's rows, encoded for a model, and lock it so that no other process replaces them.

    Existing encoded rows are used if they were encoded with the model's features. Otherwise the rows are encoded again.

    Args:
        settings: Settings of the log and its split.
        artifact: Folder of the model's files.
        ranker: The loaded model.
        split: Name of the split.

    Raises:
        UserError: The model has other tasks than the settings.
    """
    check_tasks(settings, ranker.pipeline.schema)
    work, purpose = Path(settings.data.work_dir), "an evaluation"
    with read_lock(work / "features", purpose):
        prepared = find_existing_features(BuildInputs.of(settings))
        if prepared is not None and prepared.manifest["fingerprint"] == ranker.info.fingerprint:
            prepared.require_rows(split)
            yield prepared.split(split)
            return
    logs, encoded = open_model_logs(settings, ranker.pipeline), work / "evaluation" / "encoded"
    if missing := FeatureFolder(work / "features").missing(logs):
        gone = "1 is gone," if len(missing) == 1 else f"{len(missing):,} are gone, such as"
        reason = "the features of the model's training are missing, so counters and histories are rebuilt from"
        say(f"{reason} the files that are left in the log: {gone} '{missing[0]}'")
    with write_lock(encoded, purpose, "set `data.work_dir` to another folder", wait=True):
        encode_splits(artifact / "features", logs, {split: settings.split.windows()[split]}, encoded)
        yield encoded / split


def check_tasks(settings: Settings, schema: Schema) -> None:
    """Raise UserError if a model's tasks differ from the tasks of the settings.

    Args:
        settings: Settings with the tasks.
        schema: Schema of the model.
    """
    if set(schema.tasks) != set(settings.tasks):
        raise UserError(f"the model predicts {', '.join(schema.tasks)}; the settings have {', '.join(settings.tasks)}")
    model_tasks, settings_tasks = ({"tasks": schema_.identity()["tasks"]} for schema_ in (schema, settings.schema_))
    for where, before, now in diff_settings(model_tasks, settings_tasks):
        raise UserError(
            f"the model was trained with '{where}' {before}, and it is {now} in the settings, so it does not "
            "predict these labels. Restore the setting, or train a model with it"
        )


def log_evaluation(
    settings: Settings, model: ResolvedModel, results: Results, out: Path, artifact_path: str, split: str
) -> None:
    """Log results to the model's run, or to a new run if the run is unknown or trained on another log.

    Args:
        settings: Settings of the log and its split.
        model: The first of the measured models.
        results: Results of the models.
        out: Folder in which `write_results` wrote the results.
        artifact_path: Folder for the results among the run's artifacts.
        split: Split of the rows.

    Raises:
        UnreachableError: MLflow does not answer.
    """
    summary, measured, inputs = results.first.summary, results.first, BuildInputs.of(settings)
    prepared = find_existing_features(inputs)
    fingerprints = {compute_fingerprint(inputs.logs, inputs.windows)}
    fingerprints |= set() if prepared is None else {prepared.manifest["fingerprint"]}
    run_id = model.run_id if read_artifact(model.folder, verify=False).fingerprint in fingerprints else None
    uri, name = settings.tracking.resolved_uri, f"evaluate {model.uri}"
    with runs.open_run(uri, settings.experiment, run_name=name, run_id=run_id) as run:
        if prepared is not None:
            run.log_inputs(describe_datasets(settings, prepared.manifest, split))
        heading = "Evaluation" if split == "test" else f"Evaluation on {split} rows"
        section = "test" if split == "test" else f"{split}_rows"  # `validation` has the training's metrics by step
        findings = [finding.message for finding in find_suspicious_results(results)]
        sentences = bullet_list([*describe_verdicts(results), *findings])
        row_facts = ("log", "rows", "requests", "caution")
        facts = "\n".join(f"- {fact}: {results.facts[fact]}" for fact in row_facts if fact in results.facts)
        page = f"Report: `{artifact_path}/report.html` of the artifacts."
        run.write_section(heading, f"{sentences}\n\n{facts}\n\n{page}\n\n{code_block(command_line())}")
        numbers = {  # the ends of intervals get a section of charts of their own
            f"{section}/{'intervals/' if metric.endswith(('.low', '.high')) else ''}{metric}": value
            for metric, value in flatten(summary).items()
        }
        run.log_metrics(numbers)
        run.log_artifact(out / "metrics.json", artifact_path)
        run.log_artifact(out / "report.html", artifact_path)
    if split != "test" or measured.training_overlap:  # metrics on training rows don't describe a version
        return
    if (registered := re.fullmatch(r"models:/([^/@]+)/(\d+)", model.uri)) is not None:
        rows = f"{summary.rows:,} rows of {settings.data.log}"
        sentences = f"{'; '.join(describe_verdicts(results))} ({rows})"
        report = {"report": f"runs:/{run.run_id}/{artifact_path}/report.html", "evaluated": sentences}
        describe_version(get_version(registered[1], registered[2], uri), "", report, uri)


def evaluate_model(
    settings: Settings, address: str, out: str | Path, against: Sequence[str] = (), split: str = "test"
) -> Results:
    """Score the rows of a split with a model, compute metrics, and write metrics, plots and predictions.

    Waits while another evaluation writes to the same folder.

    Args:
        settings: Settings of the log, its split and the tasks.
        address: URI of the model, or its folder.
        out: Folder for the results, which are also logged to MLflow.
        against: URIs of other models to compare with on the same rows.
        split: Split of the rows, `test` or `validation`.
    """
    short = short_names([address, *against])
    models = {name: resolve_model(model_uri, settings.tracking.resolved_uri) for model_uri, name in short.items()}
    return evaluate_models(settings, models, Path(out), split)


def evaluation_folder(split: str) -> str:
    """Return the name of the folder for results on a split, in `data.work_dir` and among a run's artifacts."""
    return "evaluation" if split == "test" else f"evaluation_{split}"


def evaluate_models(
    settings: Settings,
    models: Mapping[str, ResolvedModel],
    out: Path,
    split: str = "test",
    artifact_path: str | None = None,
) -> Results:
    """Evaluate models as `evaluate_model` does, and compare the first model with the others.

    Args:
        settings: Settings of the log, its split and the tasks.
        models: Name -> model.
        out: Folder for the results.
        split: Split of the rows, `test` or `validation`.
        artifact_path: Folder for the results among the run's artifacts, None for `evaluation_folder`.
    """
    rules, artifact_path = settings.evaluation, artifact_path or evaluation_folder(split)
    check_output_folder(out, settings)
    find_objective_metric(rules.primary_metric)
    measured: dict[str, MeasuredModel] = {}
    (first, *_) = models.values()
    with write_lock(out, "an evaluation", "give another folder with --out", wait=True):
        slicing = RowSlicer(settings, first.folder)
        for name, model in models.items():
            rows, info = score_split(settings, model, name, split), read_artifact(model.folder, verify=False)
            if model is first:
                first_rows = rows
            model_facts = {
                "sampling_correction": settings.training.sampling_correction,
                "relevance_weights": {task_name: task.score_weight for task_name, task in settings.tasks.items()},
                "score_weights": {task.name: task.score_weight for task in info.tasks},
            }
            about = {"address": model.uri, "training_overlap": describe_training_overlap(settings, model.folder)}
            measured[name] = measure_model(rows, rules.resamples, slicing.find(rows), model_facts, **about)
        title = f"{'Promotion' if artifact_path == PROMOTION_FOLDER else 'Evaluation'} of {settings.name}"
        title += "" if split == "test" else f" on {split} rows"
        facts = _facts(settings, split) | {"artifact": artifact_version(first.folder)}
        results = Results(measured, tuple(settings.tasks), rules, title, facts)
        write_results(results, out)
        _write_predictions(first_rows, settings.columns, out)
        try:
            log_evaluation(settings, first, results, out, artifact_path, split)
        except UserError as error:
            missing = "" if isinstance(error, UnreachableError) else "all of it "
            say(f"{error}: the evaluation is in '{out}', but not {missing}in MLflow")
    return results


def score_split(settings: Settings, model: ResolvedModel, name: str, split: str = "test") -> PredictedRows:
    """Score the rows of a split with a model.

    Args:
        settings: Settings of the log, its split and the tasks.
        model: Model that predicts.
        name: Name of the model in errors.
        split: Split of the rows.

    Raises:
        UserError: The model has other tasks than the settings.
    """
    ranker = Ranker.load(model.folder)
    with open_encoded_split(settings, model.folder, ranker, split) as folder:
        rows = EncodedDataset(folder, ranker.layout)
        return score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration, name)


def _facts(settings: Settings, split: str) -> dict[str, str]:
    """Return facts about the rows for the report."""
    rows, facts = settings.split, {"log": settings.data.log}
    if rows.column is not None:
        facts["rows"] = f"those with {' or '.join(map(str, getattr(rows, split)))} in column '{rows.column}'"
    else:
        ends = rows.train_end, rows.validation_end, rows.test_end
        begin, end = ends[1:] if split == "test" else ends[:2]
        until = "the end of the log" if end is None else f"{end:%Y-%m-%d %H:%M} UTC"
        facts["requests"] = f"from {begin:%Y-%m-%d %H:%M} UTC to {until}"
    if split == "validation":
        facts["caution"] = "these rows selected the state of the model, so metrics are better than on other rows"
    facts["decides"] = f"{settings.evaluation.primary_metric}, margin {settings.evaluation.max_metric_drop:g}"
    return facts


def _write_predictions(rows: PredictedRows, columns: Columns, out: Path) -> None:
    """Write predictions and labels to the file `PREDICTIONS_FILE` in folder `out`.

    The columns are `user`, `request`, `candidate`, `predicted_NAME` and `label_NAME` of each task and joint outcome,
    `score`, and `weight` if rows have weights. Unobserved labels are null. Columns that the log lacks are left out. If
    the log has no candidates, `row` is the row number in the log.
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
        pq.write_table(
            pa.table({name: values for name, values in written.items() if values is not None}), path, compression="zstd"
        )


def describe_training_overlap(settings: Settings, artifact: Path, split: str = "test") -> list[str]:
    """Describe an overlap of the rows that a model is measured on with the rows of its training.

    Args:
        settings: Settings of the measured rows.
        artifact: Folder of the model. Its own settings define the training rows.
        split: Split of the measured rows. For `test`, the model's validation rows count as training rows, because they
            selected the model's state. For `validation`, they don't, because the measured users didn't select it.

    Returns:
        Phrases that follow the model's name, such as "was trained on ...". Empty if there is no overlap.
    """
    is_test = split == "test"
    trained, measured = load_settings(artifact / "settings.yaml").split, settings.split
    if measured.column != trained.column:
        methods = ["times" if column is None else f"column '{column}'" for column in (trained.column, measured.column)]
        rows = f"rows that {methods[0]} split, and is measured on rows that {methods[1]} split"
        return [f"was trained on {rows}: it may have seen labels of the measured rows"]
    rows, (end, begin) = "", ((rows.validation_end if is_test else rows.train_end) for rows in (trained, measured))
    if measured.column is not None:
        seen = {format_split_value(value) for value in (*trained.train, *(trained.validation if is_test else ()))}
        if overlap := ", ".join(repr(value) for value in getattr(measured, split) if format_split_value(value) in seen):
            rows = f"on rows with {overlap} in column '{measured.column}', and is measured on the same rows"
    elif begin is not None and end is not None and end > begin:
        rows = (
            f"on requests before {end:%Y-%m-%d %H:%M}, and is measured on requests from {begin:%Y-%m-%d %H:%M} UTC on"
        )
    return [f"was trained, or its best state chosen, {rows}: it has seen labels of the measured rows"] if rows else []
