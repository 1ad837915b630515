"""What writes or reads a folder is not disturbed by another command of the same `data.work_dir`."""

import os
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec import locks
from mmoe_rec.evaluation.promotion import Decision
from mmoe_rec.locks import lock_file, read_lock, write_lock
from mmoe_rec.preprocessing import prepare as building
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training import train as steps
from tests.commands import refuse, run
from tests.pipelines.short_trainings import World


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with features and a model's folder."""
    world = World.of(tmp_path_factory.mktemp("world"))
    world.train()
    return world


@pytest.fixture
def world(template: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(locks, "LOCK_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(steps, "promote_trained", lambda *_: Decision("models:/learnable@champion", True, ()))
    return template


def refused(capsys: pytest.CaptureFixture, command: str, world: World, *words: object, day: str = "first") -> str:
    return refuse(capsys, command, "--config", world.folder / f"{day}.yaml", *words)


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("folder", "words", "advice"),
    [
        ("checkpoints", ["train"], ". Wait until it has ended, or set `data.work_dir` to another folder"),
        ("checkpoints", ["train", "--resume"], "or set `data.work_dir` to another folder"),
        ("tuning", ["tune", "--tuning.search", '{"training.seed": {"low": 1, "high": 2}}'], ""),
        ("model", ["edit-experts", "--mask", "1", "--model", "MODEL", "--out", "MODEL"], "another folder with --out"),
    ],
)
def test_a_second_writer_is_refused_and_leaves_all_as_it_is(
    world: World, capsys: pytest.CaptureFixture, folder: str, words: list[str], advice: str
) -> None:
    work = world.folder / "work"
    command, *options = [word.replace("MODEL", str(work / "model")) for word in words]
    with write_lock(work / folder, "a training", "wait"):
        before = content(work)
        message = refused(capsys, command, world, *options)
        assert content(work) == before
    assert f"'{work / folder}' is in use by a training (process {os.getpid()} on " in message
    assert message.rstrip(".").endswith(advice)


def test_a_training_holds_its_folders_until_its_model_is_registered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, held = world.folder / "work", []

    def promote(*_: Any) -> Decision:
        held.extend(name for name in ("checkpoints", "model", "features") if lock_file(work / name).is_file())
        return Decision("models:/learnable@champion", True, ())

    monkeypatch.setattr(steps, "promote_trained", promote)
    world.train()
    assert held == ["checkpoints", "model", "features"]
    assert not list(work.glob(".*.lock"))


def test_features_are_not_replaced_under_a_training(world: World, capsys: pytest.CaptureFixture) -> None:
    folder = world.folder / "work" / "features"
    later = world.folder / "log" / "later.parquet"
    (world.folder / "later.parquet").rename(later)
    try:
        with read_lock(folder, "a training"):
            before = content(folder)
            for words in (("--extend",), ()):
                message = refused(capsys, "features", world, *words, day="second")
                assert f"'{folder}' is in use by a training (process " in message
            assert content(folder) == before
    finally:
        later.rename(world.folder / "later.parquet")


def test_whoever_reads_features_says_so(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is stopped where it reads: by then nobody may replace the features, or what an evaluation writes."""
    held, out = [], tmp_path / "out"

    class ReadError(Exception):
        pass

    def read(*_: Any, **__: Any) -> None:
        held.append([lock_file(item).is_file() for item in (world.folder / "work" / "features", out)])
        raise ReadError

    monkeypatch.setattr("mmoe_rec.evaluation.evaluate.score_rows", read)
    monkeypatch.setattr("mmoe_rec.cli.data.inspect_features", read)
    monkeypatch.setattr("mmoe_rec.experiments.tuning.Study.run", read)
    model = ["--model", str(world.folder / "work" / "model"), "--out", str(out)]
    config = ["--config", str(world.folder / "first.yaml")]
    search = ["--tuning.search", '{"training.learning_rate": {"low": 0.1, "high": 0.2}}']
    for command, words in (("evaluate", model), ("inspect", []), ("tune", search)):
        with pytest.raises(ReadError):
            run(command, *config, *words)
    assert held == [[True, True], [True, False], [True, False]]
    assert not list((world.folder / "work").glob(".*.lock"))
    assert not lock_file(out).exists()


def test_features_that_another_process_builds_meanwhile_are_not_taken(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between building and reading, another one may have built others in their place."""
    settings, prepare, built = load_settings(world.folder / "first.yaml"), building.prepare, []

    def replaced_once(*arguments: Any, keep_existing: bool) -> Any:
        prepared = prepare(*arguments, keep_existing=keep_existing)
        built.append(prepared.manifest["fingerprint"])
        if len(built) == 1:
            second = load_settings(world.folder / "first.yaml", ["--split.validation_end", "2024-03-07"])
            prepare(BuildInputs.of(second))
        return prepared

    monkeypatch.setattr(building, "prepare", replaced_once)
    with building.lock_features(BuildInputs.of(settings), "a test") as prepared:
        assert prepared.manifest["fingerprint"] == built[0] == built[1]
