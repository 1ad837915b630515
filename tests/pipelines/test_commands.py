"""features, train and evaluate as a user runs them: what they leave, what they say, and how they refuse."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.metrics import ndcg_score

from mmoe_rec.evaluation import evaluate
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import registry
from tests.commands import read_metrics, refuse, reported_by, run, run_and_read
from tests.fork_server import run_command
from tests.pipelines.learnable_log import START, learnable_log, settings_tree, write_files

pytestmark = pytest.mark.thorough

TASKS = ("click", "liked")


@dataclass(frozen=True)
class World:
    """A log, its settings file, and the model that `train` made of them."""

    folder: Path
    config: Path
    printed: str

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def artifact(self) -> Path:
        return self.folder / "work" / "model"

    def run(self) -> Any:
        """The MLflow run that trained the model."""
        return mlflow.get_run(registry.find_run_id("models:/learnable@champion", self.uri))

    def text(self, name: str) -> str:
        """A text file of the run."""
        return mlflow.artifacts.load_text(f"{self.run().info.artifact_uri}/{name}")

    def best(self) -> dict[str, float]:
        """The best validation that MLflow knows of."""
        return {name: value for name, value in self.run().data.metrics.items() if name.startswith("best/")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    config = write_files(folder)
    return World(folder, config, run_and_read("train", "--config", config))


@pytest.fixture(scope="module")
def two_ranks(world: World) -> World:
    """The same training by two processes under torchrun, into a folder and a store of its own."""
    folder = world.folder / "two"
    tree = settings_tree(folder, data={"log": str(world.folder / "log"), "work_dir": str(folder / "work")})
    folder.mkdir()
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ranks = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run_command(*ranks, "-m", "mmoe_rec", "train", "--config", str(config))
    assert done.returncode == 0, done.stderr
    return World(folder, config, done.stdout)


def files(folder: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# One process and two


def test_one_and_two_processes_agree(world: World, two_ranks: World) -> None:
    first, two = world.best(), two_ranks.best()
    assert first.keys() == two.keys()
    assert first["best/click.auc"] > 0.68
    assert first["best/liked.auc"] > 0.65
    for name, value in first.items():
        assert two[name] == pytest.approx(value, abs=0.003), name
    weights = [load_file(item.artifact / "weights.safetensors") for item in (world, two_ranks)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        # Only the order of sums differs: 7e-7 at most was found.
        torch.testing.assert_close(weights[1][name], weight, atol=2e-5, rtol=0, msg=f"{name} differs")


def test_torchrun_says_everything_once(world: World, two_ranks: World) -> None:
    for text in ("best validation, at step", "auc ↑", "next: "):
        assert two_ranks.printed.count(text) == 1
    assert "chosen" in two_ranks.printed
    assert "note: " not in two_ranks.printed
    assert "rank 1" in two_ranks.text("sharding_plan.txt")
    assert "rank 1" not in world.text("sharding_plan.txt")


# What training leaves


def test_the_run_holds_params_metrics_and_files(world: World) -> None:
    run = world.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == run.data.tags["choices.batch_size"] == "128"
    assert run.data.params["model.experts.count"] == "3"
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(run.info.run_id, "train/click.loss")
    assert len({loss.step for loss in losses}) > 3
    assert losses[-1].value < losses[0].value
    areas = client.get_metric_history(run.info.run_id, "validation/click.auc")
    assert len(areas) == 4
    # The network's states on the users who choose one; the model on the others. The network is all of this model.
    assert run.data.metrics["best/click.auc"] == pytest.approx(max(area.value for area in areas), abs=0.05)
    assert 0 <= run.data.metrics["train/data_wait_fraction"] <= 1
    assert yaml.safe_load(world.text("settings.yaml")) == load_settings(world.config).model_dump(mode="json")
    assert "item: table_wise" in world.text("sharding_plan.txt")
    assert set(json.loads(world.text("data.json"))["splits"]) == {"train", "validation", "test"}
    plots = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "plots")]
    assert plots == ["plots/gate_weights.png", "plots/gates"]
    steps = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "plots/gates")]
    assert len(steps) == len(client.get_metric_history(run.info.run_id, "gates/load_entropy"))


# Evaluation


@pytest.fixture(scope="module")
def evaluated(world: World) -> Path:
    """Where the command that training tells to type next leaves its files."""
    (line,) = [line for line in world.printed.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    assert words[:2] == ["mmoe-rec", "evaluate"]
    out = world.folder / "by_address"
    assert f"metrics: {out / 'metrics.json'}" in run_and_read(*words[1:], "--out", out)
    return out


def test_metrics_have_intervals_and_are_those_of_the_test_rows(
    world: World, evaluated: Path, capsys: pytest.CaptureFixture
) -> None:
    actual = read_metrics(evaluated)
    split = json.loads((world.folder / "work" / "features" / "manifest.json").read_text())["splits"]["test"]
    assert actual["rows"] == split["rows"]
    assert actual["tasks"]["liked"]["rows"] == split["observed"]["liked"]
    for task in TASKS:
        for name in ("auc", "logloss", "gauc_user"):
            value = actual["tasks"][task][name]
            assert value["low"] < value["value"] < value["high"]
        assert actual["tasks"][task]["auc"]["low"] > 0.55
    area = actual["tasks"]["click"]["auc"]["value"]
    assert area == pytest.approx(world.best()["best/click.auc"], abs=0.04)
    logged = world.run()
    assert logged.data.metrics["test/click.auc"] == pytest.approx(area)
    names = {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(logged.info.run_id, "evaluation")}
    assert names == {"evaluation/metrics.json", "evaluation/report.html"}
    work = world.folder / "work"
    shutil.copytree(evaluated, work / "evaluation")
    run("report", "--config", world.config)
    shutil.rmtree(work / "evaluation")
    said = capsys.readouterr().out
    headline = reported_by(evaluated)[0]
    assert re.search("\nThe last training, .* UTC: validation AUC of the model at step ", said)
    assert re.search(f"\nThe model on test rows, .* UTC: {re.escape(headline)}\n", said)
    assert "The model on test rows: it " not in said, "it is not out of date"
    assert headline.startswith(f"click: auc {area:.4f} (")
    assert headline[1:] in (work / "report" / "report.html").read_text(encoding="utf-8")


def test_rankings_are_measured_by_the_weights_of_the_command(
    world: World, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own weights make its score, and so the ranking, but not the truth that it is measured against."""
    scored: list[Any] = []
    score = evaluate.score_rows
    monkeypatch.setattr(evaluate, "score_rows", lambda *a, **k: scored.append(score(*a, **k)) or scored[-1])
    weights = {"click": 0.25, "liked": 2.0}
    options = [f"--tasks.{task}.score_weight={weight}" for task, weight in weights.items()]
    by_id = mlflow.MlflowClient(world.uri).get_model_version_by_alias("learnable", "champion").source
    assert by_id.startswith("models:/m-")
    for out, address in (("one", "models:/learnable/latest"), ("two", by_id)):
        run("evaluate", "--config", world.config, "--model", address, "--out", tmp_path / out, *options)
    actual, before = read_metrics(tmp_path / "one"), read_metrics(evaluated)
    assert read_metrics(tmp_path / "two") == actual
    assert actual["relevance_weights"] == weights
    assert actual["score_weights"] == before["score_weights"] == before["relevance_weights"] == {"click": 1, "liked": 1}
    assert actual["tasks"] == before["tasks"]
    rows = scored[0]
    worth = sum(weight * np.nan_to_num(rows.labels[name]) for name, weight in weights.items())
    expected = []
    for request in np.unique(rows.requests.to_numpy()):
        mine = rows.requests.to_numpy() == request
        if np.ptp(worth[mine]) > 0:  # else every order is as good
            expected.append(ndcg_score([worth[mine]], [rows.score[mine]], k=5))
    assert actual["score"]["ndcg_at_5"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert world.run().data.metrics["test/score.ndcg_at_5"] == pytest.approx(np.mean(expected), abs=1e-6)
    run("evaluate", "--config", world.config, "--model", "models:/learnable@champion")  # the run's as it was


def test_a_task_without_a_known_label_is_evaluated_without_a_figure(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As where labels mature late."""
    log = learnable_log()
    (tmp_path / "log").mkdir()
    early = pc.less(log["time"], pa.scalar(START + np.timedelta64(8, "D")).cast(log["time"].type))
    liked = pc.if_else(early, log["liked"], pa.nulls(len(log), pa.int8()))
    place = log.column_names.index("liked")
    pq.write_table(log.set_column(place, "liked", liked), tmp_path / "log" / "0.parquet")
    out = tmp_path / "out"
    words = ["--config", world.config, "--model", world.artifact, "--out", out]
    run("evaluate", *words, "--data.log", tmp_path / "log")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert [f"probabilities of {task} by" in page for task in ("click", "liked")] == [True, False]
    assert read_metrics(out)["tasks"]["liked"]["rows"] == 0
    assert "liked: No row has an observed label" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["no features at hand", "features of other settings"])
def test_rows_that_are_encoded_again_give_the_same_metrics(
    world: World, evaluated: Path, tmp_path: Path, change: str
) -> None:
    """Twice, as the folder of the first time lies there already; nothing is built that the model does not need."""
    work = tmp_path / "work"
    overrides = ["--data.work_dir", work]
    if change == "features of other settings":
        overrides += ["--features.user.dim", "4", "--features.item_click.window_days", "[1, 2]"]
        run("features", "--config", world.config, *overrides)
    before = files(tmp_path)
    for _ in range(2):
        run("evaluate", "--config", world.config, "--model", world.artifact, *overrides)
        assert (work / "evaluation" / "encoded" / "test").is_dir()
        assert (work / "evaluation" / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.name.startswith(".")]
    assert (work / "features").exists() == bool(before)


# Refusals


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("features", ["--data.log", "no/such/log"], "the log 'no/such/log' does not exist. Set data.log"),
        # Features are built where a split is empty.
        ("train", ["--split.validation_end", "2030-01-01"], "the test split is empty"),
        ("evaluate", ["--split.validation_end", "2030-01-01"], "the test split is empty"),
    ],
)
def test_wrong_settings_are_refused(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, command: str, words: list[str], sentence: str
) -> None:
    model = ["--model", world.artifact] if command == "evaluate" else []
    own = ["--config", world.config, "--data.work_dir", tmp_path / "work"]
    assert sentence in refuse(capsys, command, *own, *model, *words)
    assert not files(tmp_path)


def test_what_is_missing_is_reported_before_anything_is_built(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = ["--config", world.config, "--data.work_dir", tmp_path / "work"]
    assert "training.device is cuda" in refuse(capsys, "train", *own, "--training.device", "cuda")
    own += ["--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    assert "Train first" in refuse(capsys, "evaluate", *own, "--model", "models:/learnable@champion")
    assert not list(tmp_path.iterdir())


def test_what_the_registry_refuses_in_the_end_costs_no_model(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work" / "features", work / "features")
    own = ["--data.work_dir", work, "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    wrong = ["train", "--config", world.config, *own, "--tracking.alias", "latest"]
    assert "with 'tracking.alias' 'latest'" in refuse(capsys, *wrong), "before any work"
    monkeypatch.setattr("mmoe_rec.tracking.registry.check_registry_names", lambda *_: None)
    message = refuse(capsys, *wrong)
    assert "refuses: 'latest' alias name" in message
    assert f"The model in '{work / 'model'}' is complete but not registered. To register it, run" in message
    assert Ranker.load(work / "model").info.name == "learnable"


def test_training_that_dies_keeps_the_old_model(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work", work)
    before = {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()}

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmoe_rec.training.loop.Trainer._log", die)
    own = ["--data.work_dir", work, "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    with pytest.raises(KeyboardInterrupt):
        run("train", "--config", world.config, *own)
    assert {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()} == before
    assert not [path for path in work.rglob("*") if path.name.startswith(".") and path.name.endswith(".tmp")]
    assert not torch.distributed.is_initialized()
    (died,) = mlflow.search_runs(experiment_names=["learnable"], output_format="list")
    assert died.info.status == "KILLED"
