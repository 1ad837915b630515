"""Every way to address a model leads to it, or to one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmoe_rec
from mmoe_rec.errors import UserError
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import find_model
from tests.inference.small_model import SmallModel


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return SmallModel(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: SmallModel) -> dict[str, str]:
    """Of a model that was registered twice: the store's address, and what identifies its last version."""
    import mlflow

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    for _ in range(2):
        with runs.open_run(uri, "models") as run:
            registry.register_model(run, small.folder, "small", "champion")
    assert run.run_id is not None
    version = mlflow.MlflowClient().get_model_version("small", "2")
    logged = mlflow.MlflowClient().get_logged_model(version.source.removeprefix("models:/"))
    return {"uri": uri, "run": run.run_id, "id": logged.model_id, "files": logged.artifact_location}


@pytest.mark.parametrize(
    ("address", "made_by"),
    [
        ("models:/small@champion", "run"),
        ("models:/small/2", "run"),
        ("models:/small/latest", "run"),
        ("models:/small/LATEST", "run"),
        ("models:/{id}", "run"),
        ("models:/small/2/artifacts/model", "run"),
        ("models:/small@champion/artifacts/model", "run"),
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
    found = find_model(address.format(**store, path=path, folder=small.folder), store["uri"])
    assert {each.name for each in found.folder.iterdir()} == {each.name for each in small.folder.iterdir()}
    assert found.run_id == (None if made_by is None else store[made_by])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/small/3", "'models:/small/3' can't be loaded"),
        ("models:/small@nobody", "can't be loaded .*nobody"),
        ("models:/other/latest", "can't be loaded: there is no registered model 'other'"),
        ("models:/small/Production", "can't be loaded: it names no version"),
        ("models:/m-0123", "can't be loaded .*m-0123"),
        ("models:/small", "can't be loaded"),
        ("models:/", "can't be loaded"),
        ("models:small@champion", "can't be loaded"),
        ("runs:/0123/ranking_model", "can't be loaded .*0123"),
        ("runs:/{run}/other", "can't be loaded|holds no model"),
        ("mlflow-artifacts:/models/x", "can't be loaded"),
        ("file:///no/such/folder", "can't be loaded"),
        ("ghost://bucket/model", "can't be loaded"),
        ("gs://bucket/model", "'gs://bucket/model' can't be loaded"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(store: dict[str, str], address: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        find_model(address.format(**store), store["uri"])
    assert "\n" not in str(refused.value)


def test_what_moves_is_looked_up_once(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model may become the champion while this one is read: folder and run are of one model all the same."""
    import mlflow

    load = registry.fetch_model

    def load_late(address: str, uri: str) -> Path:
        mlflow.MlflowClient().set_registered_model_alias("small", "moving", "1")
        return load(address, uri)

    with runs.open_run(store["uri"], "models"):
        mlflow.MlflowClient().set_registered_model_alias("small", "moving", "2")
    monkeypatch.setattr(registry, "fetch_model", load_late)
    assert find_model("models:/small@moving", store["uri"]).run_id == store["run"]


def test_a_run_that_was_deleted_made_nothing(store: dict[str, str]) -> None:
    import mlflow

    first = registry.find_run("models:/small/1", store["uri"])
    mlflow.MlflowClient().delete_run(first)
    assert find_model("models:/small/1", store["uri"]).run_id is None


@pytest.mark.parametrize(
    "address",
    ["models:/small@champion", "{path}"],
)
def test_a_ranker_is_loaded_from_an_address(small: SmallModel, store: dict[str, str], address: str) -> None:
    path = store["files"].removeprefix("file://")
    example = json.loads((small.folder / "example_request.json").read_text())
    expected = mmoe_rec.Ranker.load(small.folder).rank(**example)
    found = mmoe_rec.Ranker.load(address.format(**store, path=path, folder=small.folder), store["uri"])
    assert found.rank(**example) == expected


def test_a_ranker_is_looked_up_where_mlflow_was_told(
    store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(store["uri"])
    assert mmoe_rec.Ranker.load("models:/small@champion").about.name == "small"
    mlflow.set_tracking_uri(None)
    with pytest.raises(
        UserError, match=r"there is no MLflow store 'mlflow\.db' to look up 'models:/small@champion' in"
    ):
        mmoe_rec.Ranker.load("models:/small@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store["uri"])
    mlflow.set_tracking_uri(None)
    assert mmoe_rec.Ranker.load("models:/small@champion").about.name == "small"


WITHOUT_MLFLOW = """
import sys
sys.modules["mlflow"] = None
import mmoe_rec
from mmoe_rec.errors import UserError
from mmoe_rec.inference.ranker import Ranker


def refuse() -> None:
    try:
        Ranker.load("models:/small@champion")
    except UserError as error:
        print(error)


refuse()
assert mmoe_rec.Ranker is Ranker
refuse()
print(Ranker.load(sys.argv[1]).about.name)
"""


def test_folders_need_no_mlflow_and_addresses_say_that_they_do(
    small: SmallModel, store: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").touch()
    words = [sys.executable, "-c", WITHOUT_MLFLOW, str(small.folder)]
    env = {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.stdout.splitlines() == [
        "'models:/small@champion' is an address of MLflow, and this takes folders: use mmoe_rec.Ranker.load",
        "'models:/small@champion' is looked up by mlflow, which is not installed: install it, or give an artifact "
        "folder",
        "small",
    ], done.stderr
