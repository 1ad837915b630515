"""Messages that can't be sent wait in files, and are sent later, in order."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.tracking import outbox
from mmoe_rec.tracking.outbox import Message, Outbox, UnreachableError, list_waiting_runs


class Post:
    """Takes messages while it answers. Time goes on by what it is told to, and by sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0
        self.away, self.refused, self.seconds_a_try = False, "", 0.0
        self.tries = 0
        self.got: list[str] = []

    def send(self, message: Message) -> None:
        self.tries += 1
        self.now += self.seconds_a_try
        if self.away:
            raise UnreachableError("the post does not answer")
        text = message.file.read_text() if message.file is not None else str(message.values["text"])
        if text == self.refused:
            raise UserError(f"the post refuses {text}")
        self.got.append(text)

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    post = Post()
    # The module's name for it alone: threads that other tests left in this process may sleep, too.
    monkeypatch.setattr(outbox, "time", SimpleNamespace(monotonic=lambda: post.now, sleep=post.sleep))
    return post


def text(word: object) -> Message:
    return Message("tags", {"text": str(word)})


def test_an_outage_changes_neither_order_nor_content(tmp_path: Path, post: Post, capsys: pytest.CaptureFixture) -> None:
    box = Outbox(tmp_path / "run", post.send)
    file = tmp_path / "plot.png"
    for number in range(200):
        post.now += 5
        post.away = 20 <= number < 150
        if number % 10 == 0:
            file.write_text(str(number))  # the same file each time: what it held when it was put counts
            box.put(Message("file", {"folder": "plots"}, file))
        else:
            box.put(text(number))
    box.flush()
    assert post.got == [str(number) for number in range(200)]
    assert not len(box)
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"the post does not answer. The command goes on: messages for MLflow are kept in '{tmp_path / 'run'}'",
        f"MLflow has received all that was kept for it in '{tmp_path / 'run'}'",
    ]


@pytest.mark.parametrize("seconds_a_try", [0.01, 10.0, 20.0])
def test_trying_takes_a_tenth_of_the_time_at_most(tmp_path: Path, post: Post, seconds_a_try: float) -> None:
    box = Outbox(tmp_path / "run", post.send)
    post.away, post.seconds_a_try = True, seconds_a_try
    started = post.now
    while post.now < started + 3600:
        post.now += 1  # a second of training
        box.put(text("x"))
    assert post.tries * seconds_a_try < 0.12 * (post.now - started)
    assert post.tries >= 10, "it is tried again and again"


def test_what_waits_outlives_the_process(tmp_path: Path, post: Post) -> None:
    box = Outbox(tmp_path / "run", post.send)
    post.away = True
    for number in range(3):
        box.put(text(number))
    (tmp_path / "run" / "00000004.file").mkdir()  # a kill between a file and its message
    assert list_waiting_runs(tmp_path) == ["run"]
    post.away = False
    again = Outbox(tmp_path / "run", post.send)
    assert len(again) == 3
    again.put(text(3))
    again.flush()
    assert post.got == ["0", "1", "2", "3"]
    assert list_waiting_runs(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_what_comes_while_another_process_sends_is_kept(tmp_path: Path, post: Post) -> None:
    training = Outbox(tmp_path / "run", post.send)
    post.away = True
    training.put(text(0))
    post.away = False

    def send(message: Message) -> None:
        post.send(message)
        post.away = True
        training.put(text(1))
        post.away = False

    Outbox(tmp_path / "run", send).flush()
    training.flush()
    assert post.got == ["0", "1"]


def test_flush_waits_for_an_answer_but_not_for_ever(tmp_path: Path, post: Post) -> None:
    box = Outbox(tmp_path / "run", post.send)
    post.away = True
    box.put(text(0))
    box.flush(120)
    assert 110 < post.slept <= 120
    assert isinstance(box.trouble, UnreachableError)
    assert list_waiting_runs(tmp_path) == ["run"]
    post.away, post.slept = False, 0.0
    box.flush(120)
    assert box.trouble is None
    assert post.slept == 0
    assert post.got == ["0"]


def test_what_is_refused_stays_and_stops_nothing_else(
    tmp_path: Path, post: Post, capsys: pytest.CaptureFixture
) -> None:
    box = Outbox(tmp_path / "run", post.send)
    post.refused = "1"
    for number in range(4):
        post.now += 100
        box.put(text(number))
    box.flush(120)
    assert post.got == ["0", "2", "3"]
    assert post.slept == 0, "waiting would not help"
    assert str(box.trouble) == "the post refuses 1"
    assert len(box) == 1
    assert json.loads(next((tmp_path / "run").glob("*.json")).read_text())["values"] == {"text": "1"}
    assert capsys.readouterr().err.count("the post refuses 1") == 1


def test_without_a_folder_nothing_is_kept(tmp_path: Path, post: Post) -> None:
    post.away = True
    with pytest.raises(UnreachableError):
        Outbox(None, post.send).put(text(0))


def test_a_full_disk_ends_it(tmp_path: Path, post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    box = Outbox(tmp_path / "run", post.send)
    post.away = True
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"does not answer, nor can it be kept in .*: No space left on device"):
        box.put(text(0))
