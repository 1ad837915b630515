"""What a model has to beat, for any data set: popularity, and gradient-boosted trees on the same rows and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss, mean_squared_error

from mmoe_rec.batches.encoded_rows import EncodedRows, weights_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.summary import MeasuredModel
from mmoe_rec.features.layout import Layout
from mmoe_rec.jobs.places import check_out, log_and_place
from mmoe_rec.locks import writing
from mmoe_rec.log.columns import hash_column
from mmoe_rec.preprocessing.prepare import FeatureFolder, features_in_use
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.jobs.evaluate import EvaluationResult


TREES, POPULARITY = "gradient boosting", "popularity"
ROWS_AT_A_TIME = 65_536
MOST_ROWS, MOST_VALUES = 2_000_000, 200_000_000
"""Rows, and values of their inputs, that are held in memory for training or validation; of more, the last ones."""
MOST_TREES, PATIENCE, TREES_UNCHOSEN = 1000, 30, 100
"""Trees of a kind; those that are tried without a lower loss on validation rows; and trees where none say so."""
FEW_ROWS = 500_000
"""Training rows up to which trees learn at half the rate, which takes twice as many: with more, it gains little."""
SMOOTHING = 20.0
"""Rows of the mean over all that are added to those of each candidate, or each id."""
FOLDS = 5


def measure_baselines(
    settings: Settings, out: Path, evaluated: EvaluationResult | None = None, name: str = "model"
) -> Results:
    """Trains both on the training rows, measures them on the test rows, and writes a report to a folder.

    evaluated: a model on the same rows, which is compared with them, under its name. Raises UserError where there are
    no rows of a split, or a task can't be learnt.
    """
    from mmoe_rec.evaluation.summary import summarise
    from mmoe_rec.report.evaluation import write_results

    check_out(out, settings)
    with (
        features_in_use(*log_and_place(settings), "baselines", ("train", "validation", "test")) as prepared,
        writing(out, "an evaluation", "give another folder with --out"),
    ):
        scored, trees = _predict(settings, prepared)
        models = {} if evaluated is None else {name: next(iter(evaluated.results.models.values()))}
        for each, rows in scored.items():
            sums = rows.measure()
            models[each] = MeasuredModel(sums, summarise(sums, settings.evaluation.resamples))
        facts = {"log": settings.data.log} if evaluated is None else evaluated.results.facts
        facts = facts | trees
        title = f"Baselines of {settings.name}"
        rules = settings.evaluation.model_copy(update={"guarded_slices": ()})  # no slices of baselines are measured
        results = Results(models, tuple(settings.tasks), rules, title, facts)
        write_results(results, out)
    return results


def _predict(settings: Settings, prepared: FeatureFolder) -> tuple[dict[str, ScoredRows], dict[str, str]]:
    """The baselines' predictions of the test rows, and what trees of each task validation rows chose; without
    candidates, none is more popular than another."""
    from mmoe_rec.evaluation.scoring import COLUMNS, ScoredRows
    from mmoe_rec.model.layout import ModelLayout

    layout = ModelLayout.of(prepared.layout, settings)
    train, validation, test = (EncodedRows(prepared.split(name), layout) for name in ("train", "validation", "test"))
    weighted, seed = settings.training.sampling_correction == "weights", settings.training.seed
    learnt, held_out = (
        Inputs.read(rows, layout, ("candidate", *rows.weighing(weighted))) for rows in (train, validation)
    )
    last = ""
    if len(learnt.labels) < train.rows:
        last = f" from the last {len(learnt.labels):,} of {train.rows:,} training rows"
        say(f"the baselines learn{last}")
    boosted = {}
    with bar() as progress:
        step = progress.add_task(TREES, total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            try:
                boosted[task.name] = boost_trees(task.kind, learnt.of_task(index), held_out.of_task(index), seed)
            except UserError as error:
                raise UserError(f"no baseline can learn task '{task.name}'{last}: {error}") from None
            say(f"  {task.name}: {boosted[task.name][1]}")
            progress.advance(step)
    columns = (*COLUMNS, *(f"label.{name}" for name in layout.outcomes), *test.weighing(weighted))
    parts, values = [], []
    for part in Inputs.stream(test, layout, columns):
        values.append(np.stack([predict(part) for predict, _ in boosted.values()], axis=1))
        parts.append(replace(part, x=part.x[:0].copy()))  # a view would keep all
    tested = Inputs.join(parts)
    rows = ScoredRows(
        layout,
        users=tested.column("user"),
        requests=tested.column("request"),
        candidates=tested.column("candidate") if settings.columns.has_candidate else None,
        predictions=np.zeros(tested.labels.shape),
        labels=tested.labels,
        score=np.zeros(len(tested.labels)),
        experts=None,
        outcomes={name: tested.column(f"label.{name}").to_numpy() for name in layout.outcomes},
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weights=tested.weights,
    )
    own = np.stack([predict(held_out) for predict, _ in boosted.values()], axis=1)
    scored = {TREES: rows.with_predictions(_calibrate(settings, layout, held_out, own, np.concatenate(values)))}
    if rows.candidates is not None:
        rates = [rate_candidates(learnt.column("candidate"), of, learnt.weights) for of in learnt.labels.T]
        own, rated = (
            np.stack([rate(each) for rate in rates], 1) for each in (held_out.column("candidate"), rows.candidates)
        )
        scored[POPULARITY] = rows.with_predictions(_calibrate(settings, layout, held_out, own, rated))
    return scored, {f"{TREES} of {name}": told for name, (_, told) in boosted.items()}


def _calibrate(settings: Settings, layout: Layout, held_out: Inputs, own: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Predictions (M, T), calibrated by those of the validation rows, `own` (N, T), as a model's are."""
    import torch
    from scipy.special import expit, logit

    from mmoe_rec.evaluation.calibration import fit_calibration

    if settings.training.calibration == "none":
        return values
    binary, names = np.array([task.kind == "binary" for task in layout.tasks]), [task.name for task in layout.tasks]
    own, logits = (np.where(binary, logit(each.clip(1e-12, 1 - 1e-12)), each) for each in (own, values))
    found, _ = fit_calibration(settings.training.calibration, layout.tasks, own, held_out.labels, held_out.weights)
    return np.where(binary, expit(found.apply(torch.from_numpy(logits), names).numpy()), values)


