"""The benchmark of a GPU runs without a GPU if it is told to, and refuses otherwise."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import gpu

TINY = replace(gpu.QUICK, repeats=1, batches=(64,), table_rows=(100,), precisions=("fp32",), lists=(5,))


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu"]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == "torch sees no CUDA device. To try the benchmark on a CPU, add --device cpu --quick"
    assert ended.stdout == ""


def test_both_parts_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUICK", TINY)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    gpu.main()
    figures = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["figures"]
    cases = [(figure["part"], figure["case"], figure["unit"]) for figure in figures]
    assert cases == [
        ("scoring", "5 candidates, cpu", "ms"),
        ("training", "batch 64, tables of 100, fp32", "rows/s"),
    ]
    assert all(figure["value"] > 0 for figure in figures)
