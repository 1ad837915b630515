"""Logged requests say what was asked, what features saw and what was replied, and logging never stops a reply."""

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.ranking import new_request_id
from mmoe_rec.live import request_log
from mmoe_rec.live.request_log import RequestLog, RequestLogOptions, check_log_folder, hash_features, is_sampled
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.arrays import Ragged
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel, as_request
from tests.log.small_logs import random_log
from tests.processes import PATIENCE, until
from tests.server.asking import ask, element, logged, logging_app, outcomes, take_up
from tests.server.test_processes import Running, served


@pytest.fixture(scope="module")
def with_ids(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A model whose log has ids of requests, strings."""
    log = random_log(1, rows=600)
    users, times = log["user"].to_pylist(), log["time"].to_pylist()
    ids = pa.array([f"{user} {time}" for user, time in zip(users, times, strict=True)])
    columns = {"user": "user", "candidate": "item", "time": "time", "request": "page"}
    return SmallModel(tmp_path_factory.mktemp("ids"), log=[log.append_column("page", ids)], columns=columns)


def test_a_row_holds_what_was_asked_seen_and_replied(small: SmallModel, tmp_path: Path) -> None:
    table, rows = small.later_rows()
    weights = {"click": 2.0}
    first, second = as_request(table), element(task_weights=weights)
    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        left, two = ask(app, {"inputs": [first, second], "params": {"top_k": 15, "task_weights": {"spent": 0.5}}}).tree[
            "predictions"
        ]
    actual = logged(tmp_path)
    assert outcomes(app) == {"written": 2}
    mine = actual.filter(pa.array(np.array(actual["served_request"].to_pylist()) == left["request_id"]))
    assert mine["item"].to_pylist() == left["candidates"]
    assert mine["served_score"].to_pylist() == left["scores"]
    assert mine["served_rank"].to_pylist() == [*range(1, 16)]
    assert (set(mine["served_candidates"].to_pylist()), set(mine["served_replied"].to_pylist())) == ({20}, {15})
    for name, values in left["predictions"].items():
        np.testing.assert_allclose(mine[f"served_predicted_{name}"].to_numpy(), values, rtol=1e-6)
    place = left["order"]
    for name in ("user", "item", "time", "brand", "price", "tags", "born"):
        assert mine[name].to_pylist() == rows.column(name).take(pa.array(place)).to_pylist(), name
    assert "slot" not in actual.column_names
    assert {*mine["served_weights"].to_pylist()} == {'{"spent": 0.5}'}
    about = {name: {*mine[f"served_{name}"].to_pylist()} for name in ("model", "version", "artifact", "fraction")}
    assert about == {"model": {"small"}, "version": {"7"}, "artifact": {left["model"]["version"]}, "fraction": {1.0}}
    # The second request gave ids only: the rest is what the model knows of them, and null of the unknown one.
    right = actual.filter(pa.array(np.array(actual["served_request"].to_pylist()) == two["request_id"]))
    assert right["item"].to_pylist() == two["candidates"]
    assert {*right["served_weights"].to_pylist()} == {json.dumps(weights)}
    known = pq.read_table(small.prepared.serving / "latest.candidate.parquet").to_pylist()
    brands = {item["item"]: item["brand"] for item in known}
    assert right["brand"].to_pylist() == [brands.get(candidate) for candidate in two["candidates"]]
    assert None in right["brand"].to_pylist()


def test_digests_are_those_of_the_same_rows_encoded_offline(small: SmallModel, tmp_path: Path) -> None:
    table, _ = small.later_rows()
    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        ask(app, {"inputs": [element(), as_request(table), element(user={"user": USER + 1})]})
    rows = logged(tmp_path)
    pipeline = FeaturePipeline.load(small.folder / "features")
    encoded, layout = pipeline.encode(LogRows(rows, pipeline.schema)), pipeline.layout
    dense = {item.name: encoded.dense[:, place] for place, item in enumerate(layout.dense)}
    expected = hash_features(encoded.ids, dense, layout)
    inputs = {item.name: item.feature for item in (*layout.ids, *layout.dense) if not item.placement}
    assert expected.keys() == set(inputs.values())
    for name, hashes in expected.items():
        assert rows[f"served_digest_{name}"].to_pylist() == hashes.tolist(), name
    assert len(set(expected["item_click"].tolist())) > 5

    def changes(ids: dict[str, Any], numbers: dict[str, Any]) -> dict[str, list[int]]:
        different = {
            name: np.flatnonzero(item != expected[name]) for name, item in hash_features(ids, numbers, layout).items()
        }
        return {name: item.tolist() for name, item in different.items() if len(item)}

    for name, values in dense.items():  # one bit of one number
        right = values.copy()
        right[3] = np.nextafter(values[3], np.float32(9))
        assert changes(encoded.ids, dense | {name: right}) == ({inputs[name]: [3]} if name in inputs else {}), name
    for name, ids in encoded.ids.items():
        if isinstance(ids, Ragged):
            row = int(np.flatnonzero(ids.lengths > 1)[0])
            places = np.arange(len(ids.values))
            first = int(ids.lengths[:row].sum())
            places[[first, first + 1]] = places[[first + 1, first]]
            changed: Any = Ragged(ids.values[places], ids.lengths)
            if ids.values[first] == ids.values[first + 1]:
                continue
        else:
            row, changed = 5, ids.copy()
            changed[row] += 1
        assert changes({**encoded.ids, name: changed}, dense) == ({inputs[name]: [row]} if name in inputs else {}), name


def test_the_callers_own_id_is_kept_and_checked(with_ids: SmallModel, tmp_path: Path) -> None:
    own = element(context={**CONTEXT, "page": "a page"})
    with logging_app(with_ids.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        left, two, three = ask(app, {"inputs": [own, element(), element(context={**CONTEXT, "page": None})]}).tree[
            "predictions"
        ]
        assert left["request_id"] == "a page"
        assert len(two["request_id"]) == len(three["request_id"]) == 32
        assert two["request_id"] != three["request_id"]
        wrong = ask(app, {"inputs": [element(context={**CONTEXT, "page": 5})]})
        assert wrong.message == "column 'page' must hold strings, as in the log; found integers"
    ids = logged(tmp_path)["served_request"].to_pylist()
    assert set(ids) == {"a page", two["request_id"], three["request_id"]}


def test_a_server_that_does_not_log_gives_no_id_and_keeps_nothing(with_ids: SmallModel) -> None:
    from mmoe_rec.inference.ranker import Ranker

    ranking = Ranker.load(with_ids.folder).rank({"user": USER}, {**CONTEXT, "page": "x"}, {"item": ITEMS})
    assert ranking.ranked_request is None
    assert "request_id" not in ranking.to_dict()


def test_the_share_is_by_the_id_alone(small: SmallModel, tmp_path: Path) -> None:
    numbers = [*range(20_000)]
    for fraction in (0.0, 0.1, 0.5):
        actual = np.mean([is_sampled(number, fraction) for number in numbers])
        assert abs(actual - fraction) < 0.02
    assert all(is_sampled(number, 0.5) for number in numbers if is_sampled(number, 0.1))
    assert is_sampled(5, 0.3) == is_sampled("5", 0.3)
    assert {new_request_id(True) <= 2**53 for _ in range(99)} == {True}
    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=0.3)) as app:
        replies = ask(app, *({"inputs": [element()] * 9} for _ in range(12)))
    ids = [prediction["request_id"] for reply in replies for prediction in reply.tree["predictions"]]
    expected = {item for item in ids if is_sampled(item, 0.3)}
    assert 10 < len(expected) < 60
    assert set(logged(tmp_path)["served_request"].to_pylist()) == expected
    assert outcomes(app) == {"written": len(expected), "unsampled": 108 - len(expected)}


def test_what_was_refused_is_not_logged(small: SmallModel, tmp_path: Path) -> None:
    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        assert ask(app, {"inputs": [element(), element(user={})]}).status == 400
        reply = ask(app, {"inputs": [element(), element(user={})]}, page="/invocations?partial=true").tree
    assert set(logged(tmp_path)["served_request"].to_pylist()) == {reply["predictions"][0]["request_id"]}


def test_a_full_queue_drops_and_counts_and_answers(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "MAX_QUEUED_CANDIDATES", 12)  # two requests of five, whatever of them is replied
    go_on, began = threading.Event(), threading.Event()
    write_log_file = request_log.write_log_file

    def slow(*arguments: Any) -> Path:
        began.set()
        go_on.wait()
        return write_log_file(*arguments)

    monkeypatch.setattr(request_log, "write_log_file", slow)
    monkeypatch.setattr(request_log, "ROWS_PER_FILE", 1)
    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        ask(app, {"inputs": [element(top_k=1)]})
        assert began.wait(600)
        replies = [ask(app, {"inputs": [element(top_k=1)]}) for _ in range(5)]
        waiting = outcomes(app)
        go_on.set()
    assert [reply.status for reply in replies] == [200] * 5
    assert waiting == {"dropped": 3}
    assert outcomes(app) == {"dropped": 3, "written": 3}
    assert len(logged(tmp_path)) == 3
    assert caplog.text.count("requests arrive faster than they can be logged") == 1


def test_each_reply_that_waits_for_a_file_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a reply costs the same however many wait."""
    asked = list[Any]()

    class Replied(SimpleNamespace):
        reply = SimpleNamespace(model={"version": "1"})

        def __len__(self) -> int:
            asked.append(self)
            return 5

        def to_table(self) -> "Replied":
            return self

    monkeypatch.setattr(RequestLog, "_write", lambda log, tables: written.append(len(tables)) or [])
    monkeypatch.setattr(request_log, "ROWS_PER_FILE", 500)
    written, log = list[int](), RequestLog(RequestLogOptions(tmp_path), lambda *_: None)
    for _ in range(250):
        log._queue.put(Replied())
    log.close()
    assert written == [100, 100, 50]
    assert len(asked) == 2 * 250


@pytest.mark.parametrize("problem", ["gone", "full"])
def test_a_disk_that_fails_is_reported_once_and_serving_goes_on(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str
) -> None:
    folder = tmp_path / "log"
    monkeypatch.setattr(request_log, "ROWS_PER_FILE", 1)
    with logging_app(small.folder, RequestLogOptions(folder, fraction=1.0)) as app:
        if problem == "gone":
            folder.rmdir()
        else:
            monkeypatch.setattr(request_log, "atomic_file", _no_space)
        for number in range(1, 4):
            assert ask(app, {"inputs": [element()]}).status == 200
            until(lambda number=number: outcomes(app) == {"failed": number})
        message = [record.getMessage() for record in caplog.records if "can't be logged" in record.getMessage()]
        assert len(message) == 1
        assert str(folder) in message[0]
        assert "serving continues" in message[0]
        assert ("No space left" in message[0]) == (problem == "full")
        assert not folder.exists() or not any(folder.iterdir())  # nothing was made on the disk below
        monkeypatch.undo()
        folder.mkdir(exist_ok=True)
        ask(app, {"inputs": [element()]})
    assert outcomes(app) == {"failed": 3, "written": 1}


def _no_space(path: Path) -> Any:
    raise OSError(28, "No space left on device")


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"requests can't be logged in '.*file'"):
        check_log_folder(tmp_path / "file")
    check_log_folder(tmp_path / "new" / "folder")
    assert [*(tmp_path / "new" / "folder").iterdir()] == []