def rate_candidates(
    candidates: pa.Array, labels: np.ndarray, weights: np.ndarray | None
) -> Callable[[pa.Array], np.ndarray]:
    """M candidates -> (M,) float64, what is predicted for them: the mean label of each, whoever the user is.

    It is smoothed toward the mean of all rows: (sum of labels + SMOOTHING x overall mean) / (rows + SMOOTHING), where a
    row of mean weight is one; that of a candidate that was not seen is the overall mean.

    candidates, labels: (N,), NaN where unobserved; weights: (N,) what rows count, None is 1. Raises UserError where no
    label is observed.
    """
    observed = ~np.isnan(labels)
    if not observed.any():
        raise UserError("no training row has an observed label; expected at least one")
    rows = np.ones(len(labels)) if weights is None else weights / weights[observed].mean()
    counted = pd.DataFrame({"rows": rows, "labels": rows * labels}, dtype=np.float64)[observed]
    overall = counted["labels"].sum() / counted["rows"].sum()
    sums = counted.groupby(candidates.to_pandas().to_numpy()[observed]).sum()
    rates = (sums["labels"] + SMOOTHING * overall) / (sums["rows"] + SMOOTHING)
    return lambda others: rates.reindex(others.to_pandas().to_numpy()).fillna(overall).to_numpy()


Predict = Callable[["Inputs"], np.ndarray]  # rows -> (N,) float64, probabilities or values


