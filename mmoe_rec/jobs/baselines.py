"""What a model has to beat, for any data set: popularity, and gradient-boosted trees on the same rows and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from mmoe_rec.batches.encoded_rows import EncodedRows, weights_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.summary import MeasuredModel
from mmoe_rec.features.layout import Layout
from mmoe_rec.jobs.places import check_out, log_and_place
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.prepare import FeatureFolder, features_in_use
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.jobs.evaluate import EvaluationResult


TREES, POPULARITY = "gradient boosting", "popularity"
ROWS_AT_A_TIME = 65_536
MOST_ROWS = 2_000_000
"""Training rows that are held in memory; of more, the last ones."""
MOST_TREES = 300
SMOOTHING = 20.0
"""Rows of the mean over all that are added to those of each candidate."""
_CATEGORIES = 255  # what scikit-learn's histograms can hold; the last one stands for all rarer values


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
        scored = _predict(settings, prepared)
        models = {} if evaluated is None else {name: next(iter(evaluated.results.models.values()))}
        for each, rows in scored.items():
            sums = rows.measure()
            models[each] = MeasuredModel(sums, summarise(sums, settings.evaluation.resamples))
        facts = {"log": settings.data.log} if evaluated is None else evaluated.results.facts
        facts = facts | {"trees": f"at most {MOST_TREES:,} of each task, fewer where validation rows say so"}
        title = f"Baselines of {settings.name}"
        results = Results(models, tuple(settings.tasks), settings.evaluation, title, facts)
        write_results(results, out)
    return results


def _predict(settings: Settings, prepared: FeatureFolder) -> dict[str, ScoredRows]:
    """The baselines' predictions of the test rows; without candidates, none is more popular than another."""
    from mmoe_rec.evaluation.scoring import COLUMNS, ScoredRows
    from mmoe_rec.model.layout import ModelLayout

    layout = ModelLayout.of(prepared.layout, settings)
    train, validation, test = (EncodedRows(prepared.split(name), layout) for name in ("train", "validation", "test"))
    if train.rows > MOST_ROWS:
        say(f"the baselines learn from the last {MOST_ROWS:,} of {train.rows:,} training rows")
    weighted = settings.training.sampling_correction == "weights"
    learnt, held_out = (
        _Inputs.read(rows, layout, ("candidate", *rows.weighing(weighted)), MOST_ROWS) for rows in (train, validation)
    )
    outcomes = [f"label.{name}" for name in layout.outcomes]
    tested = _Inputs.read(test, layout, (*COLUMNS, *outcomes, *test.weighing(weighted)))
    popularity, trees = [], []
    with bar() as progress:
        step = progress.add_task(TREES, total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            labels, own = learnt.labels[:, index], held_out.labels[:, index]
            # Rows that say when to stop; none where they can't, for want of labels.
            enough = len(np.unique(own[~np.isnan(own)])) >= (2 if task.kind == "binary" else 1)
            try:
                rates = rate_candidates(learnt.ids("candidate"), labels, learnt.weights, tested.ids("candidate"))
                trained, stopping = (learnt.x, labels, learnt.weights), (held_out.x, own, held_out.weights)
                boosted = boost_trees(task.kind, learnt.categorical, trained, stopping if enough else None, tested.x)
            except UserError as error:
                raise UserError(f"no baseline can learn task '{task.name}': {error}") from None
            popularity.append(rates)
            trees.append(boosted)
            progress.advance(step)
    rows = ScoredRows(
        layout,
        users=tested.ids("user"),
        requests=tested.ids("request"),
        candidates=tested.ids("candidate") if settings.columns.has_candidate else None,
        predictions=np.zeros(tested.labels.shape),
        labels=tested.labels,
        score=np.zeros(len(tested.labels)),
        experts=None,
        outcomes={name: tested.table.column(f"label.{name}").to_numpy() for name in layout.outcomes},
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weights=tested.weights,
    )
    predictions = {TREES: trees} | ({} if rows.candidates is None else {POPULARITY: popularity})
    return {name: rows.with_predictions(np.stack(each, 1)) for name, each in predictions.items()}


def rate_candidates(
    candidates: pa.Array, labels: np.ndarray, weights: np.ndarray | None, others: pa.Array
) -> np.ndarray:
    """(M,) float64, what is predicted for M `others`: the mean label of each candidate, whoever the user is.

    It is smoothed toward the mean of all rows: (sum of labels + SMOOTHING x overall mean) / (rows + SMOOTHING); that of
    a candidate that was not seen is the overall mean.

    candidates, labels: (N,), NaN where unobserved; weights: (N,) what rows count, None is 1. Raises UserError where no
    label is observed.
    """
    observed = ~np.isnan(labels)
    if not observed.any():
        raise UserError("no training row has an observed label; expected at least one")
    rows = np.ones(len(labels)) if weights is None else weights
    counted = pd.DataFrame({"rows": rows, "labels": rows * labels}, dtype=np.float64)[observed]
    overall = counted["labels"].sum() / counted["rows"].sum()
    sums = counted.groupby(candidates.to_pandas().to_numpy()[observed]).sum()
    rates = (sums["labels"] + SMOOTHING * overall) / (sums["rows"] + SMOOTHING)
    return rates.reindex(others.to_pandas().to_numpy()).fillna(overall).to_numpy()


LabelledRows = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Features (N, F) float, NaN where missing, labels (N,), NaN where unobserved, and what rows count (N,), None is 1."""


def boost_trees(
    kind: str,
    categorical: np.ndarray,
    train: LabelledRows,
    validation: LabelledRows | None,
    x: np.ndarray,
    trees: int = MOST_TREES,
) -> np.ndarray:
    """(M,) float64, probabilities or values for features (M, F) by scikit-learn's histogram gradient boosting.

    kind: of the task; categorical: (F,) bool, columns of whole numbers, whose most frequent 254 values are kept apart,
    while all others, and those not seen in training, count as one; validation: rows by whose loss boosting stops once
    it has not improved for 15 trees. Raises UserError where no label is observed, or of a binary task one class only.
    """
    observed = ~np.isnan(train[1])
    classes = np.unique(train[1][observed])
    if len(classes) == 0:
        raise UserError("no training row has an observed label; expected at least one")
    if kind == "binary" and not np.array_equal(classes, [0, 1]):
        raise UserError(f"the observed training labels are {classes[:5].tolist()}; expected both 0 and 1")
    categories = {column: _frequent(train[0][observed, column]) for column in np.flatnonzero(categorical).tolist()}

    def known_rows(rows: LabelledRows) -> LabelledRows:
        known = ~np.isnan(rows[1])
        return _fold(rows[0][known], categories), rows[1][known], None if rows[2] is None else rows[2][known]

    estimator = HistGradientBoostingClassifier if kind == "binary" else HistGradientBoostingRegressor
    model = estimator(
        max_iter=trees,
        categorical_features=np.asarray(categorical, dtype=bool),
        early_stopping=validation is not None,
        n_iter_no_change=15,
        random_state=0,
    )
    names = ("X_val", "y_val", "sample_weight_val")
    held_out = {} if validation is None else dict(zip(names, known_rows(validation), strict=True))
    model.fit(*known_rows(train), **held_out)
    folded = _fold(x, categories)
    return np.asarray(model.predict_proba(folded)[:, 1] if kind == "binary" else model.predict(folded))


def _frequent(values: np.ndarray) -> np.ndarray:
    """(at most 254,) the most frequent values, the most frequent first and the smaller first among equals."""
    distinct, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    return distinct[np.argsort(-counts, kind="stable")][: _CATEGORIES - 1]


def _fold(x: np.ndarray, categories: Mapping[int, np.ndarray]) -> np.ndarray:
    """(N, F) float64 in which each categorical value is its rank by frequency, a rare one 254, a missing one NaN."""
    folded = np.array(x, dtype=np.float64)
    for column, frequent in categories.items():
        values = folded[:, column]
        rank = pd.Index(frequent).get_indexer(values).astype(np.float64)
        rank[rank < 0] = _CATEGORIES - 1
        folded[:, column] = np.where(np.isnan(values), np.nan, rank)
    return folded


@dataclass(frozen=True)
class _Inputs:
    """Inputs (N, F) float32 of encoded rows, all but placement and lists, which of them are ids (F,) bool, labels
    (N, T) float64, and further columns."""

    x: np.ndarray
    categorical: np.ndarray
    labels: np.ndarray
    table: pa.Table

    @property
    def weights(self) -> np.ndarray | None:
        """(N,), None where all rows count alike."""
        return weights_of(self.table)

    def ids(self, name: str) -> pa.Array:
        """A column of ids (N,)."""
        return self.table.column(name).combine_chunks()

    @staticmethod
    def read(rows: EncodedRows, layout: Layout, columns: Sequence[str], most: int | None = None) -> _Inputs:
        """The inputs of all rows, or of the last `most`."""
        dense = [index for index, each in enumerate(layout.dense) if not each.placement]
        names = [each.name for each in layout.ids if not each.many and not each.placement]
        left_out, parts, labels, tables = max(0, rows.rows - (most or rows.rows)), [], [], []
        for part, table in rows.stream(ROWS_AT_A_TIME, columns):
            first = min(left_out, len(part))
            left_out -= first
            if first == len(part):
                continue  # a slice of no row would keep all of them in memory
            ids = [np.asarray(part.encoded.ids[name])[first:] for name in names]
            parts.append(np.column_stack([part.encoded.dense[first:, dense], *ids]).astype(np.float32))
            labels.append(part.labels[first:])
            tables.append(table.slice(first))
        categorical = np.arange(len(dense) + len(names)) >= len(dense)
        return _Inputs(np.concatenate(parts), categorical, np.concatenate(labels), pa.concat_tables(tables))
