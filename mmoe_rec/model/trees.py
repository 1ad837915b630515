"""Boosted trees beside the network: a task's logit is a weighted sum of what both say.

Trees and networks err in different ways, so their sum ranks above both. The trees (LightGBM's) read the numbers that
the network reads, and some of them the rows that single ids have in their tables, where frequent ones come first;
`mmoe_rec.jobs.stacking` grows them and fits the weights.

In an artifact they are a folder `trees`: the trees of each task as LightGBM writes them, text that every version of it
reads, and `blends.json`, the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mmoe_rec.errors import UserError, require_packages

if TYPE_CHECKING:
    from lightgbm import Booster

FOLDER, BLENDS = "trees", "blends.json"
TREES_AT_A_TIME = 50
"""So many stay in a processor's cache while all rows pass: 701 trees and 500 rows took 11.5 ms at once, 9.2 so."""


@dataclass(frozen=True)
class Blend:
    """logit = network x the network's + trees x that of the trees + offset; of a regression, the same of values."""

    network: float
    trees: float
    offset: float


@dataclass(frozen=True)
class Trees:
    """The trees of some tasks, by their names, and how each is blended with the network."""

    boosters: Mapping[str, Booster]
    blends: Mapping[str, Blend]

    def logits(self, inputs: Tensor, names: Sequence[str]) -> Tensor:
        """(B, F) float32, numbers and then ids -> (B, T) float64 what the trees of T tasks say, NaN for one without
        them: logits, or a regression's values in deviations from its mean."""
        own = inputs.detach().cpu().numpy()
        columns = np.full((len(own), len(names)), np.nan)
        for index, name in enumerate(names):
            if name in self.boosters:
                columns[:, index] = predict(self.boosters[name], own)
        return torch.from_numpy(columns)

    def blend(self, network: Tensor, trees: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) logits of both -> (B, T) of the same type; a task without trees keeps the network's."""
        columns = []
        for name, one, other in zip(names, network.double().unbind(1), trees.double().unbind(1), strict=True):
            at = self.blends.get(name)
            columns.append(one if at is None else at.network * one + at.trees * other + at.offset)
        return torch.stack(columns, dim=1).to(network)

    def write(self, folder: Path) -> None:
        """Writes them to an artifact folder."""
        (folder / FOLDER).mkdir()
        for name, booster in self.boosters.items():
            (folder / FOLDER / f"{name}.txt").write_text(booster.model_to_string(), encoding="utf-8")
        tree = {name: asdict(blend) for name, blend in self.blends.items()}
        (folder / FOLDER / BLENDS).write_text(json.dumps(tree, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path, numbers: int, ids: int) -> Trees:
        """Those of an artifact folder, which read so many numbers, and so many ids or none. Raises UserError where they
        are damaged, or LightGBM is not installed."""
        path, what = folder / FOLDER / BLENDS, f"the model in '{folder}'"
        require_packages(f"{what}, which has trees,", "trees", "lightgbm")
        import lightgbm

        try:
            blends = TypeAdapter(dict[str, Blend]).validate_python(json.loads(path.read_text(encoding="utf-8")))
            texts = {name: (folder / FOLDER / f"{name}.txt").read_text(encoding="utf-8") for name in blends}
            boosters = {name: lightgbm.Booster(model_str=text) for name, text in texts.items()}
        except (OSError, ValueError, lightgbm.basic.LightGBMError) as error:
            raise UserError(f"the trees of {what} can't be read: {' '.join(str(error).split())[:200]}") from None
        if any(each.num_feature() not in (numbers, numbers + ids) for each in boosters.values()):
            raise UserError(f"the trees of {what} read other inputs than its layout has")
        return Trees(boosters, blends)


def predict(booster: Booster, inputs: np.ndarray) -> np.ndarray:
    """(B, F) float32, of which trees without ids read the first ones -> (B,) float64, what they say; by as many threads
    as torch uses."""
    own, total = inputs[:, : booster.num_feature()].astype(np.float64), np.zeros(len(inputs))
    some = {"raw_score": True, "num_threads": torch.get_num_threads(), "num_iteration": TREES_AT_A_TIME}
    for first in range(0, booster.num_trees(), TREES_AT_A_TIME):
        total += booster.predict(own, start_iteration=first, **some)
    return total
