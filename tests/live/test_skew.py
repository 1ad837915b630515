"""A skew check of a model that is right, and of models that are wrong in one way each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import artifact_version
from mmoe_rec.live import request_log
from mmoe_rec.live import skew as job
from mmoe_rec.live.refresh import update_tables
from mmoe_rec.live.skew import check_skew, describe
from mmoe_rec.log.reader import Log
from tests.commands import run
from tests.inference.small_model import SmallModel
from tests.live.fed_model import FedModel, Period, feed, read_period
from tests.log.small_logs import ALL_KINDS, BASE, DAY, START, random_log, times_of, write_log

FROM, TO = START + 6 * DAY, START + 9 * DAY
SHORT = FROM + DAY // 3
FEATURES: dict[str, Any] = {
    **ALL_KINDS,
    "age": {"kind": "id", "column": "age", "min_count": 1},
    "seen": {"kind": "history", "events": "views", "of": "item", "length": 4},
    "viewed": {"kind": "history", "events": "views", "of": "item", "length": 3, "attributes": ["brand"]},
    "shown": {"kind": "history", "task": "click", "of": "item", "length": 60, "min_label": 0},
    "seen_brand": {
        "kind": "counter",
        "events": "views",
        "by": ["user", "brand"],
        "outputs": ["log_sum", "log_count", "recency"],
        "window_days": [None, 0.5, 2],
    },
    "viewed_together": {"kind": "cooccurrence", "events": "views", "last": 4, "max_events": 9, "window_days": 2},
    "liked_together": {"kind": "cooccurrence", "task": "liked", "last": 5},
    "carts": {"kind": "counter", "events": "carts", "by": ["item"], "window_days": [1]},
}


def drawn_events(log: pa.Table, seed: int, rows: int, time: str) -> pa.Table:
    """Events at some of the log's own times and between them; some are the same as others, some keys are null."""
    rng = np.random.default_rng(seed)
    table = log.take(pa.array(rng.integers(0, len(log), rows)))
    shift = rng.choice([0, 0, 1, -1, DAY // 3], rows)
    columns = {name: pa.array(table[name].to_pylist(), mask=rng.random(rows) < 0.05) for name in ("user", "item")}
    brand = table["brand"].combine_chunks()
    return pa.table({**columns, "brand": brand, time: pa.array(times_of(table) + shift).cast(table["time"].type)})


def model_of(work: Path, ids: bool) -> SmallModel:
    """A model of a random log with late labels and ties in time, in several files in no order, and of two logs of
    events. Rows of one user and time, which are a request, agree in what describes user and context. ids: whether the
    log has ids of requests."""
    log = random_log(1, 700)
    users, times = log["user"].to_numpy(), times_of(log)
    age = (users % 7 + times // (2 * DAY)) % 3
    born = START - np.abs(users % 11) * 31 * DAY
    for name, values in (("age", pa.array(age)), ("born", pa.array(born).cast(log["born"].type))):
        log = log.set_column(log.column_names.index(name), name, values)
    sections = dict(BASE)
    if ids:
        log = log.append_column("page", pa.array([f"{user} {time}" for user, time in zip(users, times, strict=True)]))
        sections["columns"] = BASE["columns"] | {"request": "page"}
    write_log(work / "views", drawn_events(log, 1, 900, "viewed_at"), drawn_events(log, 2, 30, "viewed_at"))
    write_log(work / "carts", drawn_events(log, 3, 200, "time"))
    times = {"views": "viewed_at", "carts": "time"}
    events = {name: {"path": str(work / name), "time": time} for name, time in times.items()}
    data = {"log": str(work / "log"), "work_dir": str(work), "events": events}
    weights = {"click": 10, "spent": 0.1}  # scores are small, and a regression enters them
    tasks = BASE["tasks"] | {name: {**BASE["tasks"][name], "score_weight": item} for name, item in weights.items()}
    shuffled = log.take(pa.array(np.random.default_rng(1).permutation(len(log))))
    return SmallModel(
        work,
        log=[shuffled.slice(0, 300), shuffled.slice(300)],
        **{**sections, "data": data, "features": FEATURES, "tasks": tasks},
    )


def freeze(small: SmallModel, out: Path) -> None:
    """Writes the model with tables as if its log and its logs of events had ended before `FROM`."""
    data, before = small.settings.data, out.with_name("before")
    times = {"log": "time", **{name: item.time for name, item in data.events.items()}}
    for name, column in times.items():
        (before / name).mkdir(parents=True)
        for path in (Path(data.work_dir) / name).glob("*.parquet"):
            table = pq.read_table(path)
            early = table[column].cast(pa.int64()).to_numpy() < FROM
            pq.write_table(table.filter(pa.array(early)), before / name / path.name)
    events = {name: item.model_copy(update={"path": str(before / name)}) for name, item in data.events.items()}
    data = data.model_copy(update={"log": str(before / "log"), "events": events})
    settings = small.settings.model_copy(update={"data": data})
    update_tables(small.folder, settings, out, rebuild=True)


PREDICTED = ("click", "liked", "spent", "score")
Plant = Callable[[FedModel], None]


class World:
    """A model with the tables of a moment, and periods of its log."""

    def __init__(self, folder: Path, ids: bool = False) -> None:
        self.small, self.frozen = model_of(folder / "small", ids), folder / "frozen"
        freeze(self.small, self.frozen)
        self.log = Log(self.small.settings.data.log, self.small.settings.schema_)
        self.period, self.short = (read_period(self.log, (FROM, end)) for end in (FROM + DAY, SHORT))

    def fed(
        self, scratch: Path, plant: Plant = lambda server: None, period: Period | None = None, most: int = 500
    ) -> FedModel:
        """A model that was fed a period, and has logged its requests."""
        live = FedModel(self.frozen, scratch)
        plant(live)
        feed(period or self.period, live, most)
        live.write()
        return live

    def check(self, requests: Path, end: int = FROM + DAY) -> dict[str, Any]:
        return check_skew(self.small.settings, FROM, end, str(self.frozen), requests)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("served"))


def wrong(report: dict[str, Any]) -> dict[str, int]:
    """The names that differ, with how often."""
    return {value["name"]: value["mismatches"] for value in report["values"] if value["mismatches"]}


@pytest.mark.parametrize("most", [2, 500])
def test_a_server_that_is_right_is_equal_in_all_values(world: World, tmp_path: Path, most: int) -> None:
    """Everything is compared, in every row, also of requests whose candidates come in several calls."""
    period, live = world.period, world.fed(tmp_path, most=most)
    report = world.check(live.requests)
    # A list that is sent in several calls is compared within each call.
    assert wrong(report).keys() == ({"among", *PREDICTED} if most == 2 else set())
    assert (len(live.logged) > len(period.times)) == (most == 2)
    compared = {value["name"]: value["compared"] for value in report["values"]}
    assert set(compared.values()) == {len(period.rows)} == {report["logged_rows"]}
    features, schema = world.small.settings.features, world.small.settings.schema_
    available = {name for name in features if schema.role_of(name) != "placement"}
    assert compared.keys() == available | {*PREDICTED, "candidates"}
    assert len(period.rows) > len(period.times) > 20


def test_labels_that_are_seen_before_they_mature_are_found(world: World, tmp_path: Path) -> None:
    early = {"user_brand_liked", "liked_items"}

    def plant(server: FedModel) -> None:
        for name in early:
            server.ranker.pipeline.point_in_time_encoders[name].label_delay_us = 0

    live = world.fed(tmp_path, plant, read_period(world.log, (FROM, TO)))
    assert early <= wrong(world.check(live.requests, TO)).keys() <= {*early, *PREDICTED}


def test_an_event_that_is_swallowed_is_found(world: World, tmp_path: Path) -> None:
    def plant(server: FedModel) -> None:
        send, lost = server.send, list[str]()

        def lose_first(table: pa.Table, log: str | None) -> None:
            if log == "carts" and not lost:
                lost.append(log)
                table = table.slice(1)
            if len(table):
                send(table, log)

        server.send = lose_first  # type: ignore[method-assign]

    report = world.check(world.fed(tmp_path, plant).requests)
    assert {"carts"} <= wrong(report).keys() <= {"carts", *PREDICTED}


def test_a_column_with_a_name_of_the_request_log_is_refused() -> None:
    with pytest.raises(UserError, match="column 'served_score' has a name that the request log uses"):
        request_log.check_reserved_columns(["item", "served_score"], [request_log.SCORE])


def test_ctrl_c_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_read_request_log", stop)
    with pytest.raises(KeyboardInterrupt):
        world.check(Path("requests"))
    assert not (Path(world.small.settings.data.work_dir) / "skew").exists()


def test_refusals(world: World, request_logs: dict[str, tuple[World, pa.Table]], tmp_path: Path) -> None:
    settings, model = world.small.settings, str(world.frozen)
    pq.write_table(request_logs["no ids"][1], tmp_path / "requests.parquet")

    def refused(start: int, end: int, model: str = model, requests: Path = tmp_path) -> str:
        with pytest.raises(UserError) as refused:
            check_skew(settings, start, end, model, requests)
        assert not (Path(settings.data.work_dir) / "skew").exists()
        return str(refused.value)

    assert "is not before --to" in refused(FROM, FROM)
    for start in (FROM + 90 * DAY, FROM - 50 * DAY):
        assert "the period needs rows of the log in it and before it" in refused(start, start + 60 * DAY)
    assert "holds no model" in refused(FROM, TO, "no/model")
    (tmp_path / "requests.parquet").unlink()
    pq.write_table(pa.table({"user": [1]}), tmp_path / "x.parquet")
    assert "the files have no column 'served_request'" in refused(FROM, TO)
    own = ("request", "at", "rank", "score", "candidates", "replied", "artifact", "weights")
    pq.write_table(pa.table({f"served_{name}": [1] for name in own}), tmp_path / "y.parquet")
    assert "the files have no column 'item'" in refused(FROM, TO)
    pq.write_table(pa.table({"user": ["of another model"]}), tmp_path / "z.parquet")
    assert "can't be read together: " in refused(FROM, TO)
    (tmp_path / "z.parquet").write_bytes(b"PAR1")
    assert "z.parquet' is not a readable Parquet file" in refused(FROM, TO)


def test_rows_are_compared_or_counted_with_a_reason(
    world: World, request_logs: dict[str, tuple[World, pa.Table]], tmp_path: Path
) -> None:
    _, table = request_logs["no ids"]
    file, settings = tmp_path / "requests" / "0.parquet", world.small.settings
    file.parent.mkdir()
    pq.write_table(table, file)
    given = settings, FROM, SHORT, str(world.frozen), file.parent
    count = len(table)
    problem = f"none of {count} logged rows .* \\({count} answered by other versions of the m"
    with pytest.raises(UserError, match=problem):
        check_skew(settings, FROM, SHORT, str(world.small.folder), file.parent)
    mine = pa.array([artifact_version(world.frozen)] * (count - 3) + ["another"] * 3)
    several = np.flatnonzero(table["served_candidates"].to_numpy() > 1)
    second, wrong_one = several[0], several[several > several[0] + 5][0]
    table = table.set_column(table.column_names.index("served_artifact"), "served_artifact", mine)
    table = changed(table, "item", lambda each: each * 0 + 12345, second)
    table = changed(table, "served_digest_item_click", lambda each: each + 1, wrong_one)
    pq.write_table(table, file)
    report = check_skew(*given, tmp_path / "kept")
    assert (report["logged_rows"], report["compared_rows"]) == (count, count - 4)
    assert report["not_compared"] == {"other_version": 3, "not_in_log": 1}
    assert wrong(report) == {"item_click": 1, "candidates": 1}
    assert json.loads((tmp_path / "kept" / "skew.json").read_text())["mismatches"] == 2
    lacking, why, first, example, not_compared, last = describe(report)
    assert lacking.startswith("reply 'candidates' differs in 1 of ")
    assert why.endswith(": no logged reply has it")
    assert first == f"feature 'item_click' differs in 1 of {count - 4:,} rows"
    assert f"candidate {table['item'][wrong_one].as_py()}, at 2023-11-2" in example
    assert not_compared.startswith(f"{count - 4} of {count} logged rows are compared. Not compared: ")
    assert "3 answered by other versions of the model" in not_compared
    assert "1 not in the log" in not_compared
    assert last.endswith(": 2 mismatches")


@pytest.fixture(scope="module")
def request_logs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[World, pa.Table]]:
    """A log of events with and without ids of requests -> its world, and the request log of a third of a day."""
    actual = {}
    for name, item in (("ids", World(tmp_path_factory.mktemp("ids"), ids=True)), ("no ids", world)):
        server = item.fed(tmp_path_factory.mktemp("requests"), period=item.short)
        (file,) = server.requests.iterdir()
        actual[name] = item, pq.read_table(file)
    return actual


def changed(
    table: pa.Table, column: str, change: Callable[[np.ndarray], np.ndarray], rows: np.ndarray | None = None
) -> pa.Table:
    """A table whose numbers or times in a column are changed, in some of its rows or in all."""
    place, kind = table.column_names.index(column), table[column].type
    before = table[column].cast(kind if pa.types.is_floating(kind) else pa.int64()).to_numpy()
    after = change(before) if rows is None else np.where(np.isin(np.arange(len(table)), rows), change(before), before)
    return table.set_column(place, column, pa.array(after).cast(kind))


def rows_of_a_reply(table: pa.Table) -> np.ndarray:
    """Numbers of the rows of a reply with two or more."""
    at = table["served_at"].to_pylist()
    return next(rows for item in at if len(rows := np.flatnonzero([second == item for second in at])) > 1)


def with_user(table: pa.Table, rows: np.ndarray) -> pa.Table:
    return changed(table, "user", lambda users: users * 0 + 12345, rows)


def without(table: pa.Table, row: int) -> pa.Table:
    return table.take(pa.array(np.delete(np.arange(len(table)), row)))


def cut(table: pa.Table) -> pa.Table:
    """As if `top_k` had left one candidate out of each reply."""
    return changed(table, "served_candidates", lambda candidates: candidates + 1)


PLANTS: dict[str, Callable[[pa.Table, np.ndarray], pa.Table]] = {
    "nothing": lambda table, rows: table,
    "an hour": lambda table, rows: changed(table, "time", lambda times: times + 3_600_000_000),
    "a user": with_user,
    "the user of a row": lambda table, rows: with_user(table, rows[1:2]),
    "no first row": lambda table, rows: without(table, rows[0]),
    "no last row": lambda table, rows: without(table, rows[-1]),
    "a row of another reply": lambda table, rows: changed(table, "served_at", lambda times: times + 1, rows[:1]),
    "a whole reply": lambda table, rows: table.take(pa.array(np.delete(np.arange(len(table)), rows))),
    "top_k": lambda table, rows: cut(table),
    "top_k and no row": lambda table, rows: cut(without(table, rows[-1])),
    "another score": lambda table, rows: changed(table, "served_score", lambda each: np.roll(each, 1), rows[1:2]),
    ".2% of a score": lambda table, rows: changed(table, "served_score", lambda each: each * 1.002, rows[:1]),
    "3e-5 of a click": lambda table, rows: changed(table, "served_predicted_click", lambda each: each + 3e-5, rows[:1]),
}
"""What happens to a request log. rows: of one of its replies."""


@pytest.mark.parametrize(
    ("log", "plant", "differ", "left_out"),
    [
        ("ids", "nothing", {}, 0),
        ("ids", "an hour", {"time": "all"}, 0),
        ("ids", "a user", {"user": "reply"}, 0),
        ("ids", "the user of a row", {"user": 1}, 0),
        ("ids", "no first row", {"candidates": 1}, 0),
        ("ids", "no last row", {"candidates": 1}, 0),
        ("ids", "a row of another reply", {"candidates": 1}, 0),
        ("ids", "a whole reply", {}, 0),  # `rows_with_reply` says so: the server may not have logged it
        ("ids", "top_k", {}, 0),
        ("ids", "top_k and no row", {"candidates": 1}, 0),
        ("no ids", "another score", {"score": 1}, 0),
        ("no ids", ".2% of a score", {"score": 1}, 0),
        ("no ids", "3e-5 of a click", {"click": 1}, 0),
        ("no ids", "an hour", None, "all"),
        ("no ids", "a user", {}, "reply"),
        ("no ids", "the user of a row", {"candidates": 1}, 1),
        ("no ids", "no last row", {"candidates": 1}, 0),
    ],
)
def test_what_is_wrong_with_a_request_log_differs_or_is_not_compared(
    request_logs: dict[str, tuple[World, pa.Table]], tmp_path: Path, log: str, plant: str, differ: Any, left_out: Any
) -> None:
    world, table = request_logs[log]
    rows = rows_of_a_reply(table)
    planted = PLANTS[plant](table, rows)
    sizes = {"all": len(table), "reply": len(rows)}
    pq.write_table(planted, tmp_path / "requests.parquet")
    if differ is None:
        with pytest.raises(UserError, match=f"none of {len(table)} logged rows can be compared"):
            world.check(tmp_path, SHORT)
        return
    report = world.check(tmp_path, SHORT)
    assert wrong(report) == {name: sizes.get(number, number) for name, number in differ.items()}
    assert sum(report["not_compared"].values()) == sizes.get(left_out, left_out)
    assert report["logged_rows"] == len(planted) == report["compared_rows"] + sizes.get(left_out, left_out)
    assert report["compared_rows"] == report["rows_with_reply"]


def test_a_row_that_the_log_lost_is_not_compared_and_later_features_differ(
    request_logs: dict[str, tuple[World, pa.Table]], tmp_path: Path
) -> None:
    world, table = request_logs["no ids"]
    settings, (row, *_) = world.small.settings, rows_of_a_reply(table)
    files = pa.concat_tables([pq.read_table(path) for path in sorted(Path(settings.data.log).iterdir())])
    is_lost = [
        all(files[name][place] == table[name][row] for name in ("user", "item", "time")) for place in range(len(files))
    ]
    assert sum(is_lost) == 1
    write_log(tmp_path / "log", files.filter(pa.array(~np.array(is_lost))))
    pq.write_table(table, tmp_path / "requests.parquet")
    data = settings.data.model_copy(update={"log": str(tmp_path / "log"), "work_dir": str(tmp_path)})
    settings = settings.model_copy(update={"data": data})
    report = check_skew(settings, FROM, SHORT, str(world.frozen), tmp_path / "requests.parquet")
    assert report["not_compared"] == {"not_in_log": 1}
    assert report["compared_rows"] == len(table) - 1
    assert "item_click" in wrong(report)


def test_the_command(
    request_logs: dict[str, tuple[World, pa.Table]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, table = request_logs["no ids"]
    (tmp_path / "settings.yaml").write_text(world.small.settings.to_yaml(), encoding="utf-8")
    (tmp_path / "requests").mkdir()
    pq.write_table(table, tmp_path / "requests" / "0.parquet")
    words = ["--config", str(tmp_path / "settings.yaml"), "--model", str(world.frozen), "--out", str(tmp_path)]
    words += ["--requests", str(tmp_path / "requests"), "--from", "2023-11-20T22:13:20", "--to", "2023-11-21T06:13:20"]
    run("check-skew", *words)
    report = json.loads((tmp_path / "skew.json").read_text())
    assert report["mismatches"] == 0
    assert report["logged_rows"] == report["compared_rows"] == report["rows_with_reply"] == report["rows"] > 5
    assert "features are identical" in capsys.readouterr().out
    assert not (Path(world.small.settings.data.work_dir) / "skew").exists()
    table = changed(table, "served_digest_item_click", lambda each: each ^ 1)
    pq.write_table(table, tmp_path / "requests" / "0.parquet")
    with pytest.raises(SystemExit) as ended:
        run("check-skew", *words)
    assert ended.value.code == 1
    assert "feature 'item_click' differs in " in capsys.readouterr().out
