"""Search for better settings with Optuna and confirm the result by new runs, see `tune_settings`.

    data.work_dir/tuning/study.db                          trials, from which an interrupted search resumes
    data.work_dir/tuning/best.yaml                         the settings to use
    data.work_dir/tuning/comparison.json, report.html      the results

The rows of one half of the validation users (selection rows) compare trials and choose a candidate, which is a variant
of the settings. The rows of the other half (evaluation rows) compare the candidate with the original settings.

Two candidates are possible: the values of the best trial, and the best values by a least-squares fit over all trials.
The best trial may owe its result to noise. The fit uses every trial to estimate each effect.
"""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmoe_rec.atomic import digest, write_text
from mmoe_rec.batches.encoded_dataset import ValidationPart
from mmoe_rec.errors import UserError, first_line, require_packages
from mmoe_rec.experiments.compare import ExperimentResult, check_variants, save_result, train_and_compare
from mmoe_rec.experiments.runner import BASE_VARIANT, Runner, Variant, open_runner
from mmoe_rec.progress import say
from mmoe_rec.report.formatting import format_signed
from mmoe_rec.report.parts import Table
from mmoe_rec.settings.sections import SearchRange, Settings
from mmoe_rec.tracking.client import UnreachableError

TUNING_FOLDER, BEST_FILE = "tuning", "best.yaml"
SELECTION_SEEDS = 2
"""Number of runs of each candidate that choose a candidate. Other seeds confirm the choice."""
MIN_CONFIRMATION_SEEDS, SPARE_TIME_FACTOR = 3, 3
"""Minimum runs that confirm a candidate, and the factor by which spare time may increase their number.

The interval of two runs is too wide to show a gain. On small logs, the interval of five runs misses small gains too.
"""
MAX_FAILURES = 10
"""Number of consecutive trials without a result that ends the search."""
TRIAL_SEED_OFFSET, CANDIDATE_SEED_OFFSET = 1000, 100_000
"""Offsets that are added to `training.seed` for trials, and for runs that choose a candidate."""
SettingValues = dict[str, Any]
# Names of the attributes that the search stores with Optuna's trials.
_REASON, _SECONDS = "reason", "seconds"


def tune_settings(settings: Settings, minutes: float | None, trials: int | None, seeds: int) -> ExperimentResult:
    """Search for better settings and write `best.yaml`.

    Args:
        settings: Settings to start from. If `tuning.search` is empty, a small built-in space is searched.
        minutes: Time limit for trials and confirmation, None for no limit.
        trials: Number of trials, None for as many as the time allows.
        seeds: Number of runs of the candidate that confirm it, and number of runs of the base settings.

    Raises:
        UserError: No value can be tried, or no trial had a result.
        StoppedError: A signal came. The same command resumes the search.
    """
    require_packages("mmoe-rec tune", "tune", "optuna")
    check_variants(settings, [BASE_VARIANT], seeds)
    end = math.inf if minutes is None else time.time() + 60 * minutes
    _check_space(settings, settings.tuning.search)
    with open_runner(settings, "tune", "validation", ValidationPart.EVALUATION, TUNING_FOLDER) as runner:
        space = settings.tuning.search or default_space(settings, runner.prepared.manifest["splits"]["train"]["rows"])
        study = Study(runner, space)
        max_reserved_seconds, max_runs = (0.0, seeds) if minutes is None else (30 * minutes, SPARE_TIME_FACTOR * seeds)
        study.run(end, max_reserved_seconds, trials, 2 * (SELECTION_SEEDS + max_runs))
        completed = study.completed_trials()
        effects = estimate_effects(space, completed)
        candidates = _list_candidates(settings, space, completed, effects)
        seconds, notes = mean_seconds(_finished_trials(study.study)), [study.describe()]
        variant = candidates[-1] if candidates else BASE_VARIANT
        if len(candidates) > 1 and 2 * (SELECTION_SEEDS + seeds) * seconds <= end - time.time():
            variant = _choose(runner, candidates)
        elif len(candidates) > 1:
            notes.append("the time was too short for runs that compare the best trial with the fit: the fit was chosen")
        compared = [BASE_VARIANT, variant] if candidates else [BASE_VARIANT]
        min_runs = min(seeds, MIN_CONFIRMATION_SEEDS)
        runs = _train_until(end, runner, compared, min_runs, max_runs if candidates else min_runs)
        report = train_and_compare(runner, compared, runs, 0.0)
        header = ("setting", "value", "trials", "effect")
        rows = [
            (name, level, str(count), format_signed(effect)[0])
            for (name, level), (count, effect) in sorted(effects.items(), key=lambda item: -item[1][1])
        ]
        table = Table("Effects of single values on the selection rows, by least squares over the trials", header, rows)
        if not candidates:
            notes.append("nothing to adopt: no other values did better")
        elif runs < seeds:
            notes.append(f"the time was short: {runs} instead of {seeds} runs confirmed the result")
        report = replace(report, notes=notes, tables=[table])
        best = settings if report.recommended is None else variant.apply(settings)
        write_text(runner.folder / BEST_FILE, best.to_yaml())
        save_result(runner, report)
        runner.run.log_artifact(runner.folder / BEST_FILE)
    return report


