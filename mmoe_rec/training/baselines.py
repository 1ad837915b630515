"""Baselines to compare a model with: popularity, and gradient-boosted trees on the same rows and features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.calibration import fit_calibration
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.evaluate import read_labels
from mmoe_rec.evaluation.results_report import write_results
from mmoe_rec.evaluation.summary import measure_model
from mmoe_rec.evaluation.sums import PredictedRows
from mmoe_rec.features.layout import Layout
from mmoe_rec.locks import write_lock
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import add_joint_predictions, predictions, predictions_to_logits
from mmoe_rec.preprocessing.build_inputs import BuildInputs, check_output_folder
from mmoe_rec.preprocessing.prepare import FeatureFolder, lock_features
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training.boosting import Predictor, TreeInputs, fit_boosted_trees, fit_target_encoding

TREES_BASELINE, POPULARITY_BASELINE = "gradient boosting", "popularity"


def measure_baselines(
    settings: Settings,
    out: Path,
    evaluated: Results | None = None,
    name: str = "model",
) -> Results:
    """Train the baselines, measure them on the test rows, and write a report.

    Args:
        settings: Settings of the features.
        out: Folder for the report.
        evaluated: Results of a model on the same rows, to compare with. None compares only the baselines.
        name: Name of the model in the report.

    Returns:
        The results of the baselines and of the model.

    Raises:
        UserError: A split has no rows, or a task has too few labels.
    """
    check_output_folder(out, settings)
    with (
        lock_features(BuildInputs.of(settings), "baselines", ("train", "validation", "test")) as prepared,
        write_lock(out, "an evaluation", "give another folder with --out"),
    ):
        scored, trees = _predict(settings, prepared)
        models = {} if evaluated is None else {name: evaluated.first}
        models |= {baseline: measure_model(rows, settings.evaluation.resamples) for baseline, rows in scored.items()}
        facts = ({"log": settings.data.log} if evaluated is None else evaluated.facts) | trees
        title = f"Baselines of {settings.name}"
        # Leave out the guardrails on slices, because slices of baselines aren't measured.
        rules = settings.evaluation.model_copy(update={"guardrail_slices": ()})
        results = Results(models, tuple(settings.tasks), rules, title, facts)
        write_results(results, out)
    return results


def _predict(settings: Settings, prepared: FeatureFolder) -> tuple[dict[str, PredictedRows], dict[str, str]]:
    """Train the baselines and predict the test rows.

    Returns:
        Predictions by the name of the baseline (no popularity baseline if the log has no column of candidates), and
        facts for the report: "gradient boosting of TASK" -> description of the trees.
    """
    layout = ModelLayout.of(prepared.layout, settings)
    train_rows, held_out = read_tree_inputs(settings, prepared, layout)
    boosted, facts = fit_trees_per_task(settings, layout, train_rows, held_out)
    test, rows = EncodedDataset(prepared.split("test"), layout), read_labels(settings, prepared, "test")
    weights = np.array([settings.tasks[task.name].score_weight for task in layout.tasks])

    def score(values: np.ndarray) -> PredictedRows:
        return rows.with_predictions(
            add_joint_predictions(values, layout), np.log(np.clip(values, 1e-12, None)) @ weights
        )

    scored = {TREES_BASELINE: score(predict_calibrated(settings, layout, boosted, held_out, test))}
    if rows.candidates is not None:
        rates = [
            fit_target_encoding(train_rows.column("candidate"), of, train_rows.weights) for of in train_rows.labels.T
        ]
        held_out_rates, test_rates = (
            np.stack([rate(ids) for rate in rates], 1) for ids in (held_out.column("candidate"), rows.candidates)
        )
        scored[POPULARITY_BASELINE] = score(_calibrate(settings, layout, held_out, held_out_rates, test_rates))
    return scored, facts


def read_tree_inputs(settings: Settings, prepared: FeatureFolder, layout: Layout) -> tuple[TreeInputs, TreeInputs]:
    """Read the inputs of trees: the last training rows and the last selection rows (one half of the validation users).

    `TreeInputs.read` limits the number of rows.

    Args:
        settings: Settings of the features.
        prepared: Folder of the features.
        layout: Layout of the inputs.
    """
    weighted = settings.training.sampling_correction == "weights"
    train = EncodedDataset(prepared.split("train"), layout)
    selection = EncodedDataset(prepared.split("validation"), layout, part=ValidationPart.SELECTION)
    train_rows, held_out = (
        TreeInputs.read(rows, layout, ("candidate", "time", *rows.weight_columns(weighted)))
        for rows in (train, selection)
    )
    if len(train_rows.labels) < train.rows:
        say(f"the baselines learn from the last {len(train_rows.labels):,} of {train.rows:,} training rows")
    return train_rows, held_out


def fit_trees_per_task(
    settings: Settings, layout: Layout, train_rows: TreeInputs, held_out: TreeInputs
) -> tuple[list[Predictor], dict[str, str]]:
    """Fit trees for each task by `fit_boosted_trees`, and print which trees have the lowest loss on the selection rows.

    Args:
        settings: Settings of the training.
        layout: Layout with the tasks.
        train_rows: Training rows.
        held_out: Selection rows.

    Returns:
        A predictor for each task, and facts for the report: "gradient boosting of TASK" -> description of the trees.

    Raises:
        UserError: A task has too few labels.
    """
    facts, boosted = dict[str, str](), list[Predictor]()
    for index, task in enumerate(layout.tasks):
        task_rows = train_rows.select_task(index), held_out.select_task(index)
        try:
            predict, choice = fit_boosted_trees(task.kind, *task_rows, settings.training.seed)
        except UserError as error:
            raise UserError(f"no baseline can be trained for task '{task.name}': {error}") from None
        boosted.append(predict)
        facts[f"{TREES_BASELINE} of {task.name}"] = choice
        say(f"  {TREES_BASELINE} of {task.name}: {choice}")
    return boosted, facts


def predict_calibrated(
    settings: Settings, layout: Layout, trees: Sequence[Predictor], held_out: TreeInputs, rows: EncodedDataset
) -> np.ndarray:
    """Return calibrated predictions of the trees of T tasks for N rows, shape (N, T).

    Args:
        settings: Settings of the training.
        layout: Layout with the tasks.
        trees: A predictor for each task.
        held_out: Selection rows, to fit the calibration on.
        rows: The N rows to predict.
    """

    def predict(part: TreeInputs) -> np.ndarray:
        return np.stack([task_trees(part) for task_trees in trees], axis=1)

    predicted = np.concatenate([predict(part) for part in TreeInputs.iter_chunks(rows, layout, ())])
    return _calibrate(settings, layout, held_out, predict(held_out), predicted)


def _calibrate(
    settings: Settings, layout: Layout, held_out: TreeInputs, held_out_values: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Calibrate the predictions `values`, shape (rows, tasks), by the method `training.calibration`.

    The calibration is fitted on the selection rows `held_out`, whose predictions are `held_out_values`.
    """
    if settings.training.calibration == "none":
        return values
    kinds, names = [task.kind for task in layout.tasks], [task.name for task in layout.tasks]
    held_out_logits, logits = (
        predictions_to_logits(torch.from_numpy(array), kinds) for array in (held_out_values, values)
    )
    times = held_out.column("time").cast(pa.int64()).to_numpy()
    observed = held_out.labels, held_out.weights, times
    calibration, _ = fit_calibration(settings.training.calibration, layout.tasks, held_out_logits.numpy(), *observed)
    return predictions(calibration.apply(logits, names), kinds).numpy()
