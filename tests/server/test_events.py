"""Events that callers send: checked, on disk before they are acknowledged, and known to replies from then on."""

import asyncio
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sql

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.reader import RequestReader
from mmoe_rec.inference.request import Request
from mmoe_rec.live.journal import BATCHES, Batch, Journal
from mmoe_rec.log.columns import UTC_MICROSECONDS
from mmoe_rec.log.rows import LogRows
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from mmoe_rec.server.openapi import ARROW
from tests.inference.small_model import ITEMS, SmallModel
from tests.log.small_logs import DAY, START, log_rows, random_log
from tests.processes import until
from tests.server.asking import Answer, ask, reply

USERS = [-7, 0, 5]
EXPLAIN = {"explain": True}


@pytest.fixture
def models(small: SmallModel, tmp_path: Path) -> Models:
    return _models(small, tmp_path)


def _models(small: SmallModel, work: Path, **limits: Any) -> Models:
    Journal(work / "journal.db").close()
    models = Models(Limits(**limits), str(work / "journal.db"))
    models.load(Source(small.folder, "models:/small/7", "a_run"))
    return models


@pytest.fixture
def app(models: Models) -> Application:
    return Application(models, Limits())


def later_log(seed: int, rows: int = 80) -> pa.Table:
    """Rows like those of the small model's log, from the day on that follows its end."""
    table = random_log(seed, rows=rows, days=3.0)
    times = table["time"].cast(pa.int64()).to_numpy() + 11 * DAY
    return table.set_column(table.column_names.index("time"), "time", pa.array(times).cast(table["time"].type))


