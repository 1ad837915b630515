"""Messages that can't be sent are kept in a file, and sent later, in order."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.client import UnreachableError
from mmoe_rec.tracking.runs import Message, Outbox, list_unsent_runs


class Post:
    """Takes messages while it answers. Time goes on by sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0
        self.away, self.refused = False, ""
        self.tries = 0
        self.got: list[str] = []

    def send(self, message: Message) -> None:
        self.tries += 1
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
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: post.now, sleep=post.sleep))
    return post


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "unsent" / "run.jsonl"


def text(word: object) -> Message:
    return Message("tags", {"text": str(word)})


def test_an_outage_changes_neither_order_nor_content(
    tmp_path: Path, file: Path, post: Post, capsys: pytest.CaptureFixture
) -> None:
    box, plot = Outbox(file, post.send), tmp_path / "plot.png"
    for number in range(200):
        post.away = 20 <= number < 150
        if number % 10 == 0:
            plot.write_text(str(number))  # the same file each time: what it held when it was put counts
            box.put(Message("file", {"folder": "plots"}, plot))
        else:
            box.put(text(number))
    box.flush()
    assert post.got == [str(number) for number in range(200)]
    assert post.tries == 201, "nobody waits again and again for one that is away"
    assert not list(file.parent.iterdir())
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"the post does not answer. The command continues. Messages for MLflow are saved in '{file}'",
        f"MLflow has received the messages saved in '{file}'",
    ]
    box.put(text("later"))
    assert post.got[-1] == "later"


def test_kept_messages_outlive_the_process(file: Path, post: Post) -> None:
    box = Outbox(file, post.send)
    post.away = True
    for number in range(2):
        box.put(text(number))
    with file.open("a") as cut_off:
        cut_off.write('\n{"kind": "tags", "val')  # by a kill
    Outbox(file, post.send).put(text(2))
    assert list_unsent_runs(file.parent) == ["run"]
    post.away = False
    Outbox(file, post.send).flush()
    assert post.got == ["0", "1", "2"]
    assert list_unsent_runs(file.parent) == []
    assert not list(file.parent.iterdir())


def test_a_message_that_comes_while_another_process_sends_is_kept(file: Path, post: Post) -> None:
    training = Outbox(file, post.send)
    post.away = True
    training.put(text(0))
    post.away = False
    thread = threading.Thread(target=training.put, args=(text(1),))

    def send(message: Message) -> None:
        thread.start()
        post.send(message)

    Outbox(file, send).flush()
    thread.join()
    training.flush()
    assert post.got == ["0", "1"]


def test_flush_waits_for_an_answer_but_not_for_ever(file: Path, post: Post) -> None:
    box = Outbox(file, post.send)
    post.away = True
    box.put(text(0))
    box.flush(120)
    assert 110 < post.slept <= 120
    assert isinstance(box.last_error, UnreachableError)
    assert list_unsent_runs(file.parent) == ["run"]
    post.away, post.slept = False, 0.0
    box.flush(120)
    assert box.last_error is None
    assert post.slept == 0
    assert post.got == ["0"]


def test_a_refused_message_stays_and_stops_nothing_else(file: Path, post: Post, capsys: pytest.CaptureFixture) -> None:
    box = Outbox(file, post.send)
    post.refused = "1"
    for number in range(4):
        box.put(text(number))
    box.flush(120)
    assert post.got == ["0", "2", "3"]
    assert post.slept == 0, "waiting would not help"
    assert str(box.last_error) == "the post refuses 1"
    assert capsys.readouterr().err.count("the post refuses 1") == 1
    post.refused = ""
    Outbox(file, post.send).flush()
    assert post.got == ["0", "2", "3", "1"]


def test_without_a_file_nothing_is_kept(post: Post) -> None:
    post.away = True
    with pytest.raises(UnreachableError):
        Outbox(None, post.send).put(text(0))


def test_a_full_disk_ends_it(file: Path, post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    box = Outbox(file, post.send)
    post.away = True
    monkeypatch.setattr(runs, "write_lock", full)
    with pytest.raises(UserError, match=r"does not answer, and it can't be saved in .*: No space left on device"):
        box.put(text(0))
