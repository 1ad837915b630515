"""Members of a model: each is the training of its own seed, whatever stopped it; training goes on from all of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmoe_rec.batches.encoded_rows import EncodedRows, Part
from mmoe_rec.inference.artifact import read_artifact, read_model
from mmoe_rec.model.score import UNCALIBRATED
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.training import Training
from mmoe_rec.training.checkpoint import FinishedTraining, latest_checkpoint
from mmoe_rec.training.choices import Choices, Chooser
from mmoe_rec.training.validation import Validation, validate_alone
from tests.commands import refuse, run
from tests.pipelines.short_trainings import World, dying_after
from tests.training.ranks import name_rank, spawn

MEMBERS = ("--model.members", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a trained champion of two members."""
    world = World.of(tmp_path_factory.mktemp("members"))
    world.train(*MEMBERS)
    return world


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "model" / "weights.safetensors")


def validate_by(part: Part, work: Path) -> Validation:
    """The validation of a folder's model on the rows of a part."""
    about, folder = read_artifact(work / "model"), FeatureFolder(work / "features").split("validation")
    rows = EncodedRows(folder, about.layout, outcomes=True, with_users=True, part=part)
    return validate_alone(read_model(about, work / "model"), rows, about.layout, 512, UNCALIBRATED)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_each_member_is_the_training_of_its_own_seed(world: World, tmp_path: Path) -> None:
    whole = weights(world.work)
    for member, seed in enumerate((17, 10_017)):
        work = tmp_path / str(seed)
        shutil.copytree(world.work / "features", work / "features")
        world.train("--data.work", str(work), "--training.seed", str(seed))
        found = {}
        for name, weight in whole.items():
            if name.startswith("tables."):
                found[name] = weight.chunk(2, dim=1)[member]
            elif f"members.{member}." in name:
                found[name.replace(f"members.{member}.", "")] = weight
        assert_equal(found, weights(work))
        # Scored whole and in one process, a model has the validation that its training had.
        ended = FinishedTraining.read(work)
        assert ended is not None
        again = validate_by(Part.JUDGING, work)
        for name in ("loss", "auc", "gauc", "calibration", "rarer"):
            assert getattr(again, name) == pytest.approx(getattr(ended.best, name), rel=1e-5), name


def test_a_killed_member_goes_on(world: World, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.work / "features", work / "features")
    words = (*MEMBERS, "--data.work", str(work))
    left = work / "checkpoints" / "member_1" / "latest.json"
    left.parent.mkdir(parents=True)
    left.write_text("of another training", encoding="utf-8")
    with dying_after(12):
        world.train(*words)
    assert not left.exists()
    with dying_after(12, seed=10_017):
        world.train(*words, "--resume")
    assert json.loads(left.read_text())["step"] == 10
    world.train(*words, "--resume")
    assert_equal(weights(work), weights(world.work))
    one, other = (FinishedTraining.read(each) for each in (work, world.work))
    assert one is not None
    assert one.best.auc == other.best.auc


@pytest.mark.thorough
def test_training_goes_on_from_all_members(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, champion = world.folder / "first.yaml", str(world.work / "model")
    work = tmp_path / "work"
    shutil.copytree(world.work / "features", work / "features")
    own = ("--data.work", str(work), "--from", champion)
    told = refuse(capsys, "train", "--config", config, *own)
    assert "its setting 'model.members' is 2, and 1 in the settings" in told
    with dying_after(12):
        world.train(*MEMBERS, *own)
    world.train(*MEMBERS, *own, "--resume")
    found = FinishedTraining.read(work)
    assert found is not None
    assert found.started_from.auc == pytest.approx(validate_by(Part.SELECTING, world.work).auc, abs=1e-6)
    first = weights(world.work)
    assert all(not torch.equal(weight, first[name]) for name, weight in weights(work).items() if "towers" in name)


@pytest.mark.thorough
def test_members_compute_as_the_first_one_does(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def choose(self: Chooser, settings: Training) -> Choices:
        measured.append(settings.seed)
        return Choices("bf16", "fbgemm", "auto", 1, "blas", {})

    monkeypatch.setattr(Chooser, "choose", choose)
    work = tmp_path / "work"
    shutil.copytree(world.work / "features", work / "features")
    world.train(*MEMBERS, "--training.precision", "auto", "--data.work", str(work))
    assert measured == [17]
    found = [latest_checkpoint(work / "checkpoints" / name) for name in ("", "member_1")]
    assert [None if each is None else each.state.choices for each in found] == [choose(None, Training())] * 2


def train_on_rank(rank: int, ranks: int, port: int, *words: str) -> None:
    """The command on one of several ranks. It is called in a process of its own."""
    name_rank(rank, ranks, port)
    run("train", *words)


@pytest.mark.thorough
def test_two_ranks_train_the_same_members(world: World, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.work / "features", work / "features")
    spawn(train_on_rank, "--config", str(world.folder / "first.yaml"), *MEMBERS, "--data.work", str(work))
    found, expected = weights(work), weights(world.work)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-4, rtol=1e-3, msg=name)


def test_what_has_no_meaning_for_members_is_refused(world: World, capsys: pytest.CaptureFixture) -> None:
    config, model = world.folder / "first.yaml", world.work / "model"
    told = refuse(capsys, "edit-experts", "--config", config, "--model", model, "--add", "1")
    assert "has 2 members (model.members), whose experts can't be edited" in told
    told = refuse(capsys, "tune", "--config", config, "--tuning.search", '{"model.members": {"low": 1, "high": 4}}')
    assert "tuning.search names 'model.members', but a trial trains one member" in told
