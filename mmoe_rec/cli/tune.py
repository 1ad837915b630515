"""mmoe-rec tune --config configs/complete_journey.yaml --preset small
mmoe-rec tune --config configs/complete_journey.yaml --trials 20

--preset tries what matters on most logs, and needs nothing in the file: epochs, batch, learning rates, dropout, trees,
experts, widths, and groups of features left out, such as ids or histories. `small` takes 20 minutes, `medium` 2 hours,
`large` 8; --minutes says otherwise, --at-once how many trainings run at a time (one a core, or a GPU). Many
alternatives are tried at once, the better half goes on, and the best together are compared with the file by further
trainings, on validation rows of users who had no say before: they are taken if they are shown to be better, or are
simpler and lose nothing. That is written to `data.work`/tuning/best.yaml, the file with its comments, and what each
alternative gave to report.html and tuning.json beside it. The same command, after a stop or a kill, goes on within what
is left of its time.

Without --preset, tries values for the settings under `tuning.search`, keeps those with the best validation result, and
writes them, with all other settings, to `data.work`/tuning/best.yaml, which `mmoe-rec train --config` takes. The next
values follow from what was found so far (Optuna's tree-structured Parzen estimator); a trial that falls behind the
median of those before it is cut short, and a combination that is not valid is left out, with the reason.

Each trial is a run in MLflow, within one of the whole search. The search is kept in `data.work`/tuning/study.db: the
same command, also after a stop or a kill, goes on until --trials trials have ended. Test rows play no part.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mmoe_rec.atomic import digest, write_text
from mmoe_rec.cli.main import COUNT, Configuration, settings_command, show
from mmoe_rec.errors import StoppedError, UserError, first_line, require_packages
from mmoe_rec.progress import say
from mmoe_rec.settings.load import load_settings, parse_overrides
from mmoe_rec.settings.sections import Search, Settings
from mmoe_rec.tracking import runs
from mmoe_rec.tracking.outbox import PATIENCE_SECONDS, UnreachableError

if TYPE_CHECKING:
    from mmoe_rec.jobs.alternatives import Preset
    from mmoe_rec.jobs.variants import VariantTrainings

COMBINATIONS = 30  # with values of other settings, to try for a value that is not valid by itself
Values = dict[str, Any]
Outcome = Literal["reached", "cut short", "not valid", "failed"]
MOST_IN_A_ROW: dict[Outcome, int] = {"failed": 3, "not valid": 20}
"""Trials after which the search ends where they all ended so."""
# What trials are marked with: the id of the run, why it was given up, and that it was asked to stop.
_RUN, _REASON, _STOPPED = "run_id", "reason", "stopped"


@settings_command(__doc__)
@click.option("--preset", type=click.Choice(["small", "medium", "large"]), help="try what matters, within a time")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="M", help="of --preset, the time")
@click.option("--at-once", type=COUNT, metavar="N", help="of --preset, trainings at a time (one a core, or a GPU)")
@click.option("--trials", type=COUNT, metavar="N", help="without --preset, trials in all (default: 20)")
def tune(
    configuration: Configuration,
    preset: Preset | None,
    minutes: float | None,
    at_once: int | None,
    trials: int | None,
) -> None:
    if preset is not None:
        if trials is not None:
            raise UserError("--trials belongs to a search under tuning.search; of --preset, --minutes says how long")
        _tune_preset(configuration, preset, minutes, at_once)
        return
    if minutes is not None or at_once is not None:
        raise UserError("--minutes and --at-once belong to --preset")
    settings = configuration.settings
    search = settings.tuning.search
    if not search:
        raise UserError(
            f"'{configuration.file}' has nothing to search: list settings under tuning.search, or give --preset small"
        )

    def with_values(values: Values) -> Settings:
        chosen = [f"--{name}={json.dumps(value)}" for name, value in values.items()]
        return load_settings(configuration.file, [*configuration.overrides, *chosen], given_by="tuning.search")

    _check_values(search, with_values)
    require_packages("mmoe-rec tune", "tune", "optuna")
    from mmoe_rec.jobs.variants import open_variants

    depends = [settings.choices, settings.tuning.model_dump(mode="json")]
    with open_variants(settings, "tuning", "validation", depends=depends) as trainings:
        Study(trainings, with_values).run(trials or 20)


def _tune_preset(configuration: Configuration, preset: Preset, minutes: float | None, at_once: int | None) -> None:
    from mmoe_rec.jobs.presets import PAGE, tune_preset
    from mmoe_rec.report.tuning import terminal_parts

    values = {".".join(keys): value for keys, value in parse_overrides(configuration.overrides)}
    report = tune_preset(configuration.settings, configuration.file, values, preset, minutes, at_once)
    show(terminal_parts(report))
    print(f"report: {Path(report.best).with_name(PAGE)}")
    print(f"next: mmoe-rec train --config {report.best}")


def _check_values(search: dict[str, Search], with_values: Callable[[Values], Settings]) -> None:
    """Raises UserError, at once, for a value that is valid neither alone nor in some combinations with the others."""
    chance, values = random.Random(17), {name: each.choices or (each.low, each.high) for name, each in search.items()}

    def find_reason(chosen: Values) -> str | None:
        try:
            with_values(chosen)
        except UserError as error:
            return str(error)
        return None

    for name, value in ((name, value) for name, some in values.items() for value in some):
        if reason := find_reason({name: value}):
            drawn = ({each: chance.choice(some) for each, some in values.items()} for _ in range(COMBINATIONS))
            if all(find_reason({**others, name: value}) for others in drawn):
                raise UserError(f"'tuning.search' has {json.dumps(value)} for '{name}': {reason}")


class NotValidError(UserError):
    """Values that don't go together."""


