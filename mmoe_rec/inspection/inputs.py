"""What an inspection counts of each input of a feature: ids and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmoe_rec.features.layout import DenseInput, IdInput, Layout
from mmoe_rec.inspection.statistics import BinaryLabels, DistinctCount, auc, auc_of_scores, smoothed_rates
from mmoe_rec.log.hashing import mix
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.settings.schema import Meaning, Schema


@dataclass(frozen=True)
class NumberInput:
    """A dense input, its place in the layout and that of the indicator of its missing values, if it has one."""

    name: str
    place: int
    indicator: int | None
    edges: tuple[float, ...]


@dataclass(frozen=True)
class FeatureInputs:
    """A feature with its inputs in the order of the layout."""

    name: str
    kind: str
    role: str
    meaning: Meaning
    ids: tuple[IdInput, ...]
    numbers: tuple[NumberInput, ...]


def feature_inputs(schema: Schema, layout: Layout) -> list[FeatureInputs]:
    """All features in the order of the settings. Raises ValueError for an input that belongs to none of them."""
    for each in (*layout.ids, *layout.dense):
        if each.feature not in schema.features:
            raise ValueError(f"input '{each.name}' belongs to none of the features {', '.join(schema.features)}")
    return [
        FeatureInputs(
            name,
            feature.kind,
            schema.role_of(name),
            feature.meaning(schema),
            tuple(each for each in layout.ids if each.feature == name),
            _numbers(layout.dense, name),
        )
        for name, feature in schema.features.items()
    ]


def _numbers(dense: tuple[DenseInput, ...], feature: str) -> tuple[NumberInput, ...]:
    places = {each.name: place for place, each in enumerate(dense) if each.feature == feature}
    indicators = {f"{name}_missing" for name in places}.intersection(places)
    return tuple(
        NumberInput(name, place, places.get(f"{name}_missing"), dense[place].edges)
        for name, place in places.items()
        if name not in indicators
    )


FREQUENT = 50  # most frequent table rows that drift is measured in
_SCORE_BINS = 4096


class IdSums:
    """Mergeable sums of one id input over a table of R rows.

    counts: split -> (R,) look-ups; a row of the log without any id counts as a look-up of row 0, as missing.
    observed, positives: split -> (T, R) look-ups in rows where a task's label is known, and is positive.
    """

    def __init__(self, rows: int, tasks: int, many: bool) -> None:
        self.rows, self.many = rows, many
        self.counts = {split: np.zeros(rows, np.int64) for split in ("train", "test")}
        self.observed = {split: np.zeros((tasks, rows), np.int64) for split in _labelled(many)}
        self.positives = {split: np.zeros((tasks, rows), np.int64) for split in _labelled(many)}
        self.empty = {"train": 0, "test": 0}
        # Of lists only: validation rows in bins of the mean rate of their ids, between the least and the largest rate.
        self.score_rates: list[np.ndarray] = []
        self.score_edges: list[np.ndarray] = []
        self.score_positives, self.score_negatives = np.zeros((2, tasks if many else 0, _SCORE_BINS), np.int64)

    def add(self, split: str, ids: np.ndarray | Ragged, labels: BinaryLabels) -> None:
        """Counts the ids of N rows."""
        if isinstance(ids, Ragged):
            ids = _with_missing(ids)
            if split in self.empty:
                self.empty[split] += int(((ids.lengths == 1) & (ids.values[ids.offsets[:-1]] == 0)).sum())
            if split == "validation":
                self._add_scores(ids, labels)
        elif split in self.empty:
            self.empty[split] += int((ids == 0).sum())
        if split in self.counts:
            np.add.at(self.counts[split], ids.values if isinstance(ids, Ragged) else ids, 1)
        if split in self.observed:
            for task in range(len(self.observed[split])):
                positive = _taken(ids, labels.positive[task])
                np.add.at(self.positives[split][task], positive, 1)
                np.add.at(self.observed[split][task], positive, 1)
                np.add.at(self.observed[split][task], _taken(ids, labels.negative[task]), 1)

    def learn_rates(self) -> None:
        """Called once after all training rows: fixes the bins of the rates that validation rows are scored with."""
        tasks = range(len(self.score_positives))
        self.score_rates = [self.rates(task) for task in tasks]
        self.score_edges = [_evenly_in_log_odds(rates) for rates in self.score_rates]

    def rates(self, task: int) -> np.ndarray:
        """(R,) smoothed share of positives of each table row in training rows."""
        return smoothed_rates(self.positives["train"][task], self.observed["train"][task])

    def _add_scores(self, ids: Ragged, labels: BinaryLabels) -> None:
        for task, edges in enumerate(self.score_edges):
            sums = np.add.reduceat(self.score_rates[task][ids.values], ids.offsets[:-1])
            bins = np.searchsorted(edges, sums / ids.lengths)
            self.score_positives[task] += np.bincount(bins[labels.positive[task]], minlength=_SCORE_BINS)
            self.score_negatives[task] += np.bincount(bins[labels.negative[task]], minlength=_SCORE_BINS)

    def auc(self, task: int) -> float | None:
        """How well the training rates of the ids rank validation rows; None if there are no labels of both classes."""
        if not self.observed["train"][task].any():
            return None
        if self.many:
            return auc(self.score_positives[task], self.score_negatives[task])
        observed, positives = self.observed["validation"][task], self.positives["validation"][task]
        return auc_of_scores(self.rates(task), positives, observed - positives)

    def distinct(self, meaning: Meaning) -> int:
        """Known ids, or buckets, that occur in training rows."""
        return int((self.counts["train"][meaning.first_known :] > 0).sum())

    def unknown_share(self, split: str, meaning: Meaning) -> float | None:
        """Share of the ids given that are out of the vocabulary; None where there is no such thing, or no id."""
        counts = self.counts[split][int(meaning.missing) :]
        if not meaning.unknown or not counts.sum():
            return None
        return float(counts[: meaning.unknown].sum() / counts.sum())

    def psi_counts(self, meaning: Meaning) -> tuple[list[int | str], np.ndarray, np.ndarray]:
        """Table rows (or 'missing', 'unknown', 'all others'), training and test counts of the bins of drift."""
        known = self.counts["train"][meaning.first_known :]
        frequent = np.sort(np.argsort(-known, kind="stable")[:FREQUENT]) + meaning.first_known
        frequent = frequent[np.argsort(-self.counts["train"][frequent], kind="stable")]
        names: list[int | str] = [int(row) for row in frequent]
        columns = []
        for split in ("train", "test"):
            counts = self.counts[split]
            parts = [*counts[frequent], 0]
            if meaning.unknown:
                parts.append(counts[int(meaning.missing) : meaning.first_known].sum())
            if meaning.missing:
                parts.append(counts[0])
            parts[len(frequent)] = counts.sum() - sum(parts)
            columns.append(np.array(parts, np.float64))
        names += ["all others"] + ["unknown"] * bool(meaning.unknown) + ["missing"] * meaning.missing
        if len(known) <= FREQUENT:
            names.pop(len(frequent))
            columns = [np.delete(column, len(frequent)) for column in columns]
        return names, columns[0], columns[1]


def _evenly_in_log_odds(rates: np.ndarray) -> np.ndarray:
    """Rising edges from the least to the largest rate."""
    ends = np.clip([rates.min(), rates.max()], 1e-9, 1 - 1e-9)
    low, high = np.log(ends / (1 - ends))
    return 1 / (1 + np.exp(-np.linspace(low, high, _SCORE_BINS - 1)))


def _labelled(many: bool) -> tuple[str, ...]:
    return ("train",) if many else ("train", "validation")


def _with_missing(ids: Ragged) -> Ragged:
    """The same lists, an empty one as a list of row 0."""
    lengths = np.maximum(ids.lengths, 1)
    values = np.zeros(int(lengths.sum()), np.int64)
    values[np.repeat(ids.lengths > 0, lengths)] = ids.values
    return Ragged(values, lengths)


def _taken(ids: np.ndarray | Ragged, places: np.ndarray) -> np.ndarray:
    return ids.take(places).values if isinstance(ids, Ragged) else ids[places]


GRID = 1000  # quantiles of the fine histogram
PSI_BINS = 20
DISTINCT = 4096


def grid_edges(sample: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Rising float32 edges of the fine histogram: quantiles of an (N,) sample of training values, and given `edges`.

    Bin i holds the values in (edge i-1, edge i], so that a value that many rows share has a bin of its own.
    """
    quantiles = np.quantile(sample, np.linspace(0, 1, GRID + 1), method="inverted_cdf") if len(sample) else np.empty(0)
    return np.unique(np.concatenate([quantiles, np.array(edges)]).astype(np.float32))


