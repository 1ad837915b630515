"""Which model is served: attempts to take up another one, looks at an address, and settings that stay with a model."""

import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.cli.serve import AtAddress, read_limits
from mmoe_rec.errors import UserError
from mmoe_rec.inference.artifact import Source, version_of
from mmoe_rec.model.products import has_onednn
from mmoe_rec.server.app import Application
from mmoe_rec.server.models import Models, NotFoundError, Reloads
from mmoe_rec.server.options import Options
from tests.inference.other_weights import other_weights
from tests.inference.small_model import SmallModel
from tests.processes import PATIENCE, until
from tests.server.asking import ask, element, take_up


class Address:
    """A `Finder` at whose address lies, or goes wrong, what a test says: what comes next, the last one again and again.

    go_on: a find takes as long as it is not set, once the model is known.
    """

    def __init__(self, *states: str | Exception | None) -> None:
        self.states, self.finds, self.told = list(states), list[str](), ""
        self.go_on = threading.Event()
        self.go_on.set()

    def state(self) -> str | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        self.told = str(state)
        return state

    def find(self) -> Source:
        found = Source(Path("unused"), self.told)
        self.finds.append(found.address)
        assert self.go_on.wait(PATIENCE)
        return found


class HeldFiles(list[str]):
    """The models that were taken up; broken ones can't be."""

    def __call__(self, source: Source) -> None:
        self.append(source.address)
        if source.address == "broken":
            raise UserError("it is broken")


def test_a_slow_find_never_puts_an_older_model_back() -> None:
    address, taken = Address("1"), HeldFiles()
    reloads = Reloads(address, taken)
    address.go_on.clear()
    asked = reloads.ask()
    until(lambda: address.finds == ["1"])
    address.states = ["2"]
    looking = threading.Thread(target=reloads.look, daemon=True)
    looking.start()
    until(lambda: reloads._next is not None or taken)
    assert not taken, "the second waits for the first"
    address.go_on.set()
    asked.result(PATIENCE)
    looking.join(PATIENCE)
    assert taken == ["1", "2"]


def test_those_who_ask_meanwhile_share_one_further_attempt() -> None:
    address, taken = Address("1"), HeldFiles()
    reloads = Reloads(address, taken)
    address.go_on.clear()
    first = reloads.ask()
    until(lambda: address.finds == ["1"])
    address.states = ["2"]
    others = [reloads.ask() for _ in range(150)]
    assert not any(each.done() for each in (first, *others))
    address.go_on.set()
    for each in (first, *others):
        each.result(PATIENCE)
    assert address.finds == taken == ["1", "2"]
    address.states = ["3"]
    reloads.ask().result(PATIENCE)
    assert taken == ["1", "2", "3"], "and it goes on afterwards"


def test_the_model_that_is_served_is_not_loaded_again_unless_another_one_failed() -> None:
    address, taken = Address("1"), HeldFiles()
    reloads = Reloads(address, taken)
    reloads.watch("1", 0)
    for state, expected in (
        ("1", []),
        ("2", ["2"]),
        ("2", ["2"]),
        ("broken", ["2", "broken"]),
        ("broken", ["2", "broken", "broken"]),
        ("2", ["2", "broken", "broken", "2"]),
        ("2", ["2", "broken", "broken", "2"]),
    ):
        address.states = [state]
        asked = reloads.ask()
        assert isinstance(asked.exception(PATIENCE), UserError) == (state == "broken")
        assert taken == expected


def test_a_model_of_unknown_state_is_always_loaded_again() -> None:
    """As at an address of object storage."""
    assert AtAddress("file:///nowhere", "unused").state() is None
    address, taken = Address(None), HeldFiles()
    reloads = Reloads(address, taken)
    reloads.watch(None, 0)
    for _ in range(2):
        reloads.ask().result(PATIENCE)
    assert len(taken) == 2


def test_an_attempt_that_fails_tells_why() -> None:
    reloads = Reloads(Address("broken", OSError("no\nroom"), "3"), taken := HeldFiles())
    with pytest.raises(UserError, match="it is broken"):
        reloads.ask().result(PATIENCE)
    with pytest.raises(NotFoundError, match="OSError: no room"):
        reloads.ask().result(PATIENCE)
    reloads.ask().result(PATIENCE)
    assert taken == ["broken", "3"]


