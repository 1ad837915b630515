"""Runs, the registry and the ways to address a model in it, and what is said of addresses that lead nowhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch

import mmoe_rec
from mmoe_rec.errors import UserError
from mmoe_rec.tracking import client, registry, runs
from mmoe_rec.tracking.registry import resolve_model
from tests.commands import refuse
from tests.inference.small_model import SmallModel
from tests.log.small_logs import ALL_KINDS, BASE
from tests.pipelines.learnable_log import write_files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(Path(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'deep' / 'mlflow.db'}"


def test_records_a_run_beside_the_database(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.txt").write_text("x")
    with runs.open_run(uri, "first", run_name="one") as run:
        run.log_params({"model": {"experts": {"count": 4}}, **{f"p{i}": i for i in range(250)}})
        run.log_metrics({"auc": 0.5}, step=1)
        run.log_metrics({"auc": 0.75}, step=2)
        run.log_text("hello", "notes/hello.txt")
        run.log_text({"a": 1}, "a.json")
        run.log_figure(plt.figure(), "plots/empty.png")
        run.log_artifact(tmp_path / "plan.txt")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.txt"]
    folder = client.read_sqlite_path(uri).parent
    assert {path.name for path in folder.iterdir()} >= {"mlflow.db", "mlartifacts"}
    recorded = mlflow.get_run(run.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["model.experts.count"] == "4"
    assert len(recorded.data.params) == 251
    assert recorded.data.metrics["auc"] == 0.75
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names >= {"hello.txt", "a.json", "empty.png", "plan.txt"}


def test_goes_on_with_a_run(uri: str) -> None:
    with runs.open_run(uri, "second") as run:
        run.log_params({"epochs": 1})
    with runs.open_run(uri, "second", run_id=run.run_id) as again:
        again.log_params({"epochs": 2, "seed": 3})
    assert again.run_id == run.run_id
    data = mlflow.get_run(run.run_id).data
    assert data.params == {"epochs": "1", "seed": "3"}
    assert data.tags["resumed.epochs"] == "2"


def test_a_failed_run_says_so(uri: str) -> None:
    with pytest.raises(RuntimeError, match="boom"), runs.open_run(uri, "third") as run:
        raise RuntimeError("boom")
    assert mlflow.get_run(run.run_id).info.status == "FAILED"


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    with runs.open_run(f"sqlite:///{tmp_path / 'none.db'}", "x", enabled=False) as run:
        run.log_params({"a": 1})
        run.log_metrics({"a": 1.0}, 1)
        run.log_text("a", "a.txt")
        run.log_figure(None, "a.png")
        run.log_artifact(tmp_path / "no file")
        with pytest.raises(UserError, match="recorded run"):
            registry.register_model(run, tmp_path, "x", "champion")
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_registered_is_found_again(uri: str, small: SmallModel, capfd: pytest.CaptureFixture) -> None:
    """After a kill or an outage."""
    with runs.open_run(uri, "found again") as run:
        assert registry.find_registered_version(run, "found") is None
        version = registry.register_model(run, small.folder, "found")
        assert capfd.readouterr() == ("", "")
        assert registry.find_registered_version(run, "found") == version
        assert registry.find_registered_version(run, "another") is None
    with runs.open_run(uri, "found again") as second:
        assert registry.find_registered_version(second, "found") is None


def test_a_model_that_cannot_be_loaded_is_not_registered(uri: str, tmp_path: Path) -> None:
    with runs.open_run(uri, "models") as run, pytest.raises(UserError, match="holds no model"):
        registry.register_model(run, tmp_path, "broken", "champion")
    with pytest.raises(UserError, match="broken"):
        registry.fetch_model("models:/broken@champion", uri)


def test_a_model_of_one_objective_is_registered_with_an_example_of_its_own(tmp_path: Path) -> None:
    """MLflow refuses an example that weighs an objective which the signature, and so the model, does not have."""
    tasks, features = ({key: item[key]} for key, item in (("click", BASE["tasks"]), ("price", ALL_KINDS)))
    small = SmallModel(tmp_path / "work", tasks=tasks, features=features)
    sentence = registry.build_log_model_args(small.folder, tmp_path)
    assert sentence["input_example"][1]["task_weights"] == {"engagement": 1.0}
    names = [item.name for item in sentence["signature"].params.params[0].dtype.properties]
    assert names == ["click", "engagement"]


def test_looking_up_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no MLflow store"):
        registry.fetch_model("models:/small@champion", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not list(tmp_path.iterdir())


def test_a_store_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with monkeypatch.context() as patches:
        patches.setattr("mlflow.store.db.utils._upgrade_db", stopped)
        patches.setattr("mlflow.store.db.utils._initialize_tables", stopped)
        with pytest.raises(KeyboardInterrupt), runs.open_run(uri, "x"):
            pass
    assert not list(tmp_path.iterdir())
    with runs.open_run(uri, "x"):
        pass
    assert [path.name for path in tmp_path.glob("*.db*")] == ["mlflow.db"]


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look like one " * 10)
    with (
        pytest.raises(UserError, match=r"MLflow at 'sqlite:.*mlflow\.db'"),
        runs.open_run(f"sqlite:///{tmp_path / 'mlflow.db'}", "x"),
    ):
        pass


def test_a_deleted_experiment(uri: str) -> None:
    with runs.open_run(uri, "gone"):
        pass
    mlflow.delete_experiment(mlflow.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserError, match="'gone' was deleted"), runs.open_run(uri, "gone"):
        pass


@pytest.mark.parametrize(
    ("model", "alias", "message"),
    [
        ("team/shop", "champion", "would not be the URI"),
        ("shop:v2", "champion", "would not be the URI"),
        ("..", "champion", "MLflow refuses"),
        (" ", "champion", "MLflow refuses"),
        ("shop?", "champion", "would not be the URI"),
        ("shop", "latest", "reserves this alias"),
        ("shop", "v1", "reserves this alias"),
        ("shop", "the best", "MLflow refuses"),
        ("shop", "", "would not be the URI"),
    ],
)
def test_names_that_the_registry_refuses_are_reported_first(uri: str, model: str, alias: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        registry.check_registry_names(uri, model, alias)
    assert f"'tracking.registered_model' (by default the settings' `name`) '{model}'" in str(refused.value)
    assert f"'tracking.alias' '{alias}'" in str(refused.value)


def test_an_experiment_that_mlflow_refuses(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refuses: .*500"):
        runs.check_server(uri, "x" * 501, outbox_folder=tmp_path)


@pytest.mark.parametrize("name", ["shop", "Shop 2", "shop.eu-1", "läden", "a@b"])
def test_names_that_pass_can_be_registered(uri: str, small: SmallModel, name: str) -> None:
    """The rules are the registry's own: what passes is taken."""
    registry.check_registry_names(uri, name, "champion-2")
    client = mlflow.MlflowClient(uri)
    client.create_registered_model(name)
    client.create_model_version(name, str(small.folder))
    registry.check_registry_names(uri, name, "champion-2")
    client.set_registered_model_alias(name, "champion-2", "1")
    assert registry.pin_model_uri(f"models:/{name}@champion-2", uri) == f"models:/{name}/1"


