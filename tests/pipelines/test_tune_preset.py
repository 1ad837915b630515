"""`tune --preset`: from a file to a better one with its comments, within a time, and after kills. Networks are trained
in the last test alone; in the others what they would predict is drawn, and the time is that of a clock of the test."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.errors import UserError
from mmoe_rec.jobs import presets, seeds, variants
from mmoe_rec.jobs.presets import sample_users
from mmoe_rec.log.columns import hash_column
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.settings.load import load_settings
from tests import commands
from tests.fork_server import MULTIPROCESSING, call
from tests.pipelines.learnable_log import write_files
from tests.processes import until

COMMENT = "# what our shop knows of its visitors\n"
SECONDS = 5.0
"""Of a training whose predictions are drawn."""
Draw = Callable[[Any], float]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with features, and a settings file with a comment."""
    path = write_files(tmp_path_factory.mktemp("tuned"))
    path.write_text(COMMENT + path.read_text(), encoding="utf-8")
    commands.run("features", "--config", str(path))
    return path


def skill_of(task: Any) -> float:
    """How much a drawn training knows: more after more epochs, less with dropout."""
    settings = task.variant.settings
    random = np.random.default_rng(settings.training.seed)
    skill = 0.8 + 0.3 * (settings.training.epochs > 2) - 0.4 * (settings.model.bottom.dropout > 0.0)
    return float(skill + 0.02 * random.normal())


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[Draw], list[Any]]:
    """Replaces trainings by predictions of a given skill; gives the list of all that were trained."""

    def replace(skill: Draw) -> list[Any]:
        trained: list[Any] = []
        clock = SimpleNamespace(now=1000.0)
        for room in (presets, variants):
            monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(presets, "RESAMPLES", 50)

        def train(task: Any) -> None:
            trained.append(task)
            clock.now += SECONDS
            known = skill(task)
            rows = pq.read_table(task.prepared.split(task.split))
            random = np.random.default_rng(task.variant.settings.training.seed)
            columns = {}
            for name in task.variant.settings.tasks:
                label = np.nan_to_num(rows.column(f"label.{name}").to_numpy())
                columns[name] = 1 / (1 + np.exp(-known * label - random.normal(size=len(label))))
            table = pa.table({**columns, "score": np.zeros(len(rows))})
            facts = {variants._FACTS: json.dumps({"seconds": SECONDS})}
            pq.write_table(table.replace_schema_metadata(facts), task.file)

        monkeypatch.setattr(variants, "_train", train)
        return trained

    return replace


def tune(config: Path, *words: str) -> dict[str, Any]:
    """Runs the command; what it wrote."""
    commands.run("tune", "--config", str(config), "--preset", "small", "--at-once", "1", *words)
    folder = Path(load_settings(config).data.work) / "tuning"
    return json.loads((folder / "tuning.json").read_text())


def test_a_better_file_is_found_with_its_comments(
    config: Path, draw: Callable[[Draw], list[Any]], capsys: pytest.CaptureFixture
) -> None:
    trained = draw(skill_of)
    found = tune(config, "--minutes", "4", "--evaluation.resamples", "77")
    best = Path(found["best"])
    settings, before = load_settings(best), load_settings(config)
    assert found["taken"]
    assert settings.training.epochs == 2 * before.training.epochs == 4
    assert found["joined"] == ["training.epochs 4"]
    assert settings.evaluation.resamples == 77, "what was given on the command line counts"
    assert best.read_text().startswith(COMMENT)
    assert {task.split for task in trained} == {"validation"}
    by_name = {each["name"]: each for each in found["tried"]}
    assert by_name["training.epochs 4"]["verdict"] == "taken"
    assert by_name["training.epochs 4"]["effect"]["low"] > 0
    assert by_name["model.bottom.dropout 0.3"]["verdict"] == "worse"
    assert settings.model == before.model
    said = capsys.readouterr()
    assert "a training takes some" in said.err
    assert found["sentences"][0] in said.out
    assert "is better than the file" in found["sentences"][0]
    assert "of users who had no say in the choice" in found["sentences"][0]
    page = (best.parent / "report.html").read_text()
    assert "<h2" in page
    assert "model.bottom.dropout 0.3" in page
    assert found["minutes"][1] <= found["minutes"][0]

    # What has ended is not tried again.
    number = len(trained)
    # The time from the last note to the last training, after which the process was killed, is spent.
    later = (best.parent / "search.json").stat().st_mtime + 100
    os.utime(trained[-1].file, (later, later))
    again = tune(config, "--minutes", "4", "--evaluation.resamples", "77")
    os.utime(trained[-1].file)
    assert again["tried"] == found["tried"]
    assert again["minutes"][1] == pytest.approx(found["minutes"][1] + 100 / 60, abs=0.1)
    assert len(trained) == number


