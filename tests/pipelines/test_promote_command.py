"""A version of the registry takes the alias, is refused with a reason, and gives it back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import promotion
from mmoe_rec.evaluation.evaluate import NotFiniteError
from mmoe_rec.inference.ranker import OtherScoresError, Ranker
from mmoe_rec.tracking import registry
from mmoe_rec.tracking.registry import fetch_model
from tests import commands
from tests.pipelines.short_trainings import NAME, SLOW, World
from tests.report.parsed import Page

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with two versions: one that has learnt nothing, and one that has."""
    world = World.of(tmp_path_factory.mktemp("template"))
    world.train(*SLOW)
    world.train("--evaluation.slices", '["slot"]', "--evaluation.guarded_slices", '["slot"]')
    assert world.holder() == "2"
    return world


@pytest.fixture
def world(template: World) -> World:
    """The first version holds the alias."""
    registry.move_alias(NAME, "champion", "1", template.uri)
    return template


def run(world: World, *words: str) -> int:
    """The exit code of the command."""
    return commands.exit_code("promote", "--config", world.folder / "first.yaml", *words)


def tags(world: World, version: str) -> dict[str, str]:
    return world.client.get_model_version(NAME, version).tags


def test_a_better_version_takes_the_alias_and_gives_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(world, "--challenger", "2") == 0
    printed = capsys.readouterr().out
    assert world.holder() == "2"
    assert "'champion' is version 2 now" in printed
    assert "'version 2' is better than 'version 1': mean auc of click, liked is higher by " in printed
    assert tags(world, "2")["compared"].startswith("'version 2' is better than 'version 1'")
    assert tags(world, "2")["promoted"] == "'champion' since this comparison"
    report = world.folder / "work" / "promotion" / "report.html"
    assert "'version 2' is better than 'version 1'" in Page(report.read_text(encoding="utf-8")).words
    run_id = world.client.get_model_version(NAME, "2").run_id
    assert "promotion/report.html" in [each.path for each in world.client.list_artifacts(run_id, "promotion")]
    assert run(world, "--challenger", "models:/learnable/2") == 0
    assert "version 2 holds 'champion' already" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        # Another process promotes while the version is loaded.
        patch.setattr(promotion, "_load", lambda _: registry.move_alias(NAME, "champion", "1", world.uri))
        assert run(world, "--rollback") == 2
    assert world.holder() == "1"
    assert "'champion' has moved meanwhile: run the command again" in capsys.readouterr().err
    registry.move_alias(NAME, "champion", "2", world.uri)
    assert run(world, "--rollback") == 0
    assert world.holder() == "1"
    printed = capsys.readouterr().out
    assert "'champion' is version 1 again, which held it before version 2" in printed
    assert "its tables are as of 2024-" in printed
    assert tags(world, "2")["promoted"] == "no more: 'champion' went back to version 1"
    assert tags(world, "1")["promoted"] == "'champion' again, after version 2"
    registry.move_alias(NAME, "champion", "2", world.uri)  # by hand
    assert run(world, "--rollback") == 2, "what was before is not taken from a holding that has ended"
    assert "it is not known which version" in capsys.readouterr().err
    registry.move_alias(NAME, "champion", "1", world.uri)


def test_rows_that_either_has_seen_decide_nothing(world: World, capsys: pytest.CaptureFixture) -> None:
    split = ["--split.train_end", "2024-03-04", "--split.validation_end", "2024-03-05"]
    assert run(world, "--challenger", "2", *split, "--data.work", str(world.folder / "earlier")) == 1
    assert world.holder() == "1"
    printed = capsys.readouterr().out
    for version in (1, 2):
        assert f"version {version} was trained, or its best state chosen, on requests before 2024-03-08 " in printed


