"""Gradient-boosted trees (LightGBM); selecting rows choose what they see, their size and their number."""

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
"""Rows, and values of their inputs, that are held in memory for training or validation; of more, the last ones."""
MAX_TREES, EARLY_STOPPING_ROUNDS, DEFAULT_TREES = 1000, 30, 100
"""Trees of a kind; those that are tried without a lower loss on validation rows; and trees where none say so."""
SMALL_DATA_ROWS = 500_000
"""Training rows up to which trees learn at half the rate, which takes twice as many, and in all sizes: with more, both
gain little."""
MAX_CATEGORIES = 300
"""Ids of a feature up to which LightGBM splits them into any two sets."""
MIN_COLUMNS_PER_TREE = 8
"""That a tree of LightGBM looks at, where there are as many."""
SMOOTHING_ROWS = 20.0
"""Rows of the mean over all that are added to those of each candidate, or each id."""
TARGET_ENCODING_FOLDS = 5
LEAF_COUNTS = (31, 63, 127)
"""Leaves of a tree that are tried, the usual number first."""

Predictor = Callable[["TreeInputs"], np.ndarray]  # rows -> (N,) float64, probabilities or values
InputView = Callable[["TreeInputs"], np.ndarray]  # rows -> (N, F), what trees see of them


def _fit(kind: TaskKind, train: TreeInputs, held_out: TreeInputs | None, leaves: int, seed: int) -> tuple[Booster, int]:
    """Grow trees, and return them with the number of them that count when they predict."""
    learning_rate = 0.05 if len(train.labels) <= SMALL_DATA_ROWS else 0.1
    max_trees = DEFAULT_TREES if held_out is None else MAX_TREES
    booster = train_lightgbm(kind, train, held_out, leaves, seed, learning_rate, max_trees)
    return booster, booster.best_iteration or max_trees


def train_lightgbm(
    kind: TaskKind,
    train: TreeInputs,
    held_out: TreeInputs | None,
    leaves: int,
    seed: int,
    learning_rate: float,
    max_trees: int,
) -> Booster:
    """Trees of LightGBM; `best_iteration` of them lose least on the rows that are held out, if any are. rate: of
    learning. It holds labels in float32, so those of a regression should have a mean of about 0. Each tree looks at
    two fifths of the columns, which loses less than half of them at each split, in half of the time."""
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
        "force_col_wise": True,  # else the way that is faster at the moment is taken
        "verbosity": -1,
    }
    categories, own = [each for each in train.categories if each < width], {}
    rows = lightgbm.Dataset(train.x, train.labels, weight=train.weights, categorical_feature=categories)
    if held_out is not None:
        validation = rows.create_valid(held_out.x, held_out.labels, weight=held_out.weights)
        own = {"valid_sets": [validation], "callbacks": [lightgbm.early_stopping(EARLY_STOPPING_ROUNDS, verbose=False)]}
    return lightgbm.train(settings, rows, max_trees, **own)


def fit_boosted_trees(
    kind: TaskKind, train: TreeInputs, validation: TreeInputs, seed: int = 0
) -> tuple[Predictor, str]:
    """The trees with the lowest validation loss, or the mean of those of the two best views; and what was
    chosen, in words.

    An id is its number in the vocabulary, where the most frequent ones come first, or a category where there are at
    most `MAX_CATEGORIES`. kind: of the task; train, validation: its rows, as `TreeInputs.select_task` gives them; seed:
    of the columns that a split looks at. The logloss, or squared error, of validation rows also says how many trees
    count; where these lack labels, TREES_UNCHOSEN of the first view do. Raises UserError where no label is observed, of
    a binary task one class only, or no input is left.
    """
    classes = np.unique(train.labels)
    if len(classes) == 0:
        raise UserError("no training row has an observed label; expected at least one")
    if kind.is_binary and not np.array_equal(classes, [0, 1]):
        raise UserError(f"the observed training labels are {classes[:5].tolist()}; expected both 0 and 1")
    held_out = validation if len(np.unique(validation.labels)) >= 1 + kind.is_binary else None
    if not train.x.shape[1]:
        raise UserError("trees have no input: all features describe placement, or are lists of ids")
    middle, scale = kind.label_mean_and_std(train.labels)
    # Labels in float32, as LightGBM holds them, would lose small differences beside a large mean.
    train = replace(train, labels=(train.labels - middle) / scale)
    choices, losses = dict[str, Predictor](), dict[str, float]()

    def measure_loss(predict: Predictor) -> float:
        logits = kind.logits(torch.from_numpy(predict(validation))).numpy()
        return float(np.average(kind.losses(logits, validation.labels), weights=validation.weights))

    def show(view: InputView, predict: Callable[[np.ndarray], np.ndarray]) -> Predictor:
        return lambda rows: predict(view(rows)) * scale + middle

    sizes = LEAF_COUNTS[: None if held_out and len(train.labels) <= SMALL_DATA_ROWS else 1]
    for seen, x, view in _views(train):
        own, other = replace(train, x=x, categories=train.categories if seen == "with ids" else ()), None
        if held_out is not None:
            other = replace(held_out, x=view(held_out), labels=(held_out.labels - middle) / scale)
        tried = []
        for leaves in sizes:
            booster, count = _fit(kind, own, other, leaves, seed)
            shown, told = show(view, booster.predict), f"{count} trees of {leaves} leaves {seen}"
            if held_out is None:  # nothing tells them apart
                return shown, told
            tried.append((measure_loss(shown), leaves, told, shown))
        loss, leaves, told, shown = min(tried, key=lambda each: each[0])
        choices[told], losses[told], sizes = shown, loss, (leaves,)  # the first view chooses the size of all
    if len(losses) > 1:
        both = sorted(losses, key=losses.__getitem__)[:2]
        mean = f"the mean of {' and '.join(both)}"
        choices[mean] = lambda rows: np.mean([choices[each](rows) for each in both], axis=0)
        losses[mean] = measure_loss(choices[mean])
    best = min(losses, key=losses.__getitem__)
    others = (f"; {loss:.4g} of {told}" for told, loss in losses.items() if told != best)
    return choices[best], f"{best}, {kind.loss_name} of validation rows {losses[best]:.4g}{''.join(others)}"


