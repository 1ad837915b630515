"""The command that exports a model: what it writes, reports and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.evaluation.scoring import ScoredRows, score_rows
from mmoe_rec.inference.artifact import check_files, write_manifest
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.tables import Int8Bag
from tests import commands
from tests.inference.small_model import SmallModel

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A model with its features and settings beside it."""
    small = SmallModel(tmp_path_factory.mktemp("export"))
    (small.folder.parent / "settings.yaml").write_text(small.settings.to_yaml(), encoding="utf-8")
    return small


def run(small: SmallModel, out: Path, *words: str) -> dict[str, Any]:
    """The report of an export."""
    commands.run("export", "--model", str(small.folder), "--out", str(out), *words)
    found: dict[str, Any] = json.loads((out / "export.json").read_text(encoding="utf-8"))
    return found


def on_test_rows(small: SmallModel, folder: Path) -> ScoredRows:
    ranker = Ranker.load(folder)
    return score_rows(ranker.model, ranker.layout, EncodedRows(small.prepared.split("test"), ranker.layout), 100)


def pairs_in_order(labels: np.ndarray, predicted: np.ndarray) -> float:
    """AUC as the share of pairs of a positive and a negative in the right order, ties counting a half."""
    ups, downs = predicted[labels == 1], predicted[labels == 0]
    return float(np.mean([(up > down) + 0.5 * (up == down) for up in ups for down in downs]))


def test_a_model_in_int8_with_its_figures_on_test_rows(
    small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, config = tmp_path / "int8", str(small.folder.parent / "settings.yaml")
    report = run(small, out, "--int8", "--config", config, "--evaluation.batch_size", "64")
    told = capsys.readouterr().out
    assert f"model: {out}, report: {out / 'export.json'}" in told
    check_files(out)
    assert all(isinstance(each, Int8Bag) for each in Ranker.load(out).model.tables.embedding_bags.values())
    assert (report["made"], report["dense"], report["of"]) == ("int8", "bfloat16", str(small.folder))
    before, now = on_test_rows(small, small.folder), on_test_rows(small, out)
    assert report["test_rows"]["rows"] == len(before.labels) > 50
    assert report["test_rows"]["tasks"]["liked"]["model"] is None  # no such label has matured
    for place, name in ((0, "click"), (2, "spent")):
        found = report["test_rows"]["tasks"][name]
        off = np.abs(before.predictions[:, place] - now.predictions[:, place]).max()
        assert found["max_difference"] == pytest.approx(off, rel=0.05)
        assert found["max_difference"] > 0
        for which, scored in (("model", before), ("int8", now)):
            seen = ~np.isnan(scored.labels[:, place])
            labels, predicted = scored.labels[seen, place], scored.predictions[seen, place]
            if name == "spent":
                expected, tolerance = np.sqrt(np.mean((labels - predicted) ** 2)), 1e-6
            else:
                expected, tolerance = pairs_in_order(labels, predicted), 2e-3  # batches of other sizes round otherwise
            assert found[which] == pytest.approx(expected, abs=tolerance)
        assert f"{name}, test, {found['metric']}" in told
    stored = [load_file(folder / "weights.safetensors") for folder in (small.folder, out)]
    tables = [sum(each.nbytes for name, each in file.items() if name.startswith("tables.")) for file in stored]
    assert [report["bytes"][which]["tables"] for which in ("model", "int8")] == tables
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in ("export.json", "manifest.json")]
    assert report["bytes"]["int8"]["all files"] == sum(file.stat().st_size for file in files)


def test_an_export_is_replaced_and_nothing_else_is(
    small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert "test_rows" not in run(small, out, "--int8", "--dense", "int8")
    assert run(small, out, "--onnx")["made"] == "onnx"
    names = {"model.onnx", "tables.safetensors", "inputs.json", "example.safetensors", "README.md", "export.json"}
    assert {file.name for file in out.iterdir()} == names
    assert f"described in {out / 'README.md'}" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    words = ("--model", str(small.folder), "--int8", "--out")
    assert "holds something else than an export" in commands.refuse(capsys, "export", *words, str(tmp_path / "mine"))
    assert "holds the model that is exported" in commands.refuse(capsys, "export", *words, str(small.folder))


def test_a_failure_leaves_what_was_there(small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    run(small, out, "--int8")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    shutil.copytree(small.folder, broken)
    weights = load_file(broken / "weights.safetensors")
    weights["mixture.levels.0.experts.0.layers.0.weight"][1] = float("nan")
    save_file(weights, broken / "weights.safetensors")
    write_manifest(broken)
    told = commands.refuse(capsys, "export", "--model", str(broken), "--int8", "--out", str(out))
    assert told.startswith("error: ")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give one of --int8 and --onnx"),
        (("--int8", "--onnx"), "give one of --int8 and --onnx"),
        (("--onnx", "--dense", "int8"), "--dense is for --int8"),
        (("--onnx", "--config", "no.yaml"), "--config is for --int8"),
        (("--int8", "--data.work", "w"), "'--data.work' is no option; where it is a setting"),
        (("--int8", "--dense", "int4"), "invalid value for '--dense': 'int4' is not one of"),
        (("--int8",), "'no/model' holds no model"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple[str, ...], told: str) -> None:
    assert told in commands.refuse(capsys, "export", "--model", "no/model", "--out", str(tmp_path / "out"), *words)
