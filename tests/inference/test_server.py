"""The model behind `mlflow models serve`: equal scores, readable refusals, no training library in the process."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import SERVED_CODE, SERVED_PACKAGES, build_log_model_args
from tests.inference.running_server import Server, running_server
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request


@pytest.fixture(scope="module")
def server(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = Path(tmp_path_factory.mktemp("server"))
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with runs.open_run(uri, "small") as run:
        registry.register_model(run, small.folder, "small", "champion")
    with running_server("models:/small@champion", uri, folder) as running:
        yield running


def request_of(**changes: Any) -> dict[str, Any]:
    """One request with keys replaced."""
    return {"user": {"user": USER}, "context": CONTEXT, "candidates": {"item": ITEMS}, **changes}


def test_logged_rows_score_as_offline(server: Server, small: SmallModel, ranker: Ranker) -> None:
    table, rows = small.later_rows()
    status, body = server.post({"inputs": [as_request(table)]})
    assert status == 200
    (reply,) = body["predictions"]
    values, log_scores = ranker.score(rows)
    np.testing.assert_allclose(reply["scores"], np.exp(log_scores)[reply["order"]], rtol=1e-5)
    for index, task in enumerate(small.settings.tasks):
        np.testing.assert_allclose(reply["predictions"][task], values[reply["order"], index], atol=1e-5)


def test_params_for_all_and_options_of_one(server: Server, ranker: Ranker) -> None:
    params = {"task_weights": {"engagement": 1, "satisfaction": 0.5}, "top_k": 2}
    own = {"task_weights": {"liked": 3}, "top_k": 1}
    status, body = server.post({"inputs": [request_of(), request_of(**own)], "params": params})
    assert status == 200
    for actual, options in zip(body["predictions"], (params, own), strict=True):
        expected = ranker.rank(**request_of(**options))
        assert actual["candidates"] == expected.candidates
        np.testing.assert_allclose(actual["scores"], expected.scores, rtol=1e-5)
        assert (actual["tables_as_of"], actual["request_time"]) == (expected.tables_as_of, expected.request_time)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"inputs": [request_of(candidates={"item": list(range(100_000))})]}, "has 100,000 candidates; this model"),
        ({"inputs": [request_of(candidates={"item": ITEMS, "price": [float("nan")] * 5})]}, "NaN"),
        ({"inputs": [request_of()], "params": {"gate_top_k": 0}}, "gate_top_k"),
        ({"inputs": [request_of(), request_of(user={})]}, "inputs[1]: 'user' needs a column"),
        *((body, "") for body in (b'{"inputs": [', b"[]", b'{"user": {}}', b'{"inputs": 5}', b'{"inputs": [5]}')),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_are_one_sentence(server: Server, body: Any, sentence: str) -> None:
    status, reply = server.post(body)
    assert status == 400
    assert reply["message"]
    assert sentence in reply["message"]
    assert len(json.dumps(reply)) < 400 or not sentence  # MLflow's own are longer


def test_a_data_frame_has_a_row_for_each_candidate(server: Server) -> None:
    rows = [{"user": USER, "item": item, **CONTEXT} for item in ITEMS]
    split = {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}
    (ranking,) = server.post({"inputs": [request_of()]})[1]["predictions"]
    for form in ({"dataframe_split": split}, {"dataframe_records": rows}):
        status, body = server.post(form)
        assert status == 200
        assert [prediction["rank"] - 1 for prediction in body["predictions"]] == np.argsort(ranking["order"]).tolist()
        assert sorted((prediction["score"] for prediction in body["predictions"]), reverse=True) == ranking["scores"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_holds_no_training_library(server: Server) -> None:
    maps = [
        path.read_text() for path in Path("/proc").glob("[0-9]*/maps") if _group_of(path.parent) == server.process.pid
    ]
    assert any("libtorch" in item for item in maps)
    assert not any(name in item for item in maps for name in ("fbgemm_gpu", "torchrec"))


def _group_of(process: Path) -> int | None:
    try:
        return os.getpgid(int(process.name))
    except ProcessLookupError:
        return None


# What travels with the MLflow model: the code and packages that scoring imports, and no project of someone else


# Loads and ranks with the served code alone; prints the files of its modules, and the names of all packages loaded.
SCORES = """
import json, sys
import pyarrow.parquet
from mmoe_rec.inference.request_reader import read_requests
from mmoe_rec.inference.ranker import Ranker

