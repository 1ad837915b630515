"""What a training of common size would choose on this machine."""

from __future__ import annotations

import torch

from mmoe_rec.batches.batch import KeyedIds
from mmoe_rec.features.layout import DenseInput, IdInput
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.model.mmoe import build_mixture
from mmoe_rec.settings.model import Model
from mmoe_rec.settings.sections import Training
from mmoe_rec.training.choices import Choices
from mmoe_rec.training.measure import SOME_ROWS, Chooser

_IDS, _ROWS, _DIM, _NUMBERS, _TASKS = 20, 20_000, 16, 5, 2


def sample_choices(device: torch.device) -> Choices:
    """Of a model with default settings on 20 ids and 5 numbers, in default batches."""
    names = [f"id{index}" for index in range(_IDS)]
    layout = ModelLayout(
        tuple(EmbeddingTable(name, _ROWS, _DIM) for name in names),
        tuple(IdInput(name, name) for name in names),
        tuple(DenseInput(f"number{index}") for index in range(_NUMBERS)),
        tuple(ModelTask(f"task{index}", "binary", "engagement") for index in range(_TASKS)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture = build_mixture(layout.width(placement=False), [()] * _NUMBERS, 0, _TASKS, Model())
        values = torch.randint(_ROWS, (_IDS * SOME_ROWS,))
    ids = KeyedIds(tuple(names), values, torch.ones(_IDS * SOME_ROWS, dtype=torch.int32))
    settings = Training()
    return Chooser(mixture, layout, device, settings.batch_size, ids).choose(settings)
