"""The weights of a sharded model on disk, as a checkpoint holds them."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn


def save_weights(model: nn.Module, folder: Path) -> None:
    """Writes what `load_plain` reads. A collective call."""
    import torch.distributed.checkpoint as dcp

    shutil.rmtree(folder, ignore_errors=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
