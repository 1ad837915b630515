"""A worker joins its topic as soon as that can be, whatever went wrong before."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmoe_rec.journal.kafka.settings import KafkaTopic
from mmoe_rec.journal.kafka.topic import AwayError
from mmoe_rec.server.live import joined
from tests.processes import until


def test_it_goes_on_after_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [AwayError("nobody answers"), OSError("no more files"), MemoryError()]
    told = list[str | None]()

    def replica(*words: object, **more: object) -> SimpleNamespace:
        if told:
            told.append(found.failure)
        else:
            told.append(None)
        if errors:
            raise errors.pop(0)
        return SimpleNamespace(status=lambda: SimpleNamespace(failure=None))

    monkeypatch.setattr(joined, "Replica", replica)
    monkeypatch.setattr(joined, "_PAUSE_SECONDS", 0.2)
    found = joined.Joined(tmp_path, KafkaTopic(tmp_path / "file", "events"), 3.0)
    until(lambda: found.failure is None)
    assert told == [None, "nobody answers", "OSError: no more files", "MemoryError:"]
    assert "no events are taken: OSError: no more files" in caplog.text
