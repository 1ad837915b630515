"""What a ranker has learnt live against features that were extended by the same rows, and built anew from files."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference import ranker as rankers
from mmoe_rec.inference.artifact_writer import write_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.request_reader import RequestReader
from mmoe_rec.inference.scorer import Scorer
from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time import join as levels
from mmoe_rec.preprocessing.build_inputs import BuildInputs
from mmoe_rec.preprocessing.extend import extend
from tests.inference.small_model import ITEMS, USER, SmallModel
from tests.log.small_logs import DAY, START, at_times, log_rows, random_log, with_column, write_log

LATER = 10.5  # days from the log's start on
NEW_USER, NEW_ITEM = 41, 98
TIMES = ["2023-11-28T12:00:00.5+00:00", "2023-12-01T03:00:00+00:00", "2023-12-20T00:00:00+00:00"]


def later_log(seed: int, rows: int = 120) -> pa.Table:
    """Rows of the days after the small model's log, some by a new user, some of a new item; attributes change."""
    table, random = random_log(seed, rows=rows, days=3.0), np.random.default_rng(seed)
    times = np.sort(START + (LATER * DAY + random.choice(np.linspace(0, 3 * DAY, 25), rows)).astype(np.int64))
    users = table["user"].to_numpy().copy()
    users[random.random(rows) < 0.1] = NEW_USER
    # Of one instant a user sees an item once.
    items = np.array([(place % 12 - 4) * 10**17 for place in range(rows)])
    items[[5, 60]] = NEW_ITEM
    return at_times(with_column(with_column(table, "user", users), "item", items), times)


class Extension:
    """A model, its ranker, and that of the same model over features that were extended by further files."""

    def __init__(self, work: Path, further: list[pa.Table]) -> None:
        self.small, right = SmallModel(work / "before"), SmallModel(work / "after")
        write_log(work / "more", *further)
        for file in (work / "more").glob("*.parquet"):
            shutil.copyfile(file, work / "after" / "log" / f"later-{file.name}")
        windows = right.settings.split.windows()
        extended = extend(BuildInputs(right.settings.data.log, right.settings.schema_, windows, work / "after"))
        assert not any(extended.new_ids.values())  # else the model would have to be trained again
        write_artifact(
            work / "after" / "model",
            settings=right.settings,
            prepared=extended.features,
            state_dict=self.small.model.state_dict(),
            calibration=None,
        )
        self.expected = Ranker.load(work / "after" / "model")

    def ranker(self) -> Ranker:
        return Ranker.load(self.small.folder)


def learn(ranker: Ranker, events: pa.Table) -> None:
    ranker.set_state(ranker.build_state({None: log_rows(events, ranker.pipeline.schema)}))


def answers(ranker: Ranker) -> list[dict[str, Any]]:
    """What a ranker says of some requests, but for its name and the time of its tables."""
    actual = []
    for user in (USER, -7, NEW_USER, 77):
        for time in TIMES:
            ranking = ranker.rank({"user": user}, {"time": time}, {"item": [*ITEMS, NEW_ITEM]}, explain=True)
            tree = ranking.to_dict() | {"unknown": ranking.unknown_ids}
            actual.append(
                {name: tree[name] for name in ("candidates", "scores", "predictions", "explanations", "unknown")}
            )
    return actual


def scores(ranker: Ranker, small: SmallModel) -> list[float]:
    table, _ = small.later_rows()
    table = at_times(table, np.repeat(START + 16 * DAY, len(table)))
    return ranker.score(log_rows(table, small.settings.schema_))[1].tolist()


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Extension:
    return Extension(tmp_path_factory.mktemp("extended"), [later_log(3)])


