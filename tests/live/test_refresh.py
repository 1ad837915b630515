"""New versions of the model that is served, with tables that know the newest files of the log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mmoe_rec.inference.artifact import artifact_version, read_artifact
from mmoe_rec.inference.export import write_int8
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.live import refresh as job
from mmoe_rec.live.refresh import tables_time, update_tables
from mmoe_rec.log.request_values import iso_time
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import fetch_model, move_alias
from tests.fork_server import Command
from tests.live.refreshed_model import NAME, RefreshedModel
from tests.log.small_logs import DAY, START, files_of, times_of
from tests.preprocessing.test_tables_of_models import assert_same_tables

pytestmark = pytest.mark.thorough

ADDRESS = f"models:/{NAME}@champion"


def test_days_come_one_after_the_other(model: RefreshedModel, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    first = model.about("1")
    features = files_of(Path(model.settings.data.work_dir) / "features")
    model.refresh()
    assert f"'champion' of '{NAME}' stays version 1 with tables as of {first.tables_as_of}" in capsys.readouterr().out
    assert len(model.versions()) == 1

    added = model.add(9, 11)
    model.refresh("--model", ADDRESS)
    printed = capsys.readouterr().out
    assert f"'champion' of '{NAME}' is version 2 now" in printed
    assert f" {len(added)} rows and 0 events" in printed
    champion, second = model.champion_version(), model.about("2")
    assert champion.number == "2"
    assert tables_time(second) == int(times_of(added).max()) == model.last_time()
    assert second.trained_as_of == first.tables_as_of
    assert (second.fingerprint, second.layout, second.journal) == (first.fingerprint, first.layout, None)
    run = mlflow.get_run(champion.run_id)
    assert champion.run_id != model.run_id
    assert run.data.tags["refreshed.from"] == f"models:/{NAME}/1"
    assert run.data.tags["refreshed.run"] == model.run_id
    assert run.data.metrics["refresh/rows"] == len(added)
    version = model.versions()[-1]
    assert version.tags["refreshed.from"] == f"models:/{NAME}/1"
    assert version.tags["tables_as_of"] == second.tables_as_of

    last = model.add(11, 14)
    move_alias(NAME, "champion", "2", model.uri, previous=registry.get_version(NAME, "1", model.uri))
    model.refresh()
    assert model.champion_version().number == "3"
    assert model.champion_version().find_previous_champion("champion") == "1", "a promotion is undone past refreshes"
    assert model.about("3").trained_as_of == first.tables_as_of
    left, three = model.folder_of("1"), model.folder_of("3")
    for name in ("weights.safetensors", "layout.json", "settings.yaml"):
        assert (left / name).read_bytes() == (three / name).read_bytes()
    update_tables(left, model.settings, tmp_path / "anew", rebuild=True)
    assert assert_same_tables(three / "features", tmp_path / "anew" / "features") > 100
    assert artifact_version(three) == artifact_version(tmp_path / "anew")
    # What is served has changed, and says so.
    rankers = [Ranker.load(item) for item in (left, three)]
    moment = iso_time(START + 20 * DAY)
    actual = [
        ranker.rank(
            {"user": last["user"][0].as_py()},
            {"time": moment, "born": None},
            {"item": last["item"][:3].to_pylist()},
            explain=True,
        )
        for ranker in rankers
    ]
    assert [item.tables_as_of for item in actual] == [first.tables_as_of, iso_time(model.last_time())]
    counters = [item.explanations[0].counters for item in actual if item.explanations is not None]
    assert len(counters) == 2
    assert counters[0] != counters[1]
    assert files_of(Path(model.settings.data.work_dir) / "features") == features, "days are added for a training alone"


def test_what_can_not_be_added_is_reported(model: RefreshedModel, capsys: pytest.CaptureFixture) -> None:
    model.add(8, 9)  # which is in the tables already
    model.refresh()
    message = capsys.readouterr()
    assert (
        f"skipped {len(model._days(8, 9)):,} rows of new files that repeat rows of earlier files, such as row 0 of"
        in message.err
    )
    assert "no new files" in message.out
    (model.log / "days 8 to 9.parquet").unlink()
    old = next(iter(sorted(model.log.glob("*.parquet"))))
    pq.write_table(pq.read_table(old).slice(1), old)
    message = model.refused(capsys)
    assert f"'{old}' has changed since the model's tables were built from it. Restore it, or rebuild" in message
    model.refresh("--rebuild")
    assert model.champion_version().number == "2"
    capsys.readouterr()
    model.refresh("--rebuild")
    assert "rebuilt tables are identical" in capsys.readouterr().out
    (model.log / "bad.parquet").write_bytes(b"PAR1")
    assert "bad.parquet" in model.refused(capsys)
    assert "bad.parquet" in model.refused(capsys, "--skip-bad-files")
    model.add(9, 10)
    capsys.readouterr()
    model.refresh("--skip-bad-files")
    assert model.champion_version().number == "3"
    assert "skipped until it is written again: '" in capsys.readouterr().err


def test_other_settings_and_other_addresses_are_reported(model: RefreshedModel, capsys: pytest.CaptureFixture) -> None:
    model.add(9, 10)
    message = model.refused(capsys, "--tasks.click.label_delay_days", "3")
    assert "setting 'tasks.click.label_delay_days' is 0.0 in the model's features and 3.0 in the settings" in message
    assert "Give models:/NAME@ALIAS" in model.refused(capsys, "--model", f"models:/{NAME}/1")
    assert "Give models:/NAME@ALIAS" in model.refused(capsys, "--model", str(model.folder_of("1")))
    assert "no version of the model 'small' has the alias 'best'" in model.refused(
        capsys, "--model", f"models:/{NAME}@best"
    )


def test_files_that_go_stay_counted(model: RefreshedModel, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    model.add(9, 11)
    update_tables(model.folder_of("1"), model.settings, whole, rebuild=True)
    for path in model.log.glob("*.parquet"):
        if "days" not in path.name:
            path.unlink()
    model.refresh()
    assert "removed files that remain in the tables: 1" in capsys.readouterr().out
    assert_same_tables(model.folder_of("2") / "features", whole / "features")
    model.refresh("--rebuild")
    assert "are gone (1, such as" in capsys.readouterr().err
    assert tables_time(model.about("3")) == model.last_time()


def test_an_alias_that_a_person_moved_meanwhile_stays(
    model: RefreshedModel, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = registry.register_model

    def and_meanwhile(*arguments: Any, **more: Any) -> str:
        number = register(*arguments, **more)
        model.move_alias("2")
        return number

    with runs.open_run(model.uri, NAME) as run:
        register(run, model.folder_of("1"), NAME)
    model.add(9, 10)
    with monkeypatch.context() as patch:
        patch.setattr(job.registry, "register_model", and_meanwhile)
        model.refresh()
    said = " ".join(capsys.readouterr().out.split())
    assert "has moved to version 2 in the meantime, so version 3 is registered without the alias" in said
    assert model.champion_version().number == "2"
    model.refresh()
    assert model.champion_version().number == "4", "which is refreshed next"


class Killed(BaseException):
    """As sudden as a kill."""


def _dying(function: Callable[..., Any], after: bool, error: type[BaseException] = Killed) -> Callable[..., Any]:
    def dying(*arguments: Any, **more: Any) -> Any:
        if after:
            function(*arguments, **more)
        raise error

    return dying


@pytest.mark.parametrize(
    ("place", "name", "after", "versions"),
    [
        (job, "update_tables", True, 2),
        (registry, "register_model", True, 3),
        (job, "move_alias", True, 2),
    ],
)
def test_a_refresh_that_was_killed_is_ended_by_the_next(
    model: RefreshedModel, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, after: bool, versions: int
) -> None:
    added = model.add(9, 10)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, _dying(getattr(place, name), after))
        with pytest.raises(Killed):
            model.refresh()
    model.refresh()
    assert model.champion_version().number == f"{versions}" == str(model.versions()[-1].version)
    assert tables_time(model.about(f"{versions}")) == int(times_of(added).max())
    model.add(10, 11)
    model.refresh()
    assert len(model.versions()) == versions + 1


def test_old_versions_of_refreshes_go_with_their_files(
    model: RefreshedModel, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the newest, those that an alias needs, copies, and all that a refresh has not made."""

    def refresh(number: int) -> str:
        model.add(8 + number / 2, 8.5 + number / 2)
        model.refresh("--tracking.keep_versions", "1")
        assert model.champion_version().number == f"{number}"
        return " ".join("".join(capsys.readouterr()).split())

    client = mlflow.MlflowClient(model.uri, model.uri)
    for number in range(2, 6):
        assert "removed" not in refresh(number)
        if number == 2:
            move_alias(NAME, "other", "1", model.uri, previous=model.champion_version())
        if number == 3:
            model.move_alias("3", "kept")
    client.copy_model_version(f"models:/{NAME}/4", "production")
    mlflow.register_model(model.versions()[4].source, "production")
    client.delete_registered_model_alias(NAME, "other")
    gone = model.folder_of("2")
    assert "with all files: version 2 of earlier refreshes (tracking.keep_versions: 1)" in refresh(6)
    assert not gone.exists()
    refresh(7)
    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "delete_artifacts", _dying(print, after=False, error=OSError))
        assert "earlier refreshes may remain, and the next refresh removes them" in refresh(8)
    client.transition_model_version_stage(NAME, "6", "Production")
    assert "with all files: version 7 of earlier" in refresh(9)
    assert [version.version for version in model.versions()] == [1, 3, 4, 5, 6, 8, 9]
    for address in ("production/1", "production/2", "small@kept", "small/1", "small/8", "small@champion"):
        read_artifact(fetch_model(f"models:/{address}", model.uri))