def as_json(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as a caller sends them."""
    rows = table.to_pylist()
    for row in rows:
        for name in ("time", "born"):
            row[name] = None if row[name] is None else row[name].isoformat()
    return rows


def asked(time: int, user: int) -> dict[str, Any]:
    return {
        "user": {"user": user},
        "context": {"time": np.datetime64(time, "us").item().isoformat()},
        "candidates": {"item": ITEMS, "brand": ["a", "b", None, "ç", "a"]},
    }


def explained(app: Application, after: str, time: int, user: int) -> list[dict[str, Any]]:
    answer = ask(app, {"inputs": [asked(time, user)], "params": EXPLAIN}, page=f"/invocations?after={after}")
    assert answer.status == 200, answer.tree
    ranking = answer.tree["predictions"][0]
    by_item = dict(zip(ranking["candidates"], ranking["explanations"], strict=True))
    return [by_item[item] for item in ITEMS]


def expected(small: SmallModel, events: LogRows, time: int, user: int) -> list[dict[str, Any]]:
    """What the memories of the model say once all events have been added to them, without anything live."""
    pipeline = FeaturePipeline.load(small.folder / "features")
    for encoder in pipeline.memory_encoders.values():
        encoder.memory = encoder.extended(encoder.memory, encoder.events(events))
    reader = RequestReader(pipeline, small.folder / "features", 50)
    numbers, lists = pipeline.explain(reader.rows([Request(**asked(time, user))]))
    return [
        {
            "counters": {name: None if np.isnan(each[row]) else float(each[row]) for name, each in numbers.items()},
            "histories": {name: each[row] for name, each in lists.items()},
        }
        for row in range(len(ITEMS))
    ]


def test_replies_know_what_was_acknowledged(small, app):
    table = later_log(3)
    rows, position = as_json(table), ""
    for start in range(0, len(rows), 13):
        answer = ask(app, {"events": rows[start : start + 13]}, page="/events")
        assert answer.status == 200, answer.tree
        assert answer.tree["accepted"] == len(rows[start : start + 13])
        position = answer.tree["position"]
    times = table["time"].cast(pa.int64()).to_numpy()
    compared = 0
    for time in (*np.unique(times)[::7].tolist(), int(times.max()) + 1, int(times.max()) + 4 * DAY):
        for user in USERS:
            want = expected(small, log_rows(table, small.settings.schema_), time, user)
            for found, each in zip(explained(app, position, time, user), want, strict=True):
                for name, value in each["counters"].items():
                    served = found["counters"][name]
                    assert (served is None) == (value is None), name
                    assert served is None or np.float32(served) == np.float32(value), (name, time, user)
                    compared += 1
                assert found["histories"] == each["histories"]
    assert compared > 1_000
    without = expected(small, log_rows(table.slice(0, 0), small.settings.schema_), int(times.max()) + 1, 5)
    assert without[0] != want[0]  # the events do change what is known


def test_an_arrow_stream_is_the_same_as_json(small, tmp_path):
    table = later_log(4)
    found = []
    for name in ("json", "arrow"):
        app = Application(_models(small, tmp_path / name), Limits())
        if name == "json":
            answer = ask(app, {"events": as_json(table)}, page="/events")
        else:
            answer = ask(app, stream(table), page="/events", headers={"Content-Type": ARROW})
        assert answer.status == 200, answer.tree
        found.append(explained(app, answer.tree["position"], START + 20 * DAY, 5))
    assert found[0] == found[1]


def stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"events": [{}]}, "row 0: there is no column 'user'"),
        ({"events": []}, "at least one"),
        ({"events": {}}, "list"),
        ({"rows": []}, "must be an object such as"),
        ({"events": [{}], "rows": []}, "no key 'rows'"),
        ({"events": [1]}, "row 0 must be an object"),
        ({"events": [{}], "log": "views"}, "no log of events 'views'"),
        ({"events": [{}], "log": 3}, "'log' must be"),
        (b"{", "not valid JSON"),
        (b'{"events": [], "events": []}', "twice"),
    ],
)
def test_a_wrong_call_is_refused_in_a_sentence(app, body, says):
    before = ask(app, b"", page="/version", method="GET").tree["position"]
    answer = ask(app, body, page="/events")
    assert answer.status == 400
    assert says in answer.message
    assert ask(app, b"", page="/version", method="GET").tree["position"] == before


def test_a_batch_with_one_wrong_row_is_refused_whole(app):
    rows = as_json(later_log(5, rows=6))
    rows[4]["click"] = 2
    answer = ask(app, {"events": rows}, page="/events")
    assert answer.status == 400
    assert "row 4" in answer.message
    assert "click" in answer.message
    good = ask(app, {"events": rows[:1]}, page="/events").tree
    assert good["accepted"] == 1
    learnt = [line for line in _metrics(app) if line.startswith("mmoe_rec_events_total")]
    assert learnt == ['mmoe_rec_events_total{log=""} 1.0']


def test_rows_that_come_again_count_once(small, app):
    table = later_log(6)
    rows = as_json(table)
    ask(app, {"events": rows}, page="/events")
    changed = [dict(row, click=0.0 if row["click"] else 1.0) for row in rows[:5]]
    told = ask(app, {"events": [*rows[10:20], *changed]}, page="/events").tree
    assert told["accepted"] == 15, "it is found out later, and told elsewhere, that none of them counts"
    position = told["position"]
    time = START + 20 * DAY
    want = expected(small, log_rows(table, small.settings.schema_), time, 5)
    for found, each in zip(explained(app, position, time, 5), want, strict=True):
        assert found["histories"] == each["histories"]
        assert found["counters"]["item_click_rows"] == pytest.approx(each["counters"]["item_click_rows"], abs=1e-12)
    counted = dict(line.rsplit(" ", 1) for line in _metrics(app) if line.startswith("mmoe_rec_events_learnt_total"))
    assert counted['mmoe_rec_events_learnt_total{outcome="duplicate"}'] == "10.0"
    assert counted['mmoe_rec_events_learnt_total{outcome="conflict"}'] == "5.0"


def test_late_and_unordered_rows_are_told(small, app):
    early = random_log(9, rows=4)  # of the time of the model's own log
    told = ask(app, {"events": as_json(early)}, page="/events").tree
    assert told["late"] > 0
    rows = as_json(later_log(10, rows=20))
    assert ask(app, {"events": rows[10:]}, page="/events").tree["out_of_order"] == 0
    told = ask(app, {"events": rows[:10]}, page="/events").tree
    assert told["late"] == 0
    assert told["out_of_order"] > 0


@pytest.mark.parametrize("how", ["the server starts again", "another model takes its place"])
def test_what_was_learnt_is_known_afterwards(small, tmp_path, app, models, how):
    position = ask(app, {"events": as_json(later_log(7))}, page="/events").tree["position"]
    time = START + 20 * DAY
    before = explained(app, position, time, 5)
    if how == "the server starts again":
        app = Application(_models(small, tmp_path), Limits())
    else:
        models.load(Source(small.folder, "models:/small/8", "a_run"))
    assert ask(app, b"", page="/version", method="GET").tree["position"] == position
    assert explained(app, position, time, 5) == before


def test_a_server_without_a_journal_says_so(small):
    models = Models(Limits())
    models.load(Source(small.folder, "models:/small/7"))
    app = Application(models, Limits())
    assert "--journal" in ask(app, {"events": [{}]}, page="/events").message
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page="/invocations?after=1")
    assert answer.status == 400
    assert "takes no events" in answer.message


def _metrics(app: Application) -> list[str]:
    return ask(app, b"", page="/metrics", method="GET").body.decode().splitlines()


def test_calls_at_the_same_time_are_each_taken_once(small, app):
    table = later_log(13, rows=60)
    rows = as_json(table)

    async def together() -> list[Answer]:
        calls = (reply(app, {"events": rows[start : start + 3]}, page="/events") for start in range(0, 60, 3))
        return await asyncio.gather(*calls)

    answers = asyncio.run(together())
    assert [each.tree for each in answers if each.status != 200] == []
    assert sum(each.tree["accepted"] for each in answers) == 60
    position = max((each.tree["position"] for each in answers), key=int)
    time = START + 20 * DAY
    want = expected(small, log_rows(table, small.settings.schema_), time, 5)
    for found, each in zip(explained(app, position, time, 5), want, strict=True):
        assert found["counters"]["item_click_rows"] == each["counters"]["item_click_rows"]


def test_what_a_row_leaves_out_is_what_was_acknowledged_before(small, app):
    """However soon it comes, and whatever other rows of the call give."""
    rows = as_json(later_log(14, rows=40))
    brands = ["x", "y", "z"]

    def brand_after(sent: list[dict[str, Any]]) -> Any:
        position = ask(app, {"events": sent}, page="/events").tree["position"]
        ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}")
        ids = LogRows(pa.table({"user": [5], "item": [5]}), small.settings.schema_)
        return app.models.current.ranker.reader.completed(ids).table["brand"][0].as_py()

    for number in range(12):
        told = {**rows[number], "item": 5, "time": iso(START + 12 * DAY + 2 * number), "brand": brands[number % 3]}
        assert ask(app, {"events": [told]}, page="/events").status == 200
        silent = {**rows[number], "item": 5, "time": iso(START + 12 * DAY + 2 * number + 1), "user": 77}
        del silent["brand"]
        other = {**rows[number + 20], "item": 100 + number, "brand": "a"}
        assert brand_after([other, silent]) == brands[number % 3]
    assert brand_after([{**silent, "time": iso(START + 13 * DAY), "user": 78, "brand": None}]) is None


def iso(time: int) -> str:
    return np.datetime64(time, "us").item().isoformat()


def test_an_error_while_rows_are_told_apart_stays(small, app, models, monkeypatch):
    learning = models.current.learning
    monkeypatch.setattr(learning._duplicates, "filter", lambda batches: 1 / 0)
    position = ask(app, {"events": as_json(later_log(15, rows=3))}, page="/events").tree["position"]
    until(lambda: ask(app, b"", page="/version", method="GET").tree["events_failure"])
    monkeypatch.undo()
    ask(app, {"events": as_json(later_log(16, rows=3))}, page="/events")
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]})
    assert "some events are not counted" in answer.tree["predictions"][0]["warnings"][-1]
    assert ask(app, b"", page="/version", method="GET").tree["position"] != position
    models.load(Source(small.folder, "models:/small/9"))  # which begins anew
    until(lambda: ask(app, b"", page="/version", method="GET").tree["events_failure"] is None)
    assert ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}").status == 200


def test_models_that_are_replaced_keep_no_file_open(small, app, models):
    ask(app, {"events": as_json(later_log(17, rows=3))}, page="/events")

    def journals() -> int:
        found = 0
        for each in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # others open and close files meanwhile
                found += "journal" in os.readlink(f"/proc/self/fd/{each}")
        return found

    models.load(Source(small.folder, "models:/small/8"))
    before = journals()
    for _ in range(4):
        models.load(Source(small.folder, "models:/small/8"))
    assert journals() <= before + 1


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x" * 100_000] * 50, pa.string_view()),
        pa.DictionaryArray.from_arrays(pa.array([0] * 50), pa.array([["x"] * 1000])),
        pa.array([["x" * 10_000]] * 50).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    ],
    ids=["view", "coded lists", "lists of coded"],
)
def test_arrow_types_that_grow_are_refused(app, column):
    table = pa.table({"user": [5] * 50, "brand": column})
    answer = ask(app, stream(table), page="/events", headers={"Content-Type": ARROW})
    assert answer.status == 400
    assert "column 'brand' is of Arrow's type" in answer.message


def test_a_journal_of_another_model_is_told(small, tmp_path):
    Journal(tmp_path / "journal.db").append(Batch(None, 1, pa.table({"person": [1], "when": [2]})))
    with pytest.raises(UserError, match="holds rows of the interaction log without a column 'user'"):
        _models(small, tmp_path)


def test_a_lost_journal_is_told(small, tmp_path):
    """By the server that is running, and by one that is to start."""
    app = Application(_models(small, tmp_path), Limits())
    ask(app, {"events": as_json(later_log(18, rows=5))}, page="/events")
    with Journal(tmp_path / "journal.db").appending() as connection:
        connection.execute(sql.delete(BATCHES))
    answer = ask(app, {"events": as_json(later_log(19, rows=5))}, page="/events")
    assert (answer.status, "can't be kept" in answer.message) == (503, True)
    with pytest.raises(UserError, match="it ends with batch 0, and 1 were acknowledged"):
        _models(small, tmp_path)


def test_logs_of_events_that_the_model_lacks_are_told_once(
    small: SmallModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [
            text for each in caplog.records if "logs of events that the model's settings" in (text := each.getMessage())
        ]

    journal = Journal(tmp_path / "journal.db")
    event = pa.table({"user": [5], "at": pa.array([START]).cast(UTC_MICROSECONDS)})
    journal.append(Batch("returns", 0, event), Batch("clicks", 0, event))
    models = _models(small, tmp_path)
    assert [each.endswith(": 'clicks', 'returns'") for each in told()] == [True]
    assert models.current is not None
    assert models.current.learning is not None
    for source in ("returns", "clicks", "views", "views"):  # the last one by a model that came later
        journal.append(Batch(source, 0, event))
        models.current.learning.catch_up()
    assert [each.endswith(": 'views'") for each in told()] == [False, True]
