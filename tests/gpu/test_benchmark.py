"""The benchmark of a GPU runs, in all its parts, where there is none; without being asked to, it says so."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu, gpu_parts

TINY = replace(
    gpu.QUICK, repeats=1, batches=(64,), table_rows=(100,), precisions=("fp32",), experts=(8,), rows=32, lists=(5,)
)
CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu"]
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert done.returncode == 1
    sentence = "torch sees no CUDA device here, which is what this measures (on a CPU: --device cpu --quick)"
    assert done.stderr.splitlines()[-1] == sentence
    assert done.stdout == ""


def test_all_parts_run_and_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUICK", TINY)
    monkeypatch.setattr(gpu_parts, "WARM_UP", 1)
    monkeypatch.setattr(gpu_parts, "PROFILED", 1)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["machine"]["torch"] == torch.__version__
    named = {(each["part"], each["name"]) for each in found["figures"]}
    assert named >= {("training", "whole"), ("training", "steps"), ("training", "share idle"), ("experts", "dense")}
    assert named >= {("experts", "grouped"), ("experts", "grouped / dense"), ("scoring", "cpu")}
    assert all(each["value"] >= 0 for each in found["figures"])
    shares = [each["value"] for each in found["figures"] if each["name"].startswith("share")]
    assert sum(shares) == pytest.approx(100, abs=5)
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 4 + len(found["figures"])
    assert "| training | batch 64, tables of 100, fp32 | whole |" in "\n".join(table)
