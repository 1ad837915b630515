"""A log of which old files are removed and bad ones mended, day by day: what was counted stays, once, and is found."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions
from mmoe_rec.preprocessing.prepare import FeatureFolder, find_existing_features, prepare
from tests.log.small_logs import files_of, remembered, windows_of, with_column
from tests.preprocessing.growing_log import FEATURES, WINDOWS, Growing, schema_with_purchases

LATER = windows_of(10, 11)
SKIP = {"skip_bad_files": True}


def _of_three_files(folder: Path) -> Growing:
    """Eight days, prepared."""
    log = Growing(folder)
    for start, end in ((0, 1), (1, 6), (6, 8)):
        log.add(start, end)
    log.prepare()
    return log


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return _of_three_files(tmp_path)


def _remove(log: Growing, number: int) -> None:
    for name in ("log", "events"):
        (log.folder / name / f"{number}.parquet").unlink()


def _existing(log: Growing, windows: dict, **options: object) -> FeatureFolder | None:
    return find_existing_features(BuildInputs(log.source, log.schema, windows, log.work, BuildOptions(**options)))


def _memories(prepared: FeatureFolder) -> dict[str, bytes]:
    return {name: item for name, item in files_of(prepared.serving).items() if name != "pipeline.json"}


def test_days_go_on_as_if_old_files_were_still_there(growing, tmp_path):
    """Retention: with each new day an old file goes, up to where no file of the first build is left."""
    whole = _of_three_files(tmp_path / "whole")
    for number, (start, end) in enumerate(pairwise([8, 9, 10, 12.1])):
        windows = windows_of(end - 0.7, end - 0.4)
        _remove(growing, 100 - number)
        for log in (growing, whole):
            log.add(start, end)
            extended = log.extend(windows)
            assert extended is not None
            assert len(extended.missing) == (2 * (number + 1) if log is growing else 0)
        prepared, reference = (FeatureFolder(log.work / "features") for log in (growing, whole))
        assert files_of(prepared.folder / "encoded") == files_of(reference.folder / "encoded")
        assert _memories(prepared) == _memories(reference)
        for name in ("rows", "files", "digest", "events", "splits", "first_request", "last_request", "vocabularies"):
            assert prepared.manifest[name] == reference.manifest[name], name
        # What training, evaluation and inspection ask for, also after further files have gone.
        _check_at_hand(growing, windows)
    assert not (growing.folder / "log" / "100.parquet").exists()


def _check_at_hand(log: Growing, windows: dict) -> None:
    before = files_of(log.work)
    oldest = max((log.folder / "log").iterdir(), key=lambda path: int(path.stem))
    content = oldest.read_bytes()
    oldest.unlink()
    actual = _existing(log, windows)
    assert prepare(BuildInputs(log.source, log.schema, windows, log.work)).manifest == actual.manifest
    assert log.extend(windows) is None
    oldest.write_bytes(content)  # put back, at another time
    assert _existing(log, windows) is not None
    assert files_of(log.work) == before


def test_features_that_were_not_extended_are_rebuilt_unless_a_model_goes_on_from_them(growing):
    before = growing.prepare().manifest
    _remove(growing, 100)
    actual = _existing(growing, WINDOWS)
    assert actual.manifest == before
    assert (
        prepare(BuildInputs(growing.source, growing.schema, WINDOWS, growing.work), keep_existing=True).manifest
        == before
    )
    shorter = growing.prepare().manifest
    assert shorter["rows"] < before["rows"]
    assert shorter["files"] == 2


@pytest.mark.parametrize("what", ["new file", "other split", "other log"])
def test_extended_features_are_not_replaced_by_those_of_a_shorter_log(growing, what):
    growing.add(8, 10)
    growing.extend(LATER)
    _remove(growing, 100)
    windows, source = LATER, growing.source
    if what == "new file":
        growing.add(10, 12.1)
    if what == "other split":
        windows = windows_of(9, 9.5)
    if what == "other log":
        source = str(growing.folder / "log" / "9*.parquet")
    assert find_existing_features(BuildInputs(source, growing.schema, windows, growing.work)) is None
    before = files_of(growing.work)
    with pytest.raises(UserError, match=r"rows of 2 deleted files, such as '.*100.parquet'\. .* --extend"):
        prepare(BuildInputs(source, growing.schema, windows, growing.work))
    assert files_of(growing.work) == before
    (growing.work / "features").rename(growing.work / "aside")
    if what == "new file":
        assert prepare(BuildInputs(source, growing.schema, windows, growing.work)).manifest["files"] == 4


def test_a_file_that_was_written_again_is_refused_also_when_others_are_gone(growing):
    growing.add(8, 10)
    _remove(growing, 100)
    path = growing.folder / "log" / "99.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    before = files_of(growing.work)
    with pytest.raises(UserError, match=r"99.parquet' has changed since the features in '.*' were built from it"):
        growing.extend(LATER)
    path.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"99.parquet' can't be used any more \('.*' is not a readable Parquet file"):
        growing.extend(LATER, **SKIP)
    assert files_of(growing.work) == before


@pytest.mark.parametrize("how", ["one", "halves"])
def test_events_of_a_file_that_is_gone_do_not_count_twice(growing, how):
    growing.add(8, 10)
    old, new = (growing.folder / "events" / f"{number}.parquet" for number in (98, 97))
    again, table = pq.read_table(old), pq.read_table(new)
    for number, half in enumerate((slice(9), slice(9, None)) if how == "halves" else ()):
        pq.write_table(again.take(list(range(len(again)))[half]), old.with_name(f"{number}.parquet"))
    if how == "one":
        pq.write_table(pa.concat_tables([again, table]), new)
    old.unlink()
    with pytest.raises(
        UserError, match=r"^new files of events 'purchases', such as .* '.*98.parquet': .* The old file is missing"
    ):
        growing.extend(LATER)
    assert growing.extend(LATER, on_duplicates="keep") is not None


def test_events_that_may_have_come_twice_are_reported(growing, capsys):
    growing.add(8, 10)
    old = growing.folder / "events" / "98.parquet"
    pq.write_table(pq.read_table(old).slice(0), old.with_name("again.parquet"), compression="none")
    assert growing.extend(LATER) is not None
    sentence = " ".join(capsys.readouterr().err.split())
    assert "may repeat the events of" in sentence
    assert "98.parquet': they cover the same times" in sentence
    assert "If the events are the same, they count twice" in sentence


def _deliver_again(log: Growing, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old files under other names, places or times."""
    if how in ("link", "relative"):
        (log.folder / "by a link").symlink_to(log.folder)
        monkeypatch.chdir(log.folder)
        place = Path() if how == "relative" else log.folder / "by a link"
        log.source, log.schema = str(place / "log"), schema_with_purchases(FEATURES, place / "events")
    for name in ("log", "events"):
        old = log.folder / name / "99.parquet"
        if how in ("copy", "link"):
            shutil.copyfile(old, old.with_name("0.parquet"))
        if how in ("name", "swap"):
            old.rename(old.with_name("0.parquet"))
        if how == "swap":
            old.with_name("98.parquet").rename(old)
            old.with_name("0.parquet").rename(old.with_name("98.parquet"))
        for path in old.parent.iterdir() if how == "time" else ():
            os.utime(path)


