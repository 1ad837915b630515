"""Folders are read through links, and what can't be read or would be read twice is told of."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.log.files import find_files, would_find

TABLE = pa.table({"x": [1, 2, 3]})


def _write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, file)


def _found(source: str | Path) -> list[str]:
    return [file.address for file in find_files(str(source))]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with a folder of its own, one that is a link, and a link to a file."""
    log, away = tmp_path / "log", tmp_path / "away"
    _write(log / "a/0.parquet", away / "deep/1.parquet", away / "2.parquet", tmp_path / "other/3.parquet")
    (log / "b").symlink_to("../away")
    (log / "a/3.parquet").symlink_to(tmp_path / "other/3.parquet")
    return log


def test_links_are_followed(log):
    everything = [str(log / each) for each in ("a/0.parquet", "a/3.parquet", "b/2.parquet", "b/deep/1.parquet")]
    assert _found(log) == everything
    assert _found(log / "*") == everything
    assert _found(log / "**/*.parquet") == everything
    assert _found(log / "**") == everything
    assert _found(log / "b") == everything[2:]
    assert _found(log / "*/*.parquet") == everything[:3]
    assert _found(log / "[b]/d*/*") == everything[3:]
    assert _found(log / "*/../a/0.parquet") == [str(log / each / "../a/0.parquet") for each in ("a", "b")][:1]


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "**"])
@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_a_circle_of_links_is_told(log, pattern, target):
    (log / "a/again").symlink_to(target)
    with pytest.raises(
        UserError, match=r"a/again.*' is a link back to a folder that it lies in, '.*'.*remove the link"
    ):
        find_files(str(log / pattern))


def test_a_folder_that_is_there_twice_is_told(log):
    (log / "latest").symlink_to("a")
    with pytest.raises(UserError, match=r"'.*/log/a/0.parquet' and '.*/latest/0.parquet' are the same file, by a link"):
        find_files(str(log))
    assert len(_found(log / "[ab]")) == 4


def test_a_link_that_leads_nowhere_is_told(log):
    (log / "b").unlink()
    (log / "b").symlink_to("../gone")
    for source in (log, log / "*", log / "**/*.parquet"):
        with pytest.raises(UserError, match=r"'.*/log/b' is a link to '../gone', which is not there"):
            find_files(str(source))
    assert _found(log / "[ac]*/*.parquet") == [str(log / each) for each in ("a/0.parquet", "a/3.parquet")]
    (log / "b").unlink()
    (log / "_b").symlink_to("../gone")  # hidden, as what writers leave behind
    (log / "c.parquet").symlink_to("../gone.parquet")  # whose reader tells, or leaves it out with others that are bad
    assert _found(log) == [str(log / each) for each in ("a/0.parquet", "a/3.parquet", "c.parquet")]


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that may not be read, also for root."""
    scandir = os.scandir

    def forbid(folder: Path) -> None:
        def refuse(path: str | Path) -> Any:
            if Path(path) == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return forbid


@pytest.mark.parametrize("pattern", ["", "*", "*/*.parquet", "**/*.parquet", "**"])
def test_a_folder_that_may_not_be_read_is_told(log, forbid, pattern):
    forbid(log / "b")
    with pytest.raises(UserError, match=r"'.*/log/b' may not be read \(Permission denied\), and there may be files of"):
        find_files(str(log / pattern))
    assert len(_found(log / "a")) == 2
    (log / "b").rename(log / ".b")
    forbid(log / ".b")  # hidden: nothing of it is wanted
    assert len(_found(log)) == 2


_INSIDE = [
    ("log", "log/work"),
    ("log", "log/deep/work"),
    ("log", "log"),
    ("log", "log/../log/work"),
    ("log/../log/", "log/work"),
    ("log", "log/linked/work"),
    ("log", "elsewhere/work"),  # a folder of the log is a link to it
    ("log/**/*.parquet", "log/work"),
    ("log/*", "log/work"),
    ("*", "work"),
    ("work/*/*/*/*.parquet", "work"),
    ("work/features", "work"),
    ("work/features/encoded/train", "work"),
]
_APART = [
    ("log", "work"),
    ("log", "log-work"),
    ("log", "log/.work"),  # hidden
    ("log/*.parquet", "log/work"),
    ("log/day=*/*.parquet", "log/work"),
    ("work/log", "work"),
    ("*/log/*.parquet", "work"),
    ("log/0.parquet", "log"),
]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(("source", "work", "inside"), [(*e, True) for e in _INSIDE] + [(*e, False) for e in _APART])
def test_whether_a_log_takes_in_what_is_not_there_yet(tmp_path, monkeypatch, source, work, inside, there):
    _write(tmp_path / "log/0.parquet", tmp_path / "log/day=1/1.parquet", tmp_path / "elsewhere/2.parquet")
    (tmp_path / "log/linked").symlink_to("../elsewhere")
    monkeypatch.chdir(tmp_path)
    written = Path(work) / "features/encoded/train/part-00000.parquet"
    if there:
        _write(written)
    for each in (source, str(tmp_path / source)):
        assert would_find(each, [written]) == would_find(each, [tmp_path / written]) == inside
