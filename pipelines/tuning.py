"""The search for settings: a study of trials, kept in a file, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec import tracking
from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.features.build import Prepared
from mmoe_rec.progress import say
from mmoe_rec.settings import Search, Settings

Values = dict[str, Any]
FAILURES_IN_A_ROW = 3


@dataclass(frozen=True)
class Tuned:
    """A finished search. best: setting -> value; value: what it reached; file: all settings with these, as YAML."""

    best: Values
    value: float
    file: Path
    trials: int
    pruned: int
    failed: int


class Study:
    """Trials of settings for one data set.

    with_values: gives the settings with some values in the place of theirs. The study is found again by what it depends
    on: features, settings and search space.
    """

    def __init__(self, settings: Settings, prepared: Prepared, with_values: Callable[[Values], Settings]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self.settings, self.prepared, self.with_values = settings, prepared, with_values
        self.folder = Path(settings.data.work) / "tuning"
        self.folder.mkdir(parents=True, exist_ok=True)
        depends = settings.model_dump(mode="json", include={"model", "training", "tuning"})
        text = json.dumps([depends, settings.choices, prepared.manifest["fingerprint"]], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._study = optuna.create_study(
            storage=f"sqlite:///{self.folder / 'study.db'}",
            study_name=self.key,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=settings.tuning.startup_trials),
        )
        # Another seed when the search goes on, as it would draw the same values again.
        seed = settings.training.seed + len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=settings.tuning.startup_trials, seed=seed)
        self._spaces = {name: self._space(search) for name, search in settings.tuning.search.items()}

    def _space(self, search: Search) -> Any:
        distributions = self._optuna.distributions
        if search.choices is not None:
            return distributions.CategoricalDistribution([json.dumps(each) for each in search.choices])
        whole = isinstance(search.low, int) and isinstance(search.high, int)
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(search.low, search.high, log=search.log)

    def run(self, trials: int) -> Tuned:
        """Tries until there are so many trials, those of earlier runs included.

        Raises UserError where no trial came to its end, or several in a row failed.
        """
        uri, experiment = self.settings.tracking.uri, self.settings.experiment
        with tracking.open_run(uri, experiment, run_name="tuning", key=f"tuning-{self.key}") as run:
            assert run.run_id is not None
            self._forget_killed()
            failures = 0
            while len(self._study.get_trials(deepcopy=False, states=self._ended())) < trials:
                failures = failures + 1 if (error := self._try(run.run_id)) else 0
                if error and failures == FAILURES_IN_A_ROW:
                    raise UserError(f"{failures} trials in a row failed; the last one: {error}")
            tuned = self._best()
            run.log_params({f"best.{setting}": value for setting, value in tuned.best.items()})
            run.log_metrics({"best.objective": tuned.value})
            run.log_artifact(tuned.file)
            run.log_text(self._table(), "trials.csv")
            return tuned

    def _ended(self) -> tuple[Any, ...]:
        states = self._optuna.trial.TrialState
        return (states.COMPLETE, states.PRUNED, states.FAIL)

    def _forget_killed(self) -> None:
        """Trials that a kill left open are tried again under a new number."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if "run_id" in trial.user_attrs:
                tracking.mark_killed(self.settings.tracking.uri, trial.user_attrs["run_id"])
            self._study.enqueue_trial(trial.params)
            self._study.tell(trial.number, state=states.FAIL)

    def _try(self, parent: str) -> str | None:
        """One trial; gives what was wrong where it failed."""
        states = self._optuna.trial.TrialState
        trial = self._study.ask(self._spaces)
        values = {name: _plain(space, trial.params[name]) for name, space in self._spaces.items()}
        settings = self.with_values(values)
        folder = self.folder / f"trial-{trial.number:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        error = None
        try:
            reached = self._train(trial, settings, values, folder, parent)
            if reached is None:
                self._study.tell(trial, state=states.PRUNED)
                said = "cut short, as it fell behind"
            else:
                self._study.tell(trial, reached)
                said = f"{reached:.4f}"
        except UserError as failed:
            self._study.tell(trial, state=states.FAIL)
            error = str(failed)
            said = f"failed: {error}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # weights that nobody needs; the best settings are trained again
        say(f"trial {trial.number + 1}: {said} ({_as_text(values)})")
        return error

    def _train(self, trial: Any, settings: Settings, values: Values, folder: Path, parent: str) -> float | None:
        """What the training reached; None where it was cut short."""
        from mmoe_rec.devices import pick_device
        from mmoe_rec.model.layout import ModelLayout
        from mmoe_rec.training.loop import Trainer
        from mmoe_rec.training.ranks import process_group
        from mmoe_rec.training.validation import Validation

        device = pick_device(settings.training.device)
        layout = ModelLayout.of(self.prepared.layout, settings)
        # Trials are told apart by one measure, whatever weights of losses they try.
        judge, select_by = ModelLayout.of(self.prepared.layout, self.settings), settings.training.select_by
        uri, experiment = settings.tracking.uri, settings.experiment
        with (
            process_group(device, settings.training.timeout_minutes),
            tracking.open_run(uri, experiment, run_name=f"trial {trial.number + 1}", parent=parent) as run,
        ):
            trial.set_user_attr("run_id", run.run_id)
            run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
            run.set_tags({f"tuned.{setting}": value for setting, value in values.items()})

            validations = itertools.count()

            def watch(found: Validation, _: int) -> None:
                trial.report(found.objective(select_by, judge), next(validations))
                if trial.should_prune():
                    raise self._optuna.TrialPruned

            trainer = Trainer(
                self.prepared, layout, settings.model, settings.training, device, folder, run.log_metrics, watch=watch
            )
            try:
                result = trainer.run()
            except self._optuna.TrialPruned:
                run.set_tags({"cut_short": "it fell behind"})
                return None
            assert result.best is not None
            run.log_metrics({f"best.{metric}": value for metric, value in result.best.flat().items()}, result.best_step)
            return result.best.objective(select_by, judge)

    def _best(self) -> Tuned:
        states = self._optuna.trial.TrialState
        found = {state: self._study.get_trials(deepcopy=False, states=(state,)) for state in self._ended()}
        if not found[states.COMPLETE]:
            raise UserError("no trial came to its end; raise --trials, or narrow tuning.search")
        best = self._study.best_trial
        values = {name: _plain(space, best.params[name]) for name, space in self._spaces.items()}
        file = self.folder / "best.yaml"
        with atomic_file(file) as path:
            path.write_text(self.with_values(values).to_yaml(), encoding="utf-8")
        counts = (len(found[states.COMPLETE]), len(found[states.PRUNED]), len(found[states.FAIL]))
        return Tuned(values, float(best.value), file, sum(counts), *counts[1:])

    def _table(self) -> str:
        """Of all trials, as CSV."""
        return str(self._study.trials_dataframe(attrs=("number", "value", "params", "state")).to_csv(index=False))


def _plain(space: Any, value: Any) -> Any:
    return json.loads(value) if hasattr(space, "choices") else value


def _as_text(values: Values) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"
        for name, value in values.items()
    )