def test_another_model_begins_another_file(small: SmallModel, with_ids: SmallModel, tmp_path: Path) -> None:
    from mmoe_rec.inference.artifact import ResolvedModel

    with logging_app(small.folder, RequestLogOptions(tmp_path, fraction=1.0)) as app:
        left = ask(app, {"inputs": [element()]}).tree["predictions"][0]
        take_up(app.models, ResolvedModel(with_ids.folder, "models:/small/8"))
        two = ask(app, {"inputs": [element()]}).tree["predictions"][0]
    files = [pq.read_table(path) for path in sorted(tmp_path.iterdir())]
    assert [set(file["served_artifact"].to_pylist()) for file in files] == [
        {item["model"]["version"]} for item in (left, two)
    ]
    assert [set(file["served_version"].to_pylist()) for file in files] == [{"7"}, {"8"}]


# Several workers, signals and kills: what is logged appears whole, and nothing of it twice


def ids_of(running: Running, calls: int) -> set[str]:
    """The ids of requests that were answered."""
    actual = set()
    for _ in range(calls):
        status, tree = running.send({"inputs": [element(), element()]})
        assert status == 200
        actual |= {prediction["request_id"] for prediction in tree["predictions"]}
    return actual


@pytest.mark.thorough
def test_a_worker_that_is_killed_loses_what_it_has_not_written(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    words = ["--workers", "2", "--log-requests", str(folder), "--log-fraction", "1", "--log-seconds", "1"]
    with served(small.folder, tmp_path, *words) as running:
        ids = ids_of(running, 10)
        until(lambda: 'request_log_total{outcome="written"} 20.0' in _metrics(running))
        before = {path.name for path in folder.iterdir()}
        for worker in running.workers():
            os.kill(worker, signal.SIGKILL)
        until(lambda: "is replaced" in running.log.read_text())
        until(lambda: _answers(running))
        later = ids_of(running, 5)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
    assert before <= {path.name for path in folder.iterdir()}
    actual = logged(folder)["served_request"].to_pylist()
    assert ids | later <= set(actual)
    assert all(actual.count(item) == len(ITEMS) for item in set(actual))
    for file in folder.glob("*.parquet"):
        pq.read_table(file)


def _metrics(running: Running) -> str:
    return str(running.send(None, "/metrics", "GET")[1])


def _answers(running: Running) -> bool:
    try:
        return running.send({"inputs": [element()]})[0] == 200
    except (OSError, ValueError):
        return False
