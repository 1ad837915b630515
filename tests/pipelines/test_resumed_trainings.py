"""`train --resume` goes on with the training that is asked for and with no other one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mmoe_rec.evaluation.promotion import Decision
from mmoe_rec.inference.artifact_writer import finalize_artifact
from mmoe_rec.training import train as steps
from tests.pipelines.short_trainings import World, dying_after, refused

pytestmark = pytest.mark.thorough

RESUME = "--resume"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a trained champion."""
    world = World.of(tmp_path_factory.mktemp("template"))
    world.train()
    return world


@pytest.fixture(autouse=True)
def _register_by_name_only(template: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registration takes longer than such a training."""
    decision = Decision("models:/learnable@champion", True, ("it is better",))
    monkeypatch.setattr(steps, "promote_trained", lambda *_: decision)


@pytest.fixture
def world(template: World) -> World:
    shutil.rmtree(template.checkpoints, ignore_errors=True)
    return template


def other_model(world: World, name: str) -> Path:
    """The champion's folder with other weights."""
    folder = world.folder / name
    if not folder.exists():
        shutil.copytree(world.folder / "work" / "model", folder)
        weights = load_file(folder / "weights.safetensors")
        # Whether an expert is out of use is stored as a number too.
        save_file({name: item + 0.01 * (not name.endswith("masked")) for name, item in weights.items()}, folder / "w")
        (folder / "w").rename(folder / "weights.safetensors")
        finalize_artifact(folder)
    return folder


def latest_step(world: World) -> int:
    return int(json.loads((world.checkpoints / "latest.json").read_text())["step"])


def test_another_training_than_the_one_that_died_is_refused_and_the_same_goes_on(
    world: World, capsys: pytest.CaptureFixture
) -> None:
    """No features are built for a training that can't go on."""
    manifest = world.folder / "work" / "features" / "manifest.json"
    before = manifest.read_bytes()
    with dying_after(12):
        world.train()
    for words, named in (
        (
            ("--from", "models:/learnable@champion"),
            "no --from, and now it is --from models:/learnable@champion",
        ),
        (("--training.learning_rate", "0.5"), "training.learning_rate 0.01, and now it is 0.5"),
        (("--split.validation_end", "2024-03-07T12:00"), "split.validation_end "),
    ):
        message = refused(capsys, world, *words, RESUME)
        assert f"can't be resumed: it was started with {named}" in message
    log = world.folder / "log" / "more.parquet"
    shutil.copy(world.folder / "later.parquet", log)
    assert "the log, the feature settings or the split have changed" in refused(capsys, world, RESUME)
    log.unlink()
    assert manifest.read_bytes() == before

    left, second = other_model(world, "one"), other_model(world, "other")
    weights = load_file(second / "weights.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, second / "weights.safetensors")
    finalize_artifact(second)
    with dying_after(12):
        world.train("--from", str(left))
    assert latest_step(world) == 10
    message = refused(capsys, world, "--from", str(second), RESUME)
    assert f"it was started with --from {left}, and now it is --from {second}. Restore the option" in message
    assert f"it was started with --from {left}, and now it is no --from" in refused(capsys, world, RESUME)
    assert latest_step(world) == 10
    world.train("--from", str(left), RESUME)
    capsys.readouterr()
    world.train("--from", str(left), RESUME)
    assert capsys.readouterr().out.startswith("The run has already finished")
    assert "it was started with --from" in refused(capsys, world, "--from", str(second), RESUME)


def test_an_alias_is_what_it_stood_for_when_the_training_began(
    world: World, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = ("--from", "models:/learnable@champion")
    with dying_after(12):
        world.train(*champion)
    monkeypatch.setattr(
        "mmoe_rec.tracking.registry.pin_model_uri", lambda *_: pytest.fail("nothing is looked up again")
    )
    world.train(*champion, RESUME)
    world.train(*champion, RESUME)
    assert "The run has already finished" in capsys.readouterr().out
    monkeypatch.undo()
    world.train("--from", "models:/learnable/1", RESUME)  # what it stood for
    assert "The run has already finished" in capsys.readouterr().out


def test_other_settings_after_the_end_are_named(world: World, capsys: pytest.CaptureFixture) -> None:
    world.train()
    before = (world.checkpoints / "finished.json").read_bytes()
    for setting, value, named in (
        ("training.calibration", "temperature", 'training.calibration "none", and now it is "temperature"'),
        ("tasks.click.score_weight", "3", "tasks.click.score_weight 1.0, and now it is 3.0"),
        ("tracking.registered_model", "another", 'tracking.registered_model "learnable", and now it is "another"'),
        ("serving.max_candidates", "7", "serving.max_candidates 10000, and now it is 7"),
    ):
        message = refused(capsys, world, RESUME, f"--{setting}", value)
        assert "can't be resumed: it was started with " + named in message
    assert (world.checkpoints / "finished.json").read_bytes() == before
    away = ("--tracking.uri", "http://127.0.0.1:9")  # nobody is asked for a training that has ended
    features = world.folder / "work" / "features"
    features.rename(features.with_name("away"))
    world.train(RESUME, *away)
    features.with_name("away").rename(features)
    assert "has already finished" in capsys.readouterr().out


def test_a_new_training_forgets_the_one_before(world: World, capsys: pytest.CaptureFixture) -> None:
    with dying_after(32):
        world.train()
    assert latest_step(world) == 30
    with dying_after(3):  # before its first checkpoint
        world.train("--training.learning_rate", "0.02")
    assert not (world.checkpoints / "latest.json").exists()
    with dying_after(1):
        world.train(RESUME)
    world.train()
    with dying_after(3):
        world.train()
    assert not (world.checkpoints / "finished.json").exists()
    capsys.readouterr()
    world.train(RESUME)
    assert "has already finished" not in capsys.readouterr().out


def test_what_refuses_to_begin_forgets_nothing(world: World, capsys: pytest.CaptureFixture) -> None:
    world.train()
    before = {file: file.read_bytes() for file in world.checkpoints.glob("*.json")}
    words = ("--from", "models:/learnable@champion", "--model.experts.count", "5")
    assert "Training can't start from" in refused(capsys, world, *words)
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("text", ["{", "[]", '{"best": {}}'])
def test_an_end_that_cannot_be_read_is_named(world: World, capsys: pytest.CaptureFixture, text: str) -> None:
    world.checkpoints.mkdir(exist_ok=True)
    (world.checkpoints / "finished.json").write_text(text)
    assert "finished.json', is missing, damaged or of another version" in refused(capsys, world, RESUME)


def test_a_later_day_begins_a_new_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same line every day, whatever became of the day before."""
    world = World.of(tmp_path / "days")
    world.train()
    manifest = world.folder / "work" / "features" / "manifest.json"
    first, start = manifest.read_bytes(), ("--from", str(other_model(world, "start")))
    later = world.folder / "log" / "later.parquet"
    shutil.copy(world.folder / "later.parquet", later)
    message = refused(capsys, world, *start, RESUME, day="second")
    assert "run mmoe-rec features with --extend first" in message
    assert manifest.read_bytes() == first, "features that can still be extended are not built anew"
    later.unlink()

    with dying_after(12):
        world.train(*start)
    world.add_a_day()
    capsys.readouterr()
    with dying_after(7):
        world.train(*start, RESUME, day="second")
    assert "the features reach a later day than the run in" in capsys.readouterr().err
    assert latest_step(world) <= 7, "the one before had come further"
    world.train(*start, RESUME, day="second")
    out = capsys.readouterr()
    assert "a later day" not in out.err
    assert "has already finished" not in out.out
    world.train(*start, RESUME, day="second")
    assert capsys.readouterr().out.startswith("The run has already finished")


def test_a_log_that_has_grown_after_the_end_begins_a_new_training(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without --from, features of all days are built anew."""
    world = World.of(tmp_path / "days")
    world.train()
    (world.folder / "later.parquet").rename(world.folder / "log" / "later.parquet")
    capsys.readouterr()
    world.train(RESUME, day="second")
    assert "has already finished" not in capsys.readouterr().out
    world.train(RESUME, day="second")
    assert "has already finished" in capsys.readouterr().out
    message = refused(capsys, world, RESUME)
    assert "can't be resumed: it was started with split." in message
