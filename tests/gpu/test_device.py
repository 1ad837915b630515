"""What a GPU should show first: that it computes what a CPU does, and that the host does not wait for it."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.devices import fp32_matmul_precision
from mmoe_rec.errors import StopRequest
from mmoe_rec.evaluation.calibration import predict_for_calibration
from mmoe_rec.evaluation.evaluate import predict_rows
from mmoe_rec.model.levels import Experts
from mmoe_rec.model.matmul import supports_grouped_mm
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.routing import RULES
from mmoe_rec.model.score import UNCALIBRATED
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.settings import model as section
from mmoe_rec.training.distributed import process_group
from mmoe_rec.training.losses import masked_loss
from mmoe_rec.training.steps import StepRunner
from tests.model.examples import LAYOUT, random_rows, small_model
from tests.training.learnable import LAYOUTS, trained, write_prepared

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda", 0)
ROWS = 512
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
    "normalised": {"experts": EXPERTS | {"normalize": True, "raw_inputs": True}},
    "placement": {"placement": {"dropout": 0.3}},
}


def changes(case: str) -> dict[str, Any]:
    actual = WHOLE_BLOCKS | CASES[case]
    gates = actual.get("gates", {})
    if gates.get("routing") == "expert_choice":
        gates = gates | {"serving_top_k": 2}
    uses_selection_bias = gates.get("routing") in ("top_k", "shared_route")
    return actual | {"gates": {"top_k": 2, "balance": "bias" if uses_selection_bias else "loss", "z_loss": 0.1} | gates}


def steps_of(model: RankingModel, layout: ModelLayout, device: torch.device, bf16: bool) -> StepRunner:
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
    return StepRunner(sharded, optimizer, layout, device, bf16=bf16, max_grad_norm=1.0, stop=StopRequest())


@pytest.fixture
def waits() -> Iterator[None]:
    """Within the test, an operator for which the host would wait raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def batch_of(layout: Any = LAYOUT) -> Batch:
    return make_batch(*random_rows(ROWS, 1, layout)[:1], layout, random_rows(ROWS, 1, layout)[1], torchrec=False)


def loss_of(model: RankingModel, batch: Batch) -> Tensor:
    logits = model(batch).logits
    return masked_loss(logits, batch.labels, batch.observed, tasks=LAYOUT.tasks, global_counts=batch.observed_weights)[
        0
    ]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_a_cpu(case: str) -> None:
    """Without TF32, and so the same experts."""
    model, batch = small_model(PlainTables(LAYOUT), **changes(case)).eval(), batch_of()
    with torch.inference_mode(), fp32_matmul_precision("ieee", GPU):
        cpu = model(batch)
        gpu = model.to(GPU)(batch.pin_memory().to(GPU, non_blocking=True))
    torch.testing.assert_close(gpu.logits.cpu(), cpu.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gpu.routings, cpu.routings, strict=True):
        if theirs.selected is not None:
            assert torch.equal(ours.selected.cpu(), theirs.selected)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_host_does_not_wait(case: str, bf16: bool, request: pytest.FixtureRequest) -> None:
    layout = LAYOUTS["no ids"]  # torch's own tables, which a training on a GPU has not, may do as they like
    model, batch = small_model(PlainTables(layout), layout, **changes(case)).to(GPU).train(), batch_of(layout).to(GPU)
    loss_of(model, batch).backward()  # what is made once is made
    request.getfixturevalue("waits")
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = loss_of(model, batch)
    loss.backward()


def test_the_host_waits_once_a_step() -> None:
    layout = LAYOUTS["no ids"]
    with process_group(GPU):
        model = small_model(PlainTables(layout), layout, **changes("top_k")).to(GPU).train()
        steps = steps_of(model, layout, GPU, bf16=True)
        batch = batch_of(layout).pin_memory()
        for _ in range(3):
            assert steps.run_next(iter([batch]), 1.0) is not None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as actual:
                warnings.simplefilter("always")
                assert steps.run_next(iter([batch]), 1.0) is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([item for item in actual if "synchronizing" in str(item.message)]) == 1


