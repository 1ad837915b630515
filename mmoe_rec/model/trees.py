"""Boosted trees beside the network: a task's logit is a weighted sum of what both say.

Trees and networks err in different ways, so their sum ranks above both. The trees (LightGBM's) read the numbers that
the network reads, and some of them the rows that single ids have in their tables, where frequent ones come first;
`mmoe_rec.training.stacking` grows them and fits the weights.

In an artifact they are a folder `trees`: the trees of each task as LightGBM writes them, several sets one after the
other, and `blends.json`, the weights.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mmoe_rec.errors import UserError

FOLDER, BLENDS = "trees", "blends.json"


@dataclass(frozen=True)
class Blend:
    """logit = network x the network's + trees x that of the trees + offset; of a regression, the same of values."""

    network: float
    trees: float
    offset: float

    def apply(self, network: np.ndarray, trees: np.ndarray) -> np.ndarray:
        """Blend logits, or values, of both, of any shape."""
        return self.network * network + self.trees * trees + self.offset


@dataclass(frozen=True)
class Trees:
    """The trees of some tasks, by their names, as LightGBM's text, and how each is blended with the network."""

    texts: Mapping[str, str]
    blends: Mapping[str, Blend]

    @cached_property
    def forest(self) -> "Forest":
        """Trees of all tasks, in the order of `texts`. Raises ValueError or LookupError where a text is damaged."""
        return Forest([read_ensemble(text) for text in self.texts.values()])

    def logits(self, inputs: Tensor, names: Sequence[str]) -> Tensor:
        """(B, F) float32, numbers and then ids -> (B, T) float64 what the trees of T tasks say, NaN for one without
        them: logits, or a regression's values in deviations from its mean."""
        columns = np.full((len(inputs), len(names)), np.nan)
        if self.texts:
            places = [names.index(name) for name in self.texts]
            columns[:, places] = self.forest.sums(inputs.detach().cpu().numpy(), torch.get_num_threads())
        return torch.from_numpy(columns)

    def blend(self, network: Tensor, trees: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) logits of both -> (B, T) of the same type; a task without trees keeps the network's."""
        found = [astuple(self.blends.get(name, Blend(1.0, 0.0, 0.0))) for name in names]
        one, other, offset = torch.tensor(found, dtype=torch.float64, device=network.device).T
        blended = one * network.double() + other * trees.double() + offset
        return torch.where(trees.isnan(), network.double(), blended).to(network)

    def write(self, folder: Path) -> None:
        (folder / FOLDER).mkdir()
        for name, text in self.texts.items():
            (folder / FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
        tree = {name: asdict(blend) for name, blend in self.blends.items()}
        (folder / FOLDER / BLENDS).write_text(json.dumps(tree, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path, numbers: int, ids: int) -> "Trees":
        """Those of an artifact folder, which read so many numbers, and so many ids or none. Raises UserError where they
        are damaged."""
        path, what = folder / FOLDER / BLENDS, f"the model in '{folder}'"
        try:
            blends = TypeAdapter(dict[str, Blend]).validate_python(json.loads(path.read_text(encoding="utf-8")))
            texts = {name: (folder / FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in blends}
            trees = Trees(texts, blends)
            widths = trees.forest.widths if texts else set[int]()
        except (OSError, ValueError, LookupError, OverflowError) as error:
            raise UserError(f"the trees of {what} can't be read: {' '.join(str(error).split())[:200]}") from None
        if not widths <= {numbers, numbers + ids}:
            raise UserError(f"the trees of {what} read other inputs than its layout has")
        return trees


# Boosted trees as arrays: what all trees of some tasks give rows, by operations on bits.
#
# A tree is read from the text that LightGBM writes. For a block of rows, each split of all trees becomes a string of
# bits, one a row: whether the row goes left. From the roots down, the rows that reach a node are then an `and` of two
# strings, so that nothing is computed row by row. (QuickScorer, Lucchese et al., SIGIR 2015, has the bits the other way
# round: a string of leaves for each row.) At the end each row's leaf is put together, digit by digit. All of this is
# exact, and the sum over trees is taken in their order, so that a row's does not depend on the rows beside it.


ROWS_PER_BLOCK = (
    128  # so many at a time stay in a processor's cache: 871 trees and 500 rows took 3.6 ms so, and 9.6 at once
)
_SET, _MISSING = 1, 12  # bits of LightGBM's decision types: a split by a set, and a rule for what is missing

_ZERO = np.float32(1e-35)  # LightGBM reads numbers that are as small as 0, so these do not go left at an edge below 0


@dataclass(frozen=True)
class Tree:
    """A tree of S splits and S + 1 leaves; its root is split 0, or leaf 0 where there is none.

    features: (S,) int64 the input that is looked at; edges: (S,) float32, inputs up to it go left; by_set: (S,) bool,
    instead those go left that are whole numbers in a set; left, right: (S,) int64 the next split, or `~leaf`; values:
    (S + 1,) float64 of leaves. Of set c, which is `sets[split]`, the uint32 `words[places[c]:places[c + 1]]` have a bit
    for each whole number from 0 on.
    """

    features: np.ndarray
    edges: np.ndarray
    is_categorical: np.ndarray
    left: np.ndarray
    right: np.ndarray
    values: np.ndarray
    sets: np.ndarray
    set_offsets: np.ndarray
    set_bits: np.ndarray

    def left_categories(self, split: int) -> list[int]:
        """The whole numbers that go left."""
        first, end = self.set_offsets[self.sets[split] :][:2]
        return np.flatnonzero(np.unpackbits(self.set_bits[first:end].view(np.uint8), bitorder="little")).tolist()


class Ensemble(NamedTuple):
    """Boosted trees of one task, whose values are added up, and how many inputs they were grown with."""

    trees: list[Tree]
    width: int


def read_ensemble(text: str) -> Ensemble:
    """The trees in LightGBM's text, or the mean of several sets, whose texts follow each other.

    Raises ValueError or LookupError for a text that is damaged, and for trees of a kind that
    `mmoe_rec.training.stacking` does not grow.
    """
    *sets, _ = text.split("\nend of trees")
    trees, width = list[Tree](), 0
    for each in sets:
        header, *blocks = each.split("\nTree=")
        width = max(width, int(_entries(header)["max_feature_idx"]) + 1)
        trees += [_read_tree(_entries(block), len(sets)) for block in blocks]
    if not trees or any((tree.features >= width).any() for tree in trees):
        raise ValueError("there is no tree, or a split reads an input that there is not")
    return Ensemble(trees, width)


def _entries(lines: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines.splitlines() if "=" in line)


def _read_tree(entries: Mapping[str, str], sets: int) -> Tree:
    def numbers(name: str, kind: type) -> np.ndarray:
        return np.array(entries.get(name, "").split(), kind)

    kinds, thresholds = numbers("decision_type", np.int64), numbers("threshold", np.float64)
    is_categorical = kinds & _SET == _SET
    if (kinds[~is_categorical] & _MISSING).any():
        raise ValueError("a tree has a rule for missing numbers")
    with np.errstate(over="ignore"):
        edges = thresholds.astype(np.float32)
    # The largest float32 up to the threshold, as inputs are float32.
    edges = np.where(edges > thresholds, np.nextafter(edges, np.float32(-np.inf)), edges)
    edges = np.where((edges >= -_ZERO) & (edges < 0), np.nextafter(-_ZERO, np.float32(-np.inf)), edges)
    tree = Tree(
        numbers("split_feature", np.int64),
        edges,
        is_categorical,
        numbers("left_child", np.int64),
        numbers("right_child", np.int64),
        numbers("leaf_value", np.float64) / sets,
        np.where(is_categorical, thresholds, 0).astype(np.int64),
        numbers("cat_boundaries", np.int64),
        numbers("cat_threshold", np.uint32),
    )
    if len(tree.values) != len(kinds) + 1 or len(tree.left) != len(kinds):
        raise ValueError("the splits of a tree do not fit together")
    return tree


class Forest:
    """All trees of K tasks, ready to be read together."""

    def __init__(self, ensembles: Sequence[Ensemble]) -> None:
        trees = [tree for each in ensembles for tree in each.trees]
        self.widths = {each.width for each in ensembles}
        self._ends = np.cumsum([0, *(len(each.trees) for each in ensembles)]).tolist()
        self._digits = max(len(tree.features) for tree in trees).bit_length()  # of a leaf's number
        self._values = np.zeros((len(trees), 1 << self._digits))
        for tree, row in zip(trees, self._values, strict=True):
            row[: len(tree.values)] = tree.values
        self._numbers: list[tuple[int, slice, np.ndarray]] = []  # input, rows of bits, edges (E, 1)
        self._sets: list[tuple[int, slice, np.ndarray]] = []  # input, which sets, (most + 2, S) who is in which
        # Of the splits at each depth: where the rows that reach their nodes stand, which bits they read, and where the
        # rows of their left children go, which those of the right ones follow.
        self._levels: list[tuple[np.ndarray, np.ndarray, int]] = []
        sizes = [len(tree.features) for tree in trees]
        firsts = np.cumsum([0, *sizes])
        self._bits = self._edges = 0  # rows of bits, and those that are of edges
        bits = self._find_bits(trees, firsts)
        # Leaf l of tree t is ~(l x trees + t), so that leaves of one number lie side by side.
        of_tree, count = np.arange(len(trees)).repeat(sizes), len(trees)
        left, right = (
            np.where(each >= 0, each + firsts[of_tree], ~(~each * count + of_tree))
            for each in (np.concatenate([getattr(tree, side) for tree in trees]) for side in ("left", "right"))
        )
        leaves = np.full(self._values.size, -1)
        nodes, first = np.where(np.array(sizes) > 0, firsts[:-1], ~np.arange(count)), 0
        while len(nodes):
            (inner,), (outer,) = (nodes >= 0).nonzero(), (nodes < 0).nonzero()
            leaves[~nodes[outer]] = first + outer
            splits = nodes[inner]
            self._levels.append((first + inner, bits[splits], first := first + len(nodes)))
            nodes = np.concatenate([left[splits], right[splits]])
        self._leaves, self._nodes = leaves, first + 1  # the last node is that of leaves that a tree has not

    def _find_bits(self, trees: Sequence[Tree], firsts: np.ndarray) -> np.ndarray:
        """(S,) the row of bits that each split of all trees reads."""
        features, edges, is_categorical = (
            np.concatenate([getattr(tree, name) for tree in trees]) for name in ("features", "edges", "is_categorical")
        )
        bits = np.empty(len(features), np.int64)
        keys = features[~is_categorical] << 32 | edges[~is_categorical].view(np.uint32)
        keys, bits[~is_categorical] = np.unique(keys, return_inverse=True)
        self._bits = self._edges = len(keys)
        for feature, first, count in zip(*np.unique(keys >> 32, return_index=True, return_counts=True), strict=True):
            rows = slice(first, first + count)
            own = (keys[rows] & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
            self._numbers.append((int(feature), rows, own[:, None]))
        sets: dict[int, list[tuple[int, list[int]]]] = {}
        for tree, first in zip(trees, firsts, strict=False):
            for split in np.flatnonzero(tree.is_categorical).tolist():
                sets.setdefault(int(tree.features[split]), []).append((first + split, tree.left_categories(split)))
        for feature, splits in sets.items():
            table = np.zeros((2 + max(max(members) for _, members in splits), len(splits)), np.bool_)
            for place, (split, members) in enumerate(splits):
                table[members, place], bits[split] = True, self._bits
                self._bits += 1
            end = self._bits - self._edges
            self._sets.append((feature, slice(end - len(splits), end), table))
        return bits

    def sums(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        """(B, F) float32 -> (B, K) float64 the sum over each task's trees. A row's does not depend on other rows."""
        blocks = [x[first : first + ROWS_PER_BLOCK] for first in range(0, len(x), ROWS_PER_BLOCK)]
        if (threads := min(threads, len(blocks) // 4)) > 1:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._sums, blocks))
        else:
            parts = [self._sums(block) for block in blocks]
        return np.concatenate([np.empty((0, len(self._ends) - 1)), *parts])

    def _sums(self, x: np.ndarray) -> np.ndarray:
        # The narrowest words that hold all rows, of 8 to 64 bits: few rows touch less memory so.
        word: np.dtype[Any] = np.dtype(f"u{min(8, max(1, 1 << (-(-len(x) // 8) - 1).bit_length()))}")
        trees, words = len(self._values), -(-len(x) // (8 * word.itemsize))
        rows = 8 * word.itemsize * words
        columns = x.take(np.minimum(np.arange(rows), len(x) - 1), axis=0).T.copy()
        bits = np.empty((self._bits, rows // 8), np.uint8)
        goes_left = np.empty((self._edges, rows), np.bool_)
        for feature, splits, edges in self._numbers:
            np.less_equal(columns[feature], edges, out=goes_left[splits])
        bits[: self._edges] = np.packbits(goes_left, bitorder="little").reshape(self._edges, rows // 8)
        sets = self._bits - self._edges
        is_member = np.empty((rows, -(-sets // 8) * 8), np.bool_)
        for feature, splits, table in self._sets:
            last = len(table) - 1  # of numbers that are in no set
            numbers = np.where((columns[feature] >= 0) & (columns[feature] < last), columns[feature], last)
            is_member[:, splits] = table.take(numbers.astype(np.int64), axis=0)
        # Eight rows become the bits of a byte, of eight splits at a time: numbers whose bytes are 0 or 1.
        eight = is_member.view(np.uint64).reshape(rows // 8, 8, -1)
        packed = eight[:, 7].copy()
        for row in range(6, -1, -1):
            packed <<= np.uint64(1)
            packed |= eight[:, row]
        bits[self._edges :] = packed.view(np.uint8).T[:sets]
        bits = bits.view(word)
        reached = np.empty((self._nodes, words), word)
        reached[:trees], reached[-1] = ~word.type(0), 0
        for nodes, of_nodes, first in self._levels:
            middle, end = first + len(nodes), first + 2 * len(nodes)
            here = reached.take(nodes, axis=0)
            left = np.bitwise_and(here, bits.take(of_nodes, axis=0), out=reached[first:middle])
            np.bitwise_xor(here, left, out=reached[middle:end])
        # The digits of each row's leaf, one row of bits a tree: those of leaves whose number has the digit.
        of_leaves = reached.take(self._leaves, axis=0).reshape(-1, trees * words)
        leaf = np.zeros((trees, rows), np.min_scalar_type(len(of_leaves) - 1))
        for digit in reversed(range(self._digits)):
            half = 1 << digit
            one = np.bitwise_or.reduce(of_leaves[half:], axis=0)
            of_leaves = of_leaves[:half] | of_leaves[half:]
            ones = np.unpackbits(one.view(np.uint8), bitorder="little").reshape(leaf.shape)
            ones = ones.astype(leaf.dtype, copy=False)
            leaf |= np.left_shift(ones, digit, out=ones)
        slots = self._values.shape[1]
        values = self._values.take(leaf + slots * np.arange(trees)[:, None])
        sums = [values[first:end].sum(0) for first, end in pairwise(self._ends)]
        return np.stack(sums, axis=1)[: len(x)]
