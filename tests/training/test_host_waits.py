"""Where the host waits for a GPU in a training step and a validation, by each routing rule: nowhere but where stated.

What is stated is in `mmoe_rec.training.steps`. On fake tensors of a GPU, also that a step leaves nothing on the CPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch, KeyedIds, make_batch
from mmoe_rec.batches.row_reader import Position
from mmoe_rec.errors import StopRequest
from mmoe_rec.model import levels
from mmoe_rec.model.mmoe import RankingModel, Towers
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.routing import RULES
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.training.losses import add_log_variances
from mmoe_rec.training.ranks import process_group
from mmoe_rec.training.steps import Steps
from tests.model.examples import random_rows, small_model
from tests.training.fake_gpu import CUDA, Waits, fake_gpu, on_gpu
from tests.training.learnable import CPU, LAYOUTS

pytestmark = pytest.mark.thorough

ROWS = 32
ONCE_A_STEP = [("training/steps.py step", "tolist")]
EXPERTS = {"count": 16, "units": (16, 8)}
WHOLE_BLOCKS = {"bottom": {"units": (16,)}, "experts": EXPERTS}
# Each rule, as all of its options are, and what a layout adds to a step.
CASES: dict[str, dict[str, Any]] = {
    rule.name: {"gates": _gates} for rule in RULES for _gates in [{"routing": rule.name}]
}
CASES |= {
    "noise and dropout": {"gates": {"routing": "top_k", "noise": 0.5, "dropout": 0.2, "random_top_k": True}},
    "one gate": {"gates": {"routing": "top_k", "per_task": False}},
    "levels": {"gates": {"routing": "top_k"}, "experts": EXPERTS | {"count": 4, "task_count": 2, "levels": 2}},
    "wide": {"bottom": {"units": (16,), "piecewise": True, "cross_layers": 2, "dropout": 0.1}},
    "normalised": {"experts": EXPERTS | {"normalise": True, "raw_inputs": True}},
    "placement": {"placement": {"dropout": 0.3}},
}


def changes(case: str) -> dict[str, Any]:
    found = WHOLE_BLOCKS | CASES[case]
    gates = found.get("gates", {})
    if gates.get("routing") == "expert_choice":
        gates = gates | {"serving_top_k": 2}
    takes_bias = gates.get("routing") in ("top_k", "shared_route")
    return found | {"gates": {"top_k": 2, "balance": "bias" if takes_bias else "loss", "z_loss": 0.1} | gates}


def batch_of(layout: ModelLayout, weighted: bool = False) -> Batch:
    encoded, labels = random_rows(ROWS, 3, layout)
    weights, rows = np.full(ROWS, 2.0) if weighted else None, np.arange(ROWS)
    return make_batch(encoded, layout, labels, Position(0, ROWS, 17), weights, rows, torchrec=False)


def faked(batch: Batch, mode: Any) -> Batch:
    """In main memory; the ids' places stay known."""
    ids = batch.ids
    keyed = KeyedIds(ids.keys, mode.from_tensor(ids.values), mode.from_tensor(ids.lengths), ids.starts)
    parts = {name: mode.from_tensor(getattr(batch, name)) for name in batch._parts() if name != "ids"}
    return replace(batch, ids=keyed, **parts)


def steps_of(model: RankingModel, layout: ModelLayout, device: torch.device, bf16: bool) -> Steps:
    class Whole(nn.Module):
        """As torchrec's wrapper has it."""

        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, batch: Batch) -> Any:
            return self.module(batch)

    sharded: Any = SimpleNamespace(
        model=Whole(), dense_parameters=lambda: dict(model.named_parameters()), pipelined=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Steps(sharded, optimizer, layout, device, bf16=bf16, clip_gradient=1.0, stop=StopRequest())


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(CPU):
        yield


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once(monkeypatch: pytest.MonkeyPatch, case: str, bf16: bool) -> None:
    """The whole step, but for the gradients' values: a model without tables takes no part of torchrec's."""
    layout = LAYOUTS["no ids"]
    model = small_model(PlainTables(layout), layout, **changes(case)).train()
    add_log_variances(model, layout.tasks)
    batches = [batch_of(layout, weighted) for weighted in (False, True, False)]
    with fake_gpu(monkeypatch) as mode:
        on_gpu(model)

        def backward(loss: Tensor) -> None:
            assert loss.shape == ()
            for parameter in model.parameters() if loss.is_cuda else ():
                parameter.grad = torch.empty_like(parameter)

        steps = steps_of(model, layout, CUDA, bf16)
        batches = [faked(batch, mode) for batch in batches]
        waits = Waits(backward)
        found = []
        with waits.watching():
            for batch in batches:
                waits.found = []
                step = steps.next(iter([batch]), 0.5)
                assert step.bad is None
                assert step.logits.is_cuda
                found.append(waits.found)
    # Numbers that the device keeps are copied there in the first step of their kind, and never again.
    for first in found[:2]:
        assert [each for each in first if each[0] != "devices.py constant"] == ONCE_A_STEP
    assert found[2] == ONCE_A_STEP


def test_products_of_fp32_are_in_tf32_but_for_those_of_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    layout = LAYOUTS["no ids"]
    model = small_model(PlainTables(layout), layout, **changes("soft")).train()
    parts = {"gates": (levels.Gates, "_logits"), "experts": (levels.Experts, "forward"), "towers": (Towers, "forward")}
    for part, (owner, name) in parts.items():
        of = getattr(owner, name)

        def told(*arguments: Any, part: str = part, of: Any = of) -> Any:
            seen[part] = torch.backends.cuda.matmul.fp32_precision
            return of(*arguments)

        monkeypatch.setattr(owner, name, told)

    def backward(loss: Tensor) -> None:
        seen.setdefault("backward", torch.backends.cuda.matmul.fp32_precision)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    before = torch.backends.cuda.matmul.fp32_precision
    batch = batch_of(layout)
    with fake_gpu(monkeypatch) as mode:
        on_gpu(model)
        steps = steps_of(model, layout, CUDA, bf16=False)
        with Waits(backward).watching():
            assert steps.next(iter([faked(batch, mode)]), 0.5) is not None
    assert seen == {"gates": "ieee", "experts": "tf32", "towers": "tf32", "backward": "tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before