def test_experts_in_one_product_are_those_on_all_rows_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, 64, device=GPU).bfloat16()
    if not supports_grouped_mm(hidden):
        pytest.skip("this GPU has no product for all experts")
    experts = Experts(16, 64, section.Experts(units=(128, 64), compute="grouped")).to(GPU)
    probabilities = torch.rand(ROWS, 2, 16, device=GPU)
    probabilities[:, :, 5] = 0  # an expert without rows
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1.0)
    weights, used = probabilities * chosen, chosen.bool().any(1)
    actual = []
    for max_per_row in (4, 4, None):  # by the product twice, then dense
        x = hidden.clone().requires_grad_()
        experts.zero_grad()
        mixed = experts.mix(x, weights, used, max_per_row=max_per_row)
        mixed.float().square().sum().backward()
        actual.append([mixed.float(), x.grad, *(parameter.grad for parameter in experts.parameters())])
    for first, second, dense in zip(*actual, strict=True):
        assert first is not None
        assert torch.equal(first, second)
        scale = float(dense.abs().max())
        torch.testing.assert_close(first / scale, dense / scale, atol=0.02, rtol=0.05)


def test_gates_take_no_tf32_where_other_products_do() -> None:
    made = small_model(PlainTables(LAYOUT), experts={"count": 8, "units": (16, 8)}).to(GPU).mixture.gates[0]
    hidden = torch.randn(ROWS, 12, device=GPU)
    with fp32_matmul_precision("ieee", GPU):
        expected = made(hidden).logits
    with fp32_matmul_precision("tf32", GPU):
        assert torch.equal(made(hidden).logits, expected)
        rough = hidden @ made.linear.weight[0].t()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with fp32_matmul_precision("ieee", GPU):
        assert not torch.equal(hidden @ made.linear.weight[0].t(), rough)


def test_evaluation_and_calibration_follow_the_model(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, LAYOUT)
    model = small_model(PlainTables(LAYOUT))
    (file,) = (prepared.folder / "encoded" / "validation").glob("*.parquet")
    table = pq.read_table(file)
    for name in ("request", "candidate"):
        table = table.append_column(name, pa.array(range(len(table))))
    pq.write_table(table, file)
    rows = EncodedDataset(prepared.split("validation"), LAYOUT)
    actual = []
    for device in (torch.device("cpu"), GPU):
        model.to(device)
        logits, *_ = predict_for_calibration(model, LAYOUT, rows, 1_000)
        parts = (part for part, _ in rows.stream(1_000))
        actual.append((logits, *predict_rows(model, LAYOUT, parts, UNCALIBRATED)))
    for cpu, gpu, tolerance in zip(*actual, (1e-3, 1e-3, 1e-2), strict=True):
        np.testing.assert_allclose(gpu, cpu, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_a_cpu(tmp_path: Path, precision: str) -> None:
    """Under nccl, by the whole loop."""
    prepared = write_prepared(tmp_path / "data", LAYOUT)
    cpu = trained(prepared, tmp_path / "cpu").result
    gpu = trained(prepared, tmp_path / "gpu", device=GPU, precision=precision)
    assert cpu.best is not None
    assert gpu.result.best is not None
    assert "rank 0" in gpu.result.plan
    assert all(math.isfinite(value) for _, metrics in gpu.logged for value in metrics.values())
    for task, area in cpu.best.auc.items():
        assert area > 0.7
        assert gpu.result.best.auc[task] == pytest.approx(area, abs=0.01 if precision == "fp32" else 0.03)
    for task, loss in cpu.best.loss.items():
        assert gpu.result.best.loss[task] == pytest.approx(loss, rel=0.05)
    weights = gpu.model().state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
