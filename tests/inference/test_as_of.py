"""Requests before the end of the model's log: what counters and histories answer, and as of when they say they do."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.encoder import Inputs
from mmoe_rec.features.pipeline import exact_from
from mmoe_rec.inference.artifact import Artifact, read_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Freshness
from mmoe_rec.inference.reader import Request
from mmoe_rec.inference.writing import seal
from mmoe_rec.log.given import iso_time
from tests.inference.small_model import ITEMS, USER, SmallModel, as_request
from tests.log.small_logs import DAY, START, assert_same_inputs, at_times, random_log, times_of

SPLIT = {
    "train_end": np.datetime64(START + 5 * DAY, "us").item().isoformat(),
    "validation_end": np.datetime64(START + 6 * DAY, "us").item().isoformat(),
}
AS_OF_DAYS = 3
FUTURE, STALE = "they know its future", "they are stale"
LOG = random_log(3, rows=900)
LAST = int(times_of(LOG).max())
FLOOR = LAST + 1 - AS_OF_DAYS * DAY


def small_model(work: Path, log: pa.Table = LOG, as_of_days: float = AS_OF_DAYS) -> SmallModel:
    data = {"log": str(work / "log"), "work": str(work), "as_of_days": as_of_days}
    return SmallModel(work, log=[log], split=SPLIT, data=data)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A model that can be asked as of three days before its log's end."""
    return small_model(tmp_path_factory.mktemp("dated"))


@pytest.fixture(scope="module")
def ranker(dated: SmallModel) -> Ranker:
    return Ranker.load(dated.folder)


def moments(seed: int, count: int) -> list[int]:
    """Request times from the first that is exact to the log's end, of rows and between them."""
    rng = np.random.default_rng(seed)
    times = times_of(LOG)
    drawn = [*rng.integers(FLOOR, LAST, count), *rng.choice(times[times >= FLOOR], count)]
    return [FLOOR, FLOOR + 1, *(int(each) for each in drawn), LAST]


def asked_at(moment: int, seed: int) -> list[dict[str, Any]]:
    """A request of each user at a moment, with all attributes of users and candidates."""
    requests = []
    for user in (-(2**63), -7, 0, USER, 2**62):
        table = random_log(seed, rows=40)
        born, age = pa.array([START] * 40).cast(table["born"].type), pa.array([2] * 40)
        for name, values in {"user": pa.array([user] * 40), "born": born, "age": age}.items():
            table = table.set_column(table.column_names.index(name), name, values)
        requests.append(as_request(at_times(table, np.full(40, moment))))
    return requests


def served(ranker: Ranker, requests: list[dict[str, Any]]) -> list[Inputs]:
    return list(ranker.pipeline.request_inputs(ranker.reader.rows([Request(**each) for each in requests])))


