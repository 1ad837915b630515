"""Events that callers send: checked, on disk before they are acknowledged, and known to replies from then on."""

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sql

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.artifact import ResolvedModel
from mmoe_rec.inference.request_reader import Request, RequestReader
from mmoe_rec.live.journal import Batch, Journal
from mmoe_rec.live.journal_rows import make_batch, write_journal_files
from mmoe_rec.log.rows import LogRows
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from mmoe_rec.settings.sections import Serving
from tests.inference.small_model import ITEMS, SmallModel
from tests.log.small_logs import DAY, START, log_rows, random_log
from tests.processes import until
from tests.server.asking import Answer, as_json, ask, element, numbers, reply, take_up

USERS = [-7, 0, 5]
EXPLAIN = {"explain": True}


@pytest.fixture
def models(small: SmallModel, tmp_path: Path) -> ModelManager:
    return _models(small, tmp_path)


def _models(small: SmallModel, work: Path, address: str | None = None, **limits: Any) -> ModelManager:
    address = address or str(work / "journal.db")
    Journal(address).close()
    options = ServerOptions(Serving(**limits), journal=address)
    return ModelManager(options, ResolvedModel(small.folder, "models:/small/7", "a_run"))


@pytest.fixture
def app(models: ModelManager) -> Application:
    return Application(models)


def later_log(seed: int, rows: int = 80) -> pa.Table:
    """Rows like those of the small model's log, from the day on that follows its end."""
    table = random_log(seed, rows=rows, days=3.0)
    times = table["time"].cast(pa.int64()).to_numpy() + 11 * DAY
    return table.set_column(table.column_names.index("time"), "time", pa.array(times).cast(table["time"].type))


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
    for encoder in pipeline.point_in_time_encoders.values():
        encoder.store = encoder.extended(encoder.store, encoder.events(events))
    reader = RequestReader(pipeline, small.folder / "features", 50)
    numbers, lists = pipeline.explain(reader.rows([Request(**asked(time, user))]))
    return [
        {
            "counters": {name: None if np.isnan(item[row]) else float(item[row]) for name, item in numbers.items()},
            "histories": {name: item[row] for name, item in lists.items()},
        }
        for row in range(len(ITEMS))
    ]


def test_the_schema_of_a_server_with_a_journal_has_events(app):
    tree = ask(app, b"", page="/openapi.json", method="GET").tree
    assert [parameter["name"] for parameter in tree["paths"]["/invocations"]["post"]["parameters"]] == [
        "partial",
        "after",
    ]
    assert tree["paths"]["/events"].keys() == {"post"}


def test_replies_know_what_was_acknowledged(small, app):
    table, position = later_log(3), ""
    for start in range(0, len(table), 13):
        some = table.slice(start, 13)
        answer = ask(app, {"events": as_json(some)}, page="/events")
        assert answer.status == 200, answer.tree
        assert answer.tree["accepted"] == len(some)
        position = answer.tree["position"]
    again = [dict(row, click=0.0 if row["click"] else 1.0) for row in as_json(table)[10:25]]
    message = ask(app, {"events": again}, page="/events").tree
    assert message["accepted"] == 15, "it is found out later, and told elsewhere, that none of them counts"
    position = message["position"]
    times = table["time"].cast(pa.int64()).to_numpy()
    compared = 0
    for time in (*np.unique(times)[::7].tolist(), int(times.max()) + 1, int(times.max()) + 4 * DAY):
        for user in USERS:
            want = expected(small, log_rows(table, small.settings.schema_), time, user)
            for actual, item in zip(explained(app, position, time, user), want, strict=True):
                for name, value in item["counters"].items():
                    served = actual["counters"][name]
                    assert (served is None) == (value is None), name
                    assert served is None or np.float32(served) == np.float32(value), (name, time, user)
                    compared += 1
                assert actual["histories"] == item["histories"]
    assert compared > 1_000
    without = expected(small, log_rows(table.slice(0, 0), small.settings.schema_), int(times.max()) + 1, 5)
    assert without[0] != want[0]  # the events do change what is known
    assert numbers(app)['events_ingested_total{outcome="duplicate"}'] == 15


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"rows": []}, "must be an object such as"),
        ({"events": [{}], "rows": []}, "no key 'rows'"),
        ({"events": [{}], "log": 3}, "'log' must be"),
        (b"{", "not valid JSON"),
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
    assert [item for name, item in numbers(app).items() if name.startswith("events_total")] == [1]


@pytest.mark.parametrize("how", ["the server starts again", "another model takes its place"])
def test_what_was_learnt_is_known_afterwards(small, tmp_path, app, models, how):
    position = ask(app, {"events": as_json(later_log(7))}, page="/events").tree["position"]
    time = START + 20 * DAY
    before = explained(app, position, time, 5)
    if how == "the server starts again":
        app = Application(_models(small, tmp_path))
    else:
        take_up(models, ResolvedModel(small.folder, "models:/small/8", "a_run"))
    assert ask(app, b"", page="/version", method="GET").tree["position"] == position
    assert explained(app, position, time, 5) == before


