"""Requests before the end of the model's log: what counters and histories answer, and as of when they say they do."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.log.given import iso_time
from tests.inference.small_model import ITEMS, USER, SmallModel
from tests.log.small_logs import DAY, random_log, times_of

FUTURE, STALE = "they know its future", "they are stale"


def at(ranker: Ranker, moment: int) -> Any:
    return ranker.rank({"user": USER}, {"time": iso_time(moment)}, {"item": ITEMS}, explain=True)


def test_before_the_first_exact_moment_answers_are_as_of_it(ranker: Ranker) -> None:
    last = int(times_of(random_log(1, rows=600)).max())
    before, then = at(ranker, last + 1 - DAY // 2), at(ranker, last + 1)
    for one, other in zip(_by_place(before), _by_place(then), strict=True):
        assert (one.counters, one.histories) == (other.counters, other.histories)
    later = at(ranker, last + 3 * DAY)
    assert any(a.counters != b.counters for a, b in zip(_by_place(then), _by_place(later), strict=True))


def _by_place(ranking: Any) -> list[Any]:
    return [each for _, each in sorted(zip(ranking.order, ranking.explanations, strict=True), key=lambda pair: pair[0])]


def asked(ranker: Ranker, later: timedelta) -> list[str]:
    """Warnings for a request so much later than `tables_as_of`."""
    moment = datetime.fromisoformat(ranker.about.tables_as_of) + later
    return ranker.rank({"user": USER}, {"time": moment.isoformat()}, {"item": ITEMS}).warnings


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (timedelta(microseconds=-1), FUTURE),
        (timedelta(0), FUTURE),  # of which the labels are known
        (timedelta(microseconds=1), None),
        (timedelta(days=7), None),
        (timedelta(days=7, microseconds=1), STALE),
    ],
    ids=str,
)
def test_a_time_that_does_not_fit_is_told_once(ranker: Ranker, later: timedelta, sentence: str | None) -> None:
    found = asked(ranker, later)
    if sentence is None:
        assert found == []
        return
    (told,) = found
    assert sentence in told
    known = datetime.fromisoformat(ranker.about.tables_as_of)
    assert f"{known.isoformat()}," in told
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
