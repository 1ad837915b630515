"""Replies say where a request's time does not fit what counters and histories know, and which model they come from."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.inference.artifact import read_artifact
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.writing import seal
from tests.inference.small_model import ITEMS, USER, SmallModel

BEFORE, STALE = "they know its future", "they are stale"


def asked(ranker: Ranker, later: timedelta, **given: Any) -> list[str]:
    """Warnings for a request so much later than `tables_as_of`."""
    moment = datetime.fromisoformat(ranker.about.tables_as_of) + later
    candidates = {"item": ITEMS, **given.pop("candidates", {})}
    return ranker.rank({"user": USER, **given}, {"time": moment.isoformat()}, candidates).warnings


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        (timedelta(days=-400), BEFORE),
        (timedelta(microseconds=-1), BEFORE),
        (timedelta(0), BEFORE),  # of which the labels are known
        (timedelta(microseconds=1), None),
        (timedelta(minutes=1), None),
        (timedelta(days=7), None),
        (timedelta(days=7, microseconds=1), STALE),
        (timedelta(days=4000), STALE),
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
    assert BEFORE in asked(ranker, -timedelta(seconds=1))[0]


def test_an_artifact_of_before_the_setting_has_its_default(small: SmallModel, tmp_path: Path) -> None:
    small.write(tmp_path / "model")
    tree = json.loads((tmp_path / "model" / "model.json").read_text())
    del tree["stale_after_days"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(tree))
    seal(tmp_path / "model")
    assert read_artifact(tmp_path / "model").stale_after_days == 7
    assert STALE in asked(Ranker.load(tmp_path / "model"), timedelta(days=8))[0]
