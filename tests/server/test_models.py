"""Which model is served: attempts to take up another one, looks at an address, and settings that stay with a model."""

import gc
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.cli.serve import UriFinder, read_serving_settings
from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import ResolvedModel, artifact_version
from mmoe_rec.model.matmul import has_onednn
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import ModelManager
from mmoe_rec.server.options import ServerOptions
from mmoe_rec.server.workers import Reloader
from tests.inference.other_weights import other_weights
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, until
from tests.server.asking import ask, element, take_up


class Address:
    """A `ModelFinder` at whose address lies, or goes wrong, what a test says: the last one again and again."""

    def __init__(self, *states: str | Exception | None) -> None:
        self.states, self.address = list(states), ""

    def fingerprint(self) -> str | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        self.address = str(state)
        return state

    def find(self) -> ResolvedModel:
        return ResolvedModel(Path("unused"), self.address)


class IncludedFiles(list[str]):
    """The models that were taken up; broken ones can't be.

    go_on: taking one up takes as long as it is not set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, source: ResolvedModel) -> None:
        self.append(source.uri)
        assert self.go_on.wait(PATIENCE)
        if source.uri == "broken":
            raise UserError("it is broken")


def test_those_who_ask_meanwhile_share_one_further_attempt() -> None:
    address, taken, replies = Address("1"), IncludedFiles(), queue.Queue[str | None]()
    reloads = Reloader(address, "0", taken)
    threading.Thread(target=reloads.run, args=(0.0,), daemon=True).start()
    taken.go_on.clear()
    reloads.request_reload(replies.put)
    until(lambda: taken == ["1"])
    address.states = ["2"]
    for _ in range(150):
        reloads.request_reload(replies.put)
    assert replies.empty()
    taken.go_on.set()
    assert [replies.get(timeout=PATIENCE) for _ in range(151)] == [None] * 151
    assert taken == ["1", "2"]
    address.states = ["broken"]
    reloads.request_reload(replies.put)
    assert replies.get(timeout=PATIENCE) == "it is broken"
    assert taken == ["1", "2", "broken"], "and it goes on afterwards"


def test_looks_come_again_and_again() -> None:
    address, taken = Address("1"), IncludedFiles()
    threading.Thread(target=Reloader(address, "1", taken).run, args=(0.001,), daemon=True).start()
    for state in ("2", "3"):
        assert state not in taken
        address.states = [state]
        until(lambda state=state: taken and taken[-1] == state)  # type: ignore[misc]
    assert taken == ["2", "3"]


def test_the_model_that_is_served_is_not_loaded_again_unless_another_one_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, taken = Address("1"), IncludedFiles()
    reloads = Reloader(address, "1", taken)
    for state, is_requested, loads in (
        ("1", True, 0),
        ("2", True, 1),
        ("2", True, 1),
        ("broken", False, 2),
        ("broken", False, 2),
        ("broken", True, 3),
        ("broken", True, 4),
        ("2", True, 5),
        ("2", False, 5),
    ):
        address.states = [state]
        before = len(taken)
        failure = reloads.reload_if_changed(is_requested)
        assert len(taken) == loads
        assert (failure is not None) == (state == "broken" and loads > before)
    message = "the previous model is still served: it is broken"
    assert [record.getMessage() for record in caplog.records] == [message] * 3


def test_a_model_of_unknown_state_is_loaded_again_if_asked_for() -> None:
    """As at an address of object storage."""
    assert UriFinder("file:///nowhere", "unused").fingerprint() is None
    address, taken = Address(None), IncludedFiles()
    reloads = Reloader(address, None, taken)
    assert [reloads.reload_if_changed(is_requested) for is_requested in (True, False, True)] == [None] * 3
    assert len(taken) == 2


def test_no_error_ends_the_looking(caplog: pytest.LogCaptureFixture) -> None:
    down, gone = OSError("the store\nis down"), UserError("there is no such alias")
    address = Address("1", down, down, gone, "1", gone, RuntimeError("can't start new thread"), "2")
    reloads = Reloader(address, "1", taken := IncludedFiles())
    failures = list[str | None]()
    while not taken:
        failures.append(reloads.reload_if_changed(False))
    message = ["OSError: the store is down", "there is no such alias", "RuntimeError: can't start new thread"]
    assert failures == [None, message[0], message[0], message[1], None, message[1], message[2], None]
    assert [record.getMessage() for record in caplog.records] == [
        f"checking for a new model failed: {sentence}" for sentence in message
    ], "each once"


# A folder is looked at


class Copied:
    """A watched folder, and what was loaded from there: versions, or why not."""

    def __init__(self, folder: Path) -> None:
        self.finder = UriFinder(str(folder), "unused")
        self.models, self.loads = ModelManager(ServerOptions(), self.finder.find()), list[str]()
        self.reloads = Reloader(self.finder, self.finder.fingerprint(), self.take_up)

    def take_up(self, source: ResolvedModel) -> None:
        try:
            self.loads.append(take_up(self.models, source).ranker.version)
        except UserError as error:
            self.loads.append(str(error))
            raise

    def look(self) -> list[str]:
        """What a look loads."""
        before = len(self.loads)
        self.reloads.reload_if_changed(False)
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
    (message,) = copied.look()
    assert "'weights.safetensors' is missing or has changed" in message
    assert copied.models.current.ranker.version == artifact_version(small.folder), "which goes on"
    assert copied.look() == [], "what stays broken is not loaded again"
    copy(made, folder, "weights.safetensors")
    assert copied.look() == [artifact_version(made)]
    assert copied.look() == []


def test_what_only_the_manifest_distinguishes_and_what_is_no_part_of_it(small: SmallModel, tmp_path: Path) -> None:
    folder, made = tmp_path / "model", other_weights(small.folder, tmp_path / "made", 0.2, 3)
    for path in (*small.folder.rglob("*"), *made.rglob("*")):
        os.utime(path, ns=(10**18, 10**18))  # as in archives that are the same whoever makes them
    shutil.copytree(small.folder, folder)
    copied = Copied(folder)
    shutil.rmtree(folder)
    shutil.copytree(made, folder)
    assert copied.look() == [artifact_version(made)]
    (folder / "features" / "left.parquet").touch()
    (message,) = copied.look()
    assert "'features/left.parquet' is not part of it" in message
    (folder / "features" / "left.parquet").unlink()
    assert copied.look() == [artifact_version(made)]
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").touch()
    assert copied.look() == []


def test_the_artifact_in_a_model_of_mlflow_is_watched(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "ranking_model" / "artifacts" / "model"
    shutil.copytree(small.folder, folder)
    copied = Copied(tmp_path / "ranking_model")
    copy(small.folder, folder, "model.json")
    assert copied.look() == [artifact_version(folder)]
    shutil.rmtree(folder)
    assert copied.look() == []
    shutil.copytree(small.folder, folder)
    assert copied.look() == [artifact_version(folder)], "other files, though of the same model"


# The memory of a model is free once another one is served


def schema(app: Application) -> None:
    """Asks for the page that holds the model's example."""
    assert ask(app, b"", page="/openapi.json", method="GET").status == 200


