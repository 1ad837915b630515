"""What several machines have accepted goes into the tables of one new version, which all go on with."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest

from mmoe_rec.journal.checkpoints import checkpoints, remove_through
from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.segments import segment_numbers
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.options import Options
from mmoe_rec.server.reloading import Reloads, ReplicaBehindError, Source, Watch
from mmoe_rec.server.sharing.preparing import Preparing
from tests.journal.journals import batch
from tests.journal.kafka.mock_brokers import mock_brokers
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _answers, _check, _sent
from tests.server.test_events import as_json


def _free_disk(one: Path, other: Path) -> None:
    """What the guide to several machines has cron do on the other one."""
    for path in other.glob("duplicates-*.npz"):
        path.unlink()
    for path in one.glob("duplicates-*.npz"):
        shutil.copyfile(path, other / path.name)
    remove_through(other, min(checkpoints(other), default=0))


def _served(model: RefreshedModel, number: str, journal: Path, place: KafkaTopic) -> Application:
    Replica(journal, place).close()
    models = Models(Limits(), journal)
    models.load(Source(model.folder_of(number), f"models:/small/{number}"))
    return Application(models, Limits(), topic=place)


def test_a_version_that_one_machine_refreshed_is_served_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("confluent_kafka")
    model, folders = RefreshedModel(tmp_path), [tmp_path / "one", tmp_path / "other"]
    with mock_brokers(tmp_path) as brokers:
        place = brokers.topic("events")
        words = ("--journal", str(folders[0]), "--kafka", str(place.file), "--kafka-topic", place.name)
        apps = [_served(model, "1", folder, place) for folder in folders]
        rows = as_json(model._days(9, 11))
        _sent(apps[0], rows[:40])
        position = _sent(apps[1], rows[40:])
        before = _answers(apps[0], position)
        _check(_answers(apps[1], position), before)

        with pytest.raises(SystemExit):
            model.refresh("--journal", str(folders[0]))
        assert "is a replica of the topic 'events'" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            model.refresh(*words[2:])
        assert "--kafka needs --journal FOLDER as well" in capsys.readouterr().err
        assert len(model.versions()) == 1

        model.refresh(*words)
        about = model.about("2").journal
        assert about is not None
        assert about["through"] == 1
        after = _sent(apps[1], as_json(model._days(11, 12)))  # by the model before
        for app, folder in zip(apps, folders, strict=True):
            app.models.load(Source(model.folder_of("2"), "models:/small/2"))
            assert app.models.current is not None
            learning = app.models.current.learning
            assert learning is not None
            assert learning._is_known, folder
        before = _answers(apps[0], after)
        _check(_answers(apps[1], after), before)

        # What one machine sends now, both count, and the next version holds it once.
        position = _sent(apps[0], [*rows[:7], *as_json(model._days(12, 13))])
        before = _answers(apps[1], position)
        model.refresh(*words, "--remove-segments")
        assert not (folders[0] / "segment-00000001.journal").exists()
        assert (folders[1] / "segment-00000001.journal").exists()
        _free_disk(*folders)
        assert segment_numbers(folders[0]) == segment_numbers(folders[1]) == [2, 3]
        for app in apps:
            app.models.load(Source(model.folder_of("3"), "models:/small/3"))
            _check(_answers(app, position), before)
        assert (folders[0] / "segment-00000002.journal").read_bytes() == (
            folders[1] / "segment-00000002.journal"
        ).read_bytes()
        position = _sent(apps[0], as_json(model._days(13, 14)))
        before = _answers(apps[1], position)
        model.refresh(*words, "--remove-segments")
        _free_disk(*folders)
        assert segment_numbers(folders[0]) == segment_numbers(folders[1]) == [3, 4]
        for app in apps:
            app.models.load(Source(model.folder_of("4"), "models:/small/4"))
            _check(_answers(app, position), before)


def test_a_machine_with_a_backlog_catches_up_before_it_closes_the_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("confluent_kafka")
    closed_at, real = list[tuple[int, int]](), Replica.close_segment

    def close_segment(replica: Replica) -> int:
        closed_at.append((replica.status().next, replica._topic.range()[1]))
        return real(replica)

    with mock_brokers(tmp_path) as brokers:
        place = brokers.topic("events")
        Replica(tmp_path / "behind", place).close()
        one = Replica(tmp_path / "one", place)
        for number in range(600):
            one.append(batch(number))
        one.close()
        monkeypatch.setattr(Replica, "close_segment", close_segment)
        model = RefreshedModel(tmp_path)
        model.refresh("--journal", str(tmp_path / "behind"), "--kafka", str(place.file), "--kafka-topic", place.name)
    assert closed_at == [(600, 600)]


class _Address:
    """A `Finder` of a model's latest version."""

    def __init__(self, model: RefreshedModel) -> None:
        self._model, self.number = model, "1"

    def state(self) -> str:
        return self.number

    def find(self) -> Source:
        return Source(self._model.folder_of(self.number), f"models:/small/{self.number}")


def test_a_version_is_taken_up_by_a_machine_that_was_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First it has not heard of the segment for too long, then it hears of it while it waits."""
    pytest.importorskip("confluent_kafka")
    model, folders = RefreshedModel(tmp_path), [tmp_path / "one", tmp_path / "other"]
    with mock_brokers(tmp_path) as brokers:
        place = brokers.topic("events")
        words = ("--journal", str(folders[0]), "--kafka", str(place.file), "--kafka-topic", place.name)
        one = _served(model, "1", folders[0], place)
        Replica(folders[1], place).close()
        other, address = Models(Limits(), folders[1]), _Address(model)
        other.load(address.find())
        _sent(one, as_json(model._days(9, 11)))
        model.refresh(*words)
        address.number = "2"

        watch = Watch(address, Reloads(address, other.load), 0)
        watch._known = "1"
        with monkeypatch.context() as during:
            during.setattr("mmoe_rec.server.live.learning._BEHIND_SECONDS", 0.3)
            for _ in range(2):
                watch.look()
                assert other.current is not None
                assert other.current.source.address == "models:/small/1"
                assert "through segment 1, which another machine closed" in (other.failure or "")
                assert "until then serve an earlier version (--model models:/NAME/VERSION)" in (other.failure or "")
        looking = threading.Thread(target=watch.look)
        looking.start()
        late = Replica(folders[1], place)
        looking.join()
        late.close()
        assert other.current.source.address == "models:/small/2"
        assert other.failure is None
        assert watch._known == "2"


def test_that_a_machine_is_behind_is_known_of_a_model_that_another_process_loads(tmp_path: Path) -> None:
    preparing = Preparing(Source(tmp_path, "models:/small/2"), Options(Limits(), 1.0), lambda: True)
    preparing.pipe, theirs = multiprocessing.Pipe()
    theirs.send(("behind", "it is behind"))
    with pytest.raises(ReplicaBehindError, match="it is behind"):
        preparing.result()
