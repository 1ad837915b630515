"""The training loop on one GPU under nccl, against the same training on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.model.examples import LAYOUT
from tests.training.learnable import trained, write_prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_a_cpu(tmp_path: Path, precision: str) -> None:
    prepared = write_prepared(tmp_path / "data", LAYOUT)
    cpu = trained(prepared, tmp_path / "cpu").result
    gpu = trained(prepared, tmp_path / "gpu", device=torch.device("cuda", 0), precision=precision)
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
