"""A model like another one but for its weights."""

import shutil
from pathlib import Path


def other_weights(model: Path, target: Path, low: float, high: float) -> Path:
    """A copy of an artifact folder whose weights are multiplied, each tensor by a number between `low` and `high`."""
    import numpy as np
    from safetensors.torch import load_file, save_file

    from mmoe_rec.inference.artifact_writer import finalize_artifact

    shutil.copytree(model, target)
    weights = load_file(target / "weights.safetensors")
    random = np.random.default_rng(8)
    for weight in weights.values():
        weight.copy_(weight * float(random.uniform(low, high)))
    save_file(weights, target / "weights.safetensors")
    finalize_artifact(target)
    return target