def assert_same(ours: list[Inputs], theirs: list[Inputs]) -> None:
    """To the last bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert_same_inputs(one, other)


@pytest.mark.parametrize("number", range(4))
def test_what_is_served_as_of_a_moment_is_what_a_build_until_then_serves(
    number: int, ranker: Ranker, tmp_path: Path
) -> None:
    moment = moments(number, 1)[(0, 2, 3, -1)[number]]
    requests = asked_at(moment, seed=number)
    then = small_model(tmp_path, LOG.filter(pa.array(times_of(LOG) < moment)), as_of_days=0)
    until = Ranker.load(then.folder)
    expected = served(until, requests)
    assert_same(served(ranker, requests), expected)
    # What came later would be seen.
    at_the_end = Ranker.load(small_model(tmp_path / "end", as_of_days=0).folder)
    with pytest.raises(AssertionError):
        assert_same(served(at_the_end, requests), expected)


def at(ranker: Ranker, moment: int, **given: Any) -> Any:
    candidates = {"item": ITEMS, **given.pop("candidates", {})}
    return ranker.rank({"user": USER, **given}, {"time": iso_time(moment)}, candidates, explain=True)


def test_replies_warn_before_the_first_exact_moment_only(dated: SmallModel, ranker: Ranker) -> None:
    assert exact_from(dated.prepared.serving) == FLOOR
    assert ranker.exact_from == iso_time(FLOOR)
    assert ranker.about.tables_as_of == iso_time(LAST)
    names = set(ranker.pipeline.memory_encoders)
    for moment in (FLOOR, FLOOR + 1, LAST - DAY, LAST, LAST + 1, LAST + DAY):
        found = at(ranker, moment)
        assert found.warnings == []
        for each in found.explanations:
            assert each.as_of == dict.fromkeys(names, iso_time(moment))
    for moment in (FLOOR - 1, FLOOR - DAY, START - DAY):
        found = at(ranker, moment)
        (told,) = found.warnings
        assert FUTURE in told
        assert f"time {iso_time(moment)} is before {iso_time(FLOOR)}, from when on" in told
        assert found.request_time == iso_time(moment)
        for each in found.explanations:
            assert each.as_of == dict.fromkeys(names, iso_time(FLOOR))


def test_before_the_first_exact_moment_answers_are_as_of_it(ranker: Ranker) -> None:
    before, then = at(ranker, FLOOR - DAY // 2), at(ranker, FLOOR)
    for one, other in zip(_by_place(before), _by_place(then), strict=True):
        assert (one.counters, one.histories) == (other.counters, other.histories)
    later = at(ranker, LAST)
    assert any(a.counters != b.counters for a, b in zip(_by_place(then), _by_place(later), strict=True))


def _by_place(ranking: Any) -> list[Any]:
    return [each for _, each in sorted(zip(ranking.order, ranking.explanations, strict=True), key=lambda pair: pair[0])]


def test_what_is_given_has_no_moment_and_needs_no_warning(dated: SmallModel) -> None:
    ranker = Ranker.load(dated.folder)
    encoders = ranker.pipeline.memory_encoders
    brand, liked = encoders["brand_spent"], encoders["liked_items"]
    # Memories of other ages, as live ones may be.
    brand.memory = brand.compacted(brand.memory, LAST - DAY)
    liked.memory = liked.compacted(liked.memory, LAST - 2 * DAY)
    assert ranker.exact_from == iso_time(LAST - DAY)
    moment = LAST - int(1.5 * DAY)
    all_of_brand = {name: [0.5] * len(ITEMS) for name in brand.result_columns()}
    one_of_brand = {name: all_of_brand[name] for name in [*brand.result_columns()][:1]}
    for given, warned in ({}, True), (one_of_brand, True), (all_of_brand, False):
        found = at(ranker, moment, candidates=given)
        assert bool(found.warnings) == warned
        (as_of,) = {json.dumps(each.as_of) for each in found.explanations}
        expected = dict.fromkeys(encoders, iso_time(moment)) | {"brand_spent": iso_time(LAST - DAY)}
        if not warned:
            del expected["brand_spent"]
        assert json.loads(as_of) == expected
    (told,) = at(ranker, LAST - int(2.5 * DAY), candidates=all_of_brand).warnings
    assert f"before {iso_time(LAST - 2 * DAY)}, from" in told
    empty: dict[str, Any] = {name: [] for name in liked.result_columns()}
    assert at(ranker, LAST - int(2.5 * DAY), candidates=all_of_brand, **empty).warnings == []
    every = {
        name: [0.5] * len(ITEMS) for each in encoders.values() for name in each.result_columns() if each is not liked
    }
    every.pop("clicked")
    found = at(ranker, START, candidates=every, clicked=[], **empty)
    assert found.warnings == []
    assert {json.dumps(each.as_of) for each in found.explanations} == {"{}"}


def test_what_is_known_may_move_on(ranker: Ranker) -> None:
    about: Artifact = ranker.about
    fresh = Freshness.of(about)
    moved = replace(fresh, known=fresh.known + 30 * DAY)
    late = fresh.known + int(timedelta(days=20) / timedelta(microseconds=1))
    assert "they are stale" in fresh.warnings(late, [FLOOR])[0]
    assert fresh.warnings(late, []) == []
    assert moved.warnings(late, [FLOOR, None]) == []
    assert moved.warnings(FLOOR, [FLOOR, None]) == []
    assert FUTURE in moved.warnings(FLOOR - 1, [None, FLOOR])[0]
    assert moved.warnings(START, [None]) == []


def asked(ranker: Ranker, later: timedelta, **given: Any) -> list[str]:
    """Warnings for a request so much later than `tables_as_of`."""
    moment = datetime.fromisoformat(ranker.about.tables_as_of) + later
    candidates = {"item": ITEMS, **given.pop("candidates", {})}
    return ranker.rank({"user": USER, **given}, {"time": moment.isoformat()}, candidates).warnings


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (timedelta(days=-400), FUTURE),
        (timedelta(microseconds=-1), FUTURE),
        (timedelta(0), FUTURE),  # of which the labels are known
        (timedelta(microseconds=1), None),
        (timedelta(minutes=1), None),
        (timedelta(days=7), None),
        (timedelta(days=7, microseconds=1), STALE),
        (timedelta(days=4000), STALE),
    ],
    ids=str,
)
def test_a_time_that_does_not_fit_is_told_once(small: SmallModel, later: timedelta, sentence: str | None) -> None:
    ranker = Ranker.load(small.folder)
    found = asked(ranker, later)
    if sentence is None:
        assert found == []
        return
    (told,) = found
    assert sentence in told
    known = datetime.fromisoformat(ranker.about.tables_as_of)
    known_or_exact = known if sentence == STALE else known + timedelta(microseconds=1)
    assert f"{known_or_exact.isoformat()}," in told
    assert f"the request's time {(known + later).isoformat()} is" in told


@pytest.mark.parametrize("days", [0.5, None])
def test_the_setting_travels_with_the_artifact(tmp_path: Path, days: float | None) -> None:
    small = SmallModel(tmp_path, serving={"products": "blas", "stale_after_days": days})
    assert read_artifact(small.folder).stale_after_days == days
    ranker = Ranker.load(small.folder)
    assert asked(ranker, timedelta(hours=11)) == []
    (told,) = asked(ranker, timedelta(hours=13)) or ["never"]
    assert ("more than 0.5 days after" in told) == (days is not None)
    assert bool(asked(ranker, timedelta(days=4000))) == (days is not None)
    assert FUTURE in asked(ranker, -timedelta(seconds=1))[0]


def test_an_artifact_of_before_the_setting_has_its_default(small: SmallModel, tmp_path: Path) -> None:
    small.write(tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "model.json").read_text())
    del tree["stale_after_days"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(tree))
    seal(tmp_path / "model")
    assert read_artifact(tmp_path / "model").stale_after_days == 7
    assert STALE in asked(Ranker.load(tmp_path / "model"), timedelta(days=8))[0]
