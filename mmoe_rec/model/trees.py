"""Boosted trees next to the network. A task's logit is a weighted sum of the network's and the trees' logits.

Trees and networks make different errors, so their sum ranks better than either. The trees (LightGBM) read the dense
inputs of the network. Some trees also read single IDs as numbers. The number is the ID's row in its embedding table,
where frequent IDs come first. `mmoe_rec.training.stacking` trains the trees and fits the weights.

In an artifact, the folder `trees` contains LightGBM's text of each task's trees, and the weights in `blends.json`. A
text may contain several ensembles, whose mean is used.

Shapes: B rows, F inputs of the trees, T tasks of the model, K tasks with trees.
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
    """Weights of the sum network * network logit + trees * tree logit + offset. Regressions use the label's unit."""

    network: float
    trees: float
    offset: float

    def apply(self, network: np.ndarray, trees: np.ndarray) -> np.ndarray:
        """Return the weighted sum.

        Args:
            network: Logits of the network, of any shape.
            trees: Logits of the trees, of the same shape.
        """
        return self.network * network + self.trees * trees + self.offset


@dataclass(frozen=True)
class Trees:
    """Trees of some tasks.

    Attributes:
        texts: LightGBM's text of the trees, by task.
        blends: Weights of network and trees, by task.
    """

    texts: Mapping[str, str]
    blends: Mapping[str, Blend]

    @cached_property
    def forest(self) -> "Forest":
        """Trees of all tasks in `texts`, in this order. Raises ValueError or LookupError if a text is damaged."""
        return Forest([read_ensemble(text) for text in self.texts.values()])

    def logits(self, inputs: Tensor, names: Sequence[str]) -> Tensor:
        """Return the logits of the trees, (B, T) float64, NaN for tasks without trees.

        Logits of a regression count standard deviations from the mean label.

        Args:
            inputs: (B, F) float32, dense inputs and then single IDs.
            names: Names of the T tasks.
        """
        columns = np.full((len(inputs), len(names)), np.nan)
        if self.texts:
            positions = [names.index(name) for name in self.texts]
            columns[:, positions] = self.forest.sums(inputs.detach().cpu().numpy(), torch.get_num_threads())
        return torch.from_numpy(columns)

    def blend(self, network: Tensor, trees: Tensor, names: Sequence[str]) -> Tensor:
        """Blend the logits of network and trees, (B, T) of the type of `network`.

        Args:
            network: (B, T).
            trees: (B, T), NaN for tasks without trees, which keep the network's logits.
            names: Names of the T tasks.
        """
        blends = [astuple(self.blends.get(name, Blend(1.0, 0.0, 0.0))) for name in names]
        network_weight, tree_weight, offset = torch.tensor(blends, dtype=torch.float64, device=network.device).T
        blended = network_weight * network.double() + tree_weight * trees.double() + offset
        return torch.where(trees.isnan(), network.double(), blended).to(network)

    def write(self, folder: Path) -> None:
        (folder / FOLDER).mkdir()
        for name, text in self.texts.items():
            (folder / FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
        tree = {name: asdict(blend) for name, blend in self.blends.items()}
        (folder / FOLDER / BLENDS).write_text(json.dumps(tree, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path, numbers: int, ids: int) -> "Trees":
        """Read the trees of an artifact folder.

        Args:
            folder: Artifact folder.
            numbers: Number of dense inputs.
            ids: Number of inputs with single IDs. The trees of a task read all of these inputs or none.

        Raises:
            UserError: The trees are damaged.
        """
        path, model = folder / FOLDER / BLENDS, f"the model in '{folder}'"
        try:
            blends = TypeAdapter(dict[str, Blend]).validate_python(json.loads(path.read_text(encoding="utf-8")))
            texts = {name: (folder / FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in blends}
            trees = Trees(texts, blends)
            widths = trees.forest.widths if texts else set[int]()
        except (OSError, ValueError, LookupError, OverflowError) as error:
            raise UserError(f"the trees of {model} can't be read: {' '.join(str(error).split())[:200]}") from None
        if not widths <= {numbers, numbers + ids}:
            raise UserError(f"the trees of {model} expect other inputs than its layout has. Train the model again.")
        return trees


# Evaluation of all trees of some tasks by bit operations.
#
# Trees come from LightGBM's text. Rows are evaluated in blocks, by operations on bit strings with one bit per row:
#
# 1. Each split of each tree gets a bit string that says which rows go left.
# 2. Each node gets a bit string of the rows that reach it, from the roots down. For a left child, it is the `and` of
#    the parent's string and the split's string.
# 3. The strings of the leaves give each row's leaf index, bit by bit.
#
# (QuickScorer, Lucchese et al., SIGIR 2015, instead has one bit string of leaves for each row.) Leaf values are looked
# up and summed in the order of the trees, so a row's result is bitwise the same in every batch.

# Blocks of this size fit a processor's cache. 871 trees and 500 rows take 3.6 ms, and 9.6 ms without blocks.
ROWS_PER_BLOCK = 128
# Masks of LightGBM's `decision_type`: 1 marks a categorical split, and 12 holds the rule for missing values.
_SET, _MISSING = 1, 12
_ZERO = np.float32(1e-35)  # LightGBM takes numbers nearer to 0 as 0. They don't go left at an edge below 0.


@dataclass(frozen=True)
class Tree:
    """Tree of S splits and S + 1 leaves. The root is split 0, or leaf 0 without splits.

    Attributes:
        features: (S,) int64, the input of each split.
        edges: (S,) float32. Inputs up to the edge go left.
        is_categorical: (S,) bool. For a categorical split, inputs in a set of whole numbers go left. `edges` is unused.
        left: (S,) int64, the next split on the left, or `~leaf` for a leaf.
        right: (S,) int64, the next split on the right, or `~leaf`.
        values: (S + 1,) float64, values of the leaves.
        sets: (S,) int64, the index of the set of a categorical split.
        set_offsets: Index of each set's first word in `set_bits`, and the end of the last set.
        set_bits: uint32 words of all sets. Bit i of a set says whether the number i is in the set.
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
        """Return the whole numbers that go left at a split."""
        first, end = self.set_offsets[self.sets[split] :][:2]
        return np.flatnonzero(np.unpackbits(self.set_bits[first:end].view(np.uint8), bitorder="little")).tolist()


class Ensemble(NamedTuple):
    """Boosted trees of one task.

    Attributes:
        trees: Trees. The task's logit is the sum of their values.
        width: Number of inputs of the trees.
    """

    trees: list[Tree]
    width: int


def read_ensemble(text: str) -> Ensemble:
    """Read the trees in LightGBM's text. Leaf values of n ensembles are divided by n, so the sum is a mean.

    Raises:
        ValueError: The text is damaged, or the trees aren't of the kind that `mmoe_rec.training.stacking` trains.
        LookupError: The text is damaged.
    """
    *sets, _ = text.split("\nend of trees")
    trees, width = list[Tree](), 0
    for ensemble in sets:
        header, *blocks = ensemble.split("\nTree=")
        width = max(width, int(_entries(header)["max_feature_idx"]) + 1)
        trees += [_read_tree(_entries(block), len(sets)) for block in blocks]
    if not trees or any((tree.features >= width).any() for tree in trees):
        raise ValueError("there is no tree, or a split reads an input that doesn't exist")
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
    # Take the largest float32 up to the threshold, since inputs are float32.
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
        raise ValueError("the splits of a tree are inconsistent")
    return tree


class Forest:
    """All trees of K tasks, prepared for joint evaluation."""

    def __init__(self, ensembles: Sequence[Ensemble]) -> None:
        trees = [tree for ensemble in ensembles for tree in ensemble.trees]
        self.widths = {ensemble.width for ensemble in ensembles}
        self._ends = np.cumsum([0, *(len(ensemble.trees) for ensemble in ensembles)]).tolist()
        self._digits = max(len(tree.features) for tree in trees).bit_length()  # Bits of a leaf's index.
        self._values = np.zeros((len(trees), 1 << self._digits))
        for tree, row in zip(trees, self._values, strict=True):
            row[: len(tree.values)] = tree.values
        # `_sums` computes one bit string for each different numeric split, then one for each categorical split.
        # Each item has an input with numeric splits, the range of the splits' bit strings, and their edges (E, 1).
        self._numbers: list[tuple[int, slice, np.ndarray]] = []
        # Each item has an input with S categorical splits, the range of their bit strings (counted after the numeric
        # splits), and a bool array (largest category + 2, S) that says whether a split's set contains a category.
        self._sets: list[tuple[int, slice, np.ndarray]] = []
        # Each item has the splits of a depth: positions of their nodes, indices of their bit strings, and the position
        # of the first left child. The right children follow the left children.
        self._levels: list[tuple[np.ndarray, np.ndarray, int]] = []
        sizes = [len(tree.features) for tree in trees]
        firsts = np.cumsum([0, *sizes])
        self._bits = self._edges = 0  # Number of bit strings, of all splits and of numeric splits.
        bits = self._find_bits(trees, firsts)
        # Leaf l of tree t gets the number ~(l x number of trees + t). Leaves with the same index l are then adjacent.
        tree_of_split, count = np.arange(len(trees)).repeat(sizes), len(trees)
        left, right = (
            np.where(child >= 0, child + firsts[tree_of_split], ~(~child * count + tree_of_split))
            for child in (np.concatenate([getattr(tree, side) for tree in trees]) for side in ("left", "right"))
        )
        leaves = np.full(self._values.size, -1)
        nodes, first = np.where(np.array(sizes) > 0, firsts[:-1], ~np.arange(count)), 0
        while len(nodes):
            (split_positions,), (leaf_positions,) = (nodes >= 0).nonzero(), (nodes < 0).nonzero()
            leaves[~nodes[leaf_positions]] = first + leaf_positions
            splits = nodes[split_positions]
            self._levels.append((first + split_positions, bits[splits], first := first + len(nodes)))
            nodes = np.concatenate([left[splits], right[splits]])
        self._leaves, self._nodes = leaves, first + 1  # The last node stands for leaves that small trees lack.

    def _find_bits(self, trees: Sequence[Tree], firsts: np.ndarray) -> np.ndarray:
        """Assign a bit string to each split, and return the indices (S,). Equal numeric splits share a bit string."""
        features, edges, is_categorical = (
            np.concatenate([getattr(tree, name) for tree in trees]) for name in ("features", "edges", "is_categorical")
        )
        bits = np.empty(len(features), np.int64)
        keys = features[~is_categorical] << 32 | edges[~is_categorical].view(np.uint32)
        keys, bits[~is_categorical] = np.unique(keys, return_inverse=True)
        self._bits = self._edges = len(keys)
        for feature, first, count in zip(*np.unique(keys >> 32, return_index=True, return_counts=True), strict=True):
            rows = slice(first, first + count)
            own_edges = (keys[rows] & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
            self._numbers.append((int(feature), rows, own_edges[:, None]))
        sets: dict[int, list[tuple[int, list[int]]]] = {}
        for tree, first in zip(trees, firsts, strict=False):
            for split in np.flatnonzero(tree.is_categorical).tolist():
                sets.setdefault(int(tree.features[split]), []).append((first + split, tree.left_categories(split)))
        for feature, splits in sets.items():
            table = np.zeros((2 + max(max(members) for _, members in splits), len(splits)), np.bool_)
            for index, (split, members) in enumerate(splits):
                table[members, index], bits[split] = True, self._bits
                self._bits += 1
            end = self._bits - self._edges
            self._sets.append((feature, slice(end - len(splits), end), table))
        return bits

    def sums(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        """Return the sums of each task's trees, (B, K) float64. A row has the same sums, bit for bit, in every batch.

        Args:
            x: (B, F) float32.
            threads: Number of threads.
        """
        blocks = [x[first : first + ROWS_PER_BLOCK] for first in range(0, len(x), ROWS_PER_BLOCK)]
        if (threads := min(threads, len(blocks) // 4)) > 1:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(self._sums, blocks))
        else:
            parts = [self._sums(block) for block in blocks]
        return np.concatenate([np.empty((0, len(self._ends) - 1)), *parts])

    def _sums(self, x: np.ndarray) -> np.ndarray:
        # Use the narrowest word of 8 to 64 bits that has a bit for each row. Few rows then need less memory.
        dtype: np.dtype[Any] = np.dtype(f"u{min(8, max(1, 1 << (-(-len(x) // 8) - 1).bit_length()))}")
        trees, words = len(self._values), -(-len(x) // (8 * dtype.itemsize))
        rows = 8 * dtype.itemsize * words
        columns = x.take(np.minimum(np.arange(rows), len(x) - 1), axis=0).T.copy()
        bits = np.empty((self._bits, rows // 8), np.uint8)
        goes_left = np.empty((self._edges, rows), np.bool_)
        for feature, splits, edges in self._numbers:
            np.less_equal(columns[feature], edges, out=goes_left[splits])
        bits[: self._edges] = np.packbits(goes_left, bitorder="little").reshape(self._edges, rows // 8)
        sets = self._bits - self._edges
        is_member = np.empty((rows, -(-sets // 8) * 8), np.bool_)
        for feature, splits, table in self._sets:
            last = len(table) - 1  # The last row of the table is for numbers that are in no set.
            numbers = np.where((columns[feature] >= 0) & (columns[feature] < last), columns[feature], last)
            is_member[:, splits] = table.take(numbers.astype(np.int64), axis=0)
        # Combine eight rows into the bits of a byte, for eight splits at a time.
        groups = is_member.view(np.uint64).reshape(rows // 8, 8, -1)
        packed = groups[:, 7].copy()
        for row in range(6, -1, -1):
            packed <<= np.uint64(1)
            packed |= groups[:, row]
        bits[self._edges :] = packed.view(np.uint8).T[:sets]
        bits = bits.view(dtype)
        reached = np.empty((self._nodes, words), dtype)
        reached[:trees], reached[-1] = ~dtype.type(0), 0
        for nodes, bit_rows, first in self._levels:
            middle, end = first + len(nodes), first + 2 * len(nodes)
            parents = reached.take(nodes, axis=0)
            left = np.bitwise_and(parents, bits.take(bit_rows, axis=0), out=reached[first:middle])
            np.bitwise_xor(parents, left, out=reached[middle:end])
        # A bit of a row's leaf index is 1 if the row reached one of the leaves whose index has this bit.
        leaf_rows = reached.take(self._leaves, axis=0).reshape(-1, trees * words)
        leaf = np.zeros((trees, rows), np.min_scalar_type(len(leaf_rows) - 1))
        for digit in reversed(range(self._digits)):
            half = 1 << digit
            with_digit = np.bitwise_or.reduce(leaf_rows[half:], axis=0)
            leaf_rows = leaf_rows[:half] | leaf_rows[half:]
            digit_bits = np.unpackbits(with_digit.view(np.uint8), bitorder="little").reshape(leaf.shape)
            leaf |= digit_bits.astype(leaf.dtype, copy=False) << digit
        values = self._values.take(leaf + self._values.shape[1] * np.arange(trees)[:, None])
        sums = [values[first:end].sum(0) for first, end in pairwise(self._ends)]
        return np.stack(sums, axis=1)[: len(x)]