def test_two_at_once_make_one_version(model: RefreshedModel) -> None:
    model.add(9, 10)
    both = [Command(["mmoe_rec", "refresh", "--config", str(model.config)]) for _ in range(2)]
    assert [item.wait() for item in both] == [0, 0]
    said = sorted(item.stdout for item in both)
    assert len(model.versions()) == 2
    assert "no new files" in said[1] or "no new files" in said[0]
    assert model.champion_version().number == "2"


def test_files_without_rows_are_nothing_new(model: RefreshedModel, capsys: pytest.CaptureFixture) -> None:
    path = next(iter(model.log.glob("*.parquet")))
    pq.write_table(pq.read_table(path).slice(0, 0), model.log / "empty.parquet")
    model.refresh()
    assert "no new files" in capsys.readouterr().out


def test_a_model_in_int8_moves_on_too(model: RefreshedModel) -> None:
    small = model.folder / "int8"
    small.mkdir()
    write_int8(model.folder_of("1"), small)
    with runs.open_run(model.uri, NAME) as run:
        registry.register_model(run, small, NAME, "champion")
    model.add(9, 10)
    model.refresh()
    three = model.folder_of(model.champion_version().number)
    assert (three / "weights.safetensors").read_bytes() == (small / "weights.safetensors").read_bytes()
    assert tables_time(Ranker.load(three).info) == model.last_time()