@pytest.mark.parametrize("how", ["copy", "name", "swap", "link", "relative", "time"])
def test_a_file_that_is_delivered_again_counts_once(growing, tmp_path, monkeypatch, capsys, how):
    """Also where others take its name: another old file, or that of the next day, as with a newest one that rotates."""
    whole = _of_three_files(tmp_path / "whole")
    for end in (10, 12.1):
        _deliver_again(growing, how if end == 10 else "time", monkeypatch)
        assert _existing(growing, WINDOWS if end == 10 else LATER) is not None
        capsys.readouterr()
        assert growing.extend(LATER) is None
        sentence = capsys.readouterr().err
        assert ("duplicate files (same content), such as" in sentence) == (how in ("copy", "link"))
        for log in (growing, whole):
            log.add(end - 2, end)
            if how == "name" and log is growing and end == 10:
                for name in ("log", "events"):
                    (log.folder / name / "97.parquet").rename(log.folder / name / "99.parquet")
            extended = log.extend(LATER)
            assert extended.missing == []
        prepared, reference = (FeatureFolder(log.work / "features") for log in (growing, whole))
        assert files_of(prepared.folder / "encoded") == files_of(reference.folder / "encoded")
        assert _memories(prepared) == _memories(reference)
        assert prepared.manifest["rows"] == reference.manifest["rows"]


def test_files_with_the_same_bytes_count_once_in_a_build(growing, capsys):
    """Also events, whose rows nothing else tells from others."""
    before = growing.prepare()
    expected = files_of(before.folder / "encoded"), _memories(before)
    for name in ("log", "events"):
        shutil.copyfile(growing.folder / name / "99.parquet", growing.folder / name / "again.parquet")
    actual = growing.prepare("other")
    assert capsys.readouterr().err.count("skipped 2 duplicate files (same content), such as ") == 1
    assert (files_of(actual.folder / "encoded"), _memories(actual)) == expected
    assert (
        find_existing_features(BuildInputs(growing.source, growing.schema, WINDOWS, growing.folder / "other"))
        is not None
    )


def test_new_files_have_the_types_of_those_that_are_gone(growing):
    growing.add(8, 10)
    _remove(growing, 100)
    _remove(growing, 99)
    _remove(growing, 98)
    path = growing.folder / "log" / "97.parquet"
    table = pq.read_table(path)
    items = pa.array([str(value) for value in table["item"].to_pylist()])
    pq.write_table(with_column(table, "item", items), path)
    message = r"column 'item' has the type int64 when the features were built, but string in '.*97.parquet'. Write all"
    with pytest.raises(UserError, match=message):
        growing.extend(LATER)
    growing.add(10, 12.1)
    extended = growing.extend(LATER, **SKIP)
    assert [Path(item["file"]).name for item in extended.features.manifest["skipped"]] == ["97.parquet"]