def _views(train: TreeInputs) -> Iterator[tuple[str, np.ndarray, InputView]]:
    """What trees may learn from: a name, x of the training rows, and what gives that of others.

    Ids of many values make trees overfit where counters say the same, and without counters their numbers say little. So
    the third view has each id's mean label instead, as `fit_target_encoding` has it: of training rows by the requests
    of other folds, since labels of the row's own list would tell its own.
    """
    if train.num_numeric:
        yield "without ids", train.x[:, : train.num_numeric], lambda rows: rows.x[:, : rows.num_numeric]
    if train.num_numeric < train.x.shape[1]:
        yield "with ids", train.x, lambda rows: rows.x
    if train.num_numeric == train.x.shape[1] or train.folds is None or len(np.unique(train.folds)) == 1:
        return

    def learn(taken: np.ndarray) -> InputView:
        weights = None if train.weights is None else train.weights[taken]
        ids = train.x[taken, train.num_numeric :].T
        rates = [fit_target_encoding(pa.array(each), train.labels[taken], weights) for each in ids]

        def view(rows: TreeInputs) -> np.ndarray:
            ids = map(pa.array, rows.x[:, rows.num_numeric :].T)
            means = (rate(each).astype(np.float32) for rate, each in zip(rates, ids, strict=True))
            return np.column_stack([rows.x[:, : rows.num_numeric], *means])

        return view

    x = np.empty_like(train.x)
    for fold in np.unique(train.folds):
        own = train.folds == fold
        x[own] = learn(~own)(replace(train, x=train.x[own]))
    yield "with mean labels of ids", x, learn(np.ones(len(x), bool))


def fit_target_encoding(
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
    rates = (sums["labels"] + SMOOTHING_ROWS * overall) / (sums["rows"] + SMOOTHING_ROWS)
    return lambda others: rates.reindex(others.to_pandas().to_numpy()).fillna(overall).to_numpy()


@dataclass(frozen=True)
class TreeInputs:
    """Rows as trees see them: x (N, F) float32, first the `numbers`, NaN where missing, then ids, without placement and
    lists; labels (N, T), or (N,) of one task, NaN where unobserved; what rows count (N,), None is 1; the fold of FOLDS
    that a row's request belongs to (N,); the columns of x that hold few ids; and further columns."""

    x: np.ndarray
    num_numeric: int
    labels: np.ndarray
    weights: np.ndarray | None = None
    folds: np.ndarray | None = None
    categories: tuple[int, ...] = ()
    table: pa.Table = field(default_factory=lambda: pa.table({}))

    def column(self, name: str) -> pa.Array:
        """A further column (N,)."""
        return self.table.column(name).combine_chunks()

    def select_task(self, index: int) -> TreeInputs:
        """The rows with an observed label of a task. Weights become multiples of their mean, as trees compare their
        sums with constants."""
        known = ~np.isnan(self.labels[:, index])
        weights, folds = (None if each is None else each[known] for each in (self.weights, self.folds))
        if weights is not None and len(weights):
            weights = weights / weights.mean()
        x = self.x if known.all() else self.x[known]
        return TreeInputs(x, self.num_numeric, self.labels[known, index], weights, folds, self.categories)

    @staticmethod
    def iter_chunks(
        rows: EncodedDataset, layout: Layout, columns: Sequence[str], skip_rows: int = 0
    ) -> Iterator[TreeInputs]:
        """All rows but the first ones, some at a time."""
        dense = [index for index, each in enumerate(layout.dense) if not each.placement]
        for part, table in rows.stream(CHUNK_ROWS, columns):
            first = min(skip_rows, len(part))
            skip_rows -= first
            if first == len(part):
                continue  # a slice of no row would keep all of them in memory
            ids = [np.asarray(part.encoded.ids[name])[first:] for name in layout.single_ids()]
            x = np.column_stack([part.encoded.dense[first:, dense], *ids]).astype(np.float32)
            yield TreeInputs(
                x, len(dense), part.labels[first:], row_weights(table.slice(first)), table=table.slice(first)
            )

    @staticmethod
    def read(rows: EncodedDataset, layout: Layout, columns: Sequence[str]) -> TreeInputs:
        """The last rows, as many as memory is meant to hold."""
        most = min(MAX_ROWS, MAX_VALUES // max(1, len(layout.dense) + len(layout.ids)))
        skip_rows = max(0, rows.rows - most)
        parts = list(TreeInputs.iter_chunks(rows, layout, (*columns, "request"), skip_rows))
        table = pa.concat_tables([each.table for each in parts])
        x, labels = (np.concatenate([getattr(each, name) for each in parts]) for name in ("x", "labels"))
        folds = (hash_column(table["request"].combine_chunks()) % TARGET_ENCODING_FOLDS).astype(np.int8)
        tables = {each.name: layout.table(each.table).rows for each in layout.ids}
        few = [tables[name] <= MAX_CATEGORIES for name in layout.single_ids()]
        categories = tuple(parts[0].num_numeric + place for place in np.flatnonzero(few).tolist())
        own = table.drop_columns("request")
        return TreeInputs(x, parts[0].num_numeric, labels, row_weights(table), folds, categories, own)
