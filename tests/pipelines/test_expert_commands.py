"""Experts added, masked and removed, fewer of them measured, and training on from an edited one."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from mmoe_rec.cli.evaluate import table_of
from mmoe_rec.evaluation.intervals import Interval
from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranker import Ranker
from tests.commands import refuse, run
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough

EXPERTS = 4


def world(folder: Path, **gates: Any) -> Path:
    """A trained model of four experts; gives its settings file."""
    training = settings_tree(folder)["training"] | {"epochs": 1}
    model = {"experts": {"count": EXPERTS, "units": [8]}, "gates": gates}
    config = write_files(folder, training=training, model=model)
    run("train", "--config", str(config))
    return config


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("soft"), dropout=0.1)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates = {"routing": "expert_choice", "top_k": 2, "serving_top_k": 2, "balance": "loss", "z_loss": 0.001}
    return world(tmp_path_factory.mktemp("chosen"), **gates)


def ranked(folder: Path) -> np.ndarray:
    ranker = Ranker.load(folder)
    request = json.loads((folder / "example_request.json").read_text())["inputs"][0]
    ranking = ranker.rank(**request)
    return np.array(list(ranking.predictions.values())).T[np.argsort(ranking.order)]


def edit(config: Path, *arguments: str) -> Path:
    run("edit-experts", "--config", str(config), "--model", str(config.parent / "work" / "model"), *arguments)
    return config.parent / "work" / "edited"


def test_adding_experts_keeps_predictions_and_training_goes_on(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ranked(soft.parent / "work" / "model")
    folder = edit(soft, "--add", "2")
    told = capsys.readouterr().out
    assert "added 2, copied from 0, 1; the model has 6 experts" in told
    np.testing.assert_allclose(ranked(folder), before, atol=1e-6)
    assert read_artifact(folder).model["experts"]["count"] == 6
    uri = f"sqlite:///{soft.parent}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    assert client.get_model_version_by_alias("learnable", "challenger")
    shutil.copytree(soft.parent / "work" / "features", tmp_path / "features")
    own = ("--model.experts.count", "6", "--data.work", str(tmp_path))
    run("train", "--config", str(soft), "--from", str(folder), *own)
    assert "validation of the network that it was started from" in capsys.readouterr().out


def test_removing_and_masking_agree(soft: Path) -> None:
    masked = ranked(edit(soft, "--mask", "1"))
    removed = ranked(edit(soft, "--remove", "1"))
    np.testing.assert_allclose(removed, masked, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --add, --remove and --mask"),
        (["--add", "1", "--mask", "0"], "give one of --add, --remove and --mask"),
        (["--remove", "9"], "expert 9 can't be removed"),
    ],
)
def test_a_wrong_edit_ends_in_a_sentence(
    soft: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    model = soft.parent / "work" / "model"
    assert message in refuse(capsys, "edit-experts", "--config", soft, "--model", model, *arguments)


def test_what_is_no_model_is_neither_edited_nor_replaced(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ["edit-experts", "--config", soft, "--mask", "0", "--model"]
    told = refuse(capsys, *words, soft.parent / "work" / "model", "--out", tmp_path)
    assert "exists and holds no model" in told
    assert (tmp_path / "thesis.txt").exists()
    damaged = shutil.copytree(soft.parent / "work" / "model", tmp_path / "model")
    (damaged / "weights.safetensors").write_bytes(b"\0" * 40)
    told = refuse(capsys, *words, damaged)
    assert "is not as it was written: 'weights.safetensors' has 40 bytes instead of" in told


def test_fewer_experts_have_a_row_each(chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, numbers = str(chosen.parent / "work" / "model"), range(EXPERTS, 0, -1)
    words = ["evaluate", "--config", str(chosen), "--model", model, "--out", str(tmp_path), "--experts-per-row"]
    run(*words, *numbers)
    measured = json.loads((tmp_path / "experts.json").read_text())
    assert [each["k"] for each in measured] == [*numbers]
    areas = [each["tasks"]["click"]["auc"]["value"] for each in measured]
    assert len(set(areas)) == EXPERTS
    # The model's own number is what the evaluation itself measures.
    whole = json.loads((tmp_path / "metrics.json").read_text())
    assert areas[numbers.index(2)] == pytest.approx(whole["tasks"]["click"]["auc"]["value"], abs=1e-9)
    assert all(each["milliseconds"] > 0 for each in measured)
    assert f"{areas[0]:.4f} ±" in capsys.readouterr().out
    assert "--experts-per-row names 9, and a gate of the model sees 4 experts" in refuse(capsys, *words, 9)


def test_the_table_shows_what_is_undefined() -> None:
    row = {"k": 1, "milliseconds": 1.0, "tasks": {"a": {"auc": Interval(None)}}}
    assert list(table_of([row]).columns[1].cells) == ["-"]
