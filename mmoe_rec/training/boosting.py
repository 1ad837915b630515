"""Gradient-boosted trees (LightGBM).

The inputs of the trees, the leaves of a tree and the number of trees are chosen by the loss on held-out rows, which are
the selection rows (one half of the validation users).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mmoe_rec.batches.encoded_dataset import EncodedDataset, row_weights
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.log.columns import hash_column
from mmoe_rec.task_kinds.task_kind import TaskKind

if TYPE_CHECKING:
    from lightgbm import Booster

CHUNK_ROWS = 65_536
MAX_ROWS, MAX_VALUES = 2_000_000, 200_000_000
"""Maximum numbers of training rows and of their input values in memory. The same limits hold for validation rows. If
there are more rows, the last ones are used."""
MAX_TREES, EARLY_STOPPING_ROUNDS, DEFAULT_TREES = 1000, 30, 100
"""Maximum number of trees, number of successive trees without a lower validation loss that ends training, and number of
trees without validation rows."""
SMALL_DATA_ROWS = 500_000
"""Up to this number of training rows, the learning rate is halved and all numbers in `LEAF_COUNTS` are tried. With more
rows, this takes long and gains little."""
MAX_CATEGORIES = 300
"""LightGBM treats a feature with at most this number of IDs as categorical, and other IDs as numbers."""
MIN_COLUMNS_PER_TREE = 8
"""Minimum number of input columns that a tree reads, if there are enough columns."""
SMOOTHING_ROWS = 20.0
"""Weight of the overall mean label, in rows, in the smoothed mean label of a candidate or ID."""
TARGET_ENCODING_FOLDS = 5
LEAF_COUNTS = (31, 63, 127)
"""Numbers of leaves of a tree to choose from. The first is the default."""

Predictor = Callable[["TreeInputs"], np.ndarray]
"""Function from rows to predictions, shape (N,), float64."""
InputView = Callable[["TreeInputs"], np.ndarray]
"""Function from N rows to the F inputs of trees, shape (N, F)."""


def train_lightgbm(
    kind: TaskKind,
    train: TreeInputs,
    held_out: TreeInputs | None,
    leaves: int,
    seed: int,
    learning_rate: float,
    max_trees: int,
) -> Booster:
    """Grow trees with LightGBM. The result's `best_iteration` is the number of trees with the lowest held-out loss.

    Each tree reads a random two fifths of the columns, at least `MIN_COLUMNS_PER_TREE`. In a test, a random half of the
    columns for each split gave a higher loss and took twice the time.

    Args:
        kind: Kind of the task.
        train: Training rows of the task. The mean label of a regression should be about 0, because LightGBM stores
            labels in float32, which loses small differences between large labels.
        held_out: Selection rows of the task, None to grow all trees.
        leaves: Maximum number of leaves of a tree.
        seed: Seed of the random columns.
        learning_rate: Learning rate.
        max_trees: Maximum number of trees.
    """
    import lightgbm

    width = train.x.shape[1]
    settings = {
        "objective": kind.lightgbm_objective,
        "learning_rate": learning_rate,
        "num_leaves": leaves,
        "min_data_in_leaf": 50,
        "feature_fraction": max(0.4, min(1.0, MIN_COLUMNS_PER_TREE / width)),
        "cat_smooth": 20,
        "cat_l2": 20,
        "seed": seed,
        "deterministic": True,
        # By default, LightGBM times two ways of building histograms, and the trees depend on which one is faster.
        "force_col_wise": True,
        "verbosity": -1,
    }
    categories, options = [column for column in train.categories if column < width], {}
    rows = lightgbm.Dataset(train.x, train.labels, weight=train.weights, categorical_feature=categories)
    if held_out is not None:
        validation = rows.create_valid(held_out.x, held_out.labels, weight=held_out.weights)
        stop = lightgbm.early_stopping(EARLY_STOPPING_ROUNDS, verbose=False)
        options = {"valid_sets": [validation], "callbacks": [stop]}
    return lightgbm.train(settings, rows, max_trees, **options)


def fit_boosted_trees(
    kind: TaskKind, train: TreeInputs, validation: TreeInputs, seed: int = 0
) -> tuple[Predictor, str]:
    """Grow trees on several views of the inputs (see `_views`), such as all inputs without IDs, and keep the best.

    The best trees have the lowest validation loss over views, numbers of leaves and numbers of trees. The mean of the
    two best views also competes. If validation rows have too few labels, `DEFAULT_TREES` trees of the first view win.

    Args:
        kind: Kind of the task.
        train: Training rows of the task, from `TreeInputs.select_task`.
        validation: Validation rows of the task.
        seed: Seed of the random columns of each tree.

    Returns:
        The predictor, and a description of the choice.

    Raises:
        UserError: No label is observed, a binary task has one class only, or there is no input.
    """
    classes = np.unique(train.labels)
    if len(classes) == 0:
        raise UserError("no training row has an observed label. Trees need at least one.")
    if kind.is_binary and not np.array_equal(classes, [0, 1]):
        raise UserError(f"the observed training labels are {classes[:5].tolist()}, but trees need both 0 and 1.")
    held_out = validation if len(np.unique(validation.labels)) >= 1 + kind.is_binary else None
    if not train.x.shape[1]:
        raise UserError("trees have no input, because all features have the role placement or are lists of IDs")
    mean, std = kind.label_mean_and_std(train.labels)
    train = replace(train, labels=(train.labels - mean) / std)
    choices, losses = dict[str, Predictor](), dict[str, float]()

    def measure_loss(predict: Predictor) -> float:
        logits = kind.logits(torch.from_numpy(predict(validation))).numpy()
        return float(np.average(kind.losses(logits, validation.labels), weights=validation.weights))

    def show(view: InputView, predict: Callable[[np.ndarray], np.ndarray]) -> Predictor:
        return lambda rows: predict(view(rows)) * std + mean

    is_small = len(train.labels) <= SMALL_DATA_ROWS
    learning_rate, max_trees = 0.05 if is_small else 0.1, DEFAULT_TREES if held_out is None else MAX_TREES
    leaf_counts = LEAF_COUNTS[: None if held_out and is_small else 1]
    for view_name, x, view in _views(train):
        view_rows = replace(train, x=x, categories=train.categories if view_name == "with ids" else ())
        view_held_out = None
        if held_out is not None:
            view_held_out = replace(held_out, x=view(held_out), labels=(held_out.labels - mean) / std)
        candidates = []
        for leaves in leaf_counts:
            booster = train_lightgbm(kind, view_rows, view_held_out, leaves, seed, learning_rate, max_trees)
            count = booster.best_iteration or max_trees
            predictor, name = show(view, booster.predict), f"{count} trees of {leaves} leaves {view_name}"
            if held_out is None:  # Without a validation loss to choose by, take the first view.
                return predictor, name
            candidates.append((measure_loss(predictor), leaves, name, predictor))
        loss, leaves, name, predictor = min(candidates, key=lambda candidate: candidate[0])
        # To save time, only the first view tries all numbers of leaves. Later views use the first view's best number.
        choices[name], losses[name], leaf_counts = predictor, loss, (leaves,)
    if len(losses) > 1:
        best_two = sorted(losses, key=losses.__getitem__)[:2]
        blend = f"the mean of {' and '.join(best_two)}"
        choices[blend] = lambda rows: np.mean([choices[name](rows) for name in best_two], axis=0)
        losses[blend] = measure_loss(choices[blend])
    best = min(losses, key=losses.__getitem__)
    rest = (f"; {loss:.4g} of {name}" for name, loss in losses.items() if name != best)
    return choices[best], f"{best}, {kind.loss_name} of validation rows {losses[best]:.4g}{''.join(rest)}"


def _views(train: TreeInputs) -> Iterator[tuple[str, np.ndarray, InputView]]:
    """Yield views of the inputs: a name, the inputs of the training rows, and a function for the inputs of other rows.

    The first view has no IDs, because trees overfit on features with many IDs. The second view has the IDs as numbers.
    The third view replaces each ID by its mean label (`fit_target_encoding`). For a training row, this mean excludes
    all rows of the row's own fold, because the labels of its own request would reveal its label.
    """
    if train.num_numeric:
        yield "without ids", train.x[:, : train.num_numeric], lambda rows: rows.x[:, : rows.num_numeric]
    if train.num_numeric < train.x.shape[1]:
        yield "with ids", train.x, lambda rows: rows.x
    if train.num_numeric == train.x.shape[1] or train.folds is None or len(np.unique(train.folds)) == 1:
        return

    def fit(selected: np.ndarray) -> InputView:
        weights = None if train.weights is None else train.weights[selected]
        ids = train.x[selected, train.num_numeric :].T
        rates = [fit_target_encoding(pa.array(column), train.labels[selected], weights) for column in ids]

        def view(rows: TreeInputs) -> np.ndarray:
            ids = map(pa.array, rows.x[:, rows.num_numeric :].T)
            means = (rate(column).astype(np.float32) for rate, column in zip(rates, ids, strict=True))
            return np.column_stack([rows.x[:, : rows.num_numeric], *means])

        return view

    x = np.empty_like(train.x)
    for fold in np.unique(train.folds):
        in_fold = train.folds == fold
        x[in_fold] = fit(~in_fold)(replace(train, x=train.x[in_fold]))
    yield "with mean labels of ids", x, fit(np.ones(len(x), bool))


def fit_target_encoding(
    candidates: pa.Array, labels: np.ndarray, weights: np.ndarray | None
) -> Callable[[pa.Array], np.ndarray]:
    """Fit the smoothed mean label of each candidate: (sum of labels + s x overall mean) / (rows + s).

    s is `SMOOTHING_ROWS`. Weights are first divided by their mean. An unseen candidate gets the overall mean.

    Args:
        candidates: Candidates, shape (N,).
        labels: Labels, NaN if unobserved. Shape (N,).
        weights: Weights of the rows, None for equal weights. Shape (N,).

    Returns:
        Function from M candidates to their smoothed means, shape (M,), float64.

    Raises:
        UserError: No label is observed.
    """
    observed = ~np.isnan(labels)
    if not observed.any():
        raise UserError("no training row has an observed label. Popularity needs at least one.")
    rows = np.ones(len(labels)) if weights is None else weights / weights[observed].mean()
    counted = pd.DataFrame({"rows": rows, "labels": rows * labels}, dtype=np.float64)[observed]
    overall = counted["labels"].sum() / counted["rows"].sum()
    sums = counted.groupby(candidates.to_pandas().to_numpy()[observed]).sum()
    rates = (sums["labels"] + SMOOTHING_ROWS * overall) / (sums["rows"] + SMOOTHING_ROWS)
    return lambda ids: rates.reindex(ids.to_pandas().to_numpy()).fillna(overall).to_numpy()


@dataclass(frozen=True)
class TreeInputs:
    """Inputs of trees for N rows.

    Attributes:
        x: F inputs of each row, shape (N, F), float32: numeric features (NaN if missing), then features with one ID per
            row. Placement features and lists of IDs are left out.
        num_numeric: Number of columns with numeric features.
        labels: Labels of T tasks or of one task, NaN if unobserved. Shape (N, T) or (N,).
        weights: Weights of the rows, None for equal weights. Shape (N,).
        folds: Fold of each row, from 0, which is the same for all rows of a request. Shape (N,), or None if not set.
        categories: Indices of columns of `x` that LightGBM treats as categorical.
        table: Further columns of the N rows, such as "time", which `x` doesn't include.
    """

    x: np.ndarray
    num_numeric: int
    labels: np.ndarray
    weights: np.ndarray | None = None
    folds: np.ndarray | None = None
    categories: tuple[int, ...] = ()
    table: pa.Table = field(default_factory=lambda: pa.table({}))

    def column(self, name: str) -> pa.Array:
        """Return a column of `table`, shape (N,)."""
        return self.table.column(name).combine_chunks()

    def select_task(self, index: int) -> TreeInputs:
        """Return the rows with an observed label of task number `index`, with weights divided by their mean.

        LightGBM compares sums of weights, for instance of a leaf, with fixed limits.
        """
        observed = ~np.isnan(self.labels[:, index])
        weights, folds = (None if values is None else values[observed] for values in (self.weights, self.folds))
        if weights is not None and len(weights):
            weights = weights / weights.mean()
        x = self.x if observed.all() else self.x[observed]
        return TreeInputs(x, self.num_numeric, self.labels[observed, index], weights, folds, self.categories)

    @staticmethod
    def iter_chunks(
        rows: EncodedDataset, layout: Layout, columns: Sequence[str], skip_rows: int = 0
    ) -> Iterator[TreeInputs]:
        """Yield the rows in chunks of at most `CHUNK_ROWS` rows, without `folds` and `categories`.

        Args:
            rows: Encoded rows.
            layout: Layout of the inputs.
            columns: Columns of the log to read into `table`.
            skip_rows: Number of rows to skip at the start.
        """
        dense = [index for index, dense_input in enumerate(layout.dense) if not dense_input.placement]
        for part, table in rows.stream(CHUNK_ROWS, columns):
            first = min(skip_rows, len(part))
            skip_rows -= first
            if first == len(part):
                continue  # An empty slice would keep the whole chunk in memory.
            ids = [np.asarray(part.encoded.ids[name])[first:] for name in layout.single_ids()]
            x = np.column_stack([part.encoded.dense[first:, dense], *ids]).astype(np.float32)
            yield TreeInputs(
                x, len(dense), part.labels[first:], row_weights(table.slice(first)), table=table.slice(first)
            )

    @staticmethod
    def read(rows: EncodedDataset, layout: Layout, columns: Sequence[str]) -> TreeInputs:
        """Read as many of the last rows as the limits `MAX_ROWS` and `MAX_VALUES` (values of inputs) allow.

        Args:
            rows: Encoded rows.
            layout: Layout of the inputs.
            columns: Columns of the log to read into `table`.
        """
        max_rows = min(MAX_ROWS, MAX_VALUES // max(1, len(layout.dense) + len(layout.ids)))
        skip_rows = max(0, rows.rows - max_rows)
        parts = list(TreeInputs.iter_chunks(rows, layout, (*columns, "request"), skip_rows))
        table = pa.concat_tables([part.table for part in parts])
        x, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "labels"))
        folds = (hash_column(table["request"].combine_chunks()) % TARGET_ENCODING_FOLDS).astype(np.int8)
        num_ids = {id_input.name: layout.table(id_input.table).rows for id_input in layout.ids}
        is_category = [num_ids[name] <= MAX_CATEGORIES for name in layout.single_ids()]
        categories = tuple(parts[0].num_numeric + index for index in np.flatnonzero(is_category).tolist())
        weights, table = row_weights(table), table.drop_columns("request")
        return TreeInputs(x, parts[0].num_numeric, labels, weights, folds, categories, table)
