"""The command that exports a model: what it writes, reports and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmoe_rec.inference.artifact import check_files, write_manifest
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.tables import Int8EmbeddingBag
from tests import commands
from tests.inference.small_model import SmallModel
from tests.log.small_logs import ALL_KINDS

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("export"), features=ALL_KINDS)


def run(small: SmallModel, out: Path, *words: str) -> dict[str, Any]:
    """The report of an export."""
    commands.run("export", "--model", str(small.folder), "--out", str(out), *words)
    return json.loads((out / "export.json").read_text(encoding="utf-8"))


def test_a_model_in_int8_with_its_figures(small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "int8"
    report = run(small, out, "--int8")
    message = capsys.readouterr().out
    assert f"model: {out}\nreport: {out / 'export.json'}" in message
    check_files(out)
    before, now = Ranker.load(small.folder), Ranker.load(out)
    assert all(
        isinstance(embedding_bag, Int8EmbeddingBag) for embedding_bag in now.model.tables.embedding_bags.values()
    )
    assert (report["made"], report["of"]) == ("int8", str(small.folder))
    off = report["max_difference"]
    assert 0 < off["click"] < 0.05
    assert f"click: maximum difference {off['click']:.2g}" in message
    request = json.loads((small.folder / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    first, second = (np.array(item.rank(**request).predictions["click"]) for item in (before, now))
    assert 0 < np.abs(np.sort(first) - np.sort(second)).max() < 0.05
    stored = [load_file(folder / "weights.safetensors") for folder in (small.folder, out)]
    tables = [sum(item.nbytes for name, item in file.items() if name.startswith("tables.")) for file in stored]
    assert [report["bytes"][which]["tables"] for which in ("model", "int8")] == tables
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in ("export.json", "manifest.json")]
    assert report["bytes"]["int8"]["all files"] == sum(file.stat().st_size for file in files)


def test_an_export_is_replaced_and_nothing_else_is(
    small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(small, out, "--int8")["made"] == "int8"
    assert run(small, out, "--onnx")["made"] == "onnx"
    names = {"model.onnx", "inputs.json", "example.npz", "README.md", "export.json"}
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == names
    assert f"described in {out / 'README.md'}" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    words = ("--model", str(small.folder), "--int8", "--out")
    assert "contains other files" in commands.refuse(capsys, "export", *words, str(tmp_path / "mine"))
    for both in ((), ("--int8", "--onnx")):
        message = commands.refuse(capsys, "export", "--model", small.folder, "--out", out, *both)
        assert "Give exactly one of --int8 and --onnx" in message
    assert "contains the model to export" in commands.refuse(capsys, "export", *words, str(small.folder))


def test_a_failure_leaves_what_was_there(small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    run(small, out, "--int8")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    shutil.copytree(small.folder, broken)
    weights = load_file(broken / "weights.safetensors")
    weights["mixture.levels.0.experts.0.layers.0.weight"][1] = float("nan")
    save_file(weights, broken / "weights.safetensors")
    write_manifest(broken)
    commands.refuse(capsys, "export", "--model", str(broken), "--int8", "--out", str(out))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")] == []
