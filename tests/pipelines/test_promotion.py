"""A version takes the alias if it is better than the holder, after a training and by `promote`, and gives it back."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import promotion
from mmoe_rec.evaluation.evaluate import NotFiniteError, score_rows
from mmoe_rec.inference.artifact import write_manifest
from mmoe_rec.inference.ranker import PredictionMismatchError, Ranker
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import fetch_model
from tests import commands
from tests.pipelines.short_trainings import NAME, SLOW, World
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with two versions: one that has learnt nothing, and the champion."""
    world = World.of(tmp_path_factory.mktemp("template"))
    world.train(*SLOW, "--model.experts.count", "2")
    world.train("--evaluation.slices", '["slot"]', "--evaluation.guardrail_slices", '["slot"]')
    assert world.champion_version() == "2"
    return world


@pytest.fixture
def world(template: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The first version holds the alias. A training adds a version of the first one's files, as registering its own
    takes longer than to train it."""

    def register(run: runs.Run, artifact: Path, name: str, **_: Any) -> str:
        source = template.client.get_model_version(name, "1").source
        return str(template.client.create_model_version(name, source, run_id=run.run_id).version)

    monkeypatch.setattr(promotion.registry, "register_model", register)
    registry.move_alias(NAME, "champion", "1", template.uri)
    return template


@pytest.fixture
def second(world: World) -> World:
    """The second version holds the alias."""
    registry.move_alias(NAME, "champion", "2", world.uri)
    return world


def promote(world: World, *words: str) -> int:
    """The exit code of the command."""
    return commands.exit_code("promote", "--config", world.folder / "first.yaml", *words)


def tags(world: World, version: str) -> dict[str, str]:
    return world.client.get_model_version(NAME, version).tags


def newest(world: World) -> str:
    return str(
        max(int(model_version.version) for model_version in world.client.search_model_versions(f"name='{NAME}'"))
    )


def said(work: Path) -> list[str]:
    return json.loads((work / "checkpoints" / "finished.json").read_text())["promotion_messages"]


def area(artifact: Path, work: Path) -> float:
    """The mean AUC of a model on the evaluation rows of the features in a folder, which are its own."""
    ranker = Ranker.load(artifact)
    rows = EncodedDataset(work / "features" / "encoded" / "validation", ranker.layout, part=ValidationPart.EVALUATION)
    scored = score_rows(load_settings(artifact / "settings.yaml"), ranker.model, ranker.layout, rows)
    actual = []
    for name, label in scored.labels.items():
        predicted = scored.predictions[name]
        known = ~np.isnan(label)
        actual.append(roc_auc_score(label[known], predicted[known]))
    return float(np.mean(actual))


def area_of(world: World, version: str) -> float:
    """That of a version in the registry."""
    return area(fetch_model(f"models:/{NAME}/{version}", world.uri), world.folder / "work")


# The command


def test_a_better_version_takes_the_alias_and_gives_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert promote(world, "--challenger", "2") == 0
    printed = capsys.readouterr().out
    assert world.champion_version() == "2"
    assert "'champion' is version 2 now" in printed
    assert "'version 2' is better than 'version 1': mean auc of click, liked is higher by " in printed
    assert tags(world, "2")["compared"].startswith("'version 2' is better than 'version 1'")
    assert tags(world, "2")["promoted"] == "'champion' since this comparison"
    report = world.folder / "work" / "promotion" / "report.html"
    assert "'version 2' is better than 'version 1'" in Page(report.read_text(encoding="utf-8")).words
    run_id = world.client.get_model_version(NAME, "2").run_id
    assert "promotion/report.html" in [artifact.path for artifact in world.client.list_artifacts(run_id, "promotion")]
    assert promote(world, "--challenger", "models:/learnable/2") == 0
    assert "version 2 has the alias 'champion' already" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        # Another process promotes while the version is loaded.
        patch.setattr(promotion, "_load", lambda _: registry.move_alias(NAME, "champion", "1", world.uri))
        assert promote(world, "--rollback") == 2
    assert world.champion_version() == "1"
    assert "'champion' has moved while this command ran. Run the command again." in capsys.readouterr().err
    registry.move_alias(NAME, "champion", "2", world.uri)
    assert promote(world, "--rollback") == 0
    assert world.champion_version() == "1"
    printed = capsys.readouterr().out
    assert "'champion' is version 1 again, as before version 2" in printed
    assert "its tables are as of 2024-" in printed
    assert tags(world, "2")["promoted"] == "no more: 'champion' went back to version 1"
    assert tags(world, "1")["promoted"] == "'champion' again, after version 2"
    registry.move_alias(NAME, "champion", "2", world.uri)  # by hand
    assert promote(world, "--rollback") == 2, "what was before is not taken from a holding that has ended"
    assert "is unknown. Move the alias" in capsys.readouterr().err
    registry.move_alias(NAME, "champion", "1", world.uri)


def test_rows_that_either_has_seen_decide_nothing(world: World, capsys: pytest.CaptureFixture) -> None:
    split = ["--split.train_end", "2024-03-04", "--split.validation_end", "2024-03-05"]
    assert promote(world, "--challenger", "2", *split, "--data.work_dir", str(world.folder / "earlier")) == 1
    assert world.champion_version() == "1"
    printed = capsys.readouterr().out
    for version in (1, 2):
        assert f"version {version} was trained, or its best state chosen, on requests before 2024-03-08 " in printed


@pytest.mark.parametrize("what", ["damaged", "another format", "not finite"])
def test_a_version_that_cannot_be_served_is_refused_and_gives_way(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fetch_model(f"models:/{NAME}/2", world.uri), folder)
    weights = folder / "weights.safetensors"
    if what == "damaged":
        weights.write_bytes(b"short")
    elif what == "another format":
        (folder / "model.json").write_text('{"format": 1}')
        (folder / "manifest.json").unlink()
    else:
        actual = load_file(weights)
        actual = {name: item * 1e38 if "towers" in name else item for name, item in actual.items()}
        save_file(actual, weights)
        write_manifest(folder)

    def fetch(address: str, uri: str) -> Path:
        return folder if address.endswith("/2") else fetch_model(address, uri)

    monkeypatch.setattr(registry, "fetch_model", fetch)
    assert promote(world, "--challenger", "2") == 1
    assert world.champion_version() == "1"
    assert tags(world, "2")["compared"].startswith("version 2 can't be served: ")
    registry.move_alias(NAME, "champion", "2", world.uri)
    assert promote(world, "--challenger", "1") == 0
    assert world.champion_version() == "1"
    assert tags(world, "1")["compared"].startswith("version 2 (alias 'champion') can't be served any more: ")


def test_what_is_asked_for_wrongly_is_reported(world: World, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (("--challenger", "99"), "99"),
        (
            ("--challenger", "nobody"),
            "no version of 'learnable' has the alias 'nobody'. Give the number of a version",
        ),
        ((), "Give either --challenger V or --rollback"),
        (("--challenger", "2", "--rollback"), "Give either --challenger V or --rollback"),
        (("--challenger", "2", "--tracking.registered_model", "unknown"), "unknown"),
    ):
        assert promote(world, *words) == 2
        assert message in capsys.readouterr().err
    world.client.set_registered_model_alias(NAME, "lonely", "1")
    assert promote(world, "--rollback", "--tracking.alias", "lonely") == 2
    assert "the version of 'learnable' with the alias 'lonely' before version 1 is unknown" in capsys.readouterr().err


def test_an_alias_that_moves_during_the_command_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*_: Any) -> list[str]:
        world.client.delete_registered_model_alias(NAME, "champion")
        return []

    monkeypatch.setattr(promotion, "_find_objections", meanwhile)
    assert promote(world, "--challenger", "2") == 1
    assert world.champion_version() is None
    assert tags(world, "2")["compared"] == "'champion' has moved while this command ran. Run the command again."


def test_a_champion_that_can_not_be_had_here_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage, or a machine that gives other predictions, says nothing about the holder."""
    fetch = registry.fetch_model

    def away(address: str, uri: str) -> Path:
        if address.endswith("/1"):
            raise UserError(f"'{address}' can't be loaded")
        return fetch(address, uri)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch_model", away)
        assert promote(world, "--challenger", "2") == 2
    load = Ranker.load

    for error in (PredictionMismatchError("gives other predictions here"), RuntimeError("can't allocate memory")):
        with monkeypatch.context() as patch:
            calls = iter([None, error])

            def loaded(folder: Path, calls: Any = calls) -> Any:
                if (trouble := next(calls)) is not None:
                    raise trouble
                return load(folder)

            patch.setattr(Ranker, "load", staticmethod(loaded))
            assert promote(world, "--challenger", "2") == 1
        assert "can't be compared on this machine" in tags(world, "2")["compared"]
    assert world.champion_version() == "1"


@pytest.mark.parametrize(("which", "promoted"), [("2", False), ("1", True)])
def test_a_version_whose_predictions_are_not_finite(
    world: World, monkeypatch: pytest.MonkeyPatch, which: str, promoted: bool
) -> None:
    def evaluated(*_: Any, **__: Any) -> Any:
        raise NotFiniteError("it gives predictions that are not finite numbers", f"version {which}")

    monkeypatch.setattr(promotion, "evaluate_models", evaluated)
    assert promote(world, "--challenger", "2") == (0 if promoted else 1)
    assert (world.champion_version() == "2") == promoted
    assert tags(world, "2")["compared"] == "it gives predictions that are not finite numbers"


def test_rows_of_another_split_are_logged_to_a_run_of_their_own(world: World) -> None:
    words = ["--config", str(world.folder / "first.yaml"), "--model", "models:/learnable/2"]
    commands.run("evaluate", *words)
    run_id = world.client.get_model_version(NAME, "2").run_id
    before = world.client.get_run(run_id)
    right = ["--data.work_dir", str(world.folder / "few"), "--split.validation_end", "2024-03-08T12:00"]
    commands.run("evaluate", *words, *right)
    after = world.client.get_run(run_id)
    assert before.data.metrics["test/liked.auc"] > 0
    assert (after.data.metrics, after.data.tags) == (before.data.metrics, before.data.tags)
    (newest, *_) = world.client.search_runs([before.info.experiment_id], max_results=1)
    assert newest.info.run_name == "evaluate models:/learnable/2"
    assert 0 < newest.data.metrics["test/rows"] < before.data.metrics["test/rows"]
    actual = json.loads((world.folder / "few" / "evaluation" / "metrics.json").read_text())["tasks"]
    assert newest.data.metrics["test/liked.auc"] == pytest.approx(actual["liked"]["auc"]["value"])


# After a training


def test_the_first_takes_the_alias_and_a_better_one_after_it(template: World) -> None:
    reason, now = said(template.work)
    assert now == "'champion' is version 2 now, this model"
    layout = Ranker.load(template.work / "model").layout
    rows = EncodedDataset(
        template.work / "features" / "encoded" / "validation", layout, part=ValidationPart.EVALUATION
    ).rows
    better = r"'this model' is better than 'version 1': mean auc of click, liked is higher by "
    actual = re.fullmatch(
        rf"{better}([.\d]+) \(([.\d]+) to [.\d]+\) \({rows:,} evaluation rows of the validation split\)", reason
    )
    assert actual
    assert float(actual[1]) == pytest.approx(area_of(template, "2") - area_of(template, "1"), abs=1e-4)
    assert 0 < float(actual[2]) < float(actual[1])


def test_a_worse_model_leaves_the_alias(second: World, capsys: pytest.CaptureFixture) -> None:
    second.train(*SLOW)
    version = newest(second)
    assert second.champion_version() == "2"
    assert second.champion_version("challenger") == version
    out = capsys.readouterr().out
    assert f"'champion' stays version 2; this model, version {version}, is 'challenger'" in out
    assert "registered as models:/learnable@challenger" in out


def test_a_champion_of_other_features_is_measured_on_its_own(second: World) -> None:
    """Its rows are encoded by its own features; the same weights on them give the same value as at first."""
    elsewhere = second.folder / "elsewhere"
    second.train(*SLOW, "--features.item_click.window_days", "[1]", "--data.work_dir", str(elsewhere))
    assert second.champion_version() == "2"
    reason, _ = said(elsewhere)
    actual = re.search(r"is worse than 'version 2': mean auc of click, liked is lower by ([.\d]+) ", reason)
    assert actual
    assert float(actual[1]) == pytest.approx(area_of(second, "2") - area(elsewhere / "model", elsewhere), abs=1e-4)


def test_a_champion_whose_labels_mean_something_else_keeps_the_alias(second: World, tmp_path: Path) -> None:
    second.train("--data.work_dir", str(tmp_path), "--tasks.liked.label_delay_days", "1")
    reason, now = said(tmp_path)
    assert "trained with 'tasks.liked.label_delay_days' 0.0, and it is 1.0 in the settings" in reason
    assert "move the alias by hand" in reason
    assert now.startswith("'champion' stays version 2; ")
    assert second.champion_version() == "2"


def test_an_outage_during_the_comparison_decides_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:

    def away(address: str, uri: str) -> Path:
        raise runs.UnreachableError("MLflow does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch_model", away)
        with pytest.raises(SystemExit) as ended:
            world.train()
    assert ended.value.code == 75
    assert world.champion_version() == "1"
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: MLflow does not answer. The model in ")
    world.train("--resume")
    assert newest(world) in (world.champion_version(), world.champion_version("challenger")), "it is decided"
    assert " rows/s in training" not in capsys.readouterr().out, "no step was left to do"


def test_an_alias_that_moved_meanwhile_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, champions = promotion.compare_with_champion, []

    def meanwhile(*rest: Any) -> tuple[bool, str]:
        champions.append(rest[-1].number)
        registry.move_alias(NAME, "champion", "2", world.uri)
        return compare(*rest)

    monkeypatch.setattr(promotion, "compare_with_champion", meanwhile)
    world.train(*SLOW, "--training.seed", "5")
    assert champions == ["1"]
    assert world.champion_version() == "2"
    assert said(world.work)[0] == "'champion' has moved during the comparison. Compare again with `mmoe-rec promote`."


def test_a_training_that_was_killed_after_it_took_the_alias_is_not_registered_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.client.delete_registered_model_alias(NAME, "champion")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmoe_rec.training.checkpoint.FinishedRun.write", killed)
        with pytest.raises(KeyboardInterrupt):
            world.train()
    version = newest(world)
    assert world.champion_version() == version
    world.train("--resume")
    assert newest(world) == version == world.champion_version()
    assert said(world.work) == [f"'champion' is version {version}, this model"]
