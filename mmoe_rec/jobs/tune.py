"""The search for settings: a study of trials, kept in a file, so that it goes on where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import StoppedError, UserError
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.progress import say
from mmoe_rec.settings.sections import Search, Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS, UnreachableError
from mmoe_rec.tracking.runs import Run

Values = dict[str, Any]
FAILURES_IN_A_ROW = 3
NOT_VALID_IN_A_ROW = 20
KILLS_OF_ONE_TRIAL = 3
# What trials are marked with, beside the id of their run: why one was given up, which one it replaces, and how often a
# trial of its values was killed before.
_RUN, _REASON, _INSTEAD_OF, _KILLS = "run_id", "reason", "instead_of", "kills"
Outcome = Literal["reached", "cut short", "not valid", "failed"]


class NotValidError(UserError):
    """Values that don't go together."""


@dataclass(frozen=True)
class Tuned:
    """A finished search. best: setting -> value; value: what it reached; file: all settings with these, as YAML.

    trials: all of them, of which so many were cut short, not valid, or failed.
    """

    best: Values
    value: float
    file: Path
    trials: int
    cut_short: int
    not_valid: int
    failed: int


class Study:
    """Trials of settings for one data set.

    with_values: gives the settings with some values replaced. The study is found again by what it depends
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
        self._study = self._opened(self.folder / "study.db")
        # Another seed when the search goes on, or it would draw the same values again.
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

    def _opened(self, file: Path) -> Any:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return self._optuna.create_study(
                storage=f"sqlite:///{file}",
                study_name=self.key,
                direction="maximize",
                load_if_exists=True,
                pruner=self._optuna.pruners.MedianPruner(n_startup_trials=self.settings.tuning.startup_trials),
            )
        except (SQLAlchemyError, self._optuna.exceptions.OptunaError, RuntimeError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"the search in '{file}' can't be resumed: {reason}; remove it to begin anew") from None

    def run(self, trials: int) -> Tuned:
        """Tries until there are so many trials, those of earlier runs included.

        Raises:
            StoppedError: the search was asked to stop; the current trial will be tried again.
            UserError: no trial ended well, or several in a row failed or were not valid.
        """
        uri, experiment = self.settings.tracking.address, self.settings.experiment
        with runs.open_run(uri, experiment, run_name="tuning", key=f"tuning-{self.key}", unsent=self._unsent) as run:
            assert run.run_id is not None
            self._take_up_killed()
            in_a_row = {"not valid": 0, "failed": 0}
            while len(self._ended()) < trials:
                outcome, said = self._try(run.run_id)
                in_a_row = {each: many + 1 if each == outcome else 0 for each, many in in_a_row.items()}
                if in_a_row["failed"] == FAILURES_IN_A_ROW:
                    raise UserError(f"{FAILURES_IN_A_ROW} trials in a row failed; the last one: {said}")
                if in_a_row["not valid"] == NOT_VALID_IN_A_ROW:
                    raise UserError(
                        f"{NOT_VALID_IN_A_ROW} combinations in a row were not valid: narrow tuning.search; the last "
                        f"one: {said}"
                    )
            tuned = self._best()
            run.log_params({f"best.{setting}": value for setting, value in tuned.best.items()})
            run.log_metrics({"best/objective": tuned.value})
            run.log_artifact(tuned.file)
            run.log_text(self._table(), "trials.csv")
            run.flush(PATIENCE_SECONDS)
            return tuned

    @property
    def _unsent(self) -> Path:
        return Path(self.settings.data.work) / "unsent"

    def _ended(self) -> list[Any]:
        """All trials that ended, except those that were or will be tried again."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        again = {each.user_attrs.get(_INSTEAD_OF) for each in trials}
        ends = (states.COMPLETE, states.PRUNED, states.FAIL)
        return [each for each in trials if each.state in ends and each.number not in again]

    def _take_up_killed(self) -> None:
        """Trials that a kill left open are tried again under a new number, unless they were killed each time."""
        states = self._optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if _RUN in trial.user_attrs:
                runs.mark_killed(self.settings.tracking.address, trial.user_attrs[_RUN])
            kills = trial.user_attrs.get(_KILLS, 0) + 1
            if kills < KILLS_OF_ONE_TRIAL:
                self._put_back(trial, kills)
            else:
                said = f"failed: the process was killed {kills} times while it tried these values"
                say(f"trial {trial.number + 1}: {said}")
                self._study.tell(trial.number, state=states.FAIL)

    def _put_back(self, trial: Any, kills: int) -> None:
        """Has an open trial's values tried again."""
        known = {each.user_attrs.get(_INSTEAD_OF) for each in self._study.get_trials(deepcopy=False)}
        if trial.number not in known:  # else a kill came between the two calls
            self._study.enqueue_trial(trial.params, user_attrs={_INSTEAD_OF: trial.number, _KILLS: kills})
        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _try(self, parent: str) -> tuple[Outcome, str]:
        """One trial: what became of it, in a word and at length."""
        trial = self._study.ask(self._spaces)
        values = {name: _plain(space, trial.params[name]) for name, space in self._spaces.items()}
        folder = self.folder / f"trial-{trial.number:04d}"
        shutil.rmtree(folder, ignore_errors=True)
        again = f"trial {trial.number + 1} will be tried again: go on with the same command"
        try:
            outcome, said = self._tried(trial, values, folder, parent)
        except (StoppedError, KeyboardInterrupt) as stopped:
            self._put_back(trial, trial.user_attrs.get(_KILLS, 0))
            who = str(stopped).partition(";")[0] or "SIGINT came"
            raise StoppedError(f"{who}; {again}") from None
        except UnreachableError as error:
            self._put_back(trial, trial.user_attrs.get(_KILLS, 0))
            raise UserError(f"{error}; {again}, once MLflow answers") from None
        except Exception as error:  # not the user's fault, but the search must not come back to it
            trial.set_user_attr(_REASON, f"{type(error).__name__}: {error}")
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # weights that nobody needs; the best settings are trained again
        what = said if outcome == "reached" else f"{outcome}: {said}"
        say(f"trial {trial.number + 1}: {what} ({_as_text(values)})")
        return outcome, said

    def _tried(self, trial: Any, values: Values, folder: Path, parent: str) -> tuple[Outcome, str]:
        states = self._optuna.trial.TrialState
        try:
            reached = self._train(trial, self._valid(values), values, folder, parent)
        except UnreachableError:
            raise
        except UserError as error:
            trial.set_user_attr(_REASON, str(error))
            if isinstance(error, NotValidError):
                self._study.tell(trial, state=states.PRUNED)
                return "not valid", str(error)
            self._study.tell(trial, state=states.FAIL)
            return "failed", str(error)
        if reached is None:
            self._study.tell(trial, state=states.PRUNED)
            return "cut short", "it fell behind"
        self._study.tell(trial, reached)
        return "reached", f"{reached:.4f}"

    def _valid(self, values: Values) -> Settings:
        try:
            return self.with_values(values)
        except UserError as error:
            raise NotValidError(str(error)) from None

    def _train(self, trial: Any, settings: Settings, values: Values, folder: Path, parent: str) -> float | None:
        """What the training reached; None where it was cut short."""
        from mmoe_rec.devices import pick_device
        from mmoe_rec.model.layout import ModelLayout
        from mmoe_rec.training.choices import check_offered
        from mmoe_rec.training.loop import Trainer
        from mmoe_rec.training.ranks import process_group
        from mmoe_rec.training.validation import Validation

        device = pick_device(settings.training.device)
        check_offered(settings.training, device.type)  # what is not on offer here is no fault of a trial
        layout = ModelLayout.of(self.prepared.layout, settings)
        # Trials are compared by one measure, whatever loss weights they try.
        judge, select_by = ModelLayout.of(self.prepared.layout, self.settings), settings.training.select_by
        uri, experiment = settings.tracking.address, settings.experiment
        with (
            process_group(device, settings.training.timeout_minutes),
            runs.open_run(
                uri,
                experiment,
                run_name=f"trial {trial.number + 1}",
                parent=parent,
                unsent=self._unsent,
                patience=PATIENCE_SECONDS,
            ) as run,
        ):
            trial.set_user_attr(_RUN, run.run_id)
            run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
            run.set_tags({f"tuned.{setting}": value for setting, value in values.items()})

            validations = itertools.count()

            def watch(found: Validation, _: int) -> None:
                trial.report(found.objective(select_by, judge), next(validations))
                if trial.should_prune():
                    raise self._optuna.TrialPruned

            with _not_valid(run):
                trainer = Trainer(
                    self.prepared,
                    layout,
                    settings.model,
                    settings.training,
                    device,
                    folder,
                    run.log_metrics,
                    watch=watch,
                )
            try:
                result = trainer.run()
            except self._optuna.TrialPruned:
                run.set_tags({"cut_short": "it fell behind"})
                return None
            assert result.best is not None
            run.log_metrics(result.best.flat("best"), result.best_step)
            return result.best.objective(select_by, judge)

    def _best(self) -> Tuned:
        states = self._optuna.trial.TrialState
        ended = self._ended()
        if not any(each.state == states.COMPLETE for each in ended):
            reasons = [each.user_attrs[_REASON] for each in ended if _REASON in each.user_attrs]
            last = f" (the last reason: {reasons[-1]})" if reasons else ""
            raise UserError(f"no trial ended well{last}; raise --trials, or narrow tuning.search")
        best = self._study.best_trial
        values = {name: _plain(space, best.params[name]) for name, space in self._spaces.items()}
        file = self.folder / "best.yaml"
        with atomic_file(file) as path:
            path.write_text(self.with_values(values).to_yaml(), encoding="utf-8")
        not_valid = sum(each.state == states.PRUNED and _REASON in each.user_attrs for each in ended)
        cut_short = sum(each.state == states.PRUNED for each in ended) - not_valid
        failed = sum(each.state == states.FAIL for each in ended)
        return Tuned(values, float(best.value), file, len(ended), cut_short, not_valid, failed)

    def _table(self) -> str:
        """Of all trials, as CSV."""
        table = self._study.trials_dataframe(attrs=("number", "value", "params", "state", "user_attrs"))
        return str(table.to_csv(index=False))


@contextlib.contextmanager
def _not_valid(run: Run) -> Iterator[None]:
    """Around making a model: where that fails, its settings don't go together."""
    try:
        yield
    except UserError as error:
        run.set_tags({"not_valid": error})
        raise NotValidError(str(error)) from None


def _plain(space: Any, value: Any) -> Any:
    return json.loads(value) if hasattr(space, "choices") else value


def _as_text(values: Values) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"
        for name, value in values.items()
    )
