"""What a killed writer, a full disk, a loss of power or a rotten disk leave behind: dropped, or told, never read."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.journal.follower import Follower
from mmoe_rec.journal.journal import Journal
from mmoe_rec.journal.segments import read_end, segment_numbers, segment_path
from tests.journal.journals import all_numbers, batch, filled, forget_end, numbers_in
from tests.journal.writing import THOUSANDS
from tests.processes import until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def _acknowledged(folder: Path, offset: int) -> None:
    """As if only the records up to a byte of the first segment had been acknowledged."""
    journal = Journal(folder)
    file = segment_path(folder, 1)
    whole = file.read_bytes()
    (folder / "end").unlink()
    os.truncate(file, offset)
    journal.close()
    Journal(folder).close()
    file.write_bytes(whole)


@pytest.mark.parametrize("marked", [True, False], ids=["killed", "power lost"])
def test_a_last_record_cut_at_every_byte_is_dropped(folder, capfd, marked):
    path, ends = filled(folder)
    if marked:
        _acknowledged(folder, ends[-2])
    whole, end = path.read_bytes(), (folder / "end").read_bytes()
    for size in range(ends[-2], ends[-1]):
        path.write_bytes(whole[:size])
        (folder / "end").write_bytes(end) if marked else (folder / "end").unlink(missing_ok=True)
        assert all_numbers(folder) == [0, 1], "a follower passes no incomplete record"
        journal = Journal(folder)
        told = capfd.readouterr().err
        assert journal.torn == (size > ends[-2])
        assert told.count("was not whole and never acknowledged") == journal.torn
        assert journal.append(batch(7)).offset == ends[-1]
        assert all_numbers(folder) == [0, 1, 7]
        journal.close()


@pytest.mark.parametrize("marked", [True, False])
def test_a_last_record_of_zeros_or_of_anything_is_dropped(folder, marked):
    """The size of a file may reach the disk before what is in it."""
    path, ends = filled(folder)
    if marked:
        _acknowledged(folder, ends[-2])
    whole, end = path.read_bytes(), (folder / "end").read_bytes()
    tails = [
        bytes(ends[-1] - ends[-2]),
        bytes(5000),
        b"\xff" * 99,
        whole[ends[-2] : -8] + bytes(8),
        whole[ends[-2] : -1] + b"?",
    ]
    for tail in tails:
        path.write_bytes(whole[: ends[-2]] + tail)
        (folder / "end").write_bytes(end) if marked else (folder / "end").unlink(missing_ok=True)
        assert all_numbers(folder) == [0, 1]
        journal = Journal(folder)
        assert journal.torn == 1
        journal.append(batch(8))
        assert all_numbers(folder) == [0, 1, 8]


def test_no_flipped_bit_of_an_acknowledged_record_passes(folder):
    path, ends = filled(folder)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        good = sum(end <= place for end in ends[1:])
        found = list[int]()
        with pytest.raises(UserError, match=r"segment-00000001.journal' is (damaged at byte|a?\s?segment)") as error:
            _read_into(found, folder)
        assert found == list(range(good if place >= ends[0] else 0))
        if place >= ends[0]:
            assert f"damaged at byte {ends[good]:,}:" in str(error.value)
            assert ("the next record that can be read is at" in str(error.value)) == (good < 2)
    path.write_bytes(whole)
    assert all_numbers(folder) == [0, 1, 2]


def _read_into(found: list[int], folder: Path) -> None:
    follower = Follower(folder)
    while batches := follower.read():
        found += numbers_in(batches)


@pytest.mark.parametrize("marked", [True, False])
def test_a_writer_never_drops_a_record_that_others_follow(folder, marked):
    """A flipped bit in a record's length looks like a torn tail: records that were acknowledged would be cut off."""
    path, ends = filled(folder)
    whole = path.read_bytes()
    for place in range(ends[1], ends[1] + 16):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        if not marked:
            (folder / "end").unlink(missing_ok=True)
        with pytest.raises(UserError, match=rf"segment-00000001.journal' is damaged at byte {ends[1]:,}"):
            Journal(folder)
        assert path.stat().st_size == len(whole)