def test_a_server_without_a_journal_says_so(small):
    app = Application(ModelManager(ServerOptions(), ResolvedModel(small.folder, "models:/small/7")))
    assert "--journal" in ask(app, {"events": [{}]}, page="/events").message
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page="/invocations?after=1")
    assert answer.status == 400
    assert "accepts no events" in answer.message


def test_a_new_model_knows_all_that_the_one_before_took_meanwhile(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = _models(small, tmp_path)
    before, served = models.current.ingester, models.open(ResolvedModel(small.folder, "models:/small/8"))
    assert before is not None
    assert served.ingester is not None
    catch_up = served.ingester.catch_up

    def and_meanwhile() -> None:
        catch_up()
        rows = before.validator.read_json(None, as_json(later_log(20, rows=9)))
        before.journal.append(make_batch(None, rows, before.schema))
        before.catch_up()

    monkeypatch.setattr(served.ingester, "catch_up", and_meanwhile)
    models.switch_to(served)
    assert models.current is served
    assert served.ingester.position == before.position == 1


def test_a_call_that_takes_too_long_is_asked_to_retry(small: SmallModel, tmp_path: Path) -> None:
    """More calls come than threads wait for a journal that another program has locked."""
    app, journal = Application(_models(small, tmp_path, call_timeout_seconds=0.5)), Journal(tmp_path / "journal.db")
    rows = as_json(later_log(20, rows=9))

    async def scenario() -> list[Answer]:
        with journal.write_transaction():
            refused = await asyncio.gather(*(reply(app, {"events": [row]}, "/events") for row in rows[:8]))
        while (last := await reply(app, {"events": rows}, "/events")).status == 503:
            assert "no answer within" in last.message, "as on a slow machine"
        return [*refused, last]

    *refused, last = asyncio.run(scenario())
    assert {(item.status, item.headers["retry-after"]) for item in refused} == {(503, "1")}
    assert {"no answer within 0.5 seconds" in item.message for item in refused} == {True}
    assert {"events without event_id may count twice" in item.message for item in refused} == {True}
    assert numbers(app)['events_refused_total{reason="too_long"}'] >= 8
    assert last.status == 200
    assert sum(len(item) for item in journal.read(0)) == 9, "each row once, whichever call has brought it"


def test_what_a_row_leaves_out_is_what_was_acknowledged_before(small, app):
    """However soon it comes, and whatever other rows of the call give."""
    rows = as_json(later_log(14, rows=40))
    brands = ["x", "y", "z"]

    def brand_after(sent: list[dict[str, Any]]) -> Any:
        position = ask(app, {"events": sent}, page="/events").tree["position"]
        ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}")
        ids = LogRows(pa.table({"user": [5], "item": [5]}), small.settings.schema_)
        return app.models.current.ranker.reader.fill_attributes(ids).table["brand"][0].as_py()

    for number in range(12):
        message = {**rows[number], "item": 5, "time": iso(START + 12 * DAY + 2 * number), "brand": brands[number % 3]}
        assert ask(app, {"events": [message]}, page="/events").status == 200
        silent = {**rows[number], "item": 5, "time": iso(START + 12 * DAY + 2 * number + 1), "user": 77}
        del silent["brand"]
        second = {**rows[number + 20], "item": 100 + number, "brand": "a"}
        assert brand_after([second, silent]) == brands[number % 3]
    assert brand_after([{**silent, "time": iso(START + 13 * DAY), "user": 78, "brand": None}]) is None


def iso(time: int) -> str:
    return np.datetime64(time, "us").item().isoformat()


def test_models_that_are_replaced_keep_no_file_open(small, app, models):
    ask(app, {"events": as_json(later_log(17, rows=3))}, page="/events")

    def journals() -> int:
        actual = 0
        for item in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # others open and close files meanwhile
                actual += "journal" in os.readlink(f"/proc/self/fd/{item}")
        return actual

    take_up(models, ResolvedModel(small.folder, "models:/small/8"))
    before = journals()
    for _ in range(4):
        take_up(models, ResolvedModel(small.folder, "models:/small/8"))
    assert journals() <= before + 1


def test_a_journal_of_another_model_is_reported(small, tmp_path):
    Journal(tmp_path / "journal.db").append(Batch(None, 1, pa.table({"person": [1], "when": [2]})))
    with pytest.raises(
        UserError, match="rows of the journal have no column 'time', so the journal belongs to another model"
    ):
        _models(small, tmp_path)


