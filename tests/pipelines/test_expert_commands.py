"""Experts added, masked and removed, and training on from an edited one."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest

from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranker import Ranker
from tests.commands import refuse, run
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough

EXPERTS = 4


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model of four experts and return its settings file."""
    folder = tmp_path_factory.mktemp("soft")
    training = settings_tree(folder)["training"] | {"epochs": 1}
    model = {"experts": {"count": EXPERTS, "units": [8]}, "gates": {"dropout": 0.1}}
    config = write_files(folder, training=training, model=model)
    run("train", "--config", str(config))
    return config


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
    message = capsys.readouterr().out
    assert "added 2, copied from 0, 1, so the model has 6 experts" in message
    np.testing.assert_allclose(ranked(folder), before, atol=1e-6)
    assert read_artifact(folder).model["experts"]["count"] == 6
    uri = f"sqlite:///{soft.parent}/mlflow.db"
    client = mlflow.MlflowClient(uri, uri)
    assert client.get_model_version_by_alias("learnable", "challenger")
    shutil.copytree(soft.parent / "work" / "features", tmp_path / "features")
    own = ("--model.experts.count", "6", "--data.work_dir", str(tmp_path))
    run("train", "--config", str(soft), "--from", str(folder), *own)
    assert "validation of the starting model's network" in capsys.readouterr().out


def test_removing_and_masking_agree(soft: Path) -> None:
    masked = ranked(edit(soft, "--mask", "1"))
    removed = ranked(edit(soft, "--remove", "1"))
    np.testing.assert_allclose(removed, masked, atol=1e-6)


def test_a_wrong_edit_ends_in_a_sentence_and_replaces_nothing(
    soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ["edit-experts", "--config", soft, "--model", soft.parent / "work" / "model"]
    for wrong in ([], ["--add", "1", "--mask", "0"]):
        assert "Give exactly one of --add, --remove and --mask" in refuse(capsys, *words, *wrong)
    assert "Expert 9 can't be removed" in refuse(capsys, *words, "--remove", "9")
    assert "exists and contains no model" in refuse(capsys, *words, "--mask", "0", "--out", tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    damaged = shutil.copytree(soft.parent / "work" / "model", tmp_path / "model")
    (damaged / "weights.safetensors").write_bytes(b"\0" * 40)
    message = refuse(capsys, *words[:-1], damaged, "--mask", "0")
    assert "was modified: 'weights.safetensors' is missing or has changed" in message