def test_an_acknowledged_record_that_is_lost_is_told(folder):
    path, ends = filled(folder)
    writing, reading = Journal(folder), Follower(folder)
    numbers_in(reading.read())
    whole = path.read_bytes()
    for size in (ends[-1] - 1, ends[-2], ends[0], 0):
        os.truncate(path, size)
        with pytest.raises(UserError, match=r"segment-00000001.journal' is damaged at byte"):
            Journal(folder)
        with pytest.raises(UserError, match=r"segment-00000001.journal' is damaged at byte"):
            writing.append(batch(9))
        assert path.stat().st_size == size
        with pytest.raises(UserError, match=r"segment-00000001.journal' is damaged at byte"):
            _ = list(Follower(folder).read()), Follower(folder, reading.position).read(), all_numbers(folder)
    path.write_bytes(whole)
    writing.append(batch(9))
    assert numbers_in(reading.read()) == [9]


def test_a_follower_beyond_the_end_is_told(folder):
    """The files were restored from a copy that is older."""
    path, _ = filled(folder)
    old, end = path.read_bytes(), (folder / "end").read_bytes()
    Journal(folder).append(batch(3))
    follower = Follower(folder)
    follower.read()
    path.write_bytes(old)
    (folder / "end").write_bytes(end)
    assert follower.wait(0)
    with pytest.raises(UserError, match="what was acknowledged is lost"):
        follower.read()


def test_a_closed_segment_that_became_shorter_is_told(folder):
    path, ends = filled(folder)
    journal, follower = Journal(folder), Follower(folder)
    follower.read()
    journal.close_segment()
    journal.append(batch(3))
    for size in (ends[-1] - 8, ends[1]):
        os.truncate(path, size)
        with pytest.raises(UserError, match=f"damaged at byte {size:,}"):
            follower.read()


def test_a_segment_without_its_first_bytes_is_told(folder):
    """A segment is on disk before it gets its name, so this is no torn tail."""
    Journal(folder).append(batch(1))
    for content in (b"", b"MMOE", bytes(32)):
        segment_path(folder, 2).write_bytes(content)
        with pytest.raises(UserError, match=r"segment-00000002.journal' is damaged at byte 0"):
            Journal(folder)


def test_power_is_lost_between_a_segment_and_its_end(folder):
    """What the file `end` says may be older than the segments, or nothing."""
    journal = Journal(folder, 500)
    for number in range(3):
        journal.append(batch(number))
    before = (folder / "end").read_bytes()
    for number in range(3, 6):
        journal.append(batch(number))
    for content in (before, b"", before[:20], bytes(len(before)), None):
        (folder / "end").unlink() if content is None else (folder / "end").write_bytes(content)
        again = Journal(folder, 500)
        assert read_end(folder, bytes.fromhex(again.id)) == again.end() == journal.end()
        assert all_numbers(folder) == list(range(6))


def test_followers_need_no_file_end(folder):
    journal = Journal(folder, 900)
    follower, found = Follower(folder), list[int]()
    for number in range(12):
        journal.append(batch(number))
        forget_end(folder)
        assert follower.wait(0)
        found += numbers_in(follower.read())
        assert found == list(range(number + 1))
        assert not follower.wait(0)


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_of_a_record(folder):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "as Python begins"
    path, ends = filled(folder)
    journal, follower = Journal(folder), Follower(folder)
    follower.read()
    for room in (0, 1, 8, 15, 16, 17, 200):
        with (
            _files_no_larger_than(ends[-1] + room),
            pytest.raises(UserError, match="nothing was appended to the journal"),
        ):
            journal.append(batch(5, text="w" * 1000))
        assert path.stat().st_size == ends[-1]
        assert follower.read() == []
        assert all_numbers(folder) == [0, 1, 2]
    journal.append(batch(6))
    assert numbers_in(follower.read()) == [6]


