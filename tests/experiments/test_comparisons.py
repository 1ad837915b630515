"""Variants over several runs: their predictions, differences beside a plain reference, resumption, and refusals."""

import copy
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from mmoe_rec.evaluation.evaluate import read_labels, score_split
from mmoe_rec.experiments.compare import MetricVerdict, compare_variants
from mmoe_rec.experiments.runner import (
    BASE_VARIANT,
    Runner,
    RunSpec,
    Variant,
    open_runner,
    read_run_predictions,
    write_run_predictions,
)
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.model.mmoe import Mixture
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.training import loop
from mmoe_rec.training.steps import PrecisionChoice
from mmoe_rec.training.train import train_model
from tests.commands import refuse, reported_by, run_and_read
from tests.pipelines.learnable_log import settings_tree
from tests.pipelines.short_trainings import FIRST_DAY, LENIENT, RATES, SMALL, World, dying_after
from tests.report.parsed import Page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A log whose histories look at the candidate, whose table they share."""
    made = World.of(tmp_path_factory.mktemp("comparisons"))
    tree = settings_tree(made.folder, split=FIRST_DAY, training=SMALL | RATES, evaluation=LENIENT)
    tree["features"]["clicked"]["pooling"] = "attention"
    (made.folder / "first.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def settings(world: World) -> Settings:
    return load_settings(world.folder / "first.yaml")


def mean_area(world: World, files: Sequence[Path], task: str) -> float:
    """The mean AUC of the runs of a variant, by scikit-learn."""
    label = pq.read_table(world.work / "features" / "encoded" / "test")[f"label.{task}"].to_numpy()
    known = ~np.isnan(label)
    areas = [roc_auc_score(label[known], pq.read_table(file)[task].to_numpy()[known]) for file in files]
    return float(np.mean(areas))


VARIANTS = ("--variant", "long", "training.epochs=2", "--variant", "wide", "model.experts.count=4")


@pytest.mark.thorough
def test_runs_that_are_complete_stay(world: World) -> None:
    """By the command, after a kill in the fourth of six runs."""
    words = ["compare", "--config", world.folder / "first.yaml", "--seeds", "2", *VARIANTS]
    with dying_after(10, seed=18):
        run_and_read(*words)
    folder = world.work / "comparison"
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    assert len(kept) == 3, "all variants with the first seed"
    run_and_read(*words)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    actual = (folder / "comparison.json").read_text()
    for file in list(folder.rglob("*.parquet"))[::2]:
        file.unlink()
    run_and_read(*words)
    again = json.loads((folder / "comparison.json").read_text())
    for tree in (again, actual := json.loads(actual)):
        for variant in tree["variants"]:
            del variant["seconds"]
    assert again == actual, "a resumed comparison gives the same result"
    assert actual["facts"]["precision"] == "fp32"
    assert not list(folder.rglob("*.distcp")), "no weights stay"
    _check_runs(world.client)


def plant(runner: Runner, task: RunSpec) -> None:
    """In the place of training: predictions that follow the labels, with 4 experts more than with others."""
    random = np.random.default_rng([task.settings.training.seed, zlib.crc32(task.variant.name.encode())])
    rows = read_labels(runner.settings, task.prepared, runner.split, runner.part)
    gain = (2.0 if task.settings.model.experts.count == 4 else 1.0) + random.normal(0, 0.05)
    noise = np.random.default_rng(0).normal(size=(2, len(rows.score)))  # the same for all runs
    noise += random.normal(0, 0.3, noise.shape)
    tasks = {
        name: 1 / (1 + np.exp(-gain * np.nan_to_num(rows.labels[name] - 0.5) - of))
        for name, of in zip(("click", "liked"), noise, strict=True)
    }
    facts = {"seconds": 1.0, "precision": "fp32", "monitored_metric": gain}
    write_run_predictions(task.file, tasks, tasks["click"], facts)


def test_a_better_variant_is_distinguished_from_an_equal_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "train_run", plant)
    words = ["compare", "--config", world.folder / "first.yaml", "--seeds", "3", "--training.epochs", "3"]
    words += ["--variant", "better", "model.experts.count=4", "--variant", "equal", "model.experts.count=5"]
    printed = run_and_read(*words)
    folder = world.work / "comparison"
    actual = json.loads((folder / "comparison.json").read_text())
    message = reported_by(folder)
    better, equal = "is better than `these settings`", "does not differ significantly from `these settings`"
    assert message[1].startswith(f"`better` {better}: mean auc of click, liked differs by +")
    assert message[2].startswith(f"`equal` {equal}: mean auc of click, liked differs by ")
    assert actual["recommended"] == "better"
    assert "adopt `--model.experts.count=4`, since `better` is better" in printed
    page = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).words.split())
    for sentence in message:
        assert sentence in printed
        assert sentence.replace("`", "")[1:] in page

    three = load_settings(world.folder / "first.yaml", ["--training.epochs", "3"])
    changed = [("better", "model.experts.count=4"), ("equal", "model.experts.count=5")]
    with open_runner(three, "compare", "test", folder="comparison") as opened:
        base, *others = opened.train(
            [BASE_VARIANT, *(Variant(name, (change,)) for name, change in changed)], [17, 18, 19]
        )
    for number, second in enumerate(others, start=1):
        difference = actual["variants"][number]["metric_means"]["auc of click"]["difference"]
        areas = [mean_area(world, item.files, "click") for item in (base, second)]
        assert difference["value"] == pytest.approx(areas[1] - areas[0], abs=1e-6)


def _check_runs(client: mlflow.MlflowClient) -> None:
    """One run with one for each variant and seed, none of which is left open, and no registered model."""
    runs = client.search_runs([client.get_experiment_by_name("learnable").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 7
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {
        "report.html",
        "comparison.json",
    }
    assert "long/auc of click" in parent.data.metrics
    assert not client.search_registered_models()


@pytest.mark.thorough
def test_a_variant_with_other_features_has_features_of_its_own(world: World, settings: Settings) -> None:
    """The settings' own features stay, and a further run takes those that were built."""
    variants = [
        BASE_VARIANT,
        Variant("short", ("features.clicked.length=2",)),
        Variant("one task", without_tasks=("liked",)),
    ]
    manifest = world.work / "features" / "manifest.json"
    compare_variants(settings, [BASE_VARIANT], 2)
    before = manifest.stat().st_mtime_ns
    report = compare_variants(settings, variants, 2)
    (own,) = (world.work / "comparison" / "features").glob("*/features/manifest.json")
    built = own.stat().st_mtime_ns
    assert compare_variants(settings, variants, 2).sentences == report.sentences
    assert (manifest.stat().st_mtime_ns, own.stat().st_mtime_ns) == (before, built)
    short, one_task = report.variants[1:]
    assert short.verdict_metrics == ("mean auc of click, liked",)
    assert short.metric_means["auc of click"].difference.value != 0
    assert one_task.verdict_metrics == ("auc of click",)
    assert one_task.metric_means["auc of liked"].verdict == MetricVerdict.UNKNOWN