@contextmanager
def _refused_values() -> Iterator[None]:
    """Makes a NotValidError of a UserError."""
    try:
        yield
    except UserError as error:
        raise NotValidError(str(error)) from None


class Study:
    """Trials for one data set, found again by features, settings and search space.

    trainings: the features, folder and run that they are of; with_values: replaces settings.
    """

    def __init__(self, trainings: VariantTrainings, with_values: Callable[[Values], Settings]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._states = optuna, optuna.trial.TrialState
        self.settings, self.prepared, self.folder = trainings.settings, trainings.prepared, trainings.folder
        self.with_values, settings = with_values, trainings.settings
        assert trainings.run is not None, "it is open"
        self.parent = trainings.run
        depends = settings.model_dump(mode="json", include={"model", "training", "tuning"})
        self.key = digest(depends, settings.choices, trainings.prepared.manifest["fingerprint"])
        self._study = self._open(self.folder / "study.db")
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

    def _open(self, file: Path) -> Any:
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
            reason = first_line(error.__cause__ or error)
            raise UserError(f"the search in '{file}' can't be resumed: {reason}; remove it to begin anew") from None

    def run(self, trials: int) -> None:
        """Tries until there are so many trials, those of earlier runs included; writes and prints what is best.

        Raises StoppedError where it was asked to stop; UserError where no trial ended well, or several in a row failed
        or were not valid.
        """
        self._give_up_unfinished()
        last, in_a_row = "", 0
        while len(self._find_ended()) < trials:
            outcome, said = self._try()
            last, in_a_row = outcome, in_a_row + 1 if outcome == last else 1
            if in_a_row == MOST_IN_A_ROW.get(outcome):
                raise UserError(
                    f"{in_a_row} trials in a row ended as {outcome}: narrow tuning.search; the last one: {said}"
                )
        self._finish()

    def _finish(self) -> None:
        states, ended = self._states, self._find_ended()
        if not any(each.state == states.COMPLETE for each in ended):
            reasons = [each.user_attrs[_REASON] for each in ended if _REASON in each.user_attrs]
            last = f" (the last reason: {reasons[-1]})" if reasons else ""
            raise UserError(f"no trial ended well{last}; raise --trials, or narrow tuning.search")
        run, best, file = self.parent, self._study.best_trial, self.folder / "best.yaml"
        values = self._read_values(best)
        write_text(file, self.with_values(values).to_yaml())
        run.log_params({f"best.{setting}": value for setting, value in values.items()})
        run.log_metrics({"best/objective": float(best.value)})
        run.log_artifact(file)
        table = self._study.trials_dataframe(attrs=("number", "value", "params", "state", "user_attrs"))
        run.log_text(str(table.to_csv(index=False)), "trials.csv")
        run.flush(PATIENCE_SECONDS)
        outcomes: dict[Any, Outcome] = {states.COMPLETE: "reached", states.FAIL: "failed"}
        ends = Counter(
            outcomes.get(each.state, "not valid" if _REASON in each.user_attrs else "cut short") for each in ended
        )
        counts = ", ".join(f"{ends[each]} {each}" for each in ("cut short", "not valid", "failed"))
        print(f"{len(ended)} trial{'s' * (len(ended) != 1)}: {counts}")
        print(f"best: {best.value:.4f} with " + ", ".join(f"{name} {value}" for name, value in values.items()))
        print(f"next: mmoe-rec train --config {file}")

    def _find_ended(self) -> list[Any]:
        """All trials that ended; a stop or a kill is no end."""
        ends = (self._states.COMPLETE, self._states.PRUNED)
        trials = self._study.get_trials(deepcopy=False)
        return [each for each in trials if each.state in ends or _REASON in each.user_attrs]

    def _give_up_unfinished(self) -> None:
        """Closes the trials that a stop or a kill left open: others are tried in their place. Where the processes of
        several in a row were killed, as where memory runs out, they count as failed, or a supervisor that starts the
        command again would do so without end."""
        ended, killed = {each.number for each in self._find_ended()}, 0
        for trial in self._study.get_trials(deepcopy=False):
            if trial.number in ended:
                killed = 0
            elif _STOPPED not in trial.user_attrs:
                killed += 1
            if trial.state != self._states.RUNNING:
                continue
            if _RUN in trial.user_attrs:
                runs.mark_killed(self.settings.tracking.address, trial.user_attrs[_RUN])
            if killed >= MOST_IN_A_ROW["failed"]:
                told = (
                    f"its process was killed, as {killed - 1} before it were; does it need more memory than there is?"
                )
                self._optuna.trial.Trial(self._study, trial._trial_id).set_user_attr(_REASON, told)
                say(f"trial {trial.number + 1}: failed: {told}")
            self._study.tell(trial.number, state=self._states.FAIL)

    def _try(self) -> tuple[Outcome, str]:
        """One trial: what became of it, in a word and at length."""
        trial = self._study.ask(self._spaces)
        values, folder, reached = self._read_values(trial), self.folder / f"trial-{trial.number:04d}", None
        shutil.rmtree(folder, ignore_errors=True)
        left = f"trial {trial.number + 1} has not ended, and does not count: go on with the same command"
        outcome: Outcome = "cut short"
        told = "it fell behind"
        try:
            with _refused_values():
                settings = self.with_values(values)
            reached = self._train(trial, settings, values, folder)
            if reached is not None:
                outcome, told = "reached", f"{reached:.4f}"
        except (StoppedError, KeyboardInterrupt) as stopped:
            trial.set_user_attr(_STOPPED, True)
            who = str(stopped).partition(";")[0] or "SIGINT came"
            raise StoppedError(f"{who}; {left}") from None
        except UnreachableError as error:
            raise UserError(f"{error}; {left}, once MLflow answers") from None
        except UserError as error:
            outcome, told = "not valid" if isinstance(error, NotValidError) else "failed", str(error)
            trial.set_user_attr(_REASON, told)
        except Exception as error:  # not the user's fault, but the search must not come back to it
            trial.set_user_attr(_REASON, f"{type(error).__name__}: {error}")
            self._study.tell(trial, state=self._states.FAIL)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # weights that nobody needs; the best settings are trained again
        states = {"reached": None, "failed": self._states.FAIL}  # None: optuna takes no NaN as complete
        self._study.tell(trial, reached, states.get(outcome, self._states.PRUNED))
        text = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {json.dumps(value)}"
            for name, value in values.items()
        )
        say(f"trial {trial.number + 1}: {told if reached is not None else f'{outcome}: {told}'} ({text})")
        return outcome, told

    def _read_values(self, trial: Any) -> Values:
        """Setting -> value; that of a choice is stored as JSON."""
        kept = {name: trial.params[name] for name in self._spaces}
        return {name: json.loads(each) if isinstance(each, str) else each for name, each in kept.items()}

    def _train(self, trial: Any, settings: Settings, values: Values, folder: Path) -> float | None:
        """What the training reached, None where it was cut short. Raises NotValidError for values that don't fit."""
        from mmoe_rec.model.layout import ModelLayout
        from mmoe_rec.training.choices import read_choices, write_choices
        from mmoe_rec.training.loop import Trainer
        from mmoe_rec.training.ranks import training_ranks
        from mmoe_rec.training.validation import Validation

        shared = self.folder / f"choices-{self.key}.json"
        layout = ModelLayout.of(self.prepared.layout, settings)
        # Trials are compared by one measure, whatever loss weights they try.
        judge, select_by = ModelLayout.of(self.prepared.layout, self.settings), self.settings.training.select_by
        with (
            training_ranks(settings.training) as (device, _),  # what is not on offer here is no fault of a trial
            runs.open_run(
                settings.tracking.address,
                settings.experiment,
                run_name=f"trial {trial.number + 1}",
                parent=self.parent.run_id,
                unsent=Path(settings.data.work) / "unsent",
                patience=PATIENCE_SECONDS,
            ) as run,
        ):
            trial.set_user_attr(_RUN, run.run_id)
            run.log_params({**settings.model_dump(mode="json", include={"model", "training"}), **settings.choices})
            run.set_tags({f"tuned.{setting}": value for setting, value in values.items()})
            validations = itertools.count()

            def watch(validation: Validation, _: int) -> None:
                trial.report(validation.objective(select_by, judge), next(validations))
                if trial.should_prune():
                    raise self._optuna.TrialPruned

            try:
                with _refused_values():
                    trainer = Trainer(
                        self.prepared,
                        layout,
                        settings.model,
                        settings.training,
                        device,
                        folder,
                        run.log_metrics,
                        watch=watch,
                        choices=read_choices(shared),
                    )
                if not shared.exists():  # the first trial's, for all others
                    write_choices(shared, trainer.choices)
                result = trainer.run()
            except NotValidError as error:
                run.set_tags({"not_valid": error})
                raise
            except self._optuna.TrialPruned:
                run.set_tags({"cut_short": "it fell behind"})
                return None
            assert result.best is not None
            run.log_metrics(result.best.flat("network"), result.best_step)  # trials grow no trees
            return result.best.objective(select_by, judge)