# Files that were left out


def _spoil(path: Path, how: str) -> bytes:
    """Makes a file one that can't be opened, or read; returns the whole one."""
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        table = pq.read_table(path)
        wrong = pa.array([7.0] * table.num_rows)
        pq.write_table(with_column(table, "click", wrong), path)
    return whole


def _left_out(prepared: FeatureFolder) -> list[str]:
    return [Path(item["file"]).name for item in prepared.manifest["skipped"]]


@pytest.mark.parametrize("how", ["cut", "label"])
def test_a_file_that_was_left_out_is_removed(tmp_path, how):
    log = Growing(tmp_path)
    for start, end in ((0, 4), (4, 5), (5, 8)):
        log.add(start, end)
    _spoil(log.folder / "log" / "99.parquet", how)
    assert _left_out(log.prepare(**SKIP)) == ["99.parquet"]
    log.add(8, 9)
    assert _left_out(log.extend(LATER, **SKIP).features) == ["99.parquet"]
    (log.folder / "log" / "99.parquet").unlink()
    assert _existing(log, LATER) is not None
    assert log.extend(LATER) is None
    log.add(9, 12.1)
    extended = log.extend(LATER)
    assert _left_out(extended.features) == []
    assert extended.missing == []
    assert extended.features.manifest["files"] == 4


@pytest.mark.parametrize("how", ["cut", "label"])
def test_a_last_file_that_was_left_out_is_mended_and_taken_in_with_the_next_one(tmp_path, how):
    """As if it had come with the next day."""
    log, second = Growing(tmp_path / "mended"), Growing(tmp_path / "other")
    for item in (log, second):
        item.add(0, 8)
    log.add(8, 9)
    path = log.folder / "log" / "99.parquet"
    whole = _spoil(path, how)
    log.prepare(**SKIP)
    second.prepare()
    path.write_bytes(whole)
    assert _existing(log, WINDOWS) is None
    second.add(8, 9)
    for item in (log, second):
        item.add(9, 10.5)
    # The events of that day were good, and are counted already.
    (second.folder / "events" / "99.parquet").rename(tmp_path / "events.parquet")
    mine, theirs = log.extend(LATER), second.extend(LATER)
    assert mine.rows == theirs.rows
    assert mine.files == 3
    assert _left_out(mine.features) == []
    for split in ("train", "validation"):
        columns = ["user", "candidate", "time", "label.click"]
        first, two = (pq.read_table(item.features.split(split), columns=columns) for item in (mine, theirs))
        assert first.equals(two)
    clicks = [
        FeaturePipeline.load(item.features.serving).point_in_time_encoders["item_click"] for item in (mine, theirs)
    ]
    first, two = (pa.table(click.store.to_columns()) for click in clicks)
    assert first.equals(two)


def test_requests_that_come_late_count_and_are_reported(growing, tmp_path, capsys):
    """Memories are those of a log whose rows came in time, and only later rows are encoded."""
    whole = _of_three_files(tmp_path / "whole")
    for log in (growing, whole):
        log.add(8, 10)
    path = growing.folder / "log" / "97.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(5), path)
    for log in (growing, whole):
        log.extend(windows_of(9, 9.5))
        log.add(10, 12.1)
    pq.write_table(rows.slice(0, 5), growing.folder / "log" / "late.parquet")
    capsys.readouterr()
    actual, expected = growing.extend(LATER), whole.extend(LATER)
    assert "late.parquet' came late, with requests from 2023-11-22" in " ".join(capsys.readouterr().err.split())
    assert actual.rows == expected.rows + 5
    for name in ("item_click", "n"):
        mine, theirs = (item.features.serving / f"{name}.memory" for item in (actual, expected))
        assert remembered(mine).equals(remembered(theirs))
    mine, theirs = (pq.read_table(item.features.split("test")) for item in (actual, expected))
    assert mine["time"].equals(theirs["time"])
    assert len(mine) > 5


def test_new_files_that_are_all_bad_end_in_one_sentence(growing):
    growing.add(8, 9)
    path = growing.folder / "log" / "97.parquet"
    (growing.folder / "events" / "97.parquet").unlink()
    before = files_of(growing.work)
    whole = _spoil(path, "cut")
    with pytest.raises(UserError, match=r"none of the new files of the log '.*' can be used; the first: '.*97.parque"):
        growing.extend(LATER, **SKIP)
    path.write_bytes(whole)
    _spoil(path, "label")
    with pytest.raises(UserError, match=r"has no usable file among 1. The first problem: '.*97.parquet': column"):
        growing.extend(LATER, **SKIP)
    assert files_of(growing.work) == before
    path.write_bytes(whole)
    assert growing.extend(LATER, **SKIP) is not None