@pytest.mark.thorough
def test_further_inputs_are_seen_by_those_that_ask_for_them(
    config: Path, tmp_path: Path, draw: Callable[[Draw], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the features of the file that is found are those that were tried."""
    monkeypatch.setattr(presets, "list_alternatives", lambda *_: [])
    monkeypatch.setattr(presets.Search, "remove_rows", lambda _: None)

    def knows(task: Any) -> float:
        features = task.variant.settings.features
        layout = task.prepared.layout
        names = {each.name for each in (*layout.ids, *layout.dense)}
        assert ("price_value" in names) == (features["price"].values == "auto")
        assert ("item_click_rate_7d" in names) == (features["item_click"].window_days == (None, 7, 28))
        return (
            0.8
            + 0.3 * ("price_value" in names)
            + 0.02 * np.random.default_rng(task.variant.settings.training.seed).normal()
        )

    trained = draw(knows)
    found = tune(config, "--minutes", "4", "--training.weight_decay", "0.006")
    assert found["joined"] == ["exact values of price"]
    best = load_settings(found["best"])
    assert best.features["price"].values == "auto"
    (tried,) = {task.prepared.folder for task in trained}
    commands.run("features", "--config", found["best"], "--data.work", str(tmp_path / "work"))
    built = FeatureFolder(tmp_path / "work" / "features")
    for split in ("train", "validation"):
        mine, its = (pq.read_table(each.split(split)) for each in (built, FeatureFolder(tried)))
        assert "id.price_value" in mine.column_names
        assert mine == its.select(mine.column_names)


def test_trainings_that_fail_count_for_nothing(config: Path, draw: Callable[[Draw], list[Any]]) -> None:
    def fails(task: Any) -> float:
        if task.variant.settings.training.epochs == 1:
            raise UserError("the loss is not finite")
        return skill_of(task)

    draw(fails)
    found = tune(config, "--minutes", "4", "--training.weight_decay", "0.002")
    assert found["taken"]
    assert set(found["failed"].values()) == {"the loss is not finite"}
    assert any("failed and did not count; the first one: the loss is not finite" in each for each in found["sentences"])
    of_epochs = next(each for each in found["tried"] if each["name"] == "training.epochs 1")
    assert of_epochs["effect"]["value"] is None
    assert of_epochs["verdict"] == "not shown"


@pytest.mark.thorough
def test_a_training_whose_process_is_killed_three_times_has_failed(
    config: Path, draw: Callable[[Draw], list[Any]]
) -> None:
    class Killed(BaseException):
        pass

    starts = []

    def killed(task: Any) -> float:
        if task.file in starts or (task.variant.settings.model.bottom.dropout == 0.1 and not starts):
            starts.append(task.file)
            raise Killed
        return skill_of(task)

    draw(killed)
    words = ("--minutes", "4", "--training.weight_decay", "0.003")
    for _ in range(9):
        try:
            found = tune(config, *words)
            break
        except Killed:
            continue
    assert found["trainings"] > 0
    assert starts
    assert starts == 3 * starts[:1]
    assert "its process was killed 3 times" in next(iter(found["failed"].values()))


@pytest.mark.thorough
@pytest.mark.parametrize("decide_by", ["logloss", "map"])
def test_any_metric_decides_and_more_is_better(config: Path, draw: Callable[[Draw], list[Any]], decide_by: str) -> None:
    draw(skill_of)
    found = tune(config, "--minutes", "2", "--evaluation.decide_by", decide_by)
    (better,) = (each["effect"]["value"] for each in found["tried"] if each["name"] == "training.epochs 4")
    assert better > 0
    assert found["metric"].startswith("minus ") == (decide_by == "logloss")


def test_a_file_that_can_not_be_trained_is_refused_with_the_reason(
    config: Path, draw: Callable[[Draw], list[Any]], capsys: pytest.CaptureFixture
) -> None:
    def fails(task: Any) -> float:
        raise UserError("the loss is not finite")

    draw(fails)
    words = ("--preset", "small", "--at-once", "1", "--minutes", "4", "--training.weight_decay", "0.007")
    said = commands.refuse(capsys, "tune", "--config", config, *words)
    assert "no training by" in said
    assert "nothing can be compared with it: the loss is not finite" in said
    trained = draw(skill_of)
    commands.run("tune", "--config", str(config), *words)
    assert trained, "what has failed is tried again by the next start"


def test_too_little_time_keeps_the_file(config: Path, draw: Callable[[Draw], list[Any]]) -> None:
    draw(lambda task: 0.5)
    found = tune(config, "--minutes", "0.5", "--training.weight_decay", "0.004")
    assert "too few trainings fit into 0.5 minutes" in found["sentences"][0]
    assert Path(found["best"]).read_text().startswith(COMMENT)


def test_a_sample_holds_all_rows_of_some_users(config: Path, tmp_path: Path) -> None:
    whole = FeatureFolder(Path(load_settings(config).data.work) / "features")
    sampled = sample_users(whole, 0.3, tmp_path / "sample")
    assert sampled.layout == whole.layout
    assert sampled.manifest["fingerprint"] != whole.manifest["fingerprint"]
    for split in ("train", "validation"):
        rows, taken = pq.read_table(whole.split(split)), pq.read_table(sampled.split(split))
        hashes = hash_column(rows.column("user").combine_chunks())
        below = [int(each) >> 32 < 0.3 * 2**32 for each in np.asarray(hashes).astype(np.uint64)]
        assert taken == rows.filter(pa.array(below))
        assert 0 < len(taken) < len(rows)
        assert sampled.manifest["splits"][split]["rows"] == len(taken)


@pytest.mark.thorough
def test_a_log_of_which_too_few_trainings_fit_is_sampled(
    config: Path, draw: Callable[[Draw], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "TIMED_ROWS", 2_000)
    monkeypatch.setattr(presets, "FEWEST_ROWS", 500)
    monkeypatch.setattr(presets, "WISHED", 10_000_000)
    draw(skill_of)
    found = tune(config, "--minutes", "4", "--training.weight_decay", "0.005")
    assert found["sample"] < 0.1
    assert any("% of the users, since too few trainings on all rows fit" in each for each in found["sentences"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "small", "--trials", "3"], "--trials belongs to a search under tuning.search"),
        (["--minutes", "3"], "--minutes and --at-once belong to --preset"),
        (["--preset", "tiny"], "'tiny' is not one of 'small', 'medium', 'large'"),
        (["--preset", "small", "--minutes", "0"], "0.0 is not in the range x>0"),
        (["--preset", "small", "--evaluation.decide_by", "nonsense"], "evaluation.decide_by is 'nonsense'"),
    ],
)
def test_what_can_not_be_is_refused(
    config: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert message in commands.refuse(capsys, "tune", "--config", config, *words)


def tune_side_by_side(*words: str) -> None:
    """The command. It is called in a process of its own."""
    seeds.multiprocessing = MULTIPROCESSING  # type: ignore[assignment]
    commands.run("tune", *words)


@pytest.mark.thorough
def test_networks_are_trained_side_by_side_and_kills_lose_little(config: Path, tmp_path: Path) -> None:
    """First a process that trains is killed, and others go on; then the whole command, which is given again."""
    tree = yaml.safe_load(config.read_text())
    tree["training"] |= {"epochs": 1, "batch_size": 1024}
    quick, tuning = tmp_path / "quick.yaml", tmp_path / "work" / "tuning"
    quick.write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = ["--config", str(quick), "--preset", "small", "--minutes", "60", "--at-once", "2"]
    words += ["--data.work", str(tmp_path / "work")]

    def list_trained() -> dict[str, int]:
        return {each.name: each.stat().st_mtime_ns for each in tuning.rglob("trainings/*/*.parquet")}

    def find_trainer() -> int:
        """The id of a process that trains, 0 while there is none."""
        with suppress(FileNotFoundError):  # it may end meanwhile
            for each in tuning.rglob("trainings/*/*.begun"):
                return int(each.read_text().rpartition(" ")[2] or 0)
        return 0

    def run_until(steps: list[tuple[int, str]]) -> tuple[int, str]:
        """Runs the command, and sends each signal once so many trainings have ended; exit code and what it said."""
        process = call(tune_side_by_side, *words)
        for ended, what in steps:
            until(lambda ended=ended: process.poll() is not None or len(list_trained()) >= ended)
            assert process.poll() is None, process.stderr
            if what == "kill one":
                os.kill(until(find_trainer), signal.SIGKILL)
            else:
                process.send_signal(signal.SIGTERM if what == "stop" else signal.SIGKILL)
        return process.wait(), process.stdout + process.stderr

    assert run_until([(1, "kill one"), (3, "kill all")])[0] == -signal.SIGKILL
    before = list_trained()
    code, said = run_until([(len(before) + 2, "stop")])
    assert code == 75, said
    assert "trainings that ended stay: go on with the same command" in said
    assert before.items() <= list_trained().items(), "what has ended is not trained again"