@pytest.mark.parametrize("size", [1, 7, 120])
def test_a_ranker_that_learns_answers_as_one_over_extended_features(
    extended: Extension, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of rows, and the size of batches."""
    monkeypatch.setattr(levels, "MIN_LEVEL_SIZE", 100)
    monkeypatch.setattr(levels, "_LARGE_LEVEL_SIZE", 200)
    ranker, random = extended.ranker(), np.random.default_rng(size)
    table = later_log(3)
    before = answers(ranker)
    assert before != answers(extended.expected)
    mixed = table.take(pa.array(random.permutation(len(table))))
    for start in range(0, len(mixed), size):
        learn(ranker, mixed.slice(start, size))
    assert ranker.pipeline.live.rows == len(table)
    assert answers(ranker) == answers(extended.expected)
    assert scores(ranker, extended.small) == scores(extended.expected, extended.small)
    table, rows = extended.small.later_rows()
    assert ranker.reader.fill_attributes(log_rows_without(rows, "brand", "price")).table.equals(
        extended.expected.reader.fill_attributes(log_rows_without(rows, "brand", "price")).table
    )


def log_rows_without(rows: LogRows, *names: str) -> LogRows:
    return LogRows(rows.table.drop_columns(list(names)), rows.schema)


def test_scored_rows_do_not_keep_what_was_known_when_they_were_scored_first(extended: Extension) -> None:
    ranker, (_, rows) = extended.ranker(), extended.small.later_rows()
    first = ranker.score(rows)[1]
    learn(ranker, later_log(3))
    second = ranker.score(rows)[1]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(ranker.score(LogRows(rows.table, rows.schema))[1], second)
    assert rows.results == {}


def one_row(**values: Any) -> pa.Table:
    row = {"user": USER, "item": 0, "time": START + 11 * DAY, "click": 1.0, "liked": None, "spent": 2.5}
    row |= {"age": 2, "brand": "b", "price": 3.0, "tags": ["x"], "born": None, "slot": None} | values
    return at_times(pa.Table.from_pylist([row]), [row["time"]])


def known(ranker: Ranker, item: int) -> dict[str, Any]:
    rows = LogRows(pa.table({"user": [USER], "item": [item]}), ranker.pipeline.schema)
    return ranker.reader.fill_attributes(rows).table.to_pylist()[0]


def test_rows_of_any_time_add_new_ids(extended: Extension) -> None:
    ranker = extended.ranker()
    request = ({"user": 1234}, {"time": TIMES[0]}, {"item": [NEW_ITEM, 0]})
    assert ranker.rank(*request).unknown_ids == {"user": 1, "candidate": 1}
    learn(ranker, one_row(user=1234, item=NEW_ITEM, time=START + 2 * DAY, brand="a"))
    assert ranker.rank(*request).unknown_ids == {"user": 0, "candidate": 0}
    learn(ranker, one_row(item=NEW_ITEM, time=START + 13 * DAY, price=7.0, brand="c"))
    assert (known(ranker, NEW_ITEM)["brand"], known(ranker, NEW_ITEM)["price"]) == ("c", 7.0)


# A ranker learns in one thread while others rank: each answer is that of one moment, and nothing is lost


ASKED = {"user": {"user": USER}, "context": {"time": TIMES[1]}, "candidates": {"item": ITEMS}}


def answer(ranker: Ranker) -> dict[str, Any]:
    return ranker.rank(**ASKED, explain=True).to_dict()


def meanwhile(function: Callable[[], object]) -> None:
    """Has another thread do something, and waits for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize("learns_first", [True, False])
@pytest.mark.parametrize(
    ("part", "method"), [(RequestReader, "rows"), (FeaturePipeline, "request_inputs"), (Scorer, "score")]
)
def test_a_pass_that_is_under_way_answers_as_before(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, part: type, method: str, learns_first: bool
) -> None:
    """Whatever part of the pass comes before, and after, what another thread learns."""
    ranker, message = Ranker.load(small.folder), list[str]()
    before, real = answer(ranker), getattr(part, method)

    def learns(self: Any, *words: Any, **more: Any) -> Any:
        actual = None if learns_first else real(self, *words, **more)
        if not message:
            message.append("learnt")
            meanwhile(lambda: learn(ranker, later_log(3)))
        return real(self, *words, **more) if learns_first else actual

    monkeypatch.setattr(part, method, learns)
    assert answer(ranker) == before
    assert message == ["learnt"]
    now = answer(ranker)
    assert now["explanations"] != before["explanations"]
    assert now["scores"] != before["scores"]


def test_rows_that_are_scored_in_parts_are_of_one_moment(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, (_, rows) = Ranker.load(small.folder), small.later_rows()
    monkeypatch.setattr(rankers, "FEATURE_BATCH_ROWS", 5)
    before, score, message = ranker.score(rows)[1], Scorer.score, list[str]()

    def learns(self: Scorer, *words: Any) -> Any:
        if not message:
            message.append("learnt")
            meanwhile(lambda: learn(ranker, later_log(3)))
        return score(self, *words)

    monkeypatch.setattr(Scorer, "score", learns)
    np.testing.assert_array_equal(ranker.score(rows)[1], before)
    assert (ranker.score(rows)[1] != before).any()