@pytest.mark.parametrize("name", ["_sync", "os.pwrite", "os.ftruncate", "end_bytes"])
def test_a_disk_that_fails_leaves_nothing_of_a_record(folder, name, monkeypatch):
    """Wherever an append fails, its caller is told, and no follower sees it, then or later."""
    filled(folder)
    journal, follower = Journal(folder, 1), Follower(folder)
    follower.read()

    write = os.pwrite

    def fails(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    def fails_midway(file: int, data: memoryview, at: int) -> None:
        write(file, bytes(data)[:9], at)
        fails()

    for number in range(3):
        with monkeypatch.context() as patch:
            if name == "os.ftruncate":  # the write fails, and so does taking it back
                patch.setattr(os, "pwrite", fails_midway)
            patch.setattr(f"mmoe_rec.journal.journal.{name}", fails)
            with pytest.raises(UserError, match="nothing was appended"):
                journal.append(batch(100 + number))
        assert follower.read() == []
        journal.append(batch(number))
        assert numbers_in(follower.read()) == [number]
    assert all_numbers(folder) == [0, 1, 2, 0, 1, 2]


def test_a_full_disk_has_no_room_for_a_segment(folder):
    journal = Journal(folder, 100)
    journal.append(batch(0))
    with _files_no_larger_than(16), pytest.raises(UserError, match="nothing was appended"):
        journal.append(batch(1))
    assert segment_numbers(folder) == [1]
    journal.append(batch(2))
    assert segment_numbers(folder) == [1, 2]
    assert all_numbers(folder) == [0, 2]


def test_no_acknowledged_record_is_lost_when_writers_are_killed(folder):
    """Two writers at a time, one of them with threads; each is killed as soon as it has told of some batches."""
    acknowledged, follower, found = dict[int, str](), None, list[int]()
    for turn in range(8):
        arguments = [sys.executable, "-m", "tests.journal.writing", str(folder)]
        processes = [
            subprocess.Popen(
                [*arguments, str(2 * turn + each), "100000", "20000", *more], stdout=subprocess.PIPE, text=True
            )
            for each, more in enumerate(([], ["GROUP"]))
        ]
        for process in processes:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3 + 5 * (turn % 4))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines(keepends=True)
            process.wait()
            process.stdout.close()
            acknowledged |= {int(first): position for first, position in map(str.split, lines) if "-" in position}
        follower = follower or Follower(folder)
        while batches := follower.read():
            found += numbers_in(batches)
    Journal(folder).append(batch(-1, -2))
    while batches := follower.read():
        found += numbers_in(batches)
    assert len(found) == len(set(found)), "each once"
    assert found == all_numbers(folder)
    firsts = found[::2]
    assert [number + 1 for number in firsts[:-1]] == found[1:-2:2], "batches are whole"
    assert set(acknowledged) <= set(firsts)
    assert len(acknowledged) > 60
    for writer in range(16):
        own = [number % THOUSANDS // 2 for number in firsts[:-1] if number // THOUSANDS == writer]
        if writer % 2 == 0:
            assert own == list(range(len(own))), "in the writer's order, without a gap"


def test_four_processes_append_while_others_follow(folder):
    """Every follower reads each batch once, all in the same order, and each writer's in its own."""
    Journal(folder)
    rows = 4 * 2 * 150
    followers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.journal.following", str(folder), str(rows), str(most)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for most in (1, 50, 10_000)
    ]
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.journal.writing", str(folder), str(writer), "150", "30000", *more],
            stdout=subprocess.PIPE,
            text=True,
        )
        for writer, more in enumerate(([], ["GROUP"], [], ["GROUP"]))
    ]
    for writer in writers:
        assert len(writer.communicate()[0].splitlines()) == 150
        assert writer.returncode == 0
    found = [list(map(int, follower.communicate()[0].split())) for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0, 0]
    assert found[0] == found[1] == found[2] == all_numbers(folder)
    assert len(set(found[0])) == rows
    assert segment_numbers(folder)[-1] > 2
    for writer in (0, 2):
        own = [number % THOUSANDS for number in found[0] if number // THOUSANDS == writer]
        assert own == list(range(300))


def test_waiting_ends_when_another_process_appends(folder):
    follower = Follower(_made(folder))
    arguments = [sys.executable, "-m", "tests.journal.writing", str(folder), "0", "1", "1000"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        until(lambda: follower.wait(1), "the follower never saw the batch")
    assert process.returncode == 0
    assert numbers_in(follower.read()) == [0, 1]


def _made(folder: Path) -> Path:
    Journal(folder).close()
    return folder
