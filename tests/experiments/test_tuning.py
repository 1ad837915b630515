"""The search for settings: the fit of effects, trials that stop, fail or are killed, and the confirmation."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.experiments import tuning
from mmoe_rec.experiments.runner import Runner, RunSpec, Variant
from mmoe_rec.experiments.tuning import (
    MAX_FAILURES,
    Study,
    Trial,
    can_start_trial,
    current_values,
    default_space,
    discretize,
    estimate_effects,
    mean_seconds,
)
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import SearchRange
from mmoe_rec.tracking.runs import Run
from tests import commands
from tests.experiments.test_comparisons import plant
from tests.pipelines.short_trainings import World

EXPERTS = {"model.experts.count": {"low": 1, "high": 4}}
VALUES = {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.of(tmp_path_factory.mktemp("searches"))


def test_effects_are_those_of_a_regression() -> None:
    random = np.random.default_rng(0)
    space = {name: SearchRange(choices=(0, 1, 2)) for name in ("a", "b")}
    space["c"] = SearchRange(low=1.0, high=100.0, log=True)
    true = {"a": (0.0, 0.1, -0.1), "b": (0.0, 0.0, 0.3)}
    trials = []
    for _ in range(200):
        values = {"a": int(random.integers(3)), "b": int(random.integers(3)), "c": float(100 ** random.random())}
        result = sum(true[name][values[name]] for name in true) + random.normal(0, 0.01)
        trials.append(Trial(values, result))
    actual = estimate_effects(space, trials)
    for name, effects in true.items():
        levels = np.array([actual[name, str(level)][1] for level in range(3)])
        assert np.diff(levels) == pytest.approx(np.diff(effects), abs=0.02)
    assert abs(max(effect for (name, _), (_, effect) in actual.items() if name == "c")) < 0.01
    keys = list(actual)
    x = np.array([[discretize(space[name], trial.values[name]) == level for name, level in keys] for trial in trials])
    y = np.array([trial.result for trial in trials])
    ridge = Ridge(alpha=1.0, fit_intercept=False).fit(x - x.mean(0), y - y.mean())
    of_b = [place for place, (name, _) in enumerate(keys) if name == "b"]
    expected = ridge.coef_[of_b] - np.average(ridge.coef_[of_b], weights=x[:, of_b].sum(0))
    assert [actual[keys[place]][1] for place in of_b] == pytest.approx(expected)
    assert sum(count for (name, _), (count, _) in actual.items() if name == "a") == 200


def test_levels_are_thirds_of_a_range() -> None:
    assert [discretize(SearchRange(low=0, high=9), value) for value in (0, 2, 4, 9)] == ["2", "2", "4", "8"]
    assert [discretize(SearchRange(low=1.0, high=1000.0, log=True), value) for value in (2.0, 1000.0)] == [
        "3.16",
        "316.0",
    ]
    assert discretize(SearchRange(choices=([8], [8, 4])), [8, 4]) == "[8, 4]"


def test_the_built_in_space_holds_the_settings(world: World) -> None:
    settings = load_settings(world.folder / "first.yaml")
    space = default_space(settings, 3_000)
    own = current_values(settings, space)
    assert own is not None
    assert own["training.epochs"] == 1
    assert own["training.batch_size"] == 64
    assert all(own[name] == item.choices[0] for name, item in space.items())
    assert current_values(settings, {"model.experts.count": SearchRange(low=5, high=9)}) is None
    for name, item in space.items():
        for value in item.choices or ():
            Variant("x", (f"{name}={json.dumps(value)}",)).apply(settings)


def by_experts(values: dict[str, float] = VALUES) -> Callable[..., float]:
    """In the place of training: what a trial reaches, by its number of experts."""

    def train(study: Study, trial: Any, variant: Variant) -> float:
        return values[str(variant.apply(study.runner.settings).model.experts.count)]

    return train


class Killed(BaseException):
    """In the place of a signal that nobody can answer."""


@pytest.fixture
def tune(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """Runs the command without training; gives its exit code, and what it printed to both streams."""
    monkeypatch.setattr(Runner, "train_run", plant)

    def run(space: dict[str, Any], train: Callable[..., Any], *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(Study, "train", train)
        capsys.readouterr()
        given = ["--tuning.search", json.dumps(space), "--tuning.startup_trials", "2"]
        code = commands.exit_code("tune", "--config", world.folder / "first.yaml", "--seeds", 3, *given, *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_better_settings_are_found_and_confirmed(world: World, tune: Any) -> None:
    """After a stop and a kill, whose trials don't count."""

    def after(trials: int, error: BaseException) -> Callable[..., float]:
        def train(study: Study, trial: Any, variant: Variant) -> float:
            if trial.number == trials:
                raise error
            return by_experts()(study, trial, variant)

        return train

    code, _, err = tune(EXPERTS, after(2, StoppedError("SIGTERM came; all is saved")), "--trials", 8)
    assert code == 75
    assert err.splitlines()[-1] == "stopped: SIGTERM came; completed runs are kept. Repeat the command to continue."
    with pytest.raises(Killed):
        tune(EXPERTS, after(3, Killed()), "--trials", 8)
    code, out, err = tune(EXPERTS, by_experts(), "--trials", 8)
    assert code == 0, err
    assert "8 trials: 0 pruned, 0 failed. The best trial reached 0.4000 on the selection rows" in out
    assert re.search(r"^trial 1: 0\.3000 \(model\.experts\.count=3\)", err, re.MULTILINE) is None, "it isn't repeated"
    assert "is better than `these settings`: mean auc of click, liked differs by +" in out
    assert "adopt `--model.experts.count=4`, since" in out
    assert "Effects of single values" in out
    best = load_settings(world.work / "tuning" / "best.yaml")
    expected = load_settings(world.folder / "first.yaml", ["--model.experts.count", "4"])
    assert best.model == expected.model
    assert best.training == expected.training
    assert f"next: mmoe-rec train --config {world.work / 'tuning' / 'best.yaml'}" in out
    facts = json.loads((world.work / "tuning" / "comparison.json").read_text())["facts"]
    assert facts["judged by"] == "the evaluation part of the validation rows"