class NumberSums:
    """Mergeable sums of one dense input. edges: (B - 1,) of `grid_edges`; the last of the B + 1 bins is 'missing'."""

    def __init__(self, edges: np.ndarray, tasks: int) -> None:
        self.edges = edges
        bins = len(edges) + 2
        self.counts = {split: np.zeros(bins, np.int64) for split in ("train", "test")}
        self.positives, self.negatives = np.zeros((2, tasks, bins), np.int64)  # of validation rows
        self.distinct = DistinctCount(DISTINCT)

    def add(self, split: str, values: np.ndarray, missing: np.ndarray | None, labels: BinaryLabels) -> None:
        """Counts (N,) float32 values; missing: (N,) bool, None where that is not known."""
        bins = np.searchsorted(self.edges, values, side="left")
        if missing is not None:
            bins[missing] = len(self.edges) + 1
        if split in self.counts:
            self.counts[split] += self._count(bins)
        if split == "train":
            present = values if missing is None else values[~missing]
            self.distinct.add(mix((present + np.float32(0)).view(np.uint32).astype(np.uint64)))
        if split == "validation":
            for task in range(len(self.positives)):
                self.positives[task] += self._count(bins[labels.positive[task]])
                self.negatives[task] += self._count(bins[labels.negative[task]])

    def _count(self, bins: np.ndarray) -> np.ndarray:
        return np.bincount(bins, minlength=len(self.edges) + 2)

    def missing(self, split: str) -> int:
        """Rows without a value."""
        return int(self.counts[split][-1])

    def constant(self) -> bool:
        """Whether all training rows have one value, or all have none."""
        return self.distinct.count() + bool(self.missing("train")) <= 1

    def auc(self, task: int) -> float | None:
        """How well the number alone ranks validation rows, whichever way round, missing values at the better end."""
        positives, negatives = self.positives[task], self.negatives[task]
        found = [auc(positives, negatives), auc(np.roll(positives, 1), np.roll(negatives, 1))]
        return None if found[0] is None else max(max(each, 1 - each) for each in found if each is not None)

    def psi_counts(self, edges: tuple[float, ...]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, training and test counts of the bins that drift is measured in: at `edges`, if there are any, else
        about `PSI_BINS` of equal training mass; then missing values."""
        at = np.array(edges, np.float32) if len(edges) > 1 else self._equal_mass()
        uppers = np.append(self.edges, np.float32(np.inf))
        bins = np.append(np.searchsorted(at, uppers, side="left"), len(at) + 1)
        train, test = (np.bincount(bins, self.counts[split], len(at) + 2) for split in ("train", "test"))
        return [*_names(at), "missing"], train, test

    def _equal_mass(self) -> np.ndarray:
        mass = np.cumsum(self.counts["train"][:-2])
        if not len(mass) or not mass[-1]:
            return self.edges[:1]
        positions = np.searchsorted(mass, np.arange(1, PSI_BINS + 1) / PSI_BINS * mass[-1])
        return self.edges[np.unique(np.minimum(positions, len(mass) - 1))]


def _names(edges: np.ndarray) -> list[str]:
    if not len(edges):
        return ["all values"]
    words = [f"{edge:.3g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(words)]
    return [f"up to {words[0]}", *between, f"over {words[-1]}"]
