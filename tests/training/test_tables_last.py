"""Tables are updated after the dense part's gradient is known, by the same gradient, and not at all by a bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.settings.model import Gates
from mmoe_rec.training.loop import Trainer
from mmoe_rec.training.losses import masked_loss
from tests.model.examples import LAYOUT
from tests.training.learnable import TRAINING, learnable_rows, plain_model, write_prepared
from tests.training.ranks import save_weights
from tests.training.test_loop import meter, trainer, weights


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return write_prepared(tmp_path_factory.mktemp("prepared"), LAYOUT)


def batch_of(one: Trainer, seed: int, torchrec: bool = True) -> Batch:
    encoded, labels = learnable_rows(LAYOUT, 60, seed)
    return replace(make_batch(encoded, LAYOUT, labels, torchrec=torchrec), position=one.position)


def test_a_step_is_that_of_the_plain_gradient(prepared: Prepared, tmp_path: Path) -> None:
    """The first step of row-wise Adagrad is the rate times each row's gradient over its root mean square."""
    with trainer(prepared, tmp_path / "best", clip_gradient=1e9, warmup_share=0.0) as one:
        save_weights(one.sharded.model, tmp_path / "before")
        batch = batch_of(one, 7)
        one._step(iter([batch]), meter(one))
        after = weights(one, tmp_path / "after")
        model = plain_model(LAYOUT, tmp_path / "before").train()
        plain = batch_of(one, 7, torchrec=False)
    counts = plain.observed.sum(0)
    logits = model(plain).logits
    masked_loss(logits, plain.labels, plain.observed, tasks=LAYOUT.tasks, global_counts=counts)[0].backward()
    compared = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient, before = parameter.grad, parameter.detach()
        if name.startswith("tables."):
            size = gradient.square().mean(1, keepdim=True).sqrt()
            moved = (size > 1e-5).flatten()  # below, the optimizer's epsilon counts
            expected = before - TRAINING.table_learning_rate * gradient / size.clamp(min=1e-30)
        else:
            moved = gradient.abs() > 1e-5
            rate, decay = TRAINING.learning_rate, TRAINING.weight_decay
            expected = before * (1 - rate * decay) - rate * gradient.sign()
        compared += int(moved.sum())
        torch.testing.assert_close(after[name][moved], expected[moved], atol=2e-4, rtol=1e-3, msg=name)
    assert compared > 300


def _weights_hook(one: Trainer) -> Callable[[], None]:
    """Only a dense weight's own gradient is bad; what goes on to the tables is finite."""
    parameter = next(each for name, each in one.sharded.dense_parameters().items() if "towers" in name)
    return parameter.register_hook(lambda gradient: gradient * float("nan")).remove


def _inputs_hook(one: Trainer) -> Callable[[], None]:
    """The gradient that arrives at the tables is bad."""

    def spoil(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    return one.sharded.model.module.mixture.bottom.register_forward_hook(spoil).remove


@pytest.mark.parametrize("spoil", [_weights_hook, _inputs_hook])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    prepared: Prepared, tmp_path: Path, spoil: Callable[[Trainer], Callable[[], None]]
) -> None:
    """Nor does it change what optimizers remember: the steps after it are those of a training without it."""
    found = {}
    for bad in (True, False):
        with trainer(prepared, tmp_path / f"{bad}", on_bad_loss="skip", warmup_share=0.0) as one:
            one._step(iter([batch_of(one, 1)]), meter(one))
            before = weights(one, tmp_path / "now")
            if bad:
                restore = spoil(one)
                one._step(iter([batch_of(one, 2)]), meter(one))
                restore()
                assert one.bad_batches.skipped == 1
                after = weights(one, tmp_path / "now")
                assert all(torch.equal(after[name], weight) for name, weight in before.items())
                one.result.steps = 1  # the learning rate goes by it
            one._step(iter([batch_of(one, 3)]), meter(one))
            found[bad] = weights(one, tmp_path / "now")
            assert any(not torch.equal(found[bad][name], weight) for name, weight in before.items())
    assert all(torch.equal(weight, found[False][name]) for name, weight in found[True].items())


def test_rows_without_labels_do_not_count_in_balance(prepared: Prepared, tmp_path: Path) -> None:
    """The reader fills the last batch of an epoch with such copies."""
    encoded, labels = learnable_rows(LAYOUT, 80, seed=7)
    labels[50:] = np.nan
    encoded.dense[50:] = 3.0
    whole = make_batch(encoded, LAYOUT, labels, torchrec=True)
    alone = make_batch(encoded.take(np.arange(50)), LAYOUT, labels[:50], torchrec=True)
    found = {}
    for name, batch, gates_settings in (
        ("whole", whole, Gates(balance="loss", balance_weight=20.0, z_loss=5.0)),
        ("alone", alone, Gates(balance="loss", balance_weight=20.0, z_loss=5.0)),
        ("unbalanced", alone, Gates()),
    ):
        with trainer(prepared, tmp_path / "best", warmup_share=0.0) as one:
            one.steps._gates = gates_settings
            one._step(iter([replace(batch, position=one.position)]), meter(one))
            found[name] = weights(one, tmp_path / name)
    for key, weight in found["whole"].items():
        torch.testing.assert_close(weight, found["alone"][key], atol=1e-5, rtol=0, msg=key)
    gates = "mixture.levels.0.gates.linear.weight"
    assert (found["alone"][gates] - found["unbalanced"][gates]).abs().max() > 1e-3