def test_a_version_that_cannot_be_served_is_refused_and_a_holder_that_cannot_gives_way(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(fetch_model(f"models:/{NAME}/2", world.uri), broken)
    (broken / "weights.safetensors").write_bytes(b"short")

    def taken(address: str, uri: str) -> Path:
        return broken if address.endswith("/2") else fetch_model(address, uri)

    monkeypatch.setattr(registry, "fetch_model", taken)
    assert run(world, "--challenger", "2") == 1
    assert world.holder() == "1"
    assert tags(world, "2")["compared"].startswith("version 2 can't be served: ")
    registry.move_alias(NAME, "champion", "2", world.uri)
    assert run(world, "--challenger", "1") == 0
    assert world.holder() == "1"


def test_what_is_asked_for_wrongly_is_told(world: World, capsys: pytest.CaptureFixture) -> None:
    for words, told in (
        (("--challenger", "99"), "99"),
        (("--challenger", "nobody"), "no version of 'learnable' holds the alias 'nobody': those that are held are "),
        ((), "give the version that is to be promoted with --challenger, or --rollback alone"),
        (("--challenger", "2", "--rollback"), "or --rollback alone"),
        (("--challenger", "2", "--tracking.registered_model", "unknown"), "unknown"),
    ):
        assert run(world, *words) == 2
        assert told in capsys.readouterr().err
    world.client.set_registered_model_alias(NAME, "lonely", "1")
    assert run(world, "--rollback", "--tracking.alias", "lonely") == 2
    assert "it is not known which version of 'learnable' held 'lonely' before version 1" in capsys.readouterr().err


def test_an_alias_that_moves_meanwhile_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*_: Any) -> list[str]:
        world.client.create_model_version(NAME, world.client.get_model_version(NAME, "1").source)
        newest = max(int(each.version) for each in world.client.search_model_versions(f"name='{NAME}'"))
        registry.move_alias(NAME, "champion", str(newest), world.uri)
        return []

    monkeypatch.setattr(promotion, "_find_objections", meanwhile)
    assert run(world, "--challenger", "2") == 1
    assert world.holder() not in ("1", "2")
    assert tags(world, "2")["compared"] == "'champion' has moved meanwhile: run the command again"


def test_a_holder_that_can_not_be_had_here_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage, or a machine that gives other predictions, says nothing about the holder."""
    fetch = registry.fetch_model

    def away(address: str, uri: str) -> Path:
        if address.endswith("/1"):
            raise UserError(f"'{address}' can't be loaded")
        return fetch(address, uri)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "fetch_model", away)
        assert run(world, "--challenger", "2") == 2
    load = Ranker.load

    for error in (OtherScoresError("gives other predictions here"), RuntimeError("can't allocate memory")):
        with monkeypatch.context() as patch:
            calls = iter([None, error])

            def loaded(folder: Path, calls: Any = calls) -> Any:
                if (trouble := next(calls)) is not None:
                    raise trouble
                return load(folder)

            patch.setattr(Ranker, "load", staticmethod(loaded))
            assert run(world, "--challenger", "2") == 1
        assert "can't be compared here" in tags(world, "2")["compared"]
    assert world.holder() == "1"


@pytest.mark.parametrize(("which", "promoted"), [("2", False), ("1", True)])
def test_a_version_whose_predictions_are_not_finite(
    world: World, monkeypatch: pytest.MonkeyPatch, which: str, promoted: bool
) -> None:
    def evaluated(*_: Any, **__: Any) -> Any:
        raise NotFiniteError("it gives predictions that are not finite numbers", f"version {which}")

    monkeypatch.setattr(promotion, "evaluate_found", evaluated)
    assert run(world, "--challenger", "2") == (0 if promoted else 1)
    assert (world.holder() == "2") == promoted
    assert tags(world, "2")["compared"] == "it gives predictions that are not finite numbers"


def test_rows_of_another_split_are_logged_to_a_run_of_their_own(world: World) -> None:
    words = ["--config", str(world.folder / "first.yaml"), "--model", "models:/learnable/2"]
    commands.run("evaluate", *words)
    run_id = world.client.get_model_version(NAME, "2").run_id
    before = world.client.get_run(run_id)
    other = ["--data.work", str(world.folder / "few"), "--split.validation_end", "2024-03-08T12:00"]
    commands.run("evaluate", *words, *other)
    after = world.client.get_run(run_id)
    assert before.data.metrics["test/liked.auc"] > 0
    assert (after.data.metrics, after.data.tags) == (before.data.metrics, before.data.tags)
    (newest, *_) = world.client.search_runs([before.info.experiment_id], max_results=1)
    assert newest.info.run_name == "evaluate models:/learnable/2"
    assert 0 < newest.data.metrics["test/rows"] < before.data.metrics["test/rows"]
    found = json.loads((world.folder / "few" / "evaluation" / "metrics.json").read_text())["tasks"]
    assert newest.data.metrics["test/liked.auc"] == pytest.approx(found["liked"]["auc"]["value"])