def predict_rebuilt(world: World, features: Sequence[str] = (), tasks: Sequence[str] = ()) -> np.ndarray:
    """What a model predicts whose settings lack features and tasks, by `train`."""
    tree = copy.deepcopy(yaml.safe_load((world.folder / "first.yaml").read_text()))
    for section, names in (("features", features), ("tasks", tasks)):
        for name in names:
            del tree[section][name]
    tree["data"]["work_dir"] = str(world.folder / f"without_{'_'.join([*features, *tasks])}")
    path = world.folder / "anew.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    settings = load_settings(path)
    train_model(settings, register=False)
    artifact = Path(tree["data"]["work_dir"]) / "model"
    scored = score_split(settings, ResolvedModel(artifact, str(artifact)), "model")
    return np.column_stack(list(scored.predictions.values()))


def predictions_of(opened: Runner, variant: Variant) -> np.ndarray:
    (trained,) = opened.train([variant], [17])
    return np.column_stack(list(read_run_predictions(trained.files[0])[0].values()))


@pytest.mark.parametrize(
    ("features", "tasks"),
    [
        pytest.param((), (), marks=pytest.mark.thorough),
        (("price", "item_click"), ("liked",)),
        pytest.param(("clicked", "slot"), (), marks=pytest.mark.thorough),
        pytest.param(("user", "item", "slot", "clicked"), (), marks=pytest.mark.thorough),
    ],
)
def test_what_is_left_out_was_never_there(
    world: World, settings: Settings, features: tuple[str, ...], tasks: tuple[str, ...]
) -> None:
    """Bit for bit, also without placement, without tables, and with one task."""
    with open_runner(settings, "compare", "test", folder="comparison") as opened:
        actual = predictions_of(opened, Variant("smaller", (), features, tasks))
    np.testing.assert_array_equal(actual, predict_rebuilt(world, features, tasks))


