"""Boosted trees beside the network: a task's logit is a weighted sum of what both say.

Trees and networks err in different ways, so their sum ranks above both. The trees (LightGBM's) read the numbers that
the network reads, and some of them the rows that single ids have in their tables, where frequent ones come first;
`mmoe_rec.training.stacking` grows them and fits the weights.

In an artifact they are a folder `trees`: the trees of each task as LightGBM writes them, text that
`mmoe_rec.model.forest` and every version of LightGBM read, and `blends.json`, the weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mmoe_rec.errors import UserError
from mmoe_rec.model.forest import Forest, read_ensemble

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
    _weights: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Names of T tasks -> (3, T) float64 weights of network and trees, and offsets."""

    @cached_property
    def forest(self) -> Forest:
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
        if (weights := self._weights.get(tuple(names))) is None:
            found = [self.blends.get(name, Blend(1.0, 0.0, 0.0)) for name in names]
            weights = self._weights[tuple(names)] = np.array([astuple(each) for each in found]).T
        one, other, offset = torch.from_numpy(weights).to(network.device)
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
