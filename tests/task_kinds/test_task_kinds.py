"""What holds for every kind of task."""

import copy
import pickle

import numpy as np
import pytest
import torch

from mmoe_rec.task_kinds import KINDS, find_kind

LOGITS = torch.linspace(-8, 8, 33, dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_its_name(name: str) -> None:
    """Layouts are copied, sent to other processes and written as JSON."""
    kind = KINDS[name]
    for item in (kind, copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
        assert (item, type(item)) == (name, type(kind))


@pytest.mark.parametrize("kind", KINDS.values())
def test_logits_and_predictions_fit(kind) -> None:
    """Predictions are valid, and logits, log predictions and losses follow from them."""
    valid_predictions = kind.prediction(LOGITS)
    assert kind.valid_predictions[1](valid_predictions.numpy()).all()
    torch.testing.assert_close(kind.logits(valid_predictions), LOGITS)
    torch.testing.assert_close(kind.log_prediction(LOGITS), valid_predictions.clamp(min=kind.min_prediction).log())
    assert kind.log_prediction(LOGITS * 1e3).isfinite().all()
    assert kind.logits(torch.tensor([0.0, 1.0])).isfinite().all()
    assert kind.valid_labels[1](np.array([0.0, 1.0, np.nan])).all()


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_loss_is_least_for_the_mean_label(kind) -> None:
    labels = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    best = kind.logits(labels.mean().expand(4)).requires_grad_()
    kind.loss(best, labels).sum().backward()
    assert best.grad.sum().item() == pytest.approx(0, abs=1e-12)
    separate = [kind.losses((best + step).detach().numpy(), labels.numpy()).mean() for step in (0, 0.1, -0.1)]
    assert min(separate) == separate[0]


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"'binery' is not a task kind \(did you mean 'binary'\?\). Valid kinds are 'binary' and"
    ):
        find_kind("binery")
