"""What a model has to beat, for any data set: popularity, and gradient-boosted trees on the same rows and features."""

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
    """Trains them on the training rows, measures them on the test rows, and writes a report to a folder.

    evaluated: a model on the same rows, which is compared with them, under its name. Raises UserError where there are
    no rows of a split, or a task can't be learnt.
    """
    check_output_folder(out, settings)
    with (
        lock_features(BuildInputs.of(settings), "baselines", ("train", "validation", "test")) as prepared,
        write_lock(out, "an evaluation", "give another folder with --out"),
    ):
        scored, trees = _predict(settings, prepared)
        models = {} if evaluated is None else {name: evaluated.first}
        models |= {each: measure_model(rows, settings.evaluation.resamples) for each, rows in scored.items()}
        facts = ({"log": settings.data.log} if evaluated is None else evaluated.facts) | trees
        title = f"Baselines of {settings.name}"
        rules = settings.evaluation.model_copy(update={"guardrail_slices": ()})  # no slices of baselines are measured
        results = Results(models, tuple(settings.tasks), rules, title, facts)
        write_results(results, out)
    return results


def _predict(settings: Settings, prepared: FeatureFolder) -> tuple[dict[str, PredictedRows], dict[str, str]]:
    """The baselines' predictions of the test rows, and what trees of each task selecting rows chose; without
    candidates, none is more popular than another."""
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
        own, rated = (
            np.stack([rate(each) for rate in rates], 1) for each in (held_out.column("candidate"), rows.candidates)
        )
        scored[POPULARITY_BASELINE] = score(_calibrate(settings, layout, held_out, own, rated))
    return scored, facts


def read_tree_inputs(settings: Settings, prepared: FeatureFolder, layout: Layout) -> tuple[TreeInputs, TreeInputs]:
    """The last training rows, from which trees learn, and the last validation rows that select."""
    weighted = settings.training.sampling_correction == "weights"
    train = EncodedDataset(prepared.split("train"), layout)
    selecting = EncodedDataset(prepared.split("validation"), layout, part=ValidationPart.SELECTION)
    train_rows, held_out = (
        TreeInputs.read(rows, layout, ("candidate", "time", *rows.weight_columns(weighted)))
        for rows in (train, selecting)
    )
    if len(train_rows.labels) < train.rows:
        say(f"the baselines learn from the last {len(train_rows.labels):,} of {train.rows:,} training rows")
    return train_rows, held_out


def fit_trees_per_task(
    settings: Settings, layout: Layout, train_rows: TreeInputs, held_out: TreeInputs
) -> tuple[list[Predictor], dict[str, str]]:
    """The trees of all tasks, and what selecting rows chose. Raises UserError where a task can't be learnt."""
    facts, boosted = dict[str, str](), list[Predictor]()
    for index, task in enumerate(layout.tasks):
        known = train_rows.select_task(index), held_out.select_task(index)
        try:
            predict, told = fit_boosted_trees(task.kind, *known, settings.training.seed)
        except UserError as error:
            raise UserError(f"no baseline can learn task '{task.name}': {error}") from None
        boosted.append(predict)
        facts[f"{TREES_BASELINE} of {task.name}"] = told
        say(f"  {TREES_BASELINE} of {task.name}: {told}")
    return boosted, facts


def predict_calibrated(
    settings: Settings, layout: Layout, trees: Sequence[Predictor], held_out: TreeInputs, rows: EncodedDataset
) -> np.ndarray:
    """(N, T) what trees of all tasks predict for encoded rows, calibrated by the rows that are held out."""

    def predict(part: TreeInputs) -> np.ndarray:
        return np.stack([each(part) for each in trees], axis=1)

    predicted = np.concatenate([predict(part) for part in TreeInputs.iter_chunks(rows, layout, ())])
    return _calibrate(settings, layout, held_out, predict(held_out), predicted)


def _calibrate(
    settings: Settings, layout: Layout, held_out: TreeInputs, own: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Predictions (M, T), calibrated by those of the validation rows, `own` (N, T), as a model's are."""
    if settings.training.calibration == "none":
        return values
    kinds, names = [task.kind for task in layout.tasks], [task.name for task in layout.tasks]
    own_logits, logits = (predictions_to_logits(torch.from_numpy(each), kinds) for each in (own, values))
    times = held_out.column("time").cast(pa.int64()).to_numpy()
    known = held_out.labels, held_out.weights, times
    found, _ = fit_calibration(settings.training.calibration, layout.tasks, own_logits.numpy(), *known)
    return predictions(found.apply(logits, names), kinds).numpy()
