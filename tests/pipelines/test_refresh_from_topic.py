"""What several machines have accepted goes into the tables of one new version, which all go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmoe_rec.journal.kafka.replica import Replica
from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models
from mmoe_rec.server.reloading import Source
from tests.journal.kafka.mock_brokers import mock_brokers
from tests.pipelines.refreshed_model import RefreshedModel
from tests.pipelines.test_refresh_from_journal import _answers, _check, _sent
from tests.server.test_events import as_json


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
        position = _sent(apps[0], [*rows[:7], *as_json(model._days(12, 14))])
        before = _answers(apps[1], position)
        model.refresh(*words, "--remove-segments")
        assert not (folders[0] / "segment-00000001.journal").exists()
        assert (folders[1] / "segment-00000001.journal").exists()
        for app in apps:
            app.models.load(Source(model.folder_of("3"), "models:/small/3"))
            _check(_answers(app, position), before)
        assert (folders[0] / "segment-00000002.journal").read_bytes() == (
            folders[1] / "segment-00000002.journal"
        ).read_bytes()