def call(app: Application) -> None:
    """Asks for a ranking."""
    assert ask(app, {"inputs": [element()]}).status == 200


@pytest.mark.parametrize("asked", [schema, call])
def test_a_model_is_gone_once_another_one_is_served(small: SmallModel, asked: Callable[[Application], None]) -> None:
    models = ModelManager(ServerOptions(), ResolvedModel(small.folder, "models:/small/1"))
    app = Application(models)
    asked(app)
    before = weakref.ref(models.current.ranker)
    take_up(models, ResolvedModel(small.folder, "models:/small/2"))

    def is_gone() -> bool:
        gc.collect()
        return before() is None

    until(is_gone)
    asked(app)


# Settings of each model, unless the command line gives them


@pytest.mark.parametrize(
    ("overrides", "stale", "most", "matmul_backend"),
    [
        ([], [False, False, True, True], 50, "blas"),
        (["--serving.stale_after_days", "0.5"], [False, True, True, True], 50, "blas"),
        (["--serving.stale_after_days", "null", "--serving.max_elements", "4"], [False] * 4, 50, "blas"),
        (["--serving", "{stale_after_days: 100, max_candidates: 9}"], [False, False, False, True], 9, "blas"),
        (["--serving.matmul_backend", "onednn"], [False, False, True, True], 50, "onednn"),
    ],
    ids=str,
)
def test_what_the_command_line_gives_goes_for_every_model(
    small: SmallModel, overrides: list[str], stale: list[bool], most: int, matmul_backend: str
) -> None:
    source = ResolvedModel(small.folder, "models:/small/1")
    models = ModelManager(ServerOptions(*read_serving_settings(small.folder, overrides)), source)
    for served in models.current, take_up(models, source):
        ranker = served.ranker
        assert ranker.scorer.matmul_backend == (matmul_backend if has_onednn() else "blas")
        app, known = Application(models), datetime.fromisoformat(str(ranker.info.tables_as_of))
        later = [known + timedelta(days=days) for days in (0.4, 0.6, 8, 200)]
        call = {"inputs": [element(context={"time": item.isoformat()}) for item in later]}
        rankings: list[Any] = ask(app, call).tree["predictions"]
        assert ["they are stale" in " ".join(ranking["warnings"]) for ranking in rankings] == stale
        calls = [{"inputs": [element(candidates={"item": [*range(most + more)]})]} for more in (0, 1)]
        assert [ask(app, item).status for item in calls] == [200, 400]
