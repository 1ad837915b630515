"""How many days before the log's end memories can be asked as of: builds, and extensions by other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmoe_rec.features.memories import exact_from
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing.prepare import Prepared
from tests.log.small_logs import DAY, assert_same, files_of, log_rows, times_of
from tests.preprocessing.growing_log import Growing

TOLD = "counters and histories know what was known when from"


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    """Eight days, not yet prepared."""
    log = Growing(tmp_path)
    log.add(0, 8)
    return log


def last_of(prepared: Prepared) -> int:
    return int(prepared.manifest["request_microseconds"][1])


def days_of(prepared: Prepared) -> float:
    """Days before the moment after the last request from which on memories are exact."""
    floor = exact_from(prepared.serving)
    assert floor is not None
    return (last_of(prepared) + 1 - floor) / DAY


def test_features_are_built_anew_for_more_days_and_stay_for_fewer(
    growing: Growing, capsys: pytest.CaptureFixture[str]
) -> None:
    before = growing.prepare()
    assert days_of(before) == 0
    first = files_of(before.folder)
    prepared = growing.prepare(as_of_days=2.5)
    assert days_of(prepared) == 2.5
    second = files_of(prepared.folder)
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert {name.partition(".memory/")[0] for name in changed} == {
        f"serving/{name}" for name in FeaturePipeline.load(prepared.serving).memory_encoders
    }
    for fewer in (1.0, 0.0, 2.5):
        assert files_of(growing.prepare(as_of_days=fewer).folder) == second
    assert TOLD not in capsys.readouterr().err


def test_an_extension_by_more_days_keeps_what_was_left_and_says_so(
    growing: Growing, capsys: pytest.CaptureFixture[str]
) -> None:
    before = growing.prepare(as_of_days=1)
    floor = exact_from(before.serving)
    assert floor is not None
    growing.add(8, 12.1)
    assert TOLD not in capsys.readouterr().err
    extended = growing.extend(as_of_days=30).prepared
    assert TOLD in capsys.readouterr().err
    assert exact_from(extended.serving) == floor
    whole = growing.prepare("whole", as_of_days=30)
    mine, theirs = (FeaturePipeline.load(each.serving) for each in (extended, whole))
    rows, since = log_rows(growing.table, growing.schema), times_of(growing.table) >= floor
    assert 50 < since.sum() < len(rows) - 50
    assert_same(mine.encode(rows.filter(since)), theirs.encode(rows.filter(since)))
    with pytest.raises(AssertionError):
        assert_same(mine.encode(rows.filter(~since)), theirs.encode(rows.filter(~since)))
    # Features to which days were added are not built anew for it.
    files = files_of(extended.folder)
    capsys.readouterr()
    for days, told in ((30, True), (1, False), (0, False)):
        assert files_of(growing.prepare(as_of_days=days).folder) == files
        assert (TOLD in capsys.readouterr().err) == told
