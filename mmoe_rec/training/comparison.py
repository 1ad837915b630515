"""Validates a trained model on one process, so that two models can be compared on the same rows."""

from __future__ import annotations

import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.batches.reader import EncodedRows
from mmoe_rec.errors import UserError
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.training.validation import Validation, ValidationSums

_IDS = ("user", "request", "candidate")


class NotFiniteError(Exception):
    """A model gives predictions that are not finite numbers."""


@torch.no_grad()
def validate_alone(
    model: RankingModel, inputs: EncodedRows, labelled: EncodedRows, layout: ModelLayout, batch_size: int
) -> Validation:
    """Scores all rows without placement, in fp32.

    Args:
        inputs: rows as the model's own features encode them, in its layout.
        labelled: the same rows, with the labels and weights to measure by.
        layout: of the tasks to measure, which the model may have in another order.

    Raises:
        UserError: these are not the same rows, or no label is observed.
        NotFiniteError: a prediction is not finite.
    """
    names = [task.name for task in inputs.layout.tasks]
    order = [names.index(task.name) for task in layout.tasks]
    sums = ValidationSums(layout, model.experts_in_use)
    model.eval()
    if inputs.rows != labelled.rows:
        raise UserError(f"its features give {inputs.rows:,} validation rows where there are {labelled.rows:,}")
    streams = (each.stream(batch_size, _IDS) for each in (inputs, labelled))
    for (part, ids), (known, same_ids) in zip(*streams, strict=True):
        if not ids.equals(same_ids):
            raise UserError("its features give other validation rows")
        batch = make_batch(part.encoded, inputs.layout, known.labels, None, known.weights, torchrec=False)
        outputs = model(batch)
        logits = outputs.logits[:, order]
        if not logits.isfinite().all():
            raise NotFiniteError
        sums.add(outputs._replace(logits=logits), batch)
    return sums.result()