def test_a_name_is_refused_before_features_are_built(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = write_files(tmp_path)
    said = refuse(capsys, "train", "--config", config, "--tracking.registered_model", "team/shop")
    assert said.startswith("error: 'tracking.registered_model' (by default the settings' `name`) 'team/shop'")
    assert not (tmp_path / "work").exists()


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine")
    before = dict(os.environ)
    with runs.open_run(f"sqlite:///{tmp_path / 'mlflow.db'}", "x"):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77", "the user's own counts"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    after = dict(os.environ)
    assert {name: value for name, value in after.items() if "MLFLOW" in name} == {
        name: value for name, value in before.items() if "MLFLOW" in name
    }


def test_a_run_that_is_deleted_while_it_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, outbox_folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "unsent"
    with runs.open_run(uri, "x", outbox_folder=outbox_folder) as run:
        run.log_metrics({"a": 1.0}, 1)
        mlflow.MlflowClient(uri).delete_run(run.run_id)
        for step in range(2, 5):
            run.log_metrics({"a": 1.0}, step)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "refuses: The run" in said
    assert f"are saved in '{outbox_folder / f'{run.run_id}.jsonl'}'" in said
    with (
        pytest.raises(UserError, match=rf"'{run.run_id}' was deleted\. Restore it with `mlflow runs restore"),
        runs.open_run(uri, "x", run_id=run.run_id, outbox_folder=outbox_folder),
    ):
        pass
    mlflow.MlflowClient(uri).restore_run(run.run_id)
    with runs.open_run(uri, "x", run_id=run.run_id, outbox_folder=outbox_folder) as again:
        again.log_metrics({"a": 5.0}, 4)  # it took that step before
        again.log_metrics({"a": 5.0}, 5)
    history = mlflow.MlflowClient(uri).get_metric_history(run.run_id, "a")
    assert [(item.step, item.value) for item in history] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 5.0)]
    assert mlflow.MlflowClient(uri).get_run(run.run_id).info.status == "FINISHED"


