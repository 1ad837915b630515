"""features, train and evaluate as a user runs them: what they leave, what they say, and how they refuse."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
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
from safetensors.torch import load_file, save_file
from sklearn.metrics import ndcg_score

from mmoe_rec.evaluation import scoring
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import seal
from mmoe_rec.log.reader import Log
from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import registry
from tests import commands
from tests.fork_server import run_command
from tests.pipelines.learnable_log import START, learnable_log, settings_tree, write_files

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
TASKS = ("click", "liked")


@dataclass(frozen=True)
class World:
    """A log, its settings file, and the model that `train` made of them in this process."""

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
        run_id = registry.find_run("models:/learnable@champion", self.uri)
        assert run_id is not None
        return mlflow.get_run(run_id)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    config = write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        commands.run("train", "--config", str(config))
    return World(folder, config, "\n".join(lines))


@pytest.fixture(scope="module")
def two_ranks(world: World) -> World:
    """The same training by two processes under torchrun, into a folder and a store of its own."""
    folder = world.folder / "two"
    tree = settings_tree(folder, data={"log": str(world.folder / "log"), "work": str(folder / "work")})
    folder.mkdir()
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ranks = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = run_command(*ranks, "-m", "mmoe_rec", "train", "--config", str(config))
    assert done.returncode == 0, done.stderr
    return World(folder, config, done.stdout)


def refused(command: str, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        commands.run(command, *arguments)
    output = capsys.readouterr()
    assert exit_info.value.code == 2
    assert output.out == ""
    told = [line for line in output.err.splitlines() if "━" not in line and line.strip()]
    assert len(told) == 1, output.err
    assert told[0].startswith("error: ")
    assert "Traceback" not in output.err
    return told[0]


def metrics(path: Path) -> dict[str, Any]:
    """metrics.json, read by the letter of the JSON standard."""

    def forbidden(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads((path / "metrics.json").read_text(), parse_constant=forbidden)
    return found


def files(folder: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# One process and two


def validation_of(world: World) -> dict[str, float]:
    """The best validation that MLflow knows of."""
    found = world.run().data.metrics
    return {name: value for name, value in found.items() if name.startswith("best/")}


def test_one_and_two_processes_agree(world: World, two_ranks: World) -> None:
    one, two = validation_of(world), validation_of(two_ranks)
    assert one.keys() == two.keys()
    assert one["best/click.auc"] > 0.68
    assert one["best/liked.auc"] > 0.65
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=0.003), name


def test_weights_of_one_and_two_processes_agree(world: World, two_ranks: World) -> None:
    one, two = (load_file(each.artifact / "weights.safetensors") for each in (world, two_ranks))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        # Only the order of sums differs: 7e-7 at most was found.
        torch.testing.assert_close(two[name], weight, atol=2e-5, rtol=0, msg=f"{name} differs")
    plan = tracking_text(two_ranks, "sharding_plan.txt")
    assert "rank 0" in plan
    assert "rank 1" in plan
    assert "rank 1" not in tracking_text(world, "sharding_plan.txt")


def test_models_of_one_and_two_processes_give_the_same_outputs(world: World, two_ranks: World) -> None:
    one, two = (
        Ranker.load(registry.fetch_model("models:/learnable@champion", each.uri)) for each in (world, two_ranks)
    )
    rows = next(Log(str(world.folder / "log"), load_settings(world.config).schema_).stream())
    for first, second in zip(one.score(rows), two.score(rows), strict=True):
        assert np.ptp(np.asarray(first)) > 0.3
        np.testing.assert_allclose(second, first, atol=5e-5)


def test_torchrun_says_everything_once(two_ranks: World) -> None:
    assert two_ranks.printed.count("best validation, at step") == 1
    assert two_ranks.printed.count("gauc ↑") == 1, "the table of validations"
    assert "chosen" in two_ranks.printed
    assert "warning: " not in two_ranks.printed
    assert "note: " not in two_ranks.printed
    assert two_ranks.printed.count("next: ") == 1


# What training leaves


def tracking_text(world: World, name: str) -> str:
    """A text file of the run."""
    return mlflow.artifacts.load_text(f"{world.run().info.artifact_uri}/{name}")


def test_the_run_holds_params_metrics_and_files(world: World) -> None:
    run = world.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == "128"
    assert run.data.params["model.experts.count"] == "3"
    client = mlflow.MlflowClient()
    losses = client.get_metric_history(run.info.run_id, "train/click.loss")
    assert len({each.step for each in losses}) > 3
    assert losses[-1].value < losses[0].value
    areas = client.get_metric_history(run.info.run_id, "validation/click.auc")
    assert len(areas) == 4
    assert run.data.metrics["best/click.auc"] == max(each.value for each in areas)
    assert 0 <= run.data.metrics["train/waiting_share"] <= 1
    assert yaml.safe_load(tracking_text(world, "settings.yaml")) == load_settings(world.config).model_dump(mode="json")
    assert "item: table_wise" in tracking_text(world, "sharding_plan.txt")
    manifest = json.loads(tracking_text(world, "data.json"))
    assert set(manifest["splits"]) == {"train", "validation", "test"}
    assert {each["name"] for each in json.loads(tracking_text(world, "features/layout.json"))["tasks"]} == set(TASKS)
    assert json.loads(tracking_text(world, "features/pipeline.json"))["encoders"]
    plots = [each.path for each in client.list_artifacts(run.info.run_id, "plots")]
    assert plots == ["plots/gate_weights.png", "plots/gates"]
    steps = [each.path for each in client.list_artifacts(run.info.run_id, "plots/gates")]
    assert len(steps) == len(client.get_metric_history(run.info.run_id, "gates/load_entropy"))


def test_the_model_is_registered_under_the_alias(world: World) -> None:
    mlflow.set_registry_uri(world.uri)
    version = mlflow.MlflowClient(world.uri).get_model_version_by_alias("learnable", "champion")
    assert version.run_id == world.run().info.run_id
    registered = load_file(registry.fetch_model("models:/learnable@champion", world.uri) / "weights.safetensors")
    for name, weight in load_file(world.artifact / "weights.safetensors").items():
        assert torch.equal(registered[name], weight)


def test_train_says_what_comes_next_and_it_works(world: World, capsys: pytest.CaptureFixture) -> None:
    (line,) = [line for line in world.printed.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    assert words[:2] == ["mmoe-rec", "evaluate"]
    commands.run("evaluate", *words[2:], "--out", str(world.folder / "next"))
    assert f"metrics: {world.folder / 'next' / 'metrics.json'}" in capsys.readouterr().out


def test_features_are_built_once(world: World, capsys: pytest.CaptureFixture) -> None:
    before = files(world.folder / "work")
    commands.run("features", "--config", str(world.config))
    output = capsys.readouterr().out
    assert files(world.folder / "work") == before
    assert f"features: {world.folder / 'work' / 'features'}" in output
    log = pq.read_table(world.folder / "log")
    assert f"{log.num_rows:,} rows" not in output
    rows = [int(line.split()[1].replace(",", "")) for line in output.splitlines() if " rows; " in line]
    assert sum(rows) == log.num_rows


# Evaluation


@pytest.fixture(scope="module")
def evaluated(world: World) -> Path:
    out = world.folder / "by_address"
    commands.run("evaluate", "--config", str(world.config), "--model", "models:/learnable@champion", "--out", str(out))
    return out


def test_metrics_have_intervals_and_are_those_of_the_test_rows(world: World, evaluated: Path) -> None:
    found = metrics(evaluated)
    split = json.loads((world.folder / "work" / "features" / "manifest.json").read_text())["splits"]["test"]
    assert found["rows"] == split["rows"]
    assert found["tasks"]["liked"]["rows"] == split["observed"]["liked"]
    for task in TASKS:
        for name in ("auc", "logloss", "gauc_user"):
            value = found["tasks"][task][name]
            assert value["low"] < value["value"] < value["high"]
        assert found["tasks"][task]["auc"]["low"] > 0.55
    assert found["tasks"]["click"]["auc"]["value"] == pytest.approx(validation_of(world)["best/click.auc"], abs=0.04)


def test_a_folder_and_an_address_give_the_same_metrics(world: World, evaluated: Path) -> None:
    out = world.folder / "by_folder"
    commands.run("evaluate", "--config", str(world.config), "--model", str(world.artifact), "--out", str(out))
    assert (out / "metrics.json").read_bytes() == (evaluated / "metrics.json").read_bytes()


def test_the_evaluation_is_logged_to_the_run_that_trained(world: World, evaluated: Path) -> None:
    run = world.run()
    assert run.data.metrics["test/click.auc"] == pytest.approx(metrics(evaluated)["tasks"]["click"]["auc"]["value"])
    names = {each.path for each in mlflow.MlflowClient().list_artifacts(run.info.run_id, "evaluation")}
    assert names == {
        f"evaluation/{name}" for name in ("metrics.json", "comparison.json", "report.html", "gate_weights.png")
    } | {f"evaluation/calibration_{task}.png" for task in TASKS}


def test_rankings_are_measured_by_the_weights_of_the_command(
    world: World, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own weights make its score, and so the ranking, but not the truth that it is measured against."""
    scored: list[Any] = []
    score = scoring.score_rows
    monkeypatch.setattr(scoring, "score_rows", lambda *a, **k: scored.append(score(*a, **k)) or scored[-1])
    weights = {"click": 0.25, "liked": 2.0}
    options = [f"--tasks.{task}.score_weight={weight}" for task, weight in weights.items()]
    by_id = mlflow.MlflowClient(world.uri).get_model_version_by_alias("learnable", "champion").source
    assert by_id.startswith("models:/m-")
    for out, address in (("one", "models:/learnable/latest"), ("two", by_id)):
        arguments = ["--config", str(world.config), "--model", address, "--out", str(tmp_path / out), *options]
        commands.run("evaluate", *arguments)
    found, before = metrics(tmp_path / "one"), metrics(evaluated)
    assert metrics(tmp_path / "two") == found
    assert found["relevance_weights"] == weights
    assert found["score_weights"] == before["score_weights"] == before["relevance_weights"] == {"click": 1, "liked": 1}
    assert found["tasks"] == before["tasks"]

    rows = scored[0]
    worth = np.nan_to_num(rows.labels) @ np.array(list(weights.values()))
    expected = []
    for request in np.unique(rows.requests.to_numpy()):
        mine = rows.requests.to_numpy() == request
        if np.ptp(worth[mine]) > 0:  # else every order is as good
            expected.append(ndcg_score([worth[mine]], [rows.score[mine]], k=5))
    assert found["score"]["ndcg_at_5"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert world.run().data.metrics["test/score.ndcg_at_5"] == pytest.approx(np.mean(expected), abs=1e-6)
    commands.run(
        "evaluate", "--config", str(world.config), "--model", "models:/learnable@champion"
    )  # the run's as it was


def test_a_task_without_a_known_label_is_evaluated_without_a_figure(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As where labels mature late; what an evaluation before drew is not left beside these metrics."""
    log = learnable_log()
    (tmp_path / "log").mkdir()
    early = pc.less(log["time"], pa.scalar(START + np.timedelta64(8, "D")).cast(log["time"].type))
    liked = pc.if_else(early, log["liked"], pa.nulls(len(log), pa.int8()))
    place = log.column_names.index("liked")
    pq.write_table(log.set_column(place, "liked", liked), tmp_path / "log" / "0.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "calibration_liked.png").touch()
    words = ["--config", str(world.config), "--model", str(world.artifact), "--out", str(tmp_path / "out")]
    commands.run("evaluate", *words, "--data.log", str(tmp_path / "log"))
    assert {each.name for each in (tmp_path / "out").glob("*.png")} == {"calibration_click.png"}
    assert metrics(tmp_path / "out")["tasks"]["liked"]["rows"] == 0
    assert "liked: No row has an observed label" in capsys.readouterr().out


def test_probabilities_that_are_far_off_are_warned_of(world: World, capsys: pytest.CaptureFixture) -> None:
    folder = world.folder / "too high"
    shutil.copytree(world.artifact, folder)
    weights = load_file(folder / "weights.safetensors")
    (name,) = [each for each, weight in weights.items() if "towers" in each and weight.shape == (len(TASKS), 1)]
    weights[name][TASKS.index("click")] += 6
    save_file(weights, folder / "weights.safetensors")
    seal(folder)
    commands.run(
        "evaluate", "--config", str(world.config), "--model", str(folder), "--out", str(world.folder / "far off")
    )
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "the probabilities of 'click' are too high" in warning


def test_runs_go_where_mlflows_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tree = settings_tree(tmp_path)
    del tree["tracking"]
    (tmp_path / "log").mkdir()
    pq.write_table(learnable_log(rows=3_000), tmp_path / "log" / "a.parquet")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    mine = f"sqlite:///{tmp_path / 'mine.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine)
    monkeypatch.chdir(tmp_path)
    commands.run("train", "--config", "settings.yaml", "--training.epochs", "1")
    assert registry.find_run("models:/learnable@champion", mine) is not None
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "MLflow run: " in line]
    assert told.endswith(mine)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_model_of_other_labels_is_not_measured(world: World, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", str(world.config), "--model", str(world.artifact), "--tasks.liked.matures_after_days=1"]
    told = refused("evaluate", capsys, *arguments)
    assert "the model was trained with 'tasks.liked.matures_after_days' 0.0, and it is 1.0 in the settings" in told


@pytest.mark.parametrize("change", ["no features at hand", "features of other settings"])
def test_rows_that_are_encoded_anew_give_the_same_metrics(
    world: World, evaluated: Path, tmp_path: Path, change: str
) -> None:
    """Twice, as the folder of the first time lies there already; nothing is built that the model does not need."""
    work = tmp_path / "work"
    overrides = ["--data.work", str(work)]
    if change == "features of other settings":
        overrides += ["--features.user.dim", "4", "--features.item_click.window_days", "[1, 2]"]
        commands.run("features", "--config", str(world.config), *overrides)
    before = files(tmp_path)
    for _ in range(2):
        commands.run("evaluate", "--config", str(world.config), "--model", str(world.artifact), *overrides)
        assert (work / "evaluation" / "encoded" / "test").is_dir()
        found = (work / "evaluation" / "metrics.json").read_bytes()
        assert found == (evaluated / "metrics.json").read_bytes()
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.name.startswith(".")]
    assert (work / "features").exists() == bool(before)


# Refusals


def test_wrong_settings_are_refused(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    config = ["--config", str(world.config), "--data.work", str(tmp_path / "work")]
    model = ["--model", str(world.artifact)]
    for command, more in (("features", []), ("train", []), ("evaluate", model)):
        assert "'model.expert'; did you mean 'experts'?" in refused(
            command, capsys, *config, *more, "--model.expert", "3"
        )
        assert "training.batch_size" in refused(command, capsys, *config, *more, "--training.batch_size", "many")
        missing = refused(command, capsys, "--config", str(tmp_path / "none.yaml"), *more)
        assert "none.yaml' does not exist" in missing
        assert "'extra' is not a setting" in refused(command, capsys, *config, *more, "extra")
    assert not list(tmp_path.iterdir())


def test_a_missing_log_is_named(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    config = ["--config", str(world.config), "--data.work", str(tmp_path / "work"), "--data.log", "no/such/log"]
    for command, more in (("features", []), ("train", []), ("evaluate", ["--model", str(world.artifact)])):
        assert "the log 'no/such/log' does not exist; set `data.log`" in refused(command, capsys, *config, *more)
    assert not list(tmp_path.iterdir())


def test_an_empty_split_is_named(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    config = ["--config", str(world.config), "--data.work", str(tmp_path / "work")]
    late = ["--split.validation_end", "2030-01-01"]
    assert "the test split is empty" in refused("train", capsys, *config, *late)
    assert "the test split is empty" in refused("evaluate", capsys, *config, *late, "--model", str(world.artifact))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("no/such/folder", "'no/such/folder' holds no model"),
        ("models:/nobody@champion", "'models:/nobody@champion' can't be loaded"),
        ("models:/learnable@challenger", "'models:/learnable@challenger' can't be loaded"),
        ("models:/learnable/99", "'models:/learnable/99' can't be loaded"),
    ],
)
def test_unknown_models_are_named(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, address: str, sentence: str
) -> None:
    out = tmp_path / "out"
    assert sentence in refused("evaluate", capsys, "--config", str(world.config), "--model", address, "--out", str(out))
    assert not list(tmp_path.iterdir())


def test_evaluation_before_training_is_refused(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    own = ["--data.work", str(tmp_path / "work"), "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    told = refused("evaluate", capsys, "--config", str(world.config), "--model", "models:/learnable@champion", *own)
    assert "train first" in told
    assert not list(tmp_path.iterdir())


def test_a_model_of_other_tasks_is_refused(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    tree = settings_tree(world.folder)
    del tree["tasks"]["liked"]
    tree["data"]["work"] = str(tmp_path / "work")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(tree))
    told = refused("evaluate", capsys, "--config", str(tmp_path / "one.yaml"), "--model", str(world.artifact))
    assert "the model predicts click, liked; the settings have click" in told


def test_cuda_without_a_gpu_is_refused_before_anything_is_built(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    work = ["--data.work", str(tmp_path / "work")]
    told = refused("train", capsys, "--config", str(world.config), *work, "--training.device", "cuda")
    assert "training.device is cuda" in told
    assert not list(tmp_path.iterdir())


def test_a_damaged_model_is_named(world: World, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    shutil.copytree(world.artifact, tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"short")
    told = refused("evaluate", capsys, "--config", str(world.config), "--model", str(tmp_path / "model"))
    assert "weights.safetensors" in told


def test_what_the_registry_refuses_in_the_end_costs_no_model(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work" / "features", work / "features")
    own = ["--data.work", str(work), "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    wrong = ["--config", str(world.config), *own, "--tracking.alias", "latest"]
    assert "with 'tracking.alias' 'latest'" in refused("train", capsys, *wrong), "before any work"
    monkeypatch.setattr("mmoe_rec.jobs.workspace.check_mlflow", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        commands.run("train", *wrong)
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "refuses: 'latest' alias name" in told
    assert f"the trained model in '{work / 'model'}' is whole but not registered: the same command with" in told
    assert Ranker.load(work / "model").about.name == "learnable"


def test_training_that_dies_keeps_the_old_model(
    world: World, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(world.folder / "work", work)
    before = {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()}

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmoe_rec.training.loop.Trainer._log", die)
    own = ["--data.work", str(work), "--tracking.uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    with pytest.raises(KeyboardInterrupt):
        commands.run("train", "--config", str(world.config), *own)
    assert {path: path.read_bytes() for path in (work / "model").rglob("*") if path.is_file()} == before
    assert not [path for path in work.rglob("*") if path.name.startswith(".") and path.name.endswith(".tmp")]
    assert not torch.distributed.is_initialized()
    (run,) = mlflow.search_runs(experiment_names=["learnable"], output_format="list")
    assert run.info.status == "KILLED"


def test_steps_load_without_torch_and_mlflow() -> None:
    heavy = ("torch", "mlflow", "torchrec")
    code = f"import sys, mmoe_rec.jobs.train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
