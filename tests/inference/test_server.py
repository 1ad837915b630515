"""The model behind `mlflow models serve`: equal scores, readable refusals, no training library in the process."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.tracking import registry, runs
from tests.inference.running_server import Server, answers, running_server
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
    plain = request_of()
    own = request_of(task_weights={"liked": 3}, top_k=1)
    params = {"task_weights": {"engagement": 1, "satisfaction": 0.5}, "top_k": 2}
    status, body = server.post({"inputs": [plain, own], "params": params})
    assert status == 200
    first, second = body["predictions"]
    expected = ranker.rank(plain["user"], CONTEXT, plain["candidates"], params["task_weights"], 2)  # type: ignore[arg-type]
    assert first["candidates"] == expected.candidates
    np.testing.assert_allclose(first["scores"], expected.scores, rtol=1e-5)
    assert first["tables_as_of"] == expected.tables_as_of
    assert first["request_time"] == expected.request_time
    assert second["candidates"] == ranker.rank(plain["user"], CONTEXT, plain["candidates"], {"liked": 3}, 1).candidates


@pytest.mark.parametrize(
    ("changes", "params", "sentence"),
    [
        ({"candidates": {"item": ITEMS, "prise": [1] * 5}}, {}, "'candidates' has an unknown column 'prise'; did you"),
        ({"candidates": {"item": list(range(100_000))}}, {}, "has 100,000 candidates; this model takes at most 50"),
        ({"candidates": {"item": ITEMS, "price": [float("nan")] * 5}}, {}, "NaN"),
        ({"usr": {"user": 7}}, {}, "a request has no key 'usr'; did you mean 'user'?"),
        ({"task_weights": 3}, {}, "'task_weights' must be an object of numbers"),
        ({"explain": 1}, {}, "'explain' must be true or false"),
        ({}, {"task_weights": {"click": -1}}, "click"),
        ({}, {"gate_top_k": 0}, "gate_top_k"),
    ],
)
def test_refusals_are_one_sentence(
    server: Server, changes: dict[str, Any], params: dict[str, Any], sentence: str
) -> None:
    status, body = server.post({"inputs": [request_of(**changes)], "params": params})
    assert status == 400
    assert sentence in body["message"]
    assert len(json.dumps(body)) < 400


@pytest.mark.parametrize("body", [b'{"inputs": [', b"[]", b'{"user": {}}', b'{"inputs": 5}', b'{"inputs": [5]}'])
def test_malformed_bodies(server: Server, body: bytes) -> None:
    status, reply = server.post(body)
    assert status == 400
    assert reply["message"]


def test_which_of_several_requests_is_wrong(server: Server) -> None:
    status, body = server.post({"inputs": [request_of(), request_of(user={})]})
    assert status == 400
    assert body["message"].startswith("inputs[1]: 'user' needs a column")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_holds_no_training_library(server: Server) -> None:
    maps = [
        path.read_text() for path in Path("/proc").glob("[0-9]*/maps") if _group_of(path.parent) == server.process.pid
    ]
    assert any("libtorch" in each for each in maps)
    assert not any(name in each for each in maps for name in ("fbgemm_gpu", "torchrec"))


def _group_of(process: Path) -> int | None:
    try:
        return os.getpgid(int(process.name))
    except ProcessLookupError:
        return None


def test_still_alive_after_all_that(server: Server) -> None:
    assert answers(f"http://127.0.0.1:{server.port}/ping")
    assert server.post({"inputs": [request_of()]})[0] == 200
