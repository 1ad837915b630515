"""Which model holds the alias after a training: the better one on the same rows."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from mmoe_rec.batches.encoded_rows import EncodedRows, Part
from mmoe_rec.evaluation import promotion
from mmoe_rec.evaluation.evaluate import score_rows
from mmoe_rec.inference.artifact import write_manifest
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import fetch_model
from tests.pipelines.short_trainings import NAME, SLOW, World

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with two versions: one that has learnt nothing, and the champion."""
    world = World.of(tmp_path_factory.mktemp("template"))
    world.train(*SLOW, "--model.experts.count", "2")
    world.train()
    return world


@pytest.fixture
def world(template: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same, in which registering a model, which takes longer than to train it, is to count up."""

    def register(run: runs.Run, artifact: Path, name: str, **_: Any) -> str:
        versions = template.client.search_model_versions(f"name='{NAME}'")
        source = f"{versions[0].source}"
        return str(template.client.create_model_version(name, source, run_id=run.run_id).version)

    monkeypatch.setattr(promotion.registry, "register_model", register)
    registry.move_alias(NAME, "champion", "2", template.uri)
    return template


def newest(world: World) -> str:
    return str(max(int(each.version) for each in world.client.search_model_versions(f"name='{NAME}'")))


def said(work: Path) -> list[str]:
    return json.loads((work / "checkpoints" / "finished.json").read_text())["compared"]


def area(artifact: Path, work: Path) -> float:
    """The mean AUC of a model on the judging rows of the features in a folder, which are its own."""
    ranker = Ranker.load(artifact)
    rows = EncodedRows(work / "features" / "encoded" / "validation", ranker.layout, part=Part.JUDGING)
    scored = score_rows(load_settings(artifact / "settings.yaml"), ranker.model, ranker.layout, rows)
    found = []
    for name, label in scored.labels.items():
        predicted = scored.predictions[name]
        known = ~np.isnan(label)
        found.append(roc_auc_score(label[known], predicted[known]))
    return float(np.mean(found))


def area_of(world: World, version: str) -> float:
    """That of a version in the registry."""
    return area(fetch_model(f"models:/{NAME}/{version}", world.uri), world.folder / "work")


def test_the_first_takes_the_alias_and_a_better_one_after_it(template: World) -> None:
    assert template.holder() == "2"
    reason, now = said(template.work)
    assert now == "'champion' is version 2 now, this model"
    layout = Ranker.load(template.work / "model").layout
    rows = EncodedRows(template.work / "features" / "encoded" / "validation", layout, part=Part.JUDGING).rows
    better = r"'this model' is better than 'version 1': mean auc of click, liked is higher by "
    found = re.fullmatch(
        rf"{better}([.\d]+) \(([.\d]+) to [.\d]+\) \({rows:,} judging rows of the validation split\)", reason
    )
    assert found
    assert float(found[1]) == pytest.approx(area_of(template, "2") - area_of(template, "1"), abs=1e-4)
    assert 0 < float(found[2]) < float(found[1])


def test_a_gain_that_a_task_may_pay_for_is_held_back(world: World) -> None:
    """Twice the clicks are ranked right, but few rows tell about likes."""
    registry.move_alias(NAME, "champion", "1", world.uri)
    world.train("--evaluation.margin", "0.005")
    assert world.holder() == "1"
    assert said(world.work)[0].startswith(
        "'this model' is not called better, although mean auc of click, liked is higher"
    )
    assert "auc of liked changes by " in said(world.work)[0]


def test_a_worse_model_leaves_the_alias(world: World, capsys: pytest.CaptureFixture) -> None:
    world.train(*SLOW)
    version = newest(world)
    assert world.holder() == "2"
    assert world.holder("challenger") == version
    out = capsys.readouterr().out
    assert f"'champion' stays version 2; this model, version {version}, is 'challenger'" in out
    assert "registered as models:/learnable@challenger" in out


def test_a_holder_of_other_features_is_measured_on_its_own(world: World) -> None:
    """Its rows are encoded by its own features; the same weights on them give the same value as at first."""
    elsewhere = world.folder / "elsewhere"
    world.train(*SLOW, "--features.item_click.window_days", "[1]", "--data.work", str(elsewhere))
    assert world.holder() == "2"
    reason, _ = said(elsewhere)
    found = re.search(r"is worse than 'version 2': mean auc of click, liked is lower by ([.\d]+) ", reason)
    assert found
    assert float(found[1]) == pytest.approx(area_of(world, "2") - area(elsewhere / "model", elsewhere), abs=1e-4)


def test_a_holder_whose_labels_mean_something_else_keeps_the_alias(world: World, tmp_path: Path) -> None:
    world.train("--data.work", str(tmp_path), "--tasks.liked.matures_after_days", "1")
    reason, now = said(tmp_path)
    assert "trained with 'tasks.liked.matures_after_days' 0.0, and it is 1.0 in the settings" in reason
    assert "point the alias at another one yourself" in reason
    assert now.startswith("'champion' stays version 2; ")
    assert world.holder() == "2"


@pytest.mark.parametrize("what", ["damaged", "another format", "not finite"])
def test_a_holder_that_cannot_be_served_gives_way(world: World, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fetch_model("models:/learnable/2", world.uri), folder)
    weights = folder / "weights.safetensors"
    if what == "damaged":
        weights.write_bytes(b"short")
    elif what == "another format":
        (folder / "model.json").write_text('{"format": 1}')
        (folder / "manifest.json").unlink()
    else:
        found = load_file(weights)
        found = {name: each * 1e38 if "towers" in name else each for name, each in found.items()}
        save_file(found, weights)
        write_manifest(folder)
    gives_way, reason = promotion._judge_trouble(promotion._load(folder), world.champion(), "champion")
    assert gives_way
    assert reason.startswith("version 2, which holds 'champion', can't be served any more: ")


def test_an_outage_during_the_comparison_decides_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    registry.move_alias(NAME, "champion", "1", world.uri)

    def away(address: str, uri: str) -> Path:
        raise runs.UnreachableError("MLflow does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch_model", away)
        with pytest.raises(SystemExit) as ended:
            world.train()
    assert ended.value.code == 75
    assert world.holder() == "1"
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: MLflow does not answer; the trained model in ")
    world.train("--resume")
    assert newest(world) in (world.holder(), world.holder("challenger")), "it is decided"
    assert " rows/s in training" not in capsys.readouterr().out, "no step was left to do"


def test_an_alias_that_moved_meanwhile_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.move_alias(NAME, "champion", "1", world.uri)
    compare, holders = promotion.compare_with_holder, []

    def meanwhile(*rest: Any) -> tuple[bool, str]:
        holders.append(rest[-1].number)
        registry.move_alias(NAME, "champion", "2", world.uri)
        return compare(*rest)

    monkeypatch.setattr(promotion, "compare_with_holder", meanwhile)
    world.train(*SLOW, "--training.seed", "5")
    assert holders == ["1"]
    assert world.holder() == "2"
    assert said(world.work)[0] == "'champion' has moved meanwhile: compare with `mmoe-rec promote`"


def test_a_training_that_was_killed_after_it_took_the_alias_is_not_registered_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.client.delete_registered_model_alias(NAME, "champion")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmoe_rec.training.checkpoint.FinishedTraining.write", killed)
        with pytest.raises(KeyboardInterrupt):
            world.train()
    version = newest(world)
    assert world.holder() == version
    world.train("--resume")
    assert newest(world) == version == world.holder()
    assert said(world.work) == [f"'champion' is version {version}, this model"]
