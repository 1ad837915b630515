"""Several trainings of one setting: what they are worth together, in MLflow, and after a kill."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmoe_rec.inference.artifact import Source
from mmoe_rec.jobs import seeds
from mmoe_rec.jobs.evaluate import measured_on_test_rows
from mmoe_rec.report.formatting import signed
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training import loop
from mmoe_rec.training.checkpoint import latest_checkpoint
from mmoe_rec.training.choices import Choices
from tests.commands import refuse
from tests.fork_server import MULTIPROCESSING
from tests.pipelines.short_trainings import World, dying_after, refused
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.of(tmp_path_factory.mktemp("seeds"))


def test_trainings_that_were_stopped_go_on_and_their_mean_is_told(world: World, capsys: pytest.CaptureFixture) -> None:
    """One that died in the middle goes on with its run within the other one."""
    with dying_after(10, seed=18):  # after the checkpoint of step 5
        world.train("--seeds", "2")
    first = (world.folder / "work" / "seeds" / "17" / "model" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    world.train("--seeds", "2", "--resume")
    assert (world.folder / "work" / "seeds" / "17" / "model" / "manifest.json").stat().st_mtime_ns == first
    printed = capsys.readouterr().out
    assert "2 trainings, " in printed
    assert "between trainings" in printed
    assert "click: the auc of one training has a standard deviation of " in printed
    found = json.loads((world.folder / "work" / "seeds" / "seeds.json").read_text())
    assert found["seeds"] == [17, 18]
    settings = load_settings(world.folder / "first.yaml", [])
    areas = []
    for seed in found["seeds"]:
        artifact = world.folder / "work" / "seeds" / str(seed) / "model"
        (measured,) = measured_on_test_rows(settings, [Source(artifact, str(artifact))])
        areas.append(measured.summary.tasks["click"].get("auc").value)
    assert areas[0] != areas[1]
    assert found["click"]["auc"]["values"] == pytest.approx(areas, abs=1e-9)
    assert found["click"]["auc"]["mean"] == pytest.approx(np.mean(areas), abs=1e-9)
    client = world.client
    experiment = client.get_experiment_by_name("learnable")
    runs = client.search_runs([experiment.experiment_id])
    parents = [each for each in runs if each.data.tags.get("mlflow.runName") == "2 seeds"]
    assert len(parents) == 1, "the command went on with its run"
    inside = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(inside) == 2
    assert len(runs) == 3
    assert {each.info.status for each in runs} == {"FINISHED"}
    assert parents[0].data.metrics["test/click.auc.mean"] == found["click"]["auc"]["mean"]
    assert world.holder() is None, "none is registered"
    assert not client.search_registered_models()


def test_all_trainings_compute_in_what_the_first_one_chose(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a busy machine would choose for the others, in later commands too; what is set is taken."""
    chosen = list[Choices]()

    def busy(*_: object) -> Choices:
        chosen.append(Choices("bf16" if chosen else "fp32"))
        return chosen[-1]

    monkeypatch.setattr(loop, "choose_precision", busy)
    words = ("--training.precision", "auto", "--data.work", str(world.folder / "alike"))
    world.train("--seeds", "2", *words)
    world.train("--seeds", "3", "--resume", *words)
    other = ("--training.precision", "auto", "--training.epochs", "2", "--data.work", str(world.folder / "beside"))
    world.train("--seeds", "2", *other, "--against", str(world.folder / "alike"))
    folders = [world.folder / "alike" / "seeds" / f"{seed}" for seed in (17, 18, 19)]
    folders += [world.folder / "beside" / "seeds" / f"{seed}" for seed in (17, 18)]
    checkpoints = [latest_checkpoint(each / "checkpoints") for each in folders]
    assert [each and each.state.choices and each.state.choices.precision for each in checkpoints] == ["fp32"] * 5
    assert len(chosen) == 1


