"""A server goes on to the next version of its model by a delta, and by the whole model where the delta does not do."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.cli.serve import AtAddress
from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import DELTA, Source, version_of
from mmoe_rec.inference.delta import write_delta
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import Models, Reloads
from mmoe_rec.server.options import Options
from tests.inference.other_weights import other_weights
from tests.inference.small_model import SmallModel
from tests.live.refreshed_model import RefreshedModel
from tests.server.asking import ask, element


class Watched:
    """A folder that a server watches, and what was taken up from it: whether each was a delta."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder, self.taken = folder, list[bool]()
        shutil.copytree(model, folder)
        self.finder = AtAddress(str(folder), "unused")
        self.models = Models(Options(), self.finder.find())
        self.reloads = Reloads(self.finder, self.take_up, lambda: self.models.current.ranker.version)

    def take_up(self, source: Source) -> None:
        self.models.load(source)
        self.taken.append(source.is_delta)

    def publish(self, model: Path) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(model, self.folder)

    def scores(self) -> Any:
        """What a call is answered."""
        return ask(Application(self.models), {"inputs": [element()]}).tree["predictions"]


@pytest.fixture(scope="module")
def made(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models, each with a delta from the one before."""
    folder, models = tmp_path_factory.mktemp("made"), [small.folder]
    for number in range(3):
        models.append(other_weights(models[-1], folder / str(number), 0.5 + number / 10, 1.5))
        write_delta(models[-2], models[-1])
    return models


@pytest.fixture
def watched(small: SmallModel, tmp_path: Path) -> Watched:
    return Watched(small.folder, tmp_path / "watched")


def test_versions_one_after_the_other(watched: Watched, made: list[Path], tmp_path: Path) -> None:
    for number, model in enumerate(made[1:]):
        watched.publish(model)
        watched.reloads.ask().result()
        assert watched.models.current.about()["artifact"] == version_of(model)
        assert watched.scores() == Watched(model, tmp_path / str(number)).scores(), "to the bit"
    assert watched.taken == [True] * 3


def test_one_that_was_left_out_is_made_good_by_the_whole_model(watched: Watched, made: list[Path]) -> None:
    for model in (made[2], made[3], made[2]):
        watched.publish(model)
        watched.reloads.ask().result()
    assert watched.taken == [False, True, False], "a delta that leads elsewhere is not looked at"


def test_a_damaged_one_is_told_and_made_good(
    watched: Watched, made: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    watched.publish(made[1])
    (watched.folder / DELTA / "weights.safetensors").write_bytes(b"")
    before = watched.models.current
    with pytest.raises(UserError, match=r"weights.safetensors' has 0 bytes instead of"):
        watched.models.load(Source(watched.folder / DELTA, "small", is_delta=True))
    assert watched.models.current is before
    watched.reloads.ask().result()
    (told,) = [each.getMessage() for each in caplog.records if "no delta" in each.getMessage()]
    assert "and the whole model is loaded instead: the model in" in told
    assert "'weights.safetensors' has 0 bytes instead of" in told
    assert watched.taken == [False]
    assert watched.models.current.ranker.version == version_of(made[1])
    assert watched.models.failure is None


def test_one_for_another_model_changes_nothing(watched: Watched, made: list[Path]) -> None:
    before = watched.models.current
    with pytest.raises(UserError, match=r"follows version \w+, not version \w+, which is served"):
        watched.models.load(Source(made[2] / DELTA, "small", is_delta=True))
    assert watched.models.current is before
    assert "which is served" in str(watched.models.failure)


def test_what_was_fetched_is_removed(
    watched: Watched, made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, delta, scratch in ((made[1], made[1], tmp_path / "taken"), (made[2], made[3], tmp_path / "refused")):
        shutil.copytree(delta / DELTA, scratch / DELTA)
        found = Source(scratch / DELTA, "small", is_delta=True, scratch=scratch)
        monkeypatch.setattr(AtAddress, "find_delta", lambda *_, found=found: found)
        watched.publish(model)
        watched.reloads.ask().result()
        assert not scratch.exists()
    assert watched.taken == [True, False]


def test_settings_of_the_command_line_stay(small: SmallModel, made: list[Path]) -> None:
    models = Models(Options(instead={"max_candidates": 9}), Source(small.folder, "small"))
    models.load(Source(made[1] / DELTA, "small", is_delta=True))
    assert models.current.ranker.reader.max_candidates == 9
    assert models.current.ranker.about.max_candidates == 9
    assert Ranker.load(made[1]).about.max_candidates == 50


@pytest.mark.thorough
def test_a_refresh_publishes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = RefreshedModel(tmp_path)
    finder = AtAddress(f"models:/{model.name}@champion", model.uri)
    models = Models(Options(), finder.find())
    reloads = Reloads(finder, models.load, lambda: models.current.ranker.version)
    assert finder.find_delta(models.current.ranker.version) is None
    for number, days in (("2", (9, 10)), ("3", (10, 14))):
        served = models.current.ranker.version
        model.add(*days)
        model.refresh()
        found = finder.find_delta(served)
        assert found is not None
        assert found.is_delta
        assert found.scratch is not None
        assert found.scratch in found.folder.parents
        assert not (found.folder / "weights.safetensors").exists()
        reloads.ask().result()
        source = models.current.source
        assert source == replace(found, folder=source.folder, scratch=source.scratch)
        assert source.scratch not in (None, found.scratch)
        assert not source.scratch.exists()
        about, whole = models.current.about(), model.folder_of(number)
        assert (about["version"], about["artifact"]) == (number, version_of(whole))
        assert about["run_id"] == model.holder().run_id
        fresh = Application(Models(Options(), Source(whole, "small"))), Application(models)
        first, second = (ask(each, {"inputs": [element()]}).tree["predictions"] for each in fresh)
        assert first == second
        assert finder.find_delta(served) is not None
        assert finder.find_delta(models.current.ranker.version) is None