def default_space(settings: Settings, rows: int) -> dict[str, SearchRange]:
    """Return the built-in search space: settings that matter on most logs, with values around the current ones.

    Args:
        settings: The settings.
        rows: Number of training rows.
    """
    training, model, epochs = settings.training, settings.model, settings.training.epochs
    batch, rate, tables = training.resolve_batch_size(rows), training.learning_rate, training.table_learning_rate
    choices: dict[str, list[Any]] = {
        "training.epochs": [epochs] if epochs == "auto" else [epochs, epochs * 2, max(1, epochs // 2)],
        "training.batch_size": [batch, max(2, batch // 2), max(2, min(batch * 2, rows // 4))],
        "training.learning_rate": [rate, *(float(f"{rate * factor:.3g}") for factor in (2, 0.5))],
        "training.table_learning_rate": [tables, *(float(f"{tables * factor:.3g}") for factor in (2, 0.4))],
        "training.weight_decay": [training.weight_decay, 0.01],
        "model.bottom.dropout": [model.bottom.dropout, 0.0, 0.1, 0.3],
        "model.bottom.cross_layers": [model.bottom.cross_layers, 0, 2],
        "model.experts.count": [model.experts.count, 1, max(4, 2 * model.experts.count)],
    }
    unique = {name: tuple(dict.fromkeys(values)) for name, values in choices.items()}
    return {name: SearchRange(choices=values) for name, values in unique.items() if len(values) > 1}


def _check_space(settings: Settings, space: Mapping[str, SearchRange]) -> None:
    """Raise UserError if the space has a setting without a valid value. Of a range, only the ends are tried."""
    for name, search in space.items():
        errors = []
        values = search.choices or (search.low, search.high)
        for value in values:
            try:
                _make_variant("tuning.search", {name: value}).apply(settings)
            except UserError as error:
                errors.append(error)
        if len(errors) == len(values):
            raise UserError(f"tuning.search: {errors[0]}")


def _make_variant(name: str, values: SettingValues) -> Variant:
    """Return the variant that sets these values."""
    return Variant(name, tuple(f"{setting}={json.dumps(value)}" for setting, value in values.items()))


@dataclass(frozen=True)
class Trial:
    """A trial that completed.

    Attributes:
        values: Setting -> value in the trial.
        result: The monitored metric (`training.monitor`) on the selection rows.
    """

    values: SettingValues
    result: float


class Study:
    """The trials of a search. A later command with the same settings, features and search space resumes them.

    Attributes:
        runner: Runner that trains the trials.
        study: Optuna's study.
        space: Setting -> values to try.
    """

    def __init__(self, runner: Runner, space: Mapping[str, SearchRange]) -> None:
        """Open the study, mark trials of a killed command as failed, and try the settings' own values first."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        settings, self.runner, self.space = runner.settings, runner, space
        self._base = runner.plan_run(BASE_VARIANT, settings.training.seed)
        dumped_space = {name: search.model_dump() for name, search in space.items()}
        key = digest(self._base.file.stem, settings.model_choices, dumped_space)
        file, startup = runner.folder / "study.db", settings.tuning.startup_trials
        try:
            self.study = optuna.create_study(
                storage=f"sqlite:///{file}",
                study_name=key,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=startup),
            )
            earlier = self.study.get_trials(deepcopy=False)
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            reason = first_line(error.__cause__ or error)
            raise UserError(f"the search in '{file}' is damaged: {reason}. Remove the file.") from None
        # A resumed study needs another seed, or the sampler would draw the same values again.
        seed = settings.training.seed + len(earlier)
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
        for trial in (trial for trial in earlier if trial.state == optuna.trial.TrialState.RUNNING):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if not earlier and (current := current_values(settings, space)) is not None:
            choices = {name: json.dumps(current[name]) for name, search in space.items() if search.choices is not None}
            self.study.enqueue_trial({**current, **choices})

    def run(self, end: float, max_reserved_seconds: float, trials: int | None, reserved_runs: int) -> None:
        """Run trials until there are enough, or until the rest of the time is needed for confirmation.

        Args:
            end: Time at which confirmation must be complete, in seconds since 1970.
            max_reserved_seconds: Maximum seconds to reserve for confirmation.
            trials: Number of trials, None for no limit.
            reserved_runs: Number of runs that choose and confirm the candidate.

        Raises:
            UserError: `MAX_FAILURES` consecutive trials had no result.
        """
        failures = 0
        while can_start_trial(
            _finished_trials(self.study), end - time.time(), max_reserved_seconds, trials, reserved_runs
        ):
            self.study.optimize(self._try, n_trials=1)
            reason = self.study.get_trials(deepcopy=False)[-1].user_attrs.get(_REASON)
            failures = failures + 1 if reason else 0
            if failures == MAX_FAILURES:
                raise UserError(f"{failures} trials in a row had no result. Narrow tuning.search. The last: {reason}")

    def _try(self, trial: Any) -> float:
        """Run a trial and return its result. NaN marks the trial as failed in Optuna."""
        import optuna

        variant, start = (
            _make_variant(f"trial {trial.number + 1}", _suggest_values(trial, self.space)),
            time.monotonic(),
        )
        result, outcome = math.nan, "stopped"
        try:
            result = self.train(trial, variant)
            outcome = f"{result:.4f}"
        except optuna.TrialPruned:
            outcome = "pruned"
            raise
        except (
            UnreachableError
        ):  # MLflow can't be reached. The trial doesn't count as failed, and a later trial replaces it.
            raise
        except UserError as error:
            outcome = str(error)
            trial.set_user_attr(_REASON, outcome)
        finally:
            trial.set_user_attr(_SECONDS, time.monotonic() - start)
            say(f"{variant.name}: {outcome} ({', '.join(variant.overrides)})")
        return result

    def train(self, trial: Any, variant: Variant) -> float:
        """Train the network of a trial, and return its monitored metric on the selection rows.

        Args:
            trial: Optuna's trial.
            variant: Variant with the values of the trial.

        Raises:
            TrialPruned: The trial fell behind the median of the earlier trials.
        """
        import optuna

        runner, settings = self.runner, variant.apply(self.runner.settings)
        seed = settings.training.seed + TRIAL_SEED_OFFSET + trial.number
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"seed": seed})})
        file = self._base.file.with_name(f"{self.study.study_name}-{trial.number}")
        spec, validations = replace(self._base, variant=variant, settings=settings, file=file), itertools.count()

        def on_validation(validation: Any, _: int) -> None:
            trial.report(runner.monitored_metric(validation), next(validations))
            if trial.should_prune():
                raise optuna.TrialPruned

        with runner.open_run(variant.name, spec) as run:
            try:
                best = runner.fit(spec, run, on_validation)[0].best
            except optuna.TrialPruned:
                run.set_tags({"pruned": "true"})
                raise
            assert best is not None, "every run is validated at its end"
            run.log_metrics(best.to_metrics("network"))
        return runner.monitored_metric(best)

    def completed_trials(self) -> list[Trial]:
        """Return the trials with a result. Raises UserError if there are none."""
        finished = _finished_trials(self.study)
        completed = (trial for trial in finished if trial.state.name == "COMPLETE")
        trials = [Trial(_decode_params(trial.params), float(trial.value)) for trial in completed]
        if not trials:
            reasons = [trial.user_attrs[_REASON] for trial in finished if _REASON in trial.user_attrs]
            last = f" The last one: {reasons[-1]}" if reasons else ""
            raise UserError(f"no trial had a result. Give more --minutes or --trials, or narrow tuning.search.{last}")
        return trials

    def describe(self) -> str:
        """Describe in one clause how the trials ended."""
        finished = _finished_trials(self.study)
        states = Counter("failed" if _REASON in trial.user_attrs else trial.state.name for trial in finished)
        best = max(trial.value for trial in finished if trial.state.name == "COMPLETE")
        return (
            f"{len(finished)} trials: {states['PRUNED']} pruned, {states['failed']} failed. The best trial reached "
            f"{best:.4f} on the selection rows"
        )


def can_start_trial(
    finished: Sequence[Any], seconds_left: float, max_reserved_seconds: float, trials: int | None, reserved_runs: int
) -> bool:
    """Return whether another trial is wanted, and time suffices for the trial and the reserved runs.

    Args:
        finished: Finished trials.
        seconds_left: Seconds until everything must be complete.
        max_reserved_seconds: Maximum seconds to reserve for the runs after the trials, even if these need more.
        trials: Number of trials, None for no limit.
        reserved_runs: Number of runs after the trials.
    """
    mean = mean_seconds(finished)
    return mean + min(reserved_runs * mean, max_reserved_seconds) < seconds_left and (
        trials is None or len(finished) < trials
    )


def mean_seconds(finished: Sequence[Any]) -> float:
    """Return the mean seconds of completed trials, of all trials if none completed."""
    complete = [trial for trial in finished if trial.state.name == "COMPLETE"] or finished
    return float(np.mean([trial.user_attrs[_SECONDS] for trial in complete])) if complete else 0.0


def _train_until(end: float, runner: Runner, variants: Sequence[Variant], min_runs: int, max_runs: int) -> int:
    """Train runs of each variant while another run is expected to end before `end`. Return their number."""
    runs, seconds = 0, 0.0
    while runs < min_runs or (runs < max_runs and time.time() + seconds <= end):
        start = time.time()
        runner.train(variants, [runner.settings.training.seed + runs])
        runs, seconds = runs + 1, time.time() - start
    return runs


def _finished_trials(study: Any) -> list[Any]:
    """Return the trials that completed, were pruned or failed. Interrupted trials don't count."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED") or _REASON in trial.user_attrs]


def _suggest_values(trial: Any, space: Mapping[str, SearchRange]) -> SettingValues:
    """Let Optuna choose the values of a trial from the search space. Optuna gets choices as JSON strings."""
    for name, search in space.items():
        if search.choices is not None:
            trial.suggest_categorical(name, [json.dumps(value) for value in search.choices])
        else:
            draw = trial.suggest_int if _is_integer_range(search) else trial.suggest_float
            draw(name, search.low, search.high, log=search.log)
    return _decode_params(trial.params)


def _is_integer_range(search: SearchRange) -> bool:
    """Return whether a range contains integers only."""
    return isinstance(search.low, int) and isinstance(search.high, int)


def _decode_params(params: Mapping[str, Any]) -> SettingValues:
    """Convert Optuna's parameters, where choices are JSON strings, to values of settings."""
    return {name: json.loads(value) if isinstance(value, str) else value for name, value in params.items()}


def current_values(settings: Settings, space: Mapping[str, SearchRange]) -> SettingValues | None:
    """Return the current values of the settings in a search space, None if the space lacks one of these values.

    Args:
        settings: The settings.
        space: Setting -> values to try.
    """
    tree, current = settings.model_dump(mode="json"), dict[str, Any]()
    for name, search in space.items():
        value: Any = tree
        for key in name.split("."):
            value = value[key]
        if name == "training.batch_size" and value == "auto" and search.choices is not None:
            value = search.choices[0]  # The first choice of the built-in space is the size that `auto` resolves to.
        is_number = isinstance(value, int | float)
        inside = search.choices is None and is_number and search.low <= value <= search.high
        if not inside and value not in json.loads(json.dumps(search.choices or [])):
            return None
        current[name] = value
    return current


def discretize(search: SearchRange, value: Any) -> str:
    """Return the level of a value: the category to which the value belongs in the least-squares fit.

    Args:
        search: Values to try.
        value: The value.

    Returns:
        The level as JSON. For a choice, the level is the value. A range has three levels of equal width (in the
        logarithm for a log range), and the level is given by its middle.
    """
    if search.choices is not None:
        return json.dumps(value)
    assert search.low is not None
    assert search.high is not None
    low, high, x = (math.log(end) if search.log else float(end) for end in (search.low, search.high, value))
    third = min(2, int(3 * (x - low) / (high - low)))
    middle = low + (third + 0.5) * (high - low) / 3
    middle = math.exp(middle) if search.log else middle
    return json.dumps(round(middle) if _is_integer_range(search) else float(f"{middle:.3g}"))


def estimate_effects(
    space: Mapping[str, SearchRange], trials: Sequence[Trial]
) -> dict[tuple[str, str], tuple[int, float]]:
    """Estimate the main effect of each level (see `discretize`) of each setting by least squares.

    The effects of a setting have mean zero over the trials. A ridge penalty shrinks each effect as one more trial with
    an average result would. A level that was tried only once is therefore unlikely to have the largest effect.

    Args:
        space: Setting -> values to try.
        trials: Trials with results.

    Returns:
        Setting and level -> number of trials with the level, and its effect on the result.
    """
    levels = [[(name, discretize(search, trial.values[name])) for name, search in space.items()] for trial in trials]
    keys = sorted({key for trial_levels in levels for key in trial_levels})
    x = np.array([[key in trial_levels for key in keys] for trial_levels in levels], np.float64)
    results = np.array([trial.result for trial in trials])
    design, y = np.vstack([x - x.mean(0), np.eye(len(keys))]), results - results.mean()
    coefficients = np.linalg.lstsq(design, np.concatenate([y, np.zeros(len(keys))]), rcond=None)[0]
    effects = {}
    for name in space:
        columns = [index for index, key in enumerate(keys) if key[0] == name]
        counts = x[:, columns].sum(0)
        mean = float(counts @ coefficients[columns] / counts.sum())
        for index, count in zip(columns, counts, strict=True):
            effects[keys[index]] = int(count), float(coefficients[index]) - mean
    return effects


def _list_candidates(
    settings: Settings,
    space: Mapping[str, SearchRange],
    trials: Sequence[Trial],
    effects: Mapping[tuple[str, str], tuple[int, float]],
) -> list[Variant]:
    """Return the best trial, and the levels with the largest effects, as variants that change the settings."""
    levels: dict[str, str] = {}
    for (name, level), (_, effect) in effects.items():
        if name not in levels or effect > effects[name, levels[name]][1]:
            levels[name] = level
    fitted = {name: json.loads(level) for name, level in levels.items()}
    best = max(trials, key=lambda trial: trial.result).values
    current = current_values(settings, space) or {}
    candidates: list[Variant] = []
    for name, values in (("the best trial", best), ("the best values by the fit", fitted)):
        changed = {setting: value for setting, value in values.items() if current.get(setting, math.nan) != value}
        variant = _make_variant(name, changed)
        try:
            variant.apply(settings)
        except UserError:  # The best levels of different settings can be incompatible.
            continue
        if changed and variant.overrides not in [candidate.overrides for candidate in candidates]:
            candidates.append(variant)
    return candidates


def _choose(runner: Runner, candidates: Sequence[Variant]) -> Variant:
    """Train the candidates again with new seeds, and return the better one on the selection rows."""
    first_seed = runner.settings.training.seed + CANDIDATE_SEED_OFFSET
    trained = runner.train(candidates, range(first_seed, first_seed + SELECTION_SEEDS))
    return max(trained, key=lambda runs: float(np.mean([facts["monitored_metric"] for facts in runs.facts]))).variant
