"""Encoded rows -> the mergeable sums that an inspection makes of them: their size follows the tables, not the rows.

PSI, the population stability index, between training shares p and test shares q of the same bins:

    PSI = sum over bins of (q - p) ln(q / p),    p = (rows in bin + 1/2) / (all rows + bins / 2), q likewise

The half row keeps empty bins finite. It is usually read as: below .1 stable, .1 to .25 some drift, above .25 strong
drift (Siddiqi, Credit Risk Scorecards, 2006). Without any drift it is still about (bins - 1) (1 / N + 1 / M) for N and
M rows, `psi_noise`, which matters where a split has few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa

from mmoe_rec.auc import auc_of_counts
from mmoe_rec.batches.encoded_rows import EncodedRows, Rows
from mmoe_rec.features.layout import DenseInput, IdInput, Layout
from mmoe_rec.log.columns import hash_column, mix
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import bar
from mmoe_rec.settings.schema import Meaning, Schema

SPLITS = ("train", "validation", "test")
COLUMNS = ("user", "candidate", "request", "time")  # read beside the model's inputs
WHOS = COLUMNS[:3]
RATE_SMOOTHING = 20.0  # rows of the overall rate that the rate of an id is mixed with
FREQUENT = 50  # most frequent table rows that drift is measured in
GRID = 1000  # quantiles of the fine histogram of a number
PSI_BINS = 20
DISTINCT, DISTINCT_VALUES = 65_536, 4096  # hashes that are kept of ids, and of a number's values
_LOG_ODDS = np.linspace(-16, 16, 4095)  # edges of the bins of a list's mean rate
_DAY = 86_400_000_000
_MONDAY = 3 * _DAY  # 1970-01-01 was a Thursday
_SAMPLE, _SAMPLED_GROUPS = 65_536, 16
_BATCH_VALUES = 1 << 24


class DistinctCount:
    """Different 64-bit hashes seen: exact while fewer than `keep`, estimated from the `keep` smallest beyond.

    A mergeable sum of at most 8 x `keep` bytes. The estimate (k - 1) / u, where u in (0, 1] is the k-th smallest hash,
    is unbiased with a relative standard error of 1 / sqrt(k - 2) (Beyer et al., SIGMOD 2007).
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.smallest = np.empty(0, np.uint64)

    def add(self, hashes: np.ndarray) -> None:
        """Counts (N,) uint64 hashes."""
        if not self.exact:
            hashes = hashes[hashes < self.smallest[-1]]
        if len(hashes):
            self.smallest = np.unique(np.concatenate([self.smallest, pd.unique(hashes)]))[: self.keep]

    @property
    def exact(self) -> bool:
        """Whether `count` is the exact number."""
        return len(self.smallest) < self.keep

    def share_in(self, other: DistinctCount) -> float | None:
        """The share of the hashes that the other one has seen as well, or its estimate; None without hashes."""
        # Below this bound both hold all that they have seen: hashes are as good as random, so it is a fair sample.
        most = np.iinfo(np.uint64).max
        bound = min(most if each.exact else each.smallest[-1] for each in (self, other))
        mine = self.smallest[self.smallest <= bound]
        return float(np.isin(mine, other.smallest).mean()) if len(mine) else None

    def count(self) -> int:
        """The number of different hashes, or its estimate."""
        if self.exact:
            return len(self.smallest)
        return round((self.keep - 1) / (float(self.smallest[-1]) / 2.0**64))


def psi(train: np.ndarray, test: np.ndarray) -> float | None:
    """Population stability index of (B,) counts; None where a split has no rows."""
    if not train.sum() or not test.sum():
        return None
    p, q = ((each + 0.5) / (each.sum() + 0.5 * len(each)) for each in (train, test))
    return float(((q - p) * np.log(q / p)).sum())


def psi_noise(train: np.ndarray, test: np.ndarray) -> float | None:
    """What `psi` is on average if nothing has drifted; None where a split has no rows."""
    if not train.sum() or not test.sum():
        return None
    return float((len(train) - 1) * (1 / train.sum() + 1 / test.sum()))


