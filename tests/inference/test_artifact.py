"""The artifact folder: what is in it, and what is said of a damaged one."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import read_artifact, write_manifest
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import seal, write_artifact
from mmoe_rec.model.score import UNCALIBRATED, Calibration, TaskCalibration
from mmoe_rec.settings.load import load_settings
from tests.inference.small_model import SmallModel
from tests.log.small_logs import random_log, times_of


def test_holds_plain_data_only(small: SmallModel) -> None:
    endings = {path.suffix for path in small.folder.rglob("*") if path.is_file()}
    assert endings == {".json", ".yaml", ".safetensors", ".parquet"}


def test_says_what_it_was_made_from(small: SmallModel) -> None:
    about = read_artifact(small.folder)
    assert about.name == "small"
    assert about.fingerprint == small.prepared.manifest["fingerprint"]
    assert about.max_candidates == 50
    last = max(times_of(random_log(1, rows=600)))
    assert datetime.fromisoformat(about.tables_as_of) == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(
        microseconds=int(last)
    )
    assert [(task.name, task.kind, task.objective) for task in about.tasks] == [
        ("click", "binary", "engagement"),
        ("liked", "binary", "satisfaction"),
        ("spent", "regression", "engagement"),
    ]
    assert load_settings(small.folder / "settings.yaml") == small.settings


def test_weights_survive(small: SmallModel, ranker: Ranker) -> None:
    loaded = ranker.model.state_dict()
    saved = small.model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


CALIBRATION = Calibration({"liked": TaskCalibration((-0.1, 0.7), (-1 / 3, 0.4), 0.9)})


def test_calibration_survives_and_may_be_absent(small: SmallModel, ranker: Ranker, tmp_path: Path) -> None:
    assert not (small.folder / "calibration.json").exists()
    assert ranker.calibration == UNCALIBRATED
    small.write(tmp_path / "m", CALIBRATION)
    assert Ranker.load(tmp_path / "m").calibration == CALIBRATION
    small.write(tmp_path / "m", UNCALIBRATED)
    assert Ranker.load(tmp_path / "m").calibration == UNCALIBRATED


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"liked": {}}', '{"liked": {"logits": [1, 0], "calibrated": [0, 1], "slope": 1}}']
)
def test_a_damaged_calibration_is_named(small: SmallModel, tmp_path: Path, text: str) -> None:
    small.write(tmp_path / "m", CALIBRATION)
    (tmp_path / "m" / "calibration.json").write_text(text)
    write_manifest(tmp_path / "m")
    with pytest.raises(UserError, match=r"calibration.json' is damaged"):
        Ranker.load(tmp_path / "m")


def test_diverged_weights_are_not_written(small: SmallModel, tmp_path: Path) -> None:
    state = dict(small.model.state_dict())
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    with pytest.raises(UserError, match=f"weight '{name}' holds NaN"):
        write_artifact(tmp_path / "m", settings=small.settings, prepared=small.prepared, state_dict=state)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.json").unlink(), "holds no model"),
        (lambda folder: (folder / "model.json").write_text('{"format": 99}'), "another format"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"\0" * 40), "can't be read"),
        (lambda folder: shutil.rmtree(folder / "features"), "holds no feature state"),
        (lambda folder: (folder / "example_request.json").unlink(), "can't be loaded .*example_request.json"),
        (lambda folder: (folder / "example_request.json").write_text("{}"), "can't be loaded "),
        (lambda folder: (folder / "example_scores.json").write_text('{"scores": []}'), "can't be loaded "),
        (
            lambda folder: (folder / "features" / "latest.user.parquet").unlink(),
            "can't be loaded .*latest.user.parquet",
        ),
        (lambda folder: (folder / "features" / "latest.user.parquet").write_bytes(b"x"), "can't be loaded "),
        (lambda folder: (folder / "features" / "clicked.memory" / "part-00000.parquet").unlink(), "prepare it again: "),
    ],
)
def test_a_folder_that_was_written_wrong(small: SmallModel, tmp_path: Path, damage: object, message: str) -> None:
    """What no manifest can tell, as it says the same: each still ends in a sentence."""
    folder = tmp_path / "model"
    shutil.copytree(small.folder, folder)
    damage(folder)  # type: ignore[operator]
    if (folder / "model.json").exists():
        write_manifest(folder)
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=message):
        Ranker.load(folder)


def test_other_model_settings_do_not_fit(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small.folder, folder)
    tree = json.loads((folder / "model.json").read_text())
    tree["model"]["experts"]["count"] = 4
    (folder / "model.json").write_text(json.dumps(tree))
    write_manifest(folder)
    with pytest.raises(UserError, match="does not fit the model's settings"):
        Ranker.load(folder)
    with pytest.raises(UserError, match="does not fit the model's settings"):
        seal(folder)