def boost_trees(kind: str, train: Inputs, validation: Inputs, seed: int = 0) -> tuple[Predict, str]:
    """scikit-learn's histogram gradient boosting of the view with the lowest validation loss, or the mean of the two
    best; and what was chosen, in words.

    An id is its number in the vocabulary, where the most frequent ones come first: as categories, of which scikit-learn
    takes 254, ids did no better. kind: of the task; train, validation: its rows, as `Inputs.of_task` gives them; seed:
    of the columns that a split looks at. The logloss, or squared error, of validation rows also says how many trees
    count; where these lack labels, TREES_UNCHOSEN of the first view do. Raises UserError where no label is observed, of
    a binary task one class only, or no input is left.
    """
    classes = np.unique(train.labels)
    if len(classes) == 0:
        raise UserError("no training row has an observed label; expected at least one")
    if kind == "binary" and not np.array_equal(classes, [0, 1]):
        raise UserError(f"the observed training labels are {classes[:5].tolist()}; expected both 0 and 1")
    held_out = validation if len(np.unique(validation.labels)) >= (2 if kind == "binary" else 1) else None
    if not train.x.shape[1]:
        raise UserError("trees have no input: all features describe placement, or are lists of ids")
    choices = dict[str, Predict]()
    for name, x, view in _views(train):
        predict, count = _fit_trees(kind, replace(train, x=x), held_out, view, seed)
        choices[f"{count} trees {name}"] = predict
        if held_out is None:  # nothing tells them apart
            return predict, f"{count} trees {name}"
    name, measure = ("logloss", log_loss) if kind == "binary" else ("squared error", mean_squared_error)

    def measure_loss(predict: Predict) -> float:
        return measure(validation.labels, predict(validation), sample_weight=validation.weights)

    losses = {told: measure_loss(predict) for told, predict in choices.items()}
    if len(losses) > 1:
        both = sorted(losses, key=losses.__getitem__)[:2]
        mean = f"the mean of {' and '.join(both)}"
        choices[mean] = lambda rows: np.mean([choices[each](rows) for each in both], axis=0)
        losses[mean] = measure_loss(choices[mean])
    best = min(losses, key=losses.__getitem__)
    others = (f"; {loss:.4g} of {told}" for told, loss in losses.items() if told != best)
    return choices[best], f"{best}, {name} of validation rows {losses[best]:.4g}{''.join(others)}"


View = Callable[["Inputs"], np.ndarray]  # rows -> (N, F), what trees see of them


def _views(train: Inputs) -> Iterator[tuple[str, np.ndarray, View]]:
    """What trees may learn from: a name, x of the training rows, and what gives that of others.

    Ids of many values make trees overfit where counters say the same, and without counters their numbers say little. So
    the third view has each id's mean label instead, as `rate_candidates` has it: of training rows by the requests of
    other folds, since labels of the row's own list would tell its own.
    """
    if train.numbers:
        yield "without ids", train.x[:, : train.numbers], lambda rows: rows.x[:, : rows.numbers]
    if train.numbers == train.x.shape[1]:
        return
    yield "with ids", train.x, lambda rows: rows.x

    def learn(taken: np.ndarray) -> View:
        weights = None if train.weights is None else train.weights[taken]
        ids = train.x[taken, train.numbers :].T
        rates = [rate_candidates(pa.array(each), train.labels[taken], weights) for each in ids]

        def view(rows: Inputs) -> np.ndarray:
            ids = map(pa.array, rows.x[:, rows.numbers :].T)
            means = (rate(each).astype(np.float32) for rate, each in zip(rates, ids, strict=True))
            return np.column_stack([rows.x[:, : rows.numbers], *means])

        return view

    x = np.empty_like(train.x)
    if train.folds is not None and len(folds := np.unique(train.folds)) > 1:
        for fold in folds:
            own = train.folds == fold
            x[own] = learn(~own)(replace(train, x=train.x[own]))
        yield "with mean labels of ids", x, learn(np.ones(len(x), bool))


