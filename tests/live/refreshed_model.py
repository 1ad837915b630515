"""A small model with random weights that is registered and holds an alias, and a log of days that grows."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.inference.artifact import ArtifactInfo, read_artifact
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import registry, runs
from mmoe_rec.tracking.registry import ModelVersion, fetch_model, find_champion, move_alias
from tests import commands
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, DAY, START, files_of, random_log, times_of, with_requests

NAME = "small"


class Registered:
    """A model of a name in the registry at `uri`."""

    name: str
    uri: str
    folder: Path

    def keep(self) -> Self:
        """Keeps a copy of the folder for `restore`."""
        shutil.copytree(self.folder, self._kept)
        return self

    def restore(self) -> Self:
        """The folder is what it was when it was kept, at the same place, as MLflow's store holds addresses."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "mlflow.db":  # which MLflow keeps open
                path.unlink()
        shutil.copytree(self._kept, self.folder, ignore=shutil.ignore_patterns("mlflow.db"), dirs_exist_ok=True)
        stores = (sqlite3.connect(item / "mlflow.db") for item in (self._kept, self.folder))
        with closing(next(stores)) as kept, closing(next(stores)) as store:
            kept.backup(store)
        return self

    @property
    def _kept(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.kept")

    def champion_version(self, alias: str = "champion") -> ModelVersion:
        """The version that holds an alias."""
        actual = find_champion(self.name, alias, self.uri)
        assert actual is not None
        return actual

    def versions(self) -> list[Any]:
        """All versions, the first one first."""
        client = mlflow.MlflowClient(self.uri, self.uri)
        return sorted(client.search_model_versions(f"name='{self.name}'"), key=lambda each: int(each.version))

    def folder_of(self, number: str) -> Path:
        """The artifact folder of a version."""
        return fetch_model(f"models:/{self.name}/{number}", self.uri)

    def about(self, number: str) -> ArtifactInfo:
        """What the artifact of a version says, once its files are checked."""
        return read_artifact(self.folder_of(number))


class RefreshedModel(Registered):
    """In a folder: eight days of a log, a model of them that is version 1 and champion, and a settings file."""

    name = NAME

    def __init__(self, folder: Path, requests: bool = False, **sections: Any) -> None:
        """requests: the log has requests with ids, of one time each; sections: of the settings."""
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.journal = folder / "journal.db"
        self.table = random_log(3, 900, days=14.0)
        if requests:
            self.table = with_requests(self.table, spread=1)
            sections["columns"] = BASE["columns"] | {"request": "request"} | sections.get("columns", {})
        small = SmallModel(folder / "work", log=[self._days(0, 9)], tracking={"uri": self.uri}, **sections)
        self.settings: Settings = small.settings
        self.log = Path(self.settings.data.log)
        self.config = folder / "settings.yaml"
        self.config.write_text(self.settings.to_yaml(), encoding="utf-8")
        with runs.open_run(self.uri, NAME, run_name="training") as run:
            registry.register_model(run, small.folder, NAME, "champion")
            self.run_id = run.run_id

    def _days(self, start: float, end: float) -> pa.Table:
        window = (START + int(start * DAY), START + int(end * DAY))
        return self.table.filter(pa.array(in_window(times_of(self.table), window)))

    def add(self, start: float, end: float) -> pa.Table:
        """A file of these days, of which there are 14."""
        table = self._days(start, end)
        pq.write_table(table, self.log / f"days {start:g} to {end:g}.parquet")
        return table

    def refresh(self, *words: str) -> None:
        commands.run("refresh", "--config", str(self.config), *words)

    def take_in(self, *words: str) -> None:
        """The command, with the journal."""
        self.refresh("--journal", str(self.journal), *words)

    def refused(self, capsys: pytest.CaptureFixture, *words: str) -> str:
        """The sentence with which a refresh refuses; nothing has changed by it."""
        before = self.champion_version(), len(self.versions()), files_of(self.log)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            self.refresh(*words)
        assert ended.value.code == 2
        assert (self.champion_version(), len(self.versions()), files_of(self.log)) == before
        assert not (Path(self.settings.data.work_dir) / "refreshed").exists()
        (line,) = [item for item in capsys.readouterr().err.splitlines() if item.startswith("error: ")]
        return line

    def move_alias(self, number: str, alias: str = "champion") -> None:
        """A person moves the alias."""
        move_alias(NAME, alias, number, self.uri)

    def last_time(self) -> int:
        """Microseconds of the last request that the log's files hold."""
        tables = [pq.read_table(path) for path in self.log.glob("*.parquet")]
        return int(np.concatenate([times_of(table) for table in tables]).max())