def test_settings_that_are_not_better_stay(world: World, tune: Any) -> None:
    """Trials like 2 experts, and the evaluation rows show no difference."""
    space, train = {"model.experts.count": {"choices": [2, 3]}}, by_experts({"2": 0.5, "3": 0.3})
    code, out, err = tune(space, train, "--trials", 6, "--training.seed", 40)
    assert code == 0, err
    assert "`the best trial` does not differ significantly from `these settings`" in out
    assert "nothing to adopt" in out
    own = load_settings(world.folder / "first.yaml", ["--training.seed", "40"])
    assert load_settings(world.work / "tuning" / "best.yaml").model == own.model


def test_the_confirmation_has_its_part_of_the_time() -> None:
    """Trials of 10 seconds, and a confirmation that takes as long as 8 of them, or the half of a short time."""
    ended = [SimpleNamespace(user_attrs={"seconds": 10.0}, state=SimpleNamespace(name="COMPLETE")) for _ in range(3)]
    for seconds, half, trials, expected in (
        (100, 90, None, True),
        (85, 90, None, False),
        (85, 60, None, True),
        (65, 60, None, False),
        (100, 90, 3, False),
        (100, 90, 4, True),
    ):
        assert can_start_trial(ended, seconds, half, trials, 8) == expected
    assert can_start_trial([], 1, 0, None, 8)
    behind = SimpleNamespace(user_attrs={"seconds": 1.0}, state=SimpleNamespace(name="PRUNED"))
    assert [mean_seconds(item) for item in ([*ended, behind], [behind], [])] == [10, 1, 0]


def test_the_time_sets_the_number_of_confirming_runs(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(study: Study, trial: Any, variant: Variant) -> float:
        clock.value += 15
        return by_experts()(study, trial, variant)

    def train_runs(runner: Runner, variants: Any, seeds: Any) -> Any:
        clock.value += seconds * len(variants) if len(seeds) == 1 else 0
        return train_variants(runner, variants, seeds)

    clock, seconds, train_variants = SimpleNamespace(value=0.0), 15, Runner.train
    monkeypatch.setattr(Runner, "train", train_runs)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(time=lambda: clock.value, monotonic=lambda: clock.value))
    code, out, err = tune(EXPERTS, train, "--minutes", 2, "--seeds", 4, "--training.seed", 44)
    assert code == 0, err
    assert "3 trials: " in out, "their time is the first half"
    assert "the time was short: 3 instead of 4 runs confirmed the result" in out
    clock.value, seconds = 0, 7
    code, out, err = tune(EXPERTS, train, "--minutes", 2, "--seeds", 2, "--training.seed", 45)
    assert code == 0, err
    assert "5 runs of each" in out, "75 seconds remain, and a run of each variant takes 14"


