"""A small model: an artifact folder whose tables, and if asked for whose matrices, are in int8.

It is loaded and served like any other. Tables stay int8 in memory; matrices are computed with in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_manifest, read_stored
from mmoe_rec.inference.writing import seal, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights.safetensors"
Dense = Literal["bfloat16", "int8", "float32"]
"""How the matrices of the dense part are stored."""


def write_small(folder: Path, made: Path, dense: Dense) -> None:
    """Writes the artifact of a folder in int8 to an empty folder.

    Raises UserError for a folder that is not as it was written, whose weights are in int8 already, or not finite.
    """
    from mmoe_rec.model.int8 import some_in_int8

    stored = read_stored(folder / WEIGHTS)
    if some_in_int8(stored):
        raise UserError(f"the model in '{folder}' is in int8 already: name the model that it was made of")
    for name in read_manifest(folder):
        if name != WEIGHTS:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, made / name)
    write_tensors(smaller(stored, dense), made / WEIGHTS)
    seal(made)


def smaller(weights: Mapping[str, Tensor], dense: Dense) -> dict[str, Tensor]:
    """Float32 weights of a whole model, by name, as a small one stores them.

    Biases stay as they are, and so do gates, which choose experts: rounded ones may choose others. Raises UserError for
    a weight that is not finite.
    """
    from mmoe_rec.model.int8 import SCALES, quantised

    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"weight '{name}' holds NaN or infinity, which int8 can't hold: train the model again")
        table = name.startswith("tables.")
        matrix = name.endswith(".weight") and ".gates." not in name
        if table or (matrix and dense == "int8"):
            found[name], found[name + SCALES] = quantised(weight)
        else:
            found[name] = weight.bfloat16() if matrix and dense == "bfloat16" else weight
    return found
