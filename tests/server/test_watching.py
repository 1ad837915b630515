"""Looking at an address goes on whatever happens, and a copied folder is taken up once it is whole."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import version_of
from mmoe_rec.jobs.serve import AtAddress
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Reloads, Source, Watch
from tests.inference.other_weights import other_weights
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE


class Copied:
    """A watched folder, and what was loaded from there: versions, or why not."""

    def __init__(self, folder: Path) -> None:
        self.finder = AtAddress(str(folder), "unused")
        self.models, self.loads = Models(Limits()), list[str]()
        self.watch = Watch(self.finder, Reloads(self.finder, self.take_up), 3_600)
        self.watch.start(self.finder.state())

    def take_up(self, source: Source) -> None:
        """As a server's."""
        try:
            self.loads.append(self.models.load(source).ranker.version)
        except UserError as error:
            self.loads.append(str(error))
            raise

    def look(self) -> list[str]:
        """What a look loads."""
        before = len(self.loads)
        self.watch.look()
        return self.loads[before:]


def copy(made: Path, folder: Path, *names: str) -> None:
    """Some files of an artifact, newer than they were, whatever the clock's steps are."""
    for name in names:
        newer = (folder / name).stat().st_mtime_ns + 10**9
        shutil.copyfile(made / name, folder / name)
        os.utime(folder / name, ns=(newer, newer))


def test_a_copy_under_way_is_tried_again_when_more_of_it_is_there(small: SmallModel, tmp_path: Path) -> None:
    folder, made = tmp_path / "model", other_weights(small.folder, tmp_path / "made", 0.2, 3)
    shutil.copytree(small.folder, folder)
    copied = Copied(folder)
    assert copied.look() == []
    copy(made, folder, "model.json", "manifest.json", "example_scores.json")
    (told,) = copied.look()
    assert "'weights.safetensors' has changed" in told
    assert copied.look() == [], "what stays broken is not loaded again"
    copy(made, folder, "weights.safetensors")
    assert copied.look() == [version_of(made)]
    assert copied.look() == []
    assert copied.models.failure is None


def test_what_only_the_manifest_tells_apart_and_what_is_no_part_of_it(small: SmallModel, tmp_path: Path) -> None:
    folder, made = tmp_path / "model", other_weights(small.folder, tmp_path / "made", 0.2, 3)
    for each in (*small.folder.rglob("*"), *made.rglob("*")):
        os.utime(each, ns=(10**18, 10**18))  # as in archives that are the same whoever makes them
    shutil.copytree(small.folder, folder)
    copied = Copied(folder)
    shutil.rmtree(folder)
    shutil.copytree(made, folder)
    assert copied.look() == [version_of(made)]
    (folder / "features" / "left.parquet").touch()
    (told,) = copied.look()
    assert "'features/left.parquet' is no part of it" in told
    (folder / "features" / "left.parquet").unlink()
    assert copied.look() == [version_of(made)]
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").touch()
    assert copied.look() == []


def test_the_artifact_in_a_model_of_mlflow_is_watched(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "ranking_model" / "artifacts" / "model"
    shutil.copytree(small.folder, folder)
    copied = Copied(tmp_path / "ranking_model")
    copy(small.folder, folder, "model.json")
    assert copied.look() == [version_of(folder)]
    shutil.rmtree(folder)
    assert copied.look() == []
    shutil.copytree(small.folder, folder)
    assert copied.look() == [version_of(folder)], "other files, though of the same model"


class Changing:
    """A finder that says or raises what a test tells it to, and goes on with the last."""

    def __init__(self, *states: str | Exception) -> None:
        self.states, self.is_silent = list(states), False

    def state(self) -> str:
        """As a `Finder`."""
        if self.is_silent:
            threading.Event().wait()  # for ever, so that the thread does nothing any more
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def find(self) -> Source:
        """As a `Finder`."""
        return Source(Path("unused"), "found")


def test_no_error_ends_the_looking(caplog: pytest.LogCaptureFixture) -> None:
    down, broken = OSError("the store\nis down"), UserError("there is no such alias")
    finder = Changing("1", down, down, broken, "1", broken, RuntimeError("can't start new thread"), "2")
    taken = threading.Event()
    Watch(finder, Reloads(finder, lambda source: taken.set()), 0.001).start("1")
    assert taken.wait(PATIENCE)
    finder.is_silent = True
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"can't look for another model: {sentence}"
        for sentence in (
            "OSError: the store is down",
            "there is no such alias",
            "there is no such alias",
            "RuntimeError: can't start new thread",
        )
    ], "each once, until a look succeeds"


def test_a_model_whose_loading_fails_otherwise_is_not_loaded_at_every_look(caplog: pytest.LogCaptureFixture) -> None:
    finder, loads = Changing("2", "2", "3"), []

    def take_up(source: Source) -> None:
        loads.append(source)
        raise MemoryError("no room")

    watch = Watch(finder, Reloads(finder, take_up), 0)
    for count in (1, 1, 2):
        watch.look()
        assert len(loads) == count
    told = ["the previous model goes on serving: MemoryError: no room"] * 2
    assert [record.getMessage() for record in caplog.records] == told
