import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mmoe_rec.atomic
from mmoe_rec.atomic import atomic_file, atomic_folder, write_text
from mmoe_rec.errors import UserError, exit_with_message


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _die_half_way(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_a_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "state.json"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert _content(tmp_path) == {"deep/state.json": "new"}
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        _die_half_way(temporary)
    assert _content(tmp_path) == {"deep/state.json": "new"}


def _no_link(*_: object) -> None:
    raise OSError("no links here")


@pytest.mark.parametrize("can_link", [True, False])
def test_a_file_that_was_there_first_can_stay(tmp_path, monkeypatch, can_link):
    if not can_link:
        monkeypatch.setattr(os, "link", _no_link)
    for content in ("first", "second"):
        with atomic_file(tmp_path / "store", replace=False) as temporary:
            temporary.write_text(content)
    assert _content(tmp_path) == {"store": "first"}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_replaces_the_old_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(mmoe_rec.atomic, "_exchange", lambda first, second: False)
    target = tmp_path / "log"
    for week in ("one", "two"):
        with atomic_folder(target) as temporary:
            (temporary / week).mkdir()
            (temporary / week / "rows").write_text(week)
    assert _content(tmp_path) == {"log/two/rows": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("old", [True, False])
def test_a_failed_folder_leaves_what_was(tmp_path, old):
    target = tmp_path / "log"
    if old:
        target.mkdir()
        (target / "rows").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        _die_half_way(temporary / "rows")
    assert _content(tmp_path) == ({"log/rows": "old"} if old else {})
    assert list(tmp_path.iterdir()) == ([target] if old else [])


def test_the_old_folder_is_put_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "log"
    target.mkdir()
    (target / "rows").write_text("old")
    rename = os.rename

    def fail_on_the_new(source: Path, destination: Path) -> None:
        if (Path(source) / "rows").read_text() == "new":
            raise OSError("no space")
        rename(source, destination)

    monkeypatch.setattr(mmoe_rec.atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="no space"), atomic_folder(target) as temporary:
        (temporary / "rows").write_text("new")
    assert _content(tmp_path) == {"log/rows": "old"}


def test_a_killed_job_leaves_the_old(tmp_path):
    target = tmp_path / "log"
    with atomic_folder(target) as temporary:
        (temporary / "rows").write_text("old")
    program = (
        "import os, signal, sys\n"
        "from mmoe_rec.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as temporary:\n"
        "    (temporary / 'rows').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert _content(target) == {"rows": "old"}


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "rows").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "real") == {"rows": "new"}


def test_the_wrong_kind_of_target_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="is a folder"), atomic_file(tmp_path):
        pass
    with pytest.raises(UserError, match="can't be created"), atomic_folder(tmp_path / "file" / "log"):
        pass


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    @exit_with_message()
    def main() -> None:
        raise UserError("log.parquet has no column 'age':\nadd it")

    for _ in range(2):
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 2
        assert capsys.readouterr().err == "error: log.parquet has no column 'age': add it\n"


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as exit_info, exit_with_message():
        write_text(tmp_path / "numbers.json", "{}")
    assert exit_info.value.code == 2
    where = f"where '{tmp_path / 'numbers.json'}' is written"
    assert capsys.readouterr().err == f"error: the disk is full {where}. Free some space and try again.\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PermissionError), exit_with_message():
        raise PermissionError(errno.EACCES, "Permission denied")
