"""The search for settings: what it finds, that it goes on where it was stopped, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from mmoe_rec.settings import load_settings
from mmoe_rec.training.loop import Trainer
from pipelines import train, tune
from tests.pipelines.learnable_log import write_files

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


def runs(folder: Path) -> list[Any]:
    """All runs, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'learnable'")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def objective(run: Any) -> float:
    """What a trial reached."""
    return sum(run.data.metrics[f"best.validation.{task}.auc"] for task in ("click", "liked")) / 2


def test_the_best_settings_are_found_and_can_be_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = search_in(tmp_path)
    started: list[Trainer] = []
    run = Trainer.run

    def interrupted(trainer: Trainer) -> Any:
        started.append(trainer)
        if len(started) == 3:
            raise KeyboardInterrupt
        return run(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune.main(["--config", str(config), "--trials", "8"])
    tune.main(["--config", str(config), "--trials", "8"])
    said = capsys.readouterr()
    assert "8 trials, of which " in said.out
    parent, *trials = runs(tmp_path)
    assert parent.info.run_name == "tuning"
    assert parent.info.status == "FINISHED"
    assert len(trials) == 8
    assert {each.data.tags["mlflow.parentRunId"] for each in trials} == {parent.info.run_id}
    cut = [each for each in trials if "cut_short" in each.data.tags]
    assert cut, "those that learn nothing fall behind"
    assert said.out.count(f"of which {len(cut)} were cut short and 1 failed") == 1

    # The interrupted values came next, under another number.
    third, fourth = ({k: v for k, v in each.data.tags.items() if k.startswith("tuned.")} for each in trials[2:4])
    assert third == fourth
    assert set(third) == {f"tuned.{name}" for name in SEARCH}

    best = tmp_path / "work" / "tuning" / "best.yaml"
    settings = load_settings(best)
    whole = [each for each in trials if "best.validation.click.auc" in each.data.metrics]
    winner = max(whole, key=objective)
    assert parent.data.metrics["best.objective"] == pytest.approx(objective(winner))
    assert settings.training.learning_rate == float(winner.data.params["training.learning_rate"])
    assert settings.training.learning_rate > 1e-4
    assert str(settings.model.experts.count) == winner.data.params["model.experts.count"]
    assert str(settings.tasks["liked"].loss_weight) == winner.data.params["tasks.liked.loss_weight"]
    assert str(settings.features["item"].dim) == winner.data.params["features.item.dim"]
    assert not list((tmp_path / "work" / "tuning").glob("trial-*")), "no weights are left"

    features = (tmp_path / "work" / "features" / "manifest.json").stat()
    train.main(["--config", str(best)])
    assert (tmp_path / "work" / "features" / "manifest.json").stat() == features, "they are not built anew"
    assert "registered as models:/learnable@champion" in capsys.readouterr().out

    # Enough trials: nothing is tried again.
    tune.main(["--config", str(config), "--trials", "8"])
    assert len([each for each in runs(tmp_path) if "mlflow.parentRunId" in each.data.tags]) == 8


def test_trials_of_other_loss_weights_are_told_apart_by_one_measure(tmp_path: Path) -> None:
    """By its own weights, the trial with the smallest ones would always have the smallest loss."""
    config = search_in(tmp_path, {"tasks.liked.loss_weight": {"choices": [0.01]}})
    options = ["--training.select_by", "loss", "--tasks.liked.loss_weight", "3", "--training.epochs", "1"]
    tune.main(["--config", str(config), "--trials", "1", *options])
    parent, trial = runs(tmp_path)
    losses = {task: trial.data.metrics[f"best.validation.{task}.loss"] for task in ("click", "liked")}
    assert parent.data.metrics["best.objective"] == pytest.approx(-(losses["click"] + 3 * losses["liked"]))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "has nothing to search: list settings under tuning.search"),
        (
            {"data.workers": {"low": 1, "high": 2}},
            "'data.workers' can't be tried; what can are settings",
        ),
        (
            {"tasks.click.label": {"choices": ["click"]}},
            "'tasks.click.label' can't be tried; .*loss_weight",
        ),
        ({"tasks.click.objective": {"choices": ["engagement"]}}, "'tasks.click.objective' can't be tried"),
        ({"tasks.lik.loss_weight": {"low": 0.1, "high": 1}}, "there is no task 'lik'; tasks are: click, liked"),
        ({"tasks.click.loss_weight": {"low": -1.0, "high": 1}}, "'tasks.click.loss_weight' must be at least 0"),
        ({"features.item_click.dim": {"low": 4, "high": 8}}, "unknown key 'features.item_click.dim'"),
        ({"training.lerning_rate": {"low": 0.1, "high": 0.2}}, "lerning_rate.*learning_rate"),
        ({"model.experts.count": {"low": 0, "high": 2}}, "model.experts.*at least one expert"),
        ({"model.experts.count": {"low": 3}}, "give either `choices`, or both `low` and `high`"),
        ({"model.experts.count": {"low": 3, "high": 3}}, r"low \(3\) must be below high \(3\)"),
        ({"training.learning_rate": {"low": 0, "high": 3, "log": True}}, r"low \(0\) must be above 0"),
        ({"model.experts.units": {"choices": [[8], [-1]]}}, "model.experts.units"),
    ],
)
def test_a_search_that_cannot_be_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, search: dict[str, Any], message: str
) -> None:
    import re

    config = search_in(tmp_path, search)
    with pytest.raises(SystemExit) as ended:
        tune.main(["--config", str(config)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "work").exists()
