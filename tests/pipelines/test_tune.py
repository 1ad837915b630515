"""The search for settings: what it finds, that it goes on where it was stopped, and what it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import pytest

from mmoe_rec.cli.tune import MOST_IN_A_ROW, Study
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking import runs
from mmoe_rec.training.loop import Trainer
from tests import commands
from tests.pipelines.learnable_log import write_files

pytestmark = pytest.mark.thorough

# At the lowest rates nothing is learnt.
SEARCH = {
    "training.learning_rate": {"low": 1e-8, "high": 0.1, "log": True},
    "training.table_learning_rate": {"choices": [1e-8, 0.1]},
    "model.experts.count": {"low": 1, "high": 3},
    "model.experts.units": {"choices": [[8], [8, 4]]},
    "tasks.liked.loss_weight": {"low": 0.5, "high": 2.0},
    "features.item.dim": {"choices": [4, 8]},
}


def search_in(folder: Path, search: dict[str, Any] | None = None) -> Path:
    """A log and the settings of a search on it."""
    return write_files(folder, tuning={"search": SEARCH if search is None else search, "startup_trials": 2})


def runs_in(folder: Path) -> list[Any]:
    """All runs, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'learnable'")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def objective(run: Any) -> float:
    """What a trial reached."""
    return sum(run.data.metrics[f"network/{task}.auc"] for task in ("click", "liked")) / 2


def test_the_best_settings_are_found_and_can_be_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = search_in(tmp_path)
    started: list[Trainer] = []
    run = Trainer.run

    def interrupted(trainer: Trainer) -> Any:
        started.append(trainer)
        if len(started) == 3:
            raise KeyboardInterrupt
        if len(started) == 4:
            raise StoppedError("SIGTERM came; step 3 of 9 is saved, go on with --resume")
        return run(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        for number, signal in ((3, "SIGINT"), (4, "SIGTERM")):
            with pytest.raises(SystemExit) as ended:
                commands.run("tune", "--config", str(config), "--trials", "8")
            assert ended.value.code == 75
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"stopped: {signal} came; trial {number} has not ended, and does not count: go on with the same command"
            )
    commands.run("tune", "--config", str(config), "--trials", "8")
    said = capsys.readouterr()
    parent, *trials = runs_in(tmp_path)
    assert parent.info.run_name == "tuning"
    assert parent.info.status == "FINISHED"
    assert [each.info.status for each in trials] == ["FINISHED"] * 2 + ["KILLED", "KILLED"] + ["FINISHED"] * 6
    assert {each.data.tags["mlflow.parentRunId"] for each in trials} == {parent.info.run_id}
    cut = [each for each in trials if "cut_short" in each.data.tags]
    assert cut, "those that learn nothing fall behind"
    assert f"8 trials: {len(cut)} cut short, 0 not valid, 0 failed" in said.out

    tried = [{k for k in each.data.tags if k.startswith("tuned.")} for each in trials]
    assert tried == [{f"tuned.{name}" for name in SEARCH}] * 10
    trials = [each for each in trials if each.info.status == "FINISHED"]

    best = tmp_path / "work" / "tuning" / "best.yaml"
    settings = load_settings(best)
    whole = [each for each in trials if "network/click.auc" in each.data.metrics]
    winner = max(whole, key=objective)
    assert parent.data.metrics["best/objective"] == pytest.approx(objective(winner))
    assert settings.training.learning_rate == float(winner.data.params["training.learning_rate"])
    assert settings.training.learning_rate > 1e-4
    assert str(settings.model.experts.count) == winner.data.params["model.experts.count"]
    assert str(settings.tasks["liked"].loss_weight) == winner.data.params["tasks.liked.loss_weight"]
    assert str(settings.features["item"].dim) == winner.data.params["features.item.dim"]
    assert not list((tmp_path / "work" / "tuning").glob("trial-*")), "no weights are left"

    features = (tmp_path / "work" / "features" / "manifest.json").stat()
    commands.run("train", "--config", str(best))
    assert (tmp_path / "work" / "features" / "manifest.json").stat() == features, "they are not built anew"
    assert "registered as models:/learnable@champion" in capsys.readouterr().out

    # Enough trials: nothing is tried again.
    commands.run("tune", "--config", str(config), "--trials", "8")
    assert len([each for each in runs_in(tmp_path) if "mlflow.parentRunId" in each.data.tags]) == 10