def test_a_lost_journal_is_reported_by_the_server_that_has_written_it(app, tmp_path):
    ask(app, {"events": as_json(later_log(18, rows=5))}, page="/events")
    with Journal(tmp_path / "journal.db").write_transaction() as connection:
        connection.execute(sql.text("DELETE FROM journal_batches"))
    answer = ask(app, {"events": as_json(later_log(19, rows=5))}, page="/events")
    assert (answer.status, "can't be stored" in answer.message) == (503, True)


# How a worker's model follows the journal: callers may wait for a position, and the thread ends with its server


def after(app: Application, position: object) -> Answer:
    answer = ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}, page=f"/invocations?after={position}")
    assert isinstance(answer, Answer)
    return answer


def positions(app: Application, calls: int, seed: int = 3) -> list[int]:
    """Those that calls of /events get, each with one row."""
    rows = as_json(later_log(seed, rows=calls))
    return [int(ask(app, {"events": [row]}, page="/events").tree["position"]) for row in rows]


def test_positions_up_to_the_end_are_answered_and_others_refused(app, tmp_path):
    assert positions(app, 3) == [1, 2, 3]
    for position in (3, 1, 0, 2):
        assert after(app, position).status == 200
    for wrong in ("x", ""):
        answer = after(app, wrong)
        assert (answer.status, "not a position" in answer.message) == (400, True)
    second = Journal(tmp_path / "journal.db")
    assert second.append(*second.read(0)) == 6  # as another worker does
    assert after(app, 6).status == 200


def test_positions_of_removed_batches_are_answered(small, tmp_path):
    """A caller may come with an old one: what it stands for lies in the tables, or the reply says that it does not."""
    app = Application(_models(small, tmp_path))
    old = positions(app, 3)[-1]
    assert after(app, old).status == 200
    journal, place = Journal(tmp_path / "journal.db"), tmp_path / "log"
    place.mkdir()
    write_journal_files(journal, small.settings.schema_, str(place))
    journal.remove_until(old)
    assert after(app, positions(app, 2, seed=6)[-1]).status == 200
    assert after(app, old).status == 200
    answer = after(Application(_models(small, tmp_path)), old)
    assert answer.status == 200
    assert "the journal begins after position 3" in answer.tree["predictions"][0]["warnings"][-1]


def test_events_that_can_not_be_learnt_hold_up_only_who_waits_for_them(small, tmp_path, monkeypatch):
    app = Application(_models(small, tmp_path, call_timeout_seconds=1))

    def fails(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(app.models.current.ingester.ranker, "build_state", fails)
    (position,) = positions(app, 1)
    body = {"inputs": [asked(START + 20 * DAY, 5)]}

    async def both() -> tuple[int, bool, Answer]:
        waits = asyncio.create_task(reply(app, body, f"/invocations?after={position}"))
        return (await reply(app, body)).status, waits.done(), await waits

    status, is_over, late = asyncio.run(both())
    assert (status, is_over, late.status, late.headers["retry-after"]) == (200, False, 503, "1")
    assert "not ingested all events up to 1 in time (OSError: the disk is gone)" in late.message
    assert ask(app, body).tree["predictions"][0]["warnings"][-1].endswith(": OSError: the disk is gone")
    monkeypatch.undo()
    until(lambda: ask(app, b"", page="/version", method="GET").tree["events_failure"] is None)
    assert after(app, position).status == 200


def test_threads_end_with_their_server(small: SmallModel, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    app = Application(_models(small, tmp_path))
    positions(app, 3)
    assert ask(app, {"inputs": [asked(START + 20 * DAY, 5)]}).status == 200
    threads = set(threading.enumerate()) - before
    assert {"follower", "ranking_0"} <= {thread.name for thread in threads}
    del app

    def have_ended() -> bool:
        gc.collect()
        return not any(thread.is_alive() for thread in threads)

    until(have_ended, f"one of {threads} goes on")


@pytest.mark.parametrize("full", ["/invocations", "/events"])
def test_a_page_that_is_full_leaves_the_other_one_its_places(small: SmallModel, tmp_path: Path, full: str) -> None:
    app = Application(_models(small, tmp_path, max_concurrent_calls=2))
    limiter = {"/invocations": app.invocations.limiter, "/events": app.events.limiter}
    bodies = {"/invocations": {"inputs": [element()]}, "/events": {"events": as_json(later_log(3, rows=2))}}

    async def statuses() -> dict[str, int]:
        end = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await end.wait()

        held = [asyncio.ensure_future(reply(app, page=full, parts=slow())) for _ in range(2)]
        while limiter[full].active < 2:
            await asyncio.sleep(0)
        actual = {page: (await reply(app, body, page=page)).status for page, body in bodies.items()}
        end.set()
        await asyncio.gather(*held)
        return actual

    assert asyncio.run(statuses()) == {page: 503 if page == full else 200 for page in bodies}
    assert [value.active for value in limiter.values()] == [0, 0]