@pytest.mark.thorough
def test_a_history_without_its_candidate_is_pooled_by_its_mean(settings: Settings) -> None:
    """Its table stays, although the candidate's feature, whose table it shares, is left out."""
    with open_runner(settings, "compare", "test", folder="comparison") as opened:
        attention = predictions_of(opened, Variant("attention", (), ("item",)))
        mean = predictions_of(opened, Variant("mean", ("features.clicked.pooling=mean",), ("item",)))
    np.testing.assert_array_equal(attention, mean)


def test_all_runs_compute_in_what_the_first_one_chose(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a later command, whatever a busy machine would choose by then."""
    tree = settings.model_dump()
    tree["training"]["precision"] = "auto"
    tree["data"]["work_dir"] = str(tmp_path)
    settings, chosen, choose = Settings.model_validate(tree), list[int](), loop.choose_precision

    def busy(mixture: Mixture, layout: ModelLayout, device: torch.device, rows: int) -> PrecisionChoice:
        chosen.append(rows)
        return replace(choose(mixture, layout, device, rows), precision="fp32" if len(chosen) == 1 else "bf16")

    monkeypatch.setattr(loop, "choose_precision", busy)
    for without in ((), ("price",)):
        with open_runner(settings, "compare", "test") as opened:
            (actual,) = opened.train([Variant("x", (), without)], [17, 18])
        assert [facts["precision"] for facts in actual.facts] == ["fp32", "fp32"]
    assert len(chosen) == 1


@pytest.mark.thorough
def test_architectures_by_the_command(tmp_path: Path) -> None:
    world = World.of(tmp_path)
    printed = run_and_read("compare", "--config", world.folder / "first.yaml", "--architectures", "--seeds", "2")
    actual = json.loads((world.work / "comparison" / "comparison.json").read_text())
    names = ["MMoE", "shared bottom", "one gate", "PLE", "only click", "only liked", "trees alone"]
    assert [variant["name"] for variant in actual["variants"]] == names
    verdict_metrics = {variant["name"]: variant["verdict_metrics"] for variant in actual["variants"]}
    assert verdict_metrics["only click"] == ["auc of click"]
    assert verdict_metrics["trees alone"] == ["mean auc of click, liked"]
    assert actual["variants"][-1]["parameters"] is None
    assert all(sentence in printed for sentence in reported_by(world.work / "comparison"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--variant", "a", "training.lerning_rate=1"), "variant 'a': there is no option or setting '--training.ler"),
        (
            ("--variant", "a", "training.epochs=none"),
            "variant 'a': 'training.epochs' must be auto, or a whole number of at least 1",
        ),
        (("--variant", "a", "features.prize=null"), "a: there is no feature 'prize' to leave out."),
        (("--variant", "a"), "--variant 'a' changes nothing"),
        (("--variant", "a=1"), "--variant 'a=1' has no name"),
        (("--variant", "a", "b.c=1", "--variant", "a", "b.c=2"), "--variant 'a' is given twice"),
        (("--variant", "these settings", "training.epochs=2"), "two variants are named 'these settings'"),
        (("--seeds", "1"), "1 run of each variant can't show how far runs differ. Give --seeds 2 or more."),
        (("--architectures", "--features"), "can't be combined"),
        (("--margin", "0.1"), "--only and --margin require --features"),
        (("--features", "--only", "prize"), "--only: there is no feature 'prize' to leave out. Features are "),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    world: World, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert says in refuse(capsys, "compare", "--config", world.folder / "first.yaml", *words)


def test_a_comparison_is_one_process(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refuse(capsys, "compare", "--config", world.folder / "first.yaml")
    assert message == "error: compare trains in one process. Start it without torchrun."


def test_variants_that_leave_nothing_are_refused(settings: Settings) -> None:
    placement_alone = tuple(name for name in settings.features if name != "slot")
    cases: list[tuple[Any, ...]] = [((), ("click", "liked")), (placement_alone, ())]
    with open_runner(settings, "compare", "test", folder="comparison") as opened:
        for (features, tasks), message in zip(cases, ("all tasks are left out", "no feature describes"), strict=True):
            with pytest.raises(Exception, match=message):
                opened.train([Variant("x", (), features, tasks)], [17])