def test_a_search_without_any_result_ends(tune: Any) -> None:
    def fail(*_: Any) -> float:
        raise UserError("the loss is not finite")

    code, _, err = tune(EXPERTS, fail, "--trials", 50, "--training.seed", 41)
    assert code == 2
    assert len(re.findall(r"^trial \d+: the loss is not finite", err, re.MULTILINE)) == MAX_FAILURES
    assert err.splitlines()[-1].endswith(
        "trials in a row had no result. Narrow tuning.search. The last: the loss is not finite"
    )


def test_a_damaged_study_is_reported(world: World, tune: Any) -> None:
    (world.work / "tuning").mkdir(parents=True, exist_ok=True)
    file = world.work / "tuning" / "study.db"
    file.write_text("no database, but long enough to look like one " * 10)
    code, _, err = tune(EXPERTS, by_experts(), "--training.seed", 42)
    file.unlink()
    assert code == 2
    assert re.search(r"error: the search in '.*study.db' is damaged: .*\. Remove the file\.", err)


def test_trials_behind_the_median_are_cut_short(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fit(runner: Runner, task: RunSpec, run: Run, on_validation: Callable[..., None]) -> tuple[Any, str]:
        reached = VALUES[str(task.settings.model.experts.count)]
        validation = SimpleNamespace(objective=lambda *_: reached, to_metrics=lambda _: {})
        on_validation(validation, 1)
        return SimpleNamespace(best=validation), "fp32"

    monkeypatch.setattr(Runner, "train_run", plant)
    monkeypatch.setattr(Runner, "fit", fit)
    words = ["--config", world.folder / "first.yaml", "--seeds", 2, "--training.seed", 43]
    words += ["--tuning.search", json.dumps(EXPERTS), "--tuning.startup_trials", "2", "--trials", 6]
    commands.run("tune", *words)
    said = capsys.readouterr()
    behind = len(re.findall(r"^trial \d+: pruned", said.err, re.MULTILINE))
    assert behind > 0
    assert f"6 trials: {behind} pruned" in said.out
    runs = world.client.search_runs([world.client.get_experiment_by_name("learnable").experiment_id])
    assert sum("pruned" in item.data.tags for item in runs) == behind


@pytest.mark.thorough
def test_trials_that_train_are_runs_within_one(tmp_path: Path) -> None:
    world = World.of(tmp_path)
    commands.run("tune", "--config", world.folder / "first.yaml", "--trials", 3, "--seeds", 2)
    client = world.client
    runs = client.search_runs([client.get_experiment_by_name("learnable").experiment_id])
    trials = [run for run in runs if run.info.run_name.startswith("trial ")]
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(trials) == 3
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not list((world.work / "tuning").rglob("*.distcp")), "no weights stay"
    commands.run("train", "--config", world.work / "tuning" / "best.yaml")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"data.workers": {"low": 1, "high": 2}}, "'data.workers' can't be searched. Search settings"),
        ({"tasks.click.label": {"choices": ["click"]}}, "'tasks.click.label' can't be searched. .*loss_weight"),
        (
            {"model.trees.leaves": {"low": 8, "high": 64}},
            "'model.trees.leaves' can't be searched. .*except model.trees",
        ),
        ({"tasks.lik.loss_weight": {"low": 0.1, "high": 1}}, "unknown task 'lik'. Tasks are: click, liked"),
        ({"tasks.click.score_weight": {"low": 0.1, "high": 1}}, "'tasks.click.score_weight' can't be searched. Search"),
        (
            {"features.clicked.dim": {"low": 4, "high": 8}},
            "'features.clicked.dim', but the features with a table of their own",
        ),
        ({"training.lerning_rate": {"low": 0.1, "high": 0.2}}, "lerning_rate.*learning_rate"),
        ({"model.experts.count": {"low": 3}}, "give either `choices`, or both `low` and `high`"),
        ({"model.experts.count": {"low": 3, "high": 3}}, r"low \(3\) must be below high \(3\)"),
        ({"training.learning_rate": {"low": 0, "high": 3, "log": True}}, r"low \(0\) must be above 0"),
        ({"model.gates.serving_top_k": {"choices": [98, 99]}}, "error: tuning.search: .*98"),
    ],
)
def test_a_search_that_cannot_be_is_refused_at_once(
    world: World, capsys: pytest.CaptureFixture, space: dict[str, Any], message: str
) -> None:
    words = ["--config", world.folder / "first.yaml", "--tuning.search", json.dumps(space)]
    said = commands.refuse(capsys, "tune", *words)
    assert re.search(message, said), said
