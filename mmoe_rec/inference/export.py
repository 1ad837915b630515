"""A smaller form of a model, in int8, and how near another form is to the model itself.

In int8 it is an artifact folder like any other: tables stay int8 in memory, matrices are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_manifest, read_stored, write_tensors
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.writing import copy_files, seal
from mmoe_rec.model.tables import SCALES, quantised, some_in_int8

WEIGHTS = "weights.safetensors"
Dense = Literal["bfloat16", "int8", "float32"]
"""How the matrices of the dense part are stored."""
Answers = Mapping[str, np.ndarray]
"""What a model answers for the N candidates of a request, in its order: prediction or `score` -> (N,) float64."""


def write_int8(folder: Path, made: Path, dense: Dense) -> None:
    """Writes the artifact of a folder in int8 to an empty folder.

    Biases stay as they are, and so do gates, which choose experts: rounded ones may choose others.

    Raises UserError for a folder that is not as it was written, whose weights are in int8 already, or not finite.
    """
    stored, smaller = read_stored(folder / WEIGHTS), {}
    if some_in_int8(stored):
        raise UserError(f"the model in '{folder}' is in int8 already: name the model that it was made from")
    for name, weight in stored.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 can't hold: train the model again")
        matrix = name.endswith(".weight") and ".gates." not in name
        if name.startswith("tables.") or (matrix and dense == "int8"):
            smaller[name], smaller[name + SCALES] = quantised(weight)
        else:
            smaller[name] = weight.bfloat16() if matrix and dense == "bfloat16" else weight
    copy_files(folder, made, but=WEIGHTS)
    write_tensors(smaller, made / WEIGHTS)
    seal(made)


def count_bytes(folder: Path) -> dict[str, int]:
    """Bytes of an artifact's tables, of its other weights, and of all its files: its features, too."""
    sizes = {"tables": 0, "dense": 0}
    for name, weight in read_stored(folder / WEIGHTS).items():
        sizes["tables" if name.startswith("tables.") else "dense"] += weight.nbytes
    return sizes | {"all files": sum(file.bytes for file in read_manifest(folder).values())}


def answers_of(ranking: Ranking) -> Answers:
    """The answers in a ranking of all candidates."""
    back = np.argsort(ranking.order)
    values = {**ranking.predictions, "score": ranking.scores}
    return {name: np.array(each, np.float64)[back] for name, each in values.items()}


def find_differences(one: Answers, other: Answers) -> dict[str, float]:
    """Return the largest difference of each prediction and of the score, relative to values over 1."""
    apart = {name: np.abs(other[name] - values) / np.maximum(1.0, np.abs(values)) for name, values in one.items()}
    return {name: float(each.max()) for name, each in apart.items()}