def test_no_error_ends_the_looking(caplog: pytest.LogCaptureFixture) -> None:
    down, gone = OSError("the store\nis down"), UserError("there is no such alias")
    address = Address("1", down, down, gone, "1", gone, RuntimeError("can't start new thread"), "2")
    reloads = Reloads(address, taken := HeldFiles())
    reloads.watch("1", 3_600)
    while not taken:
        reloads.look()
    assert [record.getMessage() for record in caplog.records] == [
        f"can't look for another model: {sentence}"
        for sentence in (
            "OSError: the store is down",
            "there is no such alias",
            "there is no such alias",
            "RuntimeError: can't start new thread",
        )
    ], "each once, until a look succeeds"


def test_a_model_that_can_not_be_loaded_is_not_loaded_at_every_look(caplog: pytest.LogCaptureFixture) -> None:
    address, taken = Address("broken"), HeldFiles()
    reloads = Reloads(address, taken)
    for state, loads in (("broken", 1), ("broken", 1), ("3", 2)):
        address.states = [state]
        reloads.look()
        assert len(taken) == loads
    assert [record.getMessage() for record in caplog.records] == ["the previous model goes on serving: it is broken"]


# A folder is looked at


class Copied:
    """A watched folder, and what was loaded from there: versions, or why not."""

    def __init__(self, folder: Path) -> None:
        self.finder = AtAddress(str(folder), "unused")
        self.models, self.loads = Models(Options(), self.finder.find()), list[str]()
        self.reloads = Reloads(self.finder, self.take_up)
        self.reloads.watch(self.finder.state(), 3_600)

    def take_up(self, source: Source) -> None:
        try:
            self.loads.append(take_up(self.models, source).ranker.version)
        except UserError as error:
            self.loads.append(str(error))
            raise

    def look(self) -> list[str]:
        """What a look loads."""
        before = len(self.loads)
        self.reloads.look()
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
    assert copied.models.current.ranker.version == version_of(small.folder), "which goes on"
    assert copied.look() == [], "what stays broken is not loaded again"
    copy(made, folder, "weights.safetensors")
    assert copied.look() == [version_of(made)]
    assert copied.look() == []


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


# The memory of a model is free once another one is served


def schema(app: Application) -> None:
    """Asks for the page that holds the model's example."""
    assert ask(app, b"", page="/openapi.json", method="GET").status == 200


def call(app: Application) -> None:
    """Asks for a ranking."""
    assert ask(app, {"inputs": [element()]}).status == 200


@pytest.mark.parametrize("asked", [schema, call])
def test_a_model_is_gone_once_another_one_is_served(small: SmallModel, asked: Callable[[Application], None]) -> None:
    models = Models(Options(), Source(small.folder, "models:/small/1"))
    app = Application(models)
    asked(app)
    before = weakref.ref(models.current.ranker)
    take_up(models, Source(small.folder, "models:/small/2"))

    def is_gone() -> bool:
        gc.collect()
        return before() is None

    until(is_gone)
    asked(app)


# Settings of each model, unless the command line gives them


@pytest.mark.parametrize(
    ("overrides", "stale", "most", "products"),
    [
        ([], [False, False, True, True], 50, "blas"),
        (["--serving.stale_after_days", "0.5"], [False, True, True, True], 50, "blas"),
        (["--serving.stale_after_days", "null", "--serving.max_elements", "4"], [False] * 4, 50, "blas"),
        (["--serving", "{stale_after_days: 100, max_candidates: 9}"], [False, False, False, True], 9, "blas"),
        (["--serving.products", "onednn"], [False, False, True, True], 50, "onednn"),
    ],
    ids=str,
)
def test_what_the_command_line_gives_goes_for_every_model(
    small: SmallModel, overrides: list[str], stale: list[bool], most: int, products: str
) -> None:
    source = Source(small.folder, "models:/small/1")
    models = Models(Options(*read_limits(small.folder, overrides)), source)
    for served in models.current, take_up(models, source):
        ranker = served.ranker
        assert ranker.scorer.products == (products if has_onednn() else "blas")
        app, known = Application(models), datetime.fromisoformat(str(ranker.about.tables_as_of))
        later = [known + timedelta(days=days) for days in (0.4, 0.6, 8, 200)]
        call = {"inputs": [element(context={"time": each.isoformat()}) for each in later]}
        rankings: list[Any] = ask(app, call).tree["predictions"]
        assert ["they are stale" in " ".join(each["warnings"]) for each in rankings] == stale
        calls = [{"inputs": [element(candidates={"item": [*range(most + more)]})]} for more in (0, 1)]
        assert [ask(app, each).status for each in calls] == [200, 400]