def trained(values: dict[str, float]) -> Callable[..., Any]:
    """In the place of training, which takes long: what a trial reaches, by its number of experts."""

    def train(study: Study, trial: Any, settings: Settings, *_: Any) -> float:
        value = values[str(settings.model.experts.count)]
        if value < 0:
            raise UserError("the loss is not finite")
        return value

    return train


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command for a search, without training; exit code and what was said."""

    class FeatureFolder:
        manifest: ClassVar[dict[str, str]] = {"fingerprint": "f"}

    def run(
        capsys: pytest.CaptureFixture, search: dict[str, Any], trials: int, train: Callable[..., Any], *words: str
    ) -> tuple[int, str, str]:
        config = search_in(tmp_path, search)
        monkeypatch.setattr("mmoe_rec.jobs.variants.features_in_use", lambda *_: nullcontext(FeatureFolder()))
        monkeypatch.setattr(Study, "_train", train)
        capsys.readouterr()
        code, said = commands.exit_code("tune", "--config", config, "--trials", trials, *words), capsys.readouterr()
        return code, said.out, said.err

    return run


EXPERTS = {"model.experts.count": {"low": 1, "high": 4}}
TOP_K = ["--model.gates.routing", "top_k", "--model.gates.top_k", "1"]


def test_a_combination_that_is_not_valid_is_left_out_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]
) -> None:
    search = {**EXPERTS, "model.gates.top_k": {"low": 1, "high": 4}}  # 4 is valid with 4 experts only
    train = trained({"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4})
    code, out, err = study(capsys, search, 20, train, *TOP_K)
    assert code == 0, err
    (counts,) = re.findall(r"20 trials: 0 cut short, (\d+) not valid, 0 failed", out)
    left_out = re.findall(r"trial \d+: not valid: .*top_k.* \(model.experts.count (\d), model.gates.top_k (\d)\)", err)
    assert len(left_out) == int(counts) > 0
    assert all(int(experts) < int(k) for experts, k in left_out)
    assert "best: 0.4000 with model.experts.count 4" in out
    (table,) = tmp_path.glob("mlartifacts/**/trials.csv")
    assert table.read_text().count("top_k") >= int(counts), "the reasons are kept"


def test_a_search_without_any_valid_combination_ends(
    capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmoe_rec.cli.tune._check_values", lambda *_: None)
    search = {"model.gates.top_k": {"low": 5, "high": 9}}
    code, _, err = study(capsys, search, 1000, trained({}), *TOP_K)
    assert code == 2
    assert len(re.findall(r"trial \d+: not valid: ", err)) == MOST_IN_A_ROW["not valid"]
    assert "20 trials in a row ended as not valid: narrow tuning.search; the last one: " in err.splitlines()[-1]
    code, _, err = study(capsys, search, 22, trained({}), *TOP_K)
    assert code == 2
    assert re.findall(r"trial (\d+): not valid: ", err) == ["21", "22"], "it goes on where it was"
    assert "no trial ended well (the last reason: " in err.splitlines()[-1]


def test_a_bug_in_one_trial_does_not_come_again(
    capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]
) -> None:
    def broken(*_: Any) -> float:
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom"):
        study(capsys, EXPERTS, 3, broken)
    code, out, _ = study(capsys, EXPERTS, 3, trained({"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}))
    assert code == 0
    assert "3 trials: 0 cut short, 0 not valid, 1 failed" in out


class Killed(BaseException):
    """In the place of a signal that nobody can answer."""


def killed(*_: Any) -> float:
    raise Killed


def test_trials_that_are_killed_one_after_the_other_count_as_failed(
    capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]
) -> None:
    """Else a supervisor would start the command without end."""
    for _ in range(2):
        with pytest.raises(Killed):
            study(capsys, EXPERTS, 3, killed)

    def stopped(*_: Any) -> float:
        raise StoppedError("SIGTERM came; step 3 of 9 is saved, go on with --resume")

    assert study(capsys, EXPERTS, 3, stopped)[0] == 75, "one that is asked to stop was not killed"
    for told in (False, True):
        with pytest.raises(Killed):
            study(capsys, EXPERTS, 3, killed)
        said = "trial 4: failed: its process was killed, as 2 before it were" in capsys.readouterr().err
        assert said == told, "it is the third that was killed"
    code, out, _ = study(capsys, EXPERTS, 3, trained({"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}))
    assert code == 0
    assert "3 trials: 0 cut short, 0 not valid, 1 failed" in out


def test_a_trial_that_is_killed_does_not_count(
    capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]
) -> None:
    for _ in range(2):
        with pytest.raises(Killed):
            study(capsys, EXPERTS, 4, killed)
    code, out, err = study(capsys, EXPERTS, 4, trained({"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}))
    assert code == 0, err
    assert "4 trials: 0 cut short, 0 not valid, 0 failed" in out
    assert re.findall(r"trial (\d+): 0", err) == ["3", "4", "5", "6"]


def test_a_trial_waits_for_mlflow(capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]) -> None:
    def away(*_: Any) -> float:
        raise runs.UnreachableError("MLflow does not answer")

    code, _, err = study(capsys, EXPERTS, 2, away)
    assert code == 2
    assert err == (
        "error: MLflow does not answer; trial 1 has not ended, and does not count: go on with the same command, once "
        "MLflow answers\n"
    )
    code, out, _ = study(capsys, EXPERTS, 2, trained({"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}))
    assert code == 0
    assert "2 trials: 0 cut short, 0 not valid, 0 failed" in out


def test_a_damaged_study_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, study: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "work" / "tuning").mkdir(parents=True)
    (tmp_path / "work" / "tuning" / "study.db").write_text("no database, but long enough to look like one " * 10)
    code, _, err = study(capsys, EXPERTS, 2, trained({}))
    assert code == 2
    assert re.fullmatch(r"error: the search in '.*study.db' can't be resumed: .*; remove it to begin anew\n", err)


def test_trials_of_other_loss_weights_are_told_apart_by_one_measure(tmp_path: Path) -> None:
    """By its own weights, the trial with the smallest ones would always have the smallest loss."""
    config = search_in(tmp_path, {"tasks.liked.loss_weight": {"choices": [0.01]}})
    options = ["--training.select_by", "loss", "--tasks.liked.loss_weight", "3", "--training.epochs", "1"]
    commands.run("tune", "--config", str(config), "--trials", "1", *options)
    parent, trial = runs_in(tmp_path)
    losses = {task: trial.data.metrics[f"network/{task}.loss"] for task in ("click", "liked")}
    assert parent.data.metrics["best/objective"] == pytest.approx(-(losses["click"] + 3 * losses["liked"]))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "has nothing to search: list settings under tuning.search"),
        ({"data.workers": {"low": 1, "high": 2}}, "'data.workers' can't be tried; only settings"),
        ({"tasks.click.label": {"choices": ["click"]}}, "'tasks.click.label' can't be tried; .*loss_weight"),
        ({"model.trees.leaves": {"low": 8, "high": 64}}, "'model.trees.leaves' can't be tried: it is used after"),
        ({"tasks.lik.loss_weight": {"low": 0.1, "high": 1}}, "there is no task 'lik'; tasks are: click, liked"),
        ({"tasks.click.loss_weight": {"low": -1.0, "high": 1}}, "'tasks.click.loss_weight' must be at least 0"),
        ({"tasks.click.score_weight": {"low": 0.1, "high": 1}}, "'tasks.click.score_weight' can't be tried; only"),
        *(
            ({f"features.{name}.dim": {"low": 4, "high": 8}}, f"feature '{name}' has no embedding table of its own")
            for name in ("item_click", "clicked", "price")
        ),
        ({"training.lerning_rate": {"low": 0.1, "high": 0.2}}, "lerning_rate.*learning_rate"),
        ({"model.experts.count": {"low": 3}}, "give either `choices`, or both `low` and `high`"),
        ({"model.experts.count": {"low": 3, "high": 3}}, r"low \(3\) must be below high \(3\)"),
        ({"training.learning_rate": {"low": 0, "high": 3, "log": True}}, r"low \(0\) must be above 0"),
        (
            {"model.gates.serving_top_k": {"choices": [2, 99]}, "training.epochs": {"low": 1, "high": 2}},
            "error: 'tuning.search' has 99 for 'model.gates.serving_top_k': .*99",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, search: dict[str, Any], message: str
) -> None:
    config = search_in(tmp_path, search)
    said = commands.refuse(capsys, "tune", "--config", config)
    assert re.search(message, said), said
    assert not (tmp_path / "work").exists()
