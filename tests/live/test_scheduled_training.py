"""The line of a scheduler: tables move on every day, and a training is begun when one is due."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.errors import UserError
from mmoe_rec.live import refresh as job
from mmoe_rec.preprocessing.logs import HeldFiles
from mmoe_rec.preprocessing.prepare import FeatureFolder
from tests import commands
from tests.live.refreshed_model import Registered
from tests.log.small_logs import files_of
from tests.pipelines.learnable_log import START, learnable_log, settings_tree
from tests.pipelines.short_trainings import RATES, SMALL, dying_after

pytestmark = pytest.mark.thorough

NAME = "learnable"


class Days(Registered):
    """Six days of a log of ten, of which the others come as files of their own, and a model of the first six."""

    name = NAME

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        split = {"train_end": "2024-03-05", "validation_end": "2024-03-06"}
        tree = settings_tree(folder, split=split, training=SMALL | RATES)
        (folder / "settings.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        (folder / "log").mkdir()
        self.add(0, 6)
        commands.run("train", "--config", str(folder / "settings.yaml"))

    def add(self, start: float, end: float) -> pa.Table:
        """A file of these days."""
        table = rows_between(start, end)
        pq.write_table(table, self.folder / "log" / f"from {start:g}.parquet")
        return table

    def run(self, *words: str) -> None:
        """The line: a training is due two days after the newest."""
        every = ("--train-every-days", "2", "--validation-days", "1")
        commands.run("refresh", "--config", str(self.folder / "settings.yaml"), *every, *words)

    def refused(self, capsys: pytest.CaptureFixture, *words: str) -> str:
        """The sentence with which the line ends."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            self.run(*words)
        assert ended.value.code == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
        return line

    @property
    def prepared(self) -> FeatureFolder:
        return FeatureFolder(self.folder / "work" / "features")

    @property
    def under_way(self) -> bool:
        return (self.folder / "work" / "before_training").exists()

    def encoded(self, split: str) -> int:
        return int(self.prepared.manifest["splits"][split]["rows"])


def rows_between(start: float, end: float) -> pa.Table:
    log = learnable_log(rows=6_000)
    low, high = (START + np.timedelta64(round(each * 86_400), "s") for each in (start, end))
    times = log["time"].to_numpy()
    return log.filter(pa.array((times >= low) & (times < high)))


def trained_rows(start: float, *tables: pa.Table) -> int:
    """Rows since a day but for those of the last 24 hours."""
    times = np.concatenate([table["time"].to_numpy() for table in tables])
    last = times.max().astype("datetime64[s]") + np.timedelta64(1, "s") - np.timedelta64(1, "D")
    return int(((times >= START + np.timedelta64(round(start * 86_400), "s")) & (times < last)).sum())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Days:
    return Days(tmp_path_factory.mktemp("days")).keep()


@pytest.fixture
def days(kept: Days) -> Days:
    return kept.restore()


def test_a_training_when_one_is_due(days: Days, capsys: pytest.CaptureFixture) -> None:
    before = files_of(days.prepared.folder)
    one = days.add(6, 7)
    days.run()
    assert "no training is due" in capsys.readouterr().out
    assert days.holder().number == "2"
    assert files_of(days.prepared.folder) == before
    two = days.add(7, 8.5)
    days.run()
    printed = capsys.readouterr().out
    assert "'champion' of 'learnable' is version 3 now" in printed
    rows = trained_rows(6, one, two)
    assert f"training on {rows:,} rows before 2024-03-08T" in printed
    assert days.encoded("train") == rows > len(one)
    assert days.encoded("validation") == len(one) + len(two) - rows
    assert len(days.versions()) == 4
    client = mlflow.MlflowClient(days.uri, days.uri)
    run = client.get_run(client.get_model_version(NAME, "4").run_id)
    assert run.data.tags["warm_start.model"] == f"models:/{NAME}/3"
    assert run.data.tags["compared"] in printed
    assert run.data.params["split.train_end"].startswith("2024-03-08")
    holds = "4" if run.data.tags["promoted"] == "True" else "3"
    assert days.holder().number == holds
    about = days.about("4")
    assert (about.tables_as_of, about.trained_as_of) == (days.about("3").tables_as_of, None)
    assert about.files == days.about("3").files == HeldFiles.read(days.prepared.folder).digest
    assert not days.under_way
    days.run()
    printed = capsys.readouterr().out
    assert "no new files" in printed
    assert "no training is due" in printed
    assert len(days.versions()) == 4
    days.add(8.5, 10)
    days.run()
    assert days.holder().number == "5"
    assert days.about("5").trained_as_of == days.about(holds).trained_as_of or days.about(holds).tables_as_of


@pytest.mark.parametrize("more", [False, True])
def test_a_training_that_was_killed_is_ended_by_the_next(days: Days, more: bool, capsys: pytest.CaptureFixture) -> None:
    """With the rows of all days since the training before, also where another day has come meanwhile."""
    tables = [days.add(6, 8.5)]
    with dying_after(6):
        days.run()
    assert days.under_way
    assert days.holder().number == "2", "the tables have moved on"
    if more:
        tables.append(days.add(8.5, 9.5))
    days.run()
    assert days.encoded("train") == trained_rows(6, *tables)
    assert not days.under_way
    assert len(days.versions()) == 3 + more
    assert HeldFiles.read(days.prepared.folder).digest == days.about(f"{2 + more}").files
    if not more:
        experiment = mlflow.MlflowClient(days.uri).get_experiment_by_name(NAME)
        runs = mlflow.MlflowClient(days.uri).search_runs([experiment.experiment_id])
        assert len(runs) == 3, "first training, refresh, and one training that went on"
    days.run()
    assert "no training is due" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["_link", "extend", "train_model", "_forget"])
def test_a_kill_between_any_two_steps(days: Days, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    class Killed(BaseException):
        pass

    function: Callable = getattr(job, place)

    def dying(*arguments: object, **more: object) -> None:
        function(*arguments, **more)
        raise Killed

    table = days.add(6, 9)
    with monkeypatch.context() as patch:
        patch.setattr(job, place, dying)
        with pytest.raises(Killed):
            days.run()
    days.run()
    assert not days.under_way
    assert days.encoded("train") == trained_rows(6, table)
    assert len(days.versions()) == 3
    days.run()
    assert len(days.versions()) == 3


def test_a_part_that_fails_leaves_the_alias(
    days: Days, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = days.add(6, 7)
    days.run()
    (days.folder / "log" / "from 6.parquet").unlink()
    two = days.add(7, 9)
    told = days.refused(capsys)
    assert "files are gone that the tables of 'champion' hold and the features in" in told
    assert "(1, such as" in told
    assert days.holder().number == "3", "refreshed"
    days.add(6, 7)  # with the time of now

    def failing(*_: object, **__: object) -> None:
        raise UserError("it was not to be")

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_model", failing)
        assert days.refused(capsys) == "error: it was not to be"
    assert days.holder().number == "3"
    days.run()
    assert days.encoded("train") == trained_rows(6, one, two)


def test_features_that_were_extended_by_hand_do_not_matter(days: Days, capsys: pytest.CaptureFixture) -> None:
    days.add(6, 7.5)
    split = ["--split.train_end", "2024-03-07T12:00", "--split.validation_end", "2024-03-08"]
    commands.run("features", "--config", str(days.folder / "settings.yaml"), "--extend", *split)
    days.run()
    assert days.holder().number == "2"
    assert "0.0 days behind" in capsys.readouterr().out