def test_a_locked_store_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own words, without its waiting for the lock."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def locked(*_: object, **__: object) -> None:
        raise MlflowException(
            "(sqlite3.OperationalError) database is locked\n[SQL: SELECT ...]", TEMPORARILY_UNAVAILABLE
        )

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with runs.open_run(uri, "x", outbox_folder=tmp_path / "unsent") as run:
        with monkeypatch.context() as patch:
            patch.setattr(SqlAlchemyStore, "log_batch", locked)
            run.log_metrics({"a": 1.0}, 1)
            assert str(run.outbox.last_error) == f"MLflow at '{uri}' does not answer (database is locked)"
            run.log_text("x", "x.txt")
        run.log_metrics({"a": 1.0}, 2)
        run.flush(10)
    history = mlflow.MlflowClient(uri).get_metric_history(run.run_id, "a")
    assert [item.step for item in history] == [1, 2]
    assert not list((tmp_path / "unsent").iterdir())


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("http://127.0.0.1:9", "'http://127.0.0.1:9' (the URI in the variable MLFLOW_TRACKING_URI)"),
        ("http://me:secret@127.0.0.1:9", "'http://me:***@127.0.0.1:9'"),
    ],
)
def test_an_address_is_reported_with_its_source_and_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, place: str
) -> None:
    """No file that a user looks into holds that of the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9 ")
    with pytest.raises(UserError) as refused:
        runs.check_server(uri, "x", outbox_folder=tmp_path)
    assert str(refused.value) == f"MLflow at {place} does not answer (Connection refused)"


# Every way to address a model leads to it, or to one sentence.


@pytest.fixture(scope="module")
def store(uri: str, small: SmallModel) -> dict[str, str]:
    """Of a model that was registered twice: the store's address, and what identifies its last version."""
    threads = torch.get_num_threads()
    for _ in range(2):
        with runs.open_run(uri, "models") as run:
            registry.register_model(run, small.folder, "small", "champion")
    assert run.run_id is not None
    assert torch.get_num_threads() == threads
    mlflow.MlflowClient().create_registered_model("another")
    version = mlflow.MlflowClient().get_model_version("small", "2")
    logged = mlflow.MlflowClient().get_logged_model(version.source.removeprefix("models:/"))
    return {"uri": uri, "run": run.run_id, "id": logged.model_id, "files": logged.artifact_location}


def test_a_registered_model_holds_its_files_and_no_pickle(store: dict[str, str], small: SmallModel) -> None:
    folder = registry.fetch_model("models:/small@champion", store["uri"])
    assert registry.fetch_model("models:/small/1", store["uri"]) != folder
    model = folder.parents[1]
    endings = {path.suffix for path in model.rglob("*") if path.is_file()}
    assert not endings & {".pkl", ".pt", ".pth", ".pyc"}
    needed = (model / "requirements.txt").read_text()
    assert "torch==" in needed
    assert "safetensors==" in needed
    assert "torchrec" not in needed
    assert "fbgemm" not in needed
    assert not (model / "code" / "mmoe_rec" / "training").exists()