def _fit_trees(kind: str, train: Inputs, held_out: Inputs | None, view: View, seed: int) -> tuple[Predict, int]:
    """What trees predict, and how many of them. train: as trees see it; view: what shows them others."""
    estimator = (HistGradientBoostingClassifier if kind == "binary" else HistGradientBoostingRegressor)(
        learning_rate=0.05 if len(train.labels) <= FEW_ROWS else 0.1,
        max_iter=TREES_UNCHOSEN if held_out is None else MOST_TREES,
        min_samples_leaf=50,
        max_features=0.5,
        early_stopping=held_out is not None,
        n_iter_no_change=PATIENCE,
        tol=0.0,  # else labels in a large unit would never improve enough
        random_state=seed,
    )
    own, count = {}, TREES_UNCHOSEN
    if held_out is not None:
        own = {"X_val": view(held_out), "y_val": held_out.labels, "sample_weight_val": held_out.weights}
    estimator.fit(train.x, train.labels, train.weights, **own)
    if held_out is not None:
        count = int(estimator.validation_score_[1:].argmax()) + 1  # the first one is that of no tree

    def predict(rows: Inputs) -> np.ndarray:
        stages = estimator.staged_predict_proba if kind == "binary" else estimator.staged_predict
        last = next(islice(stages(view(rows)), count - 1, None))  # further trees were too many
        return np.asarray(last[:, 1] if kind == "binary" else last)

    return predict, count


@dataclass(frozen=True)
class Inputs:
    """Rows as trees see them: x (N, F) float32, first the `numbers`, NaN where missing, then ids, without placement and
    lists; labels (N, T), or (N,) of one task, NaN where unobserved; what rows count (N,), None is 1; the fold of FOLDS
    that a row's request belongs to (N,); and further columns."""

    x: np.ndarray
    numbers: int
    labels: np.ndarray
    weights: np.ndarray | None = None
    folds: np.ndarray | None = None
    table: pa.Table = field(default_factory=lambda: pa.table({}))

    def column(self, name: str) -> pa.Array:
        """A further column (N,)."""
        return self.table.column(name).combine_chunks()

    def of_task(self, index: int) -> Inputs:
        """The rows with an observed label of a task. Weights become multiples of their mean, as trees compare their
        sums with constants."""
        known = ~np.isnan(self.labels[:, index])
        weights, folds = (None if each is None else each[known] for each in (self.weights, self.folds))
        if weights is not None and len(weights):
            weights = weights / weights.mean()
        x = self.x if known.all() else self.x[known]
        return Inputs(x, self.numbers, self.labels[known, index], weights, folds)

    @staticmethod
    def stream(rows: EncodedRows, layout: Layout, columns: Sequence[str], left_out: int = 0) -> Iterator[Inputs]:
        """All rows but the first ones, some at a time."""
        dense = [index for index, each in enumerate(layout.dense) if not each.placement]
        names = [each.name for each in layout.ids if not each.many and not each.placement]
        for part, table in rows.stream(ROWS_AT_A_TIME, columns):
            first = min(left_out, len(part))
            left_out -= first
            if first == len(part):
                continue  # a slice of no row would keep all of them in memory
            ids = [np.asarray(part.encoded.ids[name])[first:] for name in names]
            x = np.column_stack([part.encoded.dense[first:, dense], *ids]).astype(np.float32)
            yield Inputs(x, len(dense), part.labels[first:], weights_of(table.slice(first)), table=table.slice(first))

    @staticmethod
    def join(parts: Sequence[Inputs]) -> Inputs:
        """All rows of parts."""
        table = pa.concat_tables([each.table for each in parts])
        x, labels = (np.concatenate([getattr(each, name) for each in parts]) for name in ("x", "labels"))
        return Inputs(x, parts[0].numbers, labels, weights_of(table), table=table)

    @staticmethod
    def read(rows: EncodedRows, layout: Layout, columns: Sequence[str]) -> Inputs:
        """The last rows, as many as memory is meant to hold."""
        most = min(MOST_ROWS, MOST_VALUES // max(1, len(layout.dense) + len(layout.ids)))
        left_out = max(0, rows.rows - most)
        whole = Inputs.join(list(Inputs.stream(rows, layout, (*columns, "request"), left_out)))
        folds = (hash_column(whole.column("request")) % FOLDS).astype(np.int8)
        return replace(whole, folds=folds, table=whole.table.drop_columns("request"))