def auc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Area under the ROC curve of a score in (B,) rising bins, ties within a bin; None where a class is missing."""
    area = float(auc_of_counts(positives, negatives))
    return None if np.isnan(area) else area


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
    """All features in the order of the settings."""
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


class IdSums:
    """Mergeable sums of one id input over a table of R rows; training rows come first.

    counts: split -> (R,) look-ups; a row of the log without any id counts as a look-up of row 0, as missing.
    observed, positives: split -> (T, R) look-ups in rows where a task's label is known, and is positive. Of lists,
    validation rows are counted in bins of the mean rate of their ids instead: scored, (T, 2, bins) by label.
    """

    def __init__(self, rows: int, tasks: int, many: bool) -> None:
        self.many = many
        self.counts = {split: np.zeros(rows, np.int64) for split in ("train", "test")}
        labelled = ("train",) if many else ("train", "validation")
        self.observed = {split: np.zeros((tasks, rows), np.int64) for split in labelled}
        self.positives = {split: np.zeros((tasks, rows), np.int64) for split in labelled}
        self.empty = {"train": 0, "test": 0}
        self.scored = np.zeros((tasks, 2, len(_LOG_ODDS) + 1), np.int64)
        self._rates: list[np.ndarray] = []

    def add(self, split: str, ids: np.ndarray | Ragged, labels: np.ndarray) -> None:
        """Counts the ids of N rows. labels: (2, T, N) bool, which rows are positive, and which are negative."""
        if isinstance(ids, Ragged):  # an empty list is one of row 0
            lengths = np.maximum(ids.lengths, 1)
            values = np.zeros(int(lengths.sum()), np.int64)
            values[np.repeat(ids.lengths > 0, lengths)] = ids.values
            ids = Ragged(values, lengths)
            if split == "validation":
                self._add_scores(ids, labels)
        else:
            ids = Ragged(ids, np.ones(len(ids), np.int32))
        if split in self.counts:
            self.empty[split] += int((ids.values[ids.offsets[:-1]][ids.lengths == 1] == 0).sum())
            np.add.at(self.counts[split], ids.values, 1)
        if split in self.observed:
            looked_up = np.repeat(labels, ids.lengths, axis=2)
            for task, (positive, negative) in enumerate(zip(*looked_up, strict=True)):
                np.add.at(self.observed[split][task], ids.values[positive | negative], 1)
                np.add.at(self.positives[split][task], ids.values[positive], 1)

    def rates(self, task: int) -> np.ndarray:
        """(R,) share of positives of each table row in training, with `RATE_SMOOTHING` rows of the overall share."""
        positives, observed = self.positives["train"][task], self.observed["train"][task]
        overall = positives.sum() / max(observed.sum(), 1)
        return (positives + RATE_SMOOTHING * overall) / (observed + RATE_SMOOTHING)

    def _add_scores(self, ids: Ragged, labels: np.ndarray) -> None:
        self._rates = self._rates or [self.rates(task) for task in range(len(self.scored))]
        for task, rates in enumerate(self._rates):
            mean = np.add.reduceat(rates[ids.values], ids.offsets[:-1]) / ids.lengths
            with np.errstate(divide="ignore"):
                bins = np.searchsorted(_LOG_ODDS, np.log(mean) - np.log1p(-mean))
            for place, rows in enumerate(labels[:, task]):
                self.scored[task, place] += np.bincount(bins[rows], minlength=len(_LOG_ODDS) + 1)

    def auc(self, task: int) -> float | None:
        """How well the training rates of the ids rank validation rows; None if there are no labels of both classes."""
        if not self.observed["train"][task].any():
            return None
        if self.many:
            return auc(*self.scored[task])
        observed, positives = self.observed["validation"][task], self.positives["validation"][task]
        _, rank = np.unique(self.rates(task), return_inverse=True)
        return auc(np.bincount(rank, positives), np.bincount(rank, observed - positives))

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
        first = meaning.first_known
        known = self.counts["train"][first:]
        frequent = np.argsort(-known, kind="stable")[:FREQUENT] + first
        names = ["all others"] * (len(known) > FREQUENT) + ["unknown"] * bool(meaning.unknown)
        names += ["missing"] * meaning.missing

        def count(counts: np.ndarray) -> np.ndarray:
            unknown, others = counts[int(meaning.missing) : first].sum(), counts[first:].sum() - counts[frequent].sum()
            told = {"all others": others, "unknown": unknown, "missing": counts[0]}
            return np.array([*counts[frequent], *(told[name] for name in names)], np.float64)

        return [*frequent.tolist(), *names], count(self.counts["train"]), count(self.counts["test"])


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
        self.labels = np.zeros((2, tasks, bins), np.int64)  # positive and negative validation rows
        self.distinct = DistinctCount(DISTINCT_VALUES)

    def add(self, split: str, values: np.ndarray, missing: np.ndarray | None, labels: np.ndarray) -> None:
        """Counts (N,) float32 values; missing: (N,) bool, None where that is not known; labels: as of `IdSums`."""
        bins = np.searchsorted(self.edges, values, side="left")
        if missing is not None:
            bins[missing] = len(self.edges) + 1
        if split in self.counts:
            self.counts[split] += self._count(bins)
        if split == "train":
            present = values if missing is None else values[~missing]
            self.distinct.add(mix((present + np.float32(0)).view(np.uint32).astype(np.uint64)))
        if split == "validation":
            for place in np.ndindex(self.labels.shape[:2]):
                self.labels[place] += self._count(bins[labels[place]])

    def _count(self, bins: np.ndarray) -> np.ndarray:
        return np.bincount(bins, minlength=len(self.edges) + 2)

    def auc(self, task: int) -> float | None:
        """How well the number alone ranks validation rows, whichever way round, missing values at the better end."""
        found = [auc(*np.roll(self.labels[:, task], shift, axis=1)) for shift in (0, 1)]
        return max((max(each, 1 - each) for each in found if each is not None), default=None)

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


class Labels:
    """Per task: observed labels and their sum."""

    def __init__(self, tasks: int) -> None:
        self.rows, self.observed, self.total = 0, np.zeros(tasks, np.int64), np.zeros(tasks)

    def add(self, labels: np.ndarray) -> None:
        """Counts (N, T) labels, NaN is unobserved."""
        self.rows += len(labels)
        self.observed += (~np.isnan(labels)).sum(0)
        self.total += np.nansum(labels, axis=0, dtype=np.float64)


@dataclass
class SplitSums:
    """Labels, times (microseconds) and different users, candidates and requests of a split."""

    labels: Labels
    first: int = np.iinfo(np.int64).max
    last: int = np.iinfo(np.int64).min
    who: dict[str, DistinctCount] = field(default_factory=lambda: {name: DistinctCount(DISTINCT) for name in WHOS})


class Sums:
    """All sums; training rows come first, in any number of parts."""

    def __init__(self, layout: Layout, features: Sequence[FeatureInputs], grids: Sequence[np.ndarray]) -> None:
        """grids: edges of each dense input's fine histogram, in the order of the layout."""
        tasks = len(layout.tasks)
        self.layout, self.features = layout, features
        self.splits: dict[str, SplitSums] = {}
        self.weeks: dict[tuple[int, str], Labels] = {}  # (start of the week, split)
        self.ids = {each.name: IdSums(layout.table(each.table).rows, tasks, each.many) for each in layout.ids}
        self.numbers = {
            each.name: NumberSums(grids[each.place], tasks) for feature in features for each in feature.numbers
        }

    def add(self, split: str, rows: Rows, columns: pa.Table) -> None:
        """Counts N rows of a split; columns: their `COLUMNS`. A regression's label above its mean is positive."""
        tasks, given, dense = self.layout.tasks, rows.labels, rows.encoded.dense
        times = columns.column("time").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
        sums = self.splits.setdefault(split, SplitSums(Labels(len(tasks))))
        sums.labels.add(given)
        sums.first, sums.last = min(sums.first, int(times.min())), max(sums.last, int(times.max()))
        for name, count in sums.who.items():
            count.add(hash_column(columns.column(name).combine_chunks()))
        weeks = (times + _MONDAY) // (7 * _DAY) * (7 * _DAY) - _MONDAY
        for week in np.unique(weeks):
            self.weeks.setdefault((int(week), split), Labels(len(tasks))).add(given[weeks == week])
        bounds = np.array([0.5 if task.kind == "binary" else task.mean for task in tasks], given.dtype)
        labels = np.stack([given > bounds, given <= bounds]).transpose(0, 2, 1)  # an unobserved one, NaN, is neither
        for name, of_ids in self.ids.items():
            of_ids.add(split, rows.encoded.ids[name], labels)
        for feature in self.features:
            for each, missing in zip(feature.numbers, _missing(feature, dense), strict=True):
                self.numbers[each.name].add(split, np.ascontiguousarray(dense[:, each.place]), missing, labels)