@pytest.mark.parametrize(
    ("address", "made_by"),
    [
        ("models:/small@champion", "run"),
        ("models:/small/2", "run"),
        ("models:/small/latest", "run"),
        ("models:/{id}", "run"),
        ("runs:/{run}/ranking_model", None),
        ("{files}", None),
        ("{path}", None),
        ("file://{folder}", None),
        ("{folder}", None),
    ],
)
def test_an_address_leads_to_the_model(
    small: SmallModel, store: dict[str, str], address: str, made_by: str | None
) -> None:
    path = store["files"].removeprefix("file://")
    actual = resolve_model(address.format(**store, path=path, folder=small.folder), store["uri"])
    assert {item.name for item in actual.folder.iterdir()} == {item.name for item in small.folder.iterdir()}
    assert actual.run_id == (None if made_by is None else store[made_by])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/small/3", "'models:/small/3' can't be loaded .*version=3"),
        ("models:/small@nobody", "can't be loaded .*nobody not found"),
        ("models:/smal@champion", "can't be loaded .*smal.* not found"),
        ("models:/small/Production", "can't be loaded .*Production"),
        ("models:/m-0123", "can't be loaded .*m-0123"),
        ("models:/small", "can't be loaded"),
        ("runs:/0123/ranking_model", "can't be loaded .*0123"),
        ("runs:/{run}/other", "can't be loaded|holds no model"),
        ("file:///no/such/folder", "can't be loaded"),
        ("ghost://bucket/model", "can't be loaded"),
        ("gs://bucket/model", "'gs://bucket/model' can't be loaded"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(store: dict[str, str], address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        resolve_model(address.format(**store), store["uri"])
    assert "\n" not in str(refused.value)


def test_what_moves_is_looked_up_once(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model may become the champion while this one is read: folder and run are of one model all the same."""
    load = registry.fetch_model

    def load_late(address: str, uri: str) -> Path:
        mlflow.MlflowClient().set_registered_model_alias("small", "moving", "1")
        return load(address, uri)

    with runs.open_run(store["uri"], "models"):
        mlflow.MlflowClient().set_registered_model_alias("small", "moving", "2")
    monkeypatch.setattr(registry, "fetch_model", load_late)
    assert resolve_model("models:/small@moving", store["uri"]).run_id == store["run"]


def test_a_run_that_was_deleted_made_nothing(store: dict[str, str]) -> None:
    first = registry.find_run_id("models:/small/1", store["uri"])
    mlflow.MlflowClient().delete_run(first)
    assert resolve_model("models:/small/1", store["uri"]).run_id is None


def test_a_ranker_is_loaded_from_an_address_which_is_looked_up_where_mlflow_was_configured(
    small: SmallModel, store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = json.loads((small.folder / "example_request.json").read_text())["inputs"][0]
    expected = mmoe_rec.load_ranker(small.folder).rank(**example)
    for address in ("models:/small@champion", store["files"].removeprefix("file://")):
        assert mmoe_rec.load_ranker(address, store["uri"]).rank(**example) == expected
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(store["uri"])
    assert mmoe_rec.load_ranker("models:/small@champion").info.name == "small"
    mlflow.set_tracking_uri(None)
    with pytest.raises(
        UserError, match=r"there is no MLflow store 'mlflow\.db' to look up 'models:/small@champion' in"
    ):
        mmoe_rec.load_ranker("models:/small@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store["uri"])
    mlflow.set_tracking_uri(None)
    assert mmoe_rec.load_ranker("models:/small@champion").info.name == "small"


WITHOUT_MLFLOW = """
import sys
sys.modules["mlflow"] = None
import mmoe_rec
from mmoe_rec.errors import UserError
for load in (mmoe_rec.Ranker.load, mmoe_rec.load_ranker):
    try:
        load("models:/small@champion")
    except UserError as error:
        print(error)
    print(load(sys.argv[1]).info.name)
"""


def test_folders_need_no_mlflow_and_addresses_say_that_they_do(
    small: SmallModel, store: dict[str, str], tmp_path: Path
) -> None:
    """Whatever was called before."""
    (tmp_path / "mlflow.db").touch()
    words = [sys.executable, "-c", WITHOUT_MLFLOW, str(small.folder)]
    env = {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.stdout.splitlines() == [
        "'models:/small@champion' is a URI, and Ranker.load takes a folder. Use mmoe_rec.load_ranker.",
        "small",
        "'models:/small@champion' needs mlflow, which is not installed. Install it or give a folder.",
        "small",
    ], done.stderr
