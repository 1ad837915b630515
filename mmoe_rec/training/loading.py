"""The way back from sharded tables to a plain model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mmoe_rec.errors import UserError
from mmoe_rec.model.tables import from_stored, stored_width


def load_plain(model: nn.Module, folder: Path) -> None:
    """Fills an unsharded model, on one process and without a process group, from a checkpoint's "model" state.

    model: a `RankingModel` over `PlainTables`. Raises UserError when the folder holds no checkpoint.
    """
    import torch.distributed.checkpoint as dcp

    if not (folder / ".metadata").is_file():
        raise UserError(f"'{folder}' holds no complete checkpoint")
    state = {"model": {name: _as_stored(name, weight) for name, weight in model.state_dict().items()}}
    with warnings.catch_warnings():
        # That is intended here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    expected = model.state_dict()
    model.load_state_dict(
        {
            name: from_stored(weight, expected[name].shape[1]) if name.startswith("tables.") else weight
            for name, weight in state["model"].items()
        }
    )


def _as_stored(name: str, weight: Tensor) -> Tensor:
    """Where a weight of a plain model is read to, before it has its own width."""
    padded = name.startswith("tables.") and stored_width(weight.shape[1]) != weight.shape[1]
    return torch.empty(len(weight), stored_width(weight.shape[1])) if padded else weight
