"""What MLflow's pages say of a training, its evaluation and the version that it registered."""

import json
import re
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from mmoe_rec.settings.load import load_settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.runs import command_line, describe_datasets, name_run
from tests import commands
from tests.pipelines.short_trainings import World

PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World.of(tmp_path_factory.mktemp("page"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", "a settings.yaml", f"http://me:{PASSWORD}@host"])
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
        world.train()
        commands.run("evaluate", "--config", str(world.folder / "first.yaml"), "--model", "models:/learnable@champion")
    return world


@pytest.fixture(scope="module")
def run(world: World) -> mlflow.entities.Run:
    experiment = world.client.get_experiment_by_name("learnable")
    (actual,) = world.client.search_runs([experiment.experiment_id])
    return actual


def test_the_run_says_what_it_is(world: World, run: mlflow.entities.Run) -> None:
    assert run.info.run_name == "train until 2024-03-06, seed 17"
    said = run.data.tags["mlflow.note.content"]
    assert re.findall("^### (.+)$", said, re.MULTILINE) == ["Training", "Result", "Evaluation"]
    assert "'a settings.yaml'" in said
    assert PASSWORD not in said
    manifest = json.loads((world.folder / "work" / "features" / "manifest.json").read_text())
    assert f"{manifest['splits']['train']['rows']:,} rows of `{world.folder / 'log'}`" in said
    assert "- 'champion' belonged to no model before" in said
    area = run.data.metrics["best/click.auc"]
    assert f"- click.auc {area:.4f}\n" in said
    assert f"- click: auc {run.data.metrics['test/click.auc']:.4f} (" in said


def test_rows_are_inputs_of_the_run(world: World, run: mlflow.entities.Run) -> None:
    actual = {}
    for dataset_input in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in dataset_input.tags}
        assert dataset_input.dataset.name == "learnable"
        assert json.loads(dataset_input.dataset.source)["uri"] == str(world.folder / "log")
        actual[tags["split"]] = (tags["mlflow.data.context"], json.loads(dataset_input.dataset.profile)["num_rows"])
    encoded = world.folder / "work" / "features" / "encoded"
    rows = {split: pq.read_table(encoded / split).num_rows for split in ("train", "validation", "test")}
    contexts = {"train": "training", "validation": "validation", "test": "test"}
    assert actual == {split: (contexts[split], count) for split, count in rows.items()}
    digests = {dataset_input.dataset.digest for dataset_input in run.inputs.dataset_inputs}
    assert len(digests) == 3


def test_digests_follow_log_and_split(world: World) -> None:
    settings = load_settings(world.folder / "first.yaml")
    manifest = json.loads((world.folder / "work" / "features" / "manifest.json").read_text())
    (mine,) = describe_datasets(settings, manifest, "test")
    assert describe_datasets(settings, manifest, "test") == [mine]
    (second,) = describe_datasets(settings, manifest | {"digest": "other"}, "test")
    later = load_settings(world.folder / "first.yaml", ["--split.test_end", "2024-03-09"])
    assert len({item["digest"] for item in (mine, second, *describe_datasets(later, manifest, "test"))}) == 3


def test_charts_have_sections(run: mlflow.entities.Run) -> None:
    sections = {name.rpartition("/")[0] for name in run.data.metrics}
    gates = {"gates", "gates/click", "gates/liked"}
    assert sections == {"train", "validation", "best", "test", "test/intervals", "system", *gates}
    assert "test/intervals/click.auc.low" in run.data.metrics
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0


def test_the_version_is_described(world: World, run: mlflow.entities.Run) -> None:
    version = world.client.get_model_version("learnable", "1")
    assert version.description.startswith("'champion' belonged to no model before")
    assert "- click.auc 0." in version.description
    assert version.tags["report"] == f"runs:/{run.info.run_id}/evaluation/report.html"
    assert version.tags["evaluated"].startswith("click: auc ")
    assert version.tags["promoted"] == "True"
    assert version.tags["data.digest"] == run.data.tags["data.digest"]
    assert mlflow.models.get_model_info("models:/learnable/1").signature is not None


def test_an_experiment_gets_its_kind_unless_it_has_one(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    client.create_experiment("old")
    client.create_experiment("its own", tags={"mlflow.experimentKind": "genai_development"})
    for name in ("new", "old", "its own"):
        with runs.open_run(uri, name):
            pass
    kinds = [client.get_experiment_by_name(name).tags["mlflow.experimentKind"] for name in ("new", "old", "its own")]
    assert kinds == ["custom_model_development"] * 2 + ["genai_development"]


def test_sections_are_replaced_and_cut_and_people_s_words_stay(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    with runs.open_run(uri, "notes") as run:
        pass
    client.set_tag(run.run_id, "mlflow.note.content", "Do not delete: the paper's run.\n\n## mine")
    with runs.open_run(uri, "notes", run_id=run.run_id) as again:
        again.write_section("Training", "first\n\n#### of it")
        for name in ("Training", "Resumed", "Result", "Evaluation"):
            again.write_section(name, f"verdict of {name}\n\n```sh\n{'x' * 9_000}\n```")
    said = client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert said.startswith("Do not delete: the paper's run.\n\n## mine\n\n### Training\n\nverdict of Training\n")
    assert len(said) < 8_000
    assert "verdict of Evaluation" in said
    assert said.count("```") == 8


def test_who_may_not_write_to_the_registry_gets_the_evaluation(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise mlflow.exceptions.MlflowException("PERMISSION_DENIED", error_code=403)

    monkeypatch.setattr(mlflow.MlflowClient, "set_model_version_tag", refuse)
    commands.run("evaluate", "--config", str(world.folder / "first.yaml"), "--model", "models:/learnable@champion")
    printed = capsys.readouterr()
    assert "PERMISSION_DENIED: models:/learnable/1 is not described in the registry" in printed.err
    assert "report: " in printed.out
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    commands.run("evaluate", "--config", str(world.folder / "first.yaml"), "--model", "models:/learnable@champion")
    printed = capsys.readouterr()
    assert "but not all of it in MLflow" in printed.err
    assert "auc ↑" in printed.out


def test_names_of_trainings_and_commands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(world.folder / "first.yaml")
    assert name_run(settings, "models:/learnable/3") == "train until 2024-03-06 from models:/learnable/3, seed 17"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as where a script is started
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mmoe-rec", "train", "--config", "a b.yaml"])
    assert command_line() == "mmoe-rec train --config 'a b.yaml'"