ranker = Ranker.load(sys.argv[1])
example = json.load(open(sys.argv[1] + "/example_request.json"))["inputs"][0]
options = {"top_k": 2, "gate_top_k": 1, "mask_experts": [0], "task_weights": {"click": 2.0}, "explain": True}
(ranking,) = ranker.rank_many(read_requests([example], options))
assert len(ranking.scores) == 2, ranking
ranker.score(pyarrow.parquet.read_table(sys.argv[2]))
files = {name: each.__file__ for name, each in sys.modules.items() if name.partition(".")[0] == "mmoe_rec"}
print(json.dumps({"files": files, "loaded": [name for name in sys.modules if "." not in name]}))
"""


@pytest.fixture(scope="module")
def served(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the served code, and what `SCORES` says of a process that has no other code of ours."""
    folder = tmp_path_factory.mktemp("served")
    (code,) = build_log_model_args(small.folder, folder)["code_paths"]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    pq.write_table(small.later_rows()[0], folder / "rows.parquet")
    words = [sys.executable, "-c", SCORES, str(small.folder), str(folder / "rows.parquet")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return Path(code), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.thorough
def test_the_served_code_is_what_scoring_imports(served: tuple[Path, dict[str, Any]]) -> None:
    code, said = served
    paths = [Path(file).relative_to(code) for file in said["files"].values()]
    loaded = {str(path) if str(path) in SERVED_CODE else path.parts[0] for path in paths}
    # What a loaded file imports when it writes, which scoring never does.
    by_writers = {"atomic.py"}
    assert loaded == set(SERVED_CODE) - by_writers
    writers = [path for path in code.rglob("*.py") if "from mmoe_rec.atomic import" in path.read_text()]
    assert writers


@pytest.mark.thorough
def test_the_served_packages_are_what_scoring_imports(served: tuple[Path, dict[str, Any]]) -> None:
    code, said = served
    own = {name for file in said["files"].values() for name in _imported(Path(file))}
    asked = own & set(said["loaded"])
    packages = {name.lower() for item in asked for name in packages_distributions().get(item, ())} - {"mmoe-rec"}
    model = _imported(code / "inference" / "mlflow_model.py")
    assert "mlflow" in model
    assert "mlflow" not in packages
    # Time zones are a package of files, which Python's zoneinfo looks for by itself.
    assert packages | {"mlflow", "tzdata"} == set(SERVED_PACKAGES)
    assert "zoneinfo" in own


def _imported(file: Path) -> set[str]:
    actual = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            actual |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            actual.add(node.module.partition(".")[0])
    return actual


@pytest.mark.thorough
def test_a_project_in_the_working_folder_is_not_taken_for_the_models(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uv.lock", "pyproject.toml", ".python-version"):
        (tmp_path / name).write_text("version = 1\n")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with runs.open_run(uri, "small") as run:
        version = registry.register_model(run, small.folder, "small")
    assert not [name for name in os.environ if name.startswith("MLFLOW") and "UV" in name]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/small/{version}", dst_path=str(tmp_path / "model")))
    names = {path.name for path in folder.iterdir()}
    assert {"MLmodel", "requirements.txt", "python_env.yaml"} <= names
    assert not names & {"uv.lock", "pyproject.toml", ".python-version"}
    needed = (folder / "requirements.txt").read_text().split()
    assert [item.partition("==")[0] for item in needed] == list(SERVED_PACKAGES)