def _missing(feature: FeatureInputs, dense: np.ndarray) -> list[np.ndarray | None]:
    """(N,) bool for each number of a feature: rows in which it is missing; None where the encoded rows don't tell.

    A missing vector is all zeros. Any other number without an indicator was never missing in training rows.
    """
    if feature.meaning.zeros_missing:
        none: np.ndarray = ~np.any(dense[:, [each.place for each in feature.numbers]], axis=1)
        return [none] * len(feature.numbers)
    return [None if each.indicator is None else dense[:, each.indicator] > 0.5 for each in feature.numbers]


def collect(prepared: FeatureFolder, schema: Schema) -> Sums:
    """Sums of all encoded rows. Raises UserError for a split without rows, and for rows that can't be read."""
    prepared.require_rows(*SPLITS)
    layout = prepared.layout
    splits = {name: EncodedRows(prepared.split(name), layout) for name in SPLITS}
    sums = Sums(layout, feature_inputs(schema, layout), _grids(splits["train"], layout))
    batch_size = max(1024, min(65_536, _BATCH_VALUES // (len(layout.dense) + len(layout.ids))))
    with bar() as progress:
        task = progress.add_task("inspecting", total=sum(each.rows for each in splits.values()))
        for name, encoded in splits.items():
            for rows, columns in encoded.stream(batch_size, COLUMNS):
                sums.add(name, rows, columns)
                progress.advance(task, len(rows))
    return sums


def _grids(train: EncodedRows, layout: Layout) -> list[np.ndarray]:
    """Edges of each dense input's histogram, from rows spread evenly over the training rows."""
    chosen = np.unique(np.linspace(0, len(train.groups) - 1, _SAMPLED_GROUPS).round().astype(np.int64))
    sample = []
    for group in chosen:
        rows = int(train.group_rows[group])
        take = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLE // len(chosen))).round().astype(np.int64))
        sample.append(train.read_row_group(train.groups[group], take).encoded.dense)
    dense = np.concatenate(sample)
    return [grid_edges(dense[:, place], each.edges) for place, each in enumerate(layout.dense)]