def test_trainings_side_by_side_are_those_one_after_the_other(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same models, and a page that shows each of them. Only the number of threads could differ, and it is given."""
    monkeypatch.setattr(seeds, "multiprocessing", MULTIPROCESSING)
    together = World.of(tmp_path)
    together.train("--seeds", "2", "--at-once", "2")
    printed = capsys.readouterr().out
    assert f"report: {together.folder / 'work' / 'seeds' / 'report.html'}" in printed
    world.train("--seeds", "2", "--resume")
    one, other = (json.loads((each.folder / "work" / "seeds" / "seeds.json").read_text()) for each in (world, together))
    for task in ("click", "liked"):
        assert other[task]["auc"]["values"] == pytest.approx(one[task]["auc"]["values"], abs=1e-4)
        assert len(set(other[task]["auc"]["values"])) == 2
    page = Page((together.folder / "work" / "seeds" / "report.html").read_text(encoding="utf-8"))
    words = " ".join(page.words.split())
    assert "Seeds 17, 18" in words
    assert "the auc of one training has a standard deviation of" in words
    assert "precision fp32" in words
    for value in other["click"]["auc"]["values"]:
        assert f"{value:.4f}" in words
    client = together.client
    runs = client.search_runs([client.get_experiment_by_name("learnable").experiment_id])
    (parent,) = [each for each in runs if "mlflow.parentRunId" not in each.data.tags]
    assert len(runs) == 3
    assert {each.info.status for each in runs} == {"FINISHED"}
    assert "the auc of one training has a standard deviation of" in parent.data.tags["mlflow.note.content"]
    assert {each.path for each in client.list_artifacts(parent.info.run_id)} == {"report.html", "seeds.json"}
    log = together.folder / "work" / "seeds" / "18" / "training.log"
    assert "MLflow run" in log.read_text()


def test_other_settings_are_compared_over_their_trainings(world: World, capsys: pytest.CaptureFixture) -> None:
    """By as many trainings as each has; the differences are those of the means."""
    world.train("--seeds", "2", "--resume")
    other = str(world.folder / "other")
    words = ["--data.work", other, "--training.table_learning_rate", "0.001", "--against", str(world.folder / "work")]
    capsys.readouterr()
    world.train("--seeds", "2", *words)
    printed = capsys.readouterr().out
    files = (world.folder / each / "seeds" / "seeds.json" for each in ("work", "other"))
    first, second = (json.loads(each.read_text()) for each in files)
    apart = second["against"]["work"]["groups"]["click"]["auc"]
    assert apart["value"] == pytest.approx(second["click"]["auc"]["mean"] - first["click"]["auc"]["mean"], abs=1e-9)
    assert apart["low"] < apart["value"] < apart["high"]
    decides = second["against"]["work"]["objective"]
    means = [[each[task]["auc"]["mean"] for task in ("click", "liked")] for each in (first, second)]
    assert decides["value"] == pytest.approx(np.mean(means[1]) - np.mean(means[0]), abs=1e-9)
    assert "mean auc of click, liked differs by" in " ".join(printed.split())
    words = " ".join(Page((Path(other) / "seeds" / "report.html").read_text(encoding="utf-8")).words.split())
    assert "minus work" in words
    assert "{}{} to {}".format(*signed(apart["value"], apart["low"], apart["high"])) in words
    (world.folder / "cut" / "seeds").mkdir(parents=True)
    (world.folder / "cut" / "seeds" / "seeds.json").write_text('{"models": {"17"')
    for against, told in (
        (str(world.folder / "log"), "holds no trainings of several seeds that have all ended"),
        (str(world.folder / "cut"), "holds no trainings of several seeds that have all ended"),
        (str(world.folder / "work"), "is the folder of these trainings"),
    ):
        assert told in refused(capsys, world, "--seeds", "2", "--against", against)
    # Of a model that was trained anew since nothing was measured.
    shutil.rmtree(Path(other) / "seeds" / "18" / "model")
    shutil.copytree(Path(other) / "seeds" / "17" / "model", Path(other) / "seeds" / "18" / "model")
    told = refused(capsys, world, "--seeds", "2", "--resume", "--against", other)
    assert "holds no trainings of several seeds that have all ended" in told


def test_a_refused_run_leaves_what_was_found(world: World, capsys: pytest.CaptureFixture) -> None:
    world.train("--seeds", "2", "--resume")
    files = [world.folder / "work" / "seeds" / name for name in ("seeds.json", "report.html")]
    before = [each.read_bytes() for each in files]
    told = refused(capsys, world, "--seeds", "2", "--resume", "--training.learning_rate", "0.5")
    assert "training.learning_rate" in told
    assert [each.read_bytes() for each in files] == before


def test_other_settings_that_have_seen_the_rows_are_told_of(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Their split ends later; and other tasks are told before anything is trained."""
    world.train("--seeds", "2", "--resume")
    later = ["--data.work", str(tmp_path / "later"), "--split.train_end", "2024-03-08T12:00"]
    world.train("--seeds", "2", *later, "--split.validation_end", "2024-03-08T18:00")
    capsys.readouterr()
    world.train("--seeds", "2", "--resume", "--against", str(tmp_path / "later"))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: models of 'later' were trained by settings by which each was trained, or its best state" in said
    page = Page((world.folder / "work" / "seeds" / "report.html").read_text(encoding="utf-8"))
    assert "it has seen labels that it is measured by" in " ".join(page.words.split())
    config = world.folder / "first.yaml"
    one_task = yaml.safe_load(config.read_text())
    del one_task["tasks"]["liked"]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one_task))
    words = ["--config", str(tmp_path / "one.yaml"), "--data.work", str(tmp_path / "one"), "--seeds", "2"]
    told = refuse(capsys, "train", *words, "--against", world.folder / "work")
    assert told.startswith(f"error: --against '{world.folder / 'work'}': the model predicts click, liked; the settings")
    assert not (tmp_path / "one" / "seeds").exists()


def test_what_cannot_be_is_told(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words, told in (
        (("--seeds", "1"), "1 is not in the range x>=2"),
        (("--seeds", "2", "--from", "models:/x/1"), "--seeds trains from random weights; leave --from out"),
        (("--seeds", "2"), "start it without torchrun"),
        (("--against", "x"), "--at-once and --against belong to --seeds; models are compared by evaluate"),
        (("--at-once", "2"), "--at-once and --against belong to --seeds"),
    ):
        assert told in refused(capsys, world, *words)
