"""A new day of a log as a scheduler adds it: features --extend, train --from, evaluate, promote and refresh."""

import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.tracking import registry
from pipelines import daily
from tests import commands
from tests.pipelines.learnable_log import START, learnable_log, settings_tree

pytestmark = pytest.mark.thorough

FIRST_SPLIT = {"train_end": "2024-03-07", "validation_end": "2024-03-08"}
SECOND_SPLIT = {"train_end": "2024-03-10", "validation_end": "2024-03-10T12:00"}


@dataclass(frozen=True)
class Days:
    """Where all lies, the settings file of the second day, and what was printed on the way. The first features are in
    `before`."""

    folder: Path
    config: Path
    printed: dict[str, str]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


def _settings(folder: Path, name: str, split: dict[str, str]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings_tree(folder, split=split), sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    folder = tmp_path_factory.mktemp("days")
    (folder / "log").mkdir()
    log = learnable_log()
    times = log["time"].to_numpy()
    new = times >= START + np.timedelta64(8, "D")
    pq.write_table(log.filter(pa.array(~new)), folder / "log" / "first.parquet")
    later = log.filter(pa.array(new))
    items = later["item"].to_numpy()
    # A fifth of the items go by ids that no earlier file has.
    later = later.set_column(2, "item", pa.array(np.where(items % 5 == 0, items + 1000, items)))
    config, second = _settings(folder, "first", FIRST_SPLIT), _settings(folder, "second", SECOND_SPLIT)
    printed = {"nobody": refuse_daily("--config", str(config))}
    commands.run("train", "--config", config)
    printed["nothing"] = commands.run_and_read("features", "--config", config, "--extend")
    shutil.copytree(folder / "work" / "features", folder / "before")
    pq.write_table(later, folder / "log" / "later.parquet")
    with redirect_stdout(io.StringIO()) as daily_run:
        daily.main(["--config", str(second)])
    printed["daily"] = daily_run.getvalue()
    return Days(folder, second, printed)


def refuse_daily(*words: str) -> str:
    """The sentence with which a day refuses."""
    with redirect_stderr(io.StringIO()) as message, pytest.raises(SystemExit) as ended:
        daily.main(words)
    assert ended.value.code == 2
    return message.getvalue()


def test_a_day_goes_from_new_files_to_refreshed_tables(days: Days) -> None:
    printed = days.printed["daily"]
    places = [printed.index(name) for name in ("added ", "registered as models:/learnable@", "metrics: ")]
    assert places == sorted(places)
    last = next(line for line in reversed(printed.splitlines()) if "'champion' of 'learnable'" in line)
    assert printed.rindex(last) > places[-1], "tables are refreshed at the end"
    champion = registry.find_champion("learnable", "champion", days.uri)
    assert champion is not None
    assert f"version {champion.number}" in last
    assert "no version of 'learnable' has the alias 'champion'" in days.printed["nobody"]
    nowhere = str(days.folder / "nowhere")
    assert "nowhere' does not exist" in refuse_daily("--config", str(days.config), "--data.log", nowhere)


def test_the_command_says_what_was_added(days: Days) -> None:
    assert days.printed["nothing"].strip() == f"no new files in '{days.folder / 'log'}', so the features are unchanged"
    lines = days.printed["daily"].splitlines()
    later = pq.read_table(days.folder / "log" / "later.parquet")
    assert f"added {later.num_rows:,} rows of 1 new file" in lines
    assert "new IDs: user 0, item 8, slot 0" in lines
    rows = re.findall(r"^  (?:train|validation|test): ([\d,]+) rows; ", days.printed["daily"], re.MULTILINE)
    assert sum(int(row.replace(",", "")) for row in rows) == later.num_rows
    assert any(line.startswith("next: mmoe-rec train --config ") and "--from models:/" in line for line in lines)


def test_the_started_model_is_registered_beside_the_first_one(days: Days) -> None:
    mlflow.set_registry_uri(days.uri)
    version = mlflow.MlflowClient(days.uri).get_model_version("learnable", "2")
    run = mlflow.get_run(version.run_id)
    assert run.data.tags["warm_start"] == "models:/learnable/1"
    assert run.data.tags["warm_start.run"] == registry.find_run_id("models:/learnable/1", days.uri)
    left, two = (Ranker.load(registry.fetch_model(f"models:/learnable/{number}", days.uri)) for number in (1, 2))
    assert two.layout.table("item").rows == left.layout.table("item").rows + 8
    first = json.loads((days.folder / "before" / "manifest.json").read_text())
    assert left.info.fingerprint == first["fingerprint"] != two.info.fingerprint
    example = json.loads((days.folder / "work" / "model" / "example_request.json").read_text())["inputs"][0]
    ranking = two.rank(example["user"], example["context"], example["candidates"])
    assert len(set(ranking.scores)) == len(ranking.scores)


def test_features_without_training_rows_are_not_trained_on(
    days: Days, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    shutil.copytree(days.folder / "before", tmp_path / "features")
    config = ("--config", str(days.folder / "first.yaml"), "--data.work_dir", str(tmp_path))
    commands.run("features", *config, "--extend")
    printed = capsys.readouterr().out
    assert "  train: no rows" in printed
    helps = "have no train rows: days were added, so only the new rows are encoded, and no new row is in"
    assert printed.splitlines()[-1].startswith("these features can't train a model: ")
    assert helps in printed.splitlines()[-1]
    commands.run("features", *config)
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1], "also where they are at hand"
    assert helps in commands.refuse(capsys, "train", *config, "--from", "models:/learnable/1")
    assert helps in commands.refuse(capsys, "inspect", *config)


def test_a_gain_that_half_a_day_does_not_show_leaves_the_alias(days: Days) -> None:
    """Its validation is better than that of its start, which is the holder, by less than users differ."""
    lines = days.printed["daily"].splitlines()
    before = next(line for line in lines if line.startswith("validation of the starting model's network"))
    client = mlflow.MlflowClient(days.uri)
    run_id = client.get_model_version("learnable", "2").run_id
    actual = [client.get_metric_history(run_id, f"validation/{task}.auc") for task in ("click", "liked")]
    assert {item[0].step for item in actual} == {0}
    assert f"click.auc {actual[0][0].value:.4f}, liked.auc {actual[1][0].value:.4f}" in before
    first, *later = (click.value + liked.value for click, liked in zip(*actual, strict=True))
    assert max(later) > first
    assert client.get_run(run_id).data.tags["promoted"] == "False"
    assert any(
        line.startswith("there is no significant difference between 'this model' and 'version 1'") for line in lines
    )
    assert "'champion' stays version 1; this model, version 2, is 'challenger'" in lines
