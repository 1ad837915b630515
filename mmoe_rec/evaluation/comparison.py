"""Compare a model with others on the same rows, and decide which model is better.

docs/explanation/intervals-and-promotion.md explains the rule of `decide`. Holm's method (1979) corrects the p-values of
metrics in a report's main tables for the number of metrics and models. The p-value of `evaluation.primary_metric` is
corrected for the number of models alone, because this metric was chosen before anything was measured.

A metric averaged over S runs varies with the runs and with the sample of users. The variance of the average is
therefore (variance between runs) / S + variance over users. The second term comes from a bootstrap of the average, with
the same resampled users in all runs. The interval is Student's t, with degrees of freedom by Welch and Satterthwaite.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    ALPHA,
    Difference,
    Estimate,
    MetricKey,
    Replicates,
    compute_difference,
    holm_correct,
)
from mmoe_rec.evaluation.metrics import metrics_for_kind
from mmoe_rec.evaluation.metrics.metric import distance_from_one
from mmoe_rec.evaluation.slices import SliceRecord, compare_slices
from mmoe_rec.evaluation.summary import OBJECTIVE, SCORE, BootstrapMetrics, MeasuredModel, Objective, Summary, nest
from mmoe_rec.evaluation.sums import EvaluationSums, count_minority, describe_row_mismatch
from mmoe_rec.report.formatting import format_signed
from mmoe_rec.settings.sections import Evaluation
from mmoe_rec.task_kinds import KINDS

MAX_LISTED_SLICES = 3  # maximum number of slices that a message lists
SLICE_RESAMPLES = 200  # enough for standard errors within 5%


class Outcome(StrEnum):
    """Outcome of comparing a model with a reference model in the objective, the metric that decides which is better.

    `BLOCKED`: The model is better, but a guardrail failed.
    `UNDECIDED`: There is no objective, or the objective is undefined or has no interval.
    """

    BETTER = "better"
    BLOCKED = "blocked"
    NOT_SIGNIFICANT = "not significant"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Guardrail:
    """Result of one guardrail, a limit that a model must keep to be accepted as better.

    Attributes:
        task: Name of the task, None for the guardrail of slices.
        metric: `slices`, or the metric of the task: `auc`, `r2` or `calibration`.
        passed: Whether the model keeps the limit.
        message: Sentence about the result.
    """

    task: str | None
    metric: str
    passed: bool
    message: str


@dataclass(frozen=True)
class ModelDifferences:
    """Differences in metrics, model minus reference model.

    Attributes:
        objective: Difference in the objective, the metric that decides which model is better.
        groups: Task or `score` -> metric -> difference.
    """

    objective: Difference
    groups: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Verdict:
    """Decision between two models, with a sentence that states it."""

    kind: Outcome
    message: str
    guardrails: tuple[Guardrail, ...]


@dataclass(frozen=True)
class Comparison:
    """Comparison of a model with reference models.

    Attributes:
        model: Name of the model.
        objective: Metric that decides which model is better, None if no task has enough labels.
        differences: Name of the reference model -> differences from that model.
        eligible_tasks: Tasks with at least `MIN_RARER_ROWS` rows of the rarer label, or labels of a regression.
        excluded_tasks: Other task -> number of such rows.
        verdicts: Name of the reference model -> verdict.
    """

    model: str
    objective: Objective | None
    differences: dict[str, ModelDifferences]
    eligible_tasks: tuple[str, ...]
    excluded_tasks: dict[str, int]
    verdicts: dict[str, Verdict]


def compare(
    models: Mapping[str, MeasuredModel],
    model: str,
    tasks: Sequence[str],
    rules: Evaluation,
    slices: Sequence[SliceRecord] = (),
) -> Comparison:
    """Compare a model with all other models in all metrics, and decide as `decide` does.

    Tasks that only one of two models predicts are left out. The `score` is left out if the models were measured with
    different weights of tasks, because the relevance of rows then differs.

    Args:
        models: Name -> measured model.
        model: Name of the model to judge.
        tasks: Tasks that the objective may average over and that guardrails check.
        rules: Settings of the decision.
        slices: Comparisons in slices that the guardrail of slices checks.

    Raises:
        UserError: The models were measured on different rows, or `rules` names an unknown metric.
    """
    model_sums = models[model].sums
    references = {name: measured.sums for name, measured in models.items() if name != model}
    objective = Objective.from_setting(rules.primary_metric, model_sums, tasks)
    single_runs = ((name, [sums]) for name, sums in references.items())
    by_reference = _correct_differences(
        model_sums, find_differences([model_sums], single_runs, objective, rules.resamples, name=model), references
    )
    labels = {task: count_minority(model_sums, task) for task in tasks}
    eligible = tuple(task for task, rows in labels.items() if rows >= MIN_RARER_ROWS)
    verdicts = {}
    for reference, differences in by_reference.items():
        summaries = {name: models[name].summary for name in (model, reference)}
        guardrails = list(check_guardrails(differences, summaries, eligible, rules))
        if (slice_guardrail := check_slice_guardrail(slices, reference, eligible, rules.max_metric_drop)) is not None:
            guardrails.append(slice_guardrail)
        verdicts[reference] = decide(model, reference, objective, differences, guardrails)
    excluded = {task: rows for task, rows in labels.items() if rows < MIN_RARER_ROWS}
    return Comparison(model, objective, by_reference, eligible, excluded, verdicts)


Differences = dict[tuple[str, str, str], Difference]
"""(reference model or settings, task or `score`, metric) -> difference. The objective's key is (name, *OBJECTIVE)."""


def find_differences(
    sums: Sequence[EvaluationSums],
    others: Iterable[tuple[str, Sequence[EvaluationSums]]],
    objective: Objective | None = None,
    resamples: int = 1000,
    metrics: Collection[str] | None = None,
    name: str = "these settings",
) -> Differences:
    """Return differences in metrics, these settings minus other settings, without correcting p-values.

    A metric of settings is the mean over their runs. If one side has a single run, intervals only cover the sample of
    users. Tasks that only one side measures are left out, and so is the score if the two sides weigh tasks differently.

    Args:
        sums: Sums for the metrics of these settings, one item for each run.
        others: Pairs of the name of other settings and the sums of their runs. Only one pair is in memory at a time.
        objective: Metric that decides which settings are better, None without a decision.
        resamples: Number of bootstrap resamples.
        metrics: Metrics to compare in addition to the objective, None for all.
        name: Name of the compared settings in errors.

    Raises:
        UserError: The runs were measured on different rows.
    """
    means = _bootstrap_mean(sums, resamples, objective, metrics)
    differences: Differences = {}
    for reference, reference_sums in others:
        for run_sums in reference_sums:
            if (mismatch := describe_row_mismatch(sums[0], run_sums)) is not None:
                raise UserError(
                    f"'{name}' and '{reference}' were not measured on the same rows ({mismatch}): differences of "
                    "models need the same requests and candidates, with the same labels"
                )
        reference_means = _bootstrap_mean(reference_sums, resamples, objective, metrics)
        excluded = {SCORE} if _weights_of_tasks(sums[0]) != _weights_of_tasks(reference_sums[0]) else set[str]()
        if excluded and objective is not None and SCORE in objective.groups:
            excluded.add(OBJECTIVE[0])
        for key in (key for key in means if key in reference_means and key[0] not in excluded):
            (values, estimate), (reference_values, reference_estimate) = means[key], reference_means[key]
            sides = (values, reference_values) if min(len(values), len(reference_values)) > 1 else ()
            run_variances = [(side.var(ddof=1) / len(side), len(side) - 1) for side in sides]
            differences[reference, *key] = compute_difference(estimate, reference_estimate, run_variances)
    return differences


def _bootstrap_mean(
    sums: Sequence[EvaluationSums],
    resamples: int,
    objective: Objective | None = None,
    metrics: Collection[str] | None = None,
) -> dict[MetricKey, tuple[np.ndarray, Estimate]]:
    """Return the values (S,) of each metric in S runs, and the mean over the runs with bootstrap replicates."""
    runs = [BootstrapMetrics(run_sums, objective, metrics) for run_sums in sums]

    def mean_of(counts: np.ndarray) -> Replicates:
        values = [run.compute(counts) for run in runs]
        return {key: np.mean([run_values[key] for run_values in values], axis=0) for key in values[0]}

    point_values = [run.point_values for run in runs]
    means = runs[0].bootstrap(resamples, mean_of)
    return {key: (np.array([run_values[key] for run_values in point_values]), mean) for key, mean in means.items()}


def decide(
    model: str,
    other: str,
    objective: Objective | None,
    differences: ModelDifferences,
    guardrails: Sequence[Guardrail] = (),
) -> Verdict:
    """Decide whether a model is better than a reference model.

    Args:
        model: Name of the model.
        other: Name of the reference model.
        objective: Metric that decides, None if no task has enough labels.
        differences: Model minus reference model, with corrected p-values.
        guardrails: Results of the guardrails.
    """
    difference, both = differences.objective, f"'{model}' and '{other}'"
    if objective is None or difference.p_value is None or difference.value is None:
        reason = f"every task has fewer than {MIN_RARER_ROWS} rows of one label"
        if objective is not None:
            no_interval = "has no interval, as one user decides nearly alone, or many redraws leave it undefined"
            reason = f"{objective.name} {'is undefined' if difference.value is None else no_interval}"
        return Verdict(Outcome.UNDECIDED, f"{both} can't be compared: {reason}", tuple(guardrails))
    metric = objective.name
    if not difference.is_significant:
        change = f"{metric} differs by {difference.format()}"
        message = f"there is no significant difference between {both}{difference.correction_note}: {change}"
        if difference.low == difference.high == 0:
            message = f"{both} do not differ: {metric} is the same"
        return Verdict(Outcome.NOT_SIGNIFICANT, message, tuple(guardrails))
    ends = sorted(abs(end or 0.0) for end in (difference.low, difference.high))
    size, *reach = format_signed(abs(difference.value), *ends, sign=False)
    direction, size = "higher" if difference.value > 0 else "lower", f"{size} ({' to '.join(reach)})"
    is_gain = (difference.value > 0) == (objective.better == "higher")
    if is_gain and (failed := [guard.message for guard in guardrails if not guard.passed]):
        beats = f"although {metric} is {direction} than that of '{other}' by {size}"
        message = f"'{model}' is not accepted as better, {beats}: {'; '.join(failed)}"
        return Verdict(Outcome.BLOCKED, message, tuple(guardrails))
    kind = Outcome.BETTER if is_gain else Outcome.WORSE
    return Verdict(kind, f"'{model}' is {kind} than '{other}': {metric} is {direction} by {size}", tuple(guardrails))


def check_guardrails(
    differences: ModelDifferences, summaries: Mapping[str, Summary], eligible_tasks: Sequence[str], rules: Evaluation
) -> Iterator[Guardrail]:
    """Check each task's loss in its `guardrail_metric`, and the calibration ratio of binary tasks.

    The first check passes if the interval rules out a loss of more than `max_metric_drop`. The second check fails if
    the ratio is significantly beyond `max_calibration_ratio`, and further from 1 than for the reference model.

    Args:
        differences: Differences in metrics, model minus reference model.
        summaries: Model name -> summary. The first entry is the model, the second is the reference model.
        eligible_tasks: Tasks with enough labels.
        rules: Settings with the limits.
    """
    reference_name, (summary, reference) = list(summaries)[-1], summaries.values()
    for task in eligible_tasks:
        metric = summary.tasks[task].guardrail_metric
        limit = f"a loss of more than {rules.max_metric_drop:g} (evaluation.max_metric_drop)"
        difference = differences.groups.get(task, {}).get(metric, Difference(None))
        conclusion = f"so {limit} can't be ruled out"
        if passed := difference.low is not None and difference.low >= -rules.max_metric_drop:
            conclusion = f"so {limit} is ruled out"
        elif difference.high is not None and difference.high < -rules.max_metric_drop:
            conclusion = f"which is {limit}"
        message = f"the {metric} of {task} changes by {difference.format()}"
        if difference.low is None:
            missing = "is undefined" if difference.value is None else "has no interval"
            message = f"the difference in {metric} of {task} {missing}"
        yield Guardrail(task, metric, passed, f"{message}, {conclusion}")
        ratio, reference_ratio = (tasks[task].get("calibration") for tasks in (summary.tasks, reference.tasks))
        if ratio.value is None or reference_ratio.value is None:
            continue
        low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
        is_outside = low > rules.max_calibration_ratio or high < 1 / rules.max_calibration_ratio
        passed = not (is_outside and distance_from_one(ratio.value) > distance_from_one(reference_ratio.value))
        message = (
            f"the probabilities of {task} are {ratio.format(2)} times the mean label, which is "
            f"{'beyond' if is_outside else 'not significantly beyond'} a factor of {rules.max_calibration_ratio:g} "
            f"(evaluation.max_calibration_ratio). For '{reference_name}', the factor is {reference_ratio.value:.2f}"
        )
        yield Guardrail(task, "calibration", passed, message)


def check_slice_guardrail(
    slices: Sequence[SliceRecord], other: str, tasks: Sequence[str], margin: float
) -> Guardrail | None:
    """Check that no slice loses significantly more than the margin. Return None if no slice can be tested.

    p-values are corrected for the number of comparisons. The probability that any slice blocks a model that is as good
    as the reference model in all slices is therefore at most 2.5%.

    Args:
        slices: Comparisons of the model in slices.
        other: Name of the reference model.
        tasks: Tasks with enough labels.
        margin: Largest allowed loss in a task's `guardrail_metric`.
    """
    guardrail_metric = {kind.guardrail_metric for kind in KINDS.values()}
    compared = [record for record in slices if record.compared_to == other and record.group in tasks]
    guarded = [record for record in compared if record.metric in guardrail_metric and record.degrees_of_freedom]
    tested = [(record, record.loss_p_value(margin)) for record in guarded]
    if not tested:
        return None
    losing = [record for record, p in tested if p * len(tested) < ALPHA]
    losing.sort(key=lambda record: record.difference or 0.0)
    tested_slices = dict.fromkeys((record.by, record.slice) for record, _ in tested)
    number, by = len(tested_slices), ", ".join(dict.fromkeys(by for by, _ in tested_slices))
    finding = f"none of {number} slices by {by} has, significantly,"
    limit = f"a loss of more than {margin:g} (evaluation.max_metric_drop)"
    if losing:
        more = f", and in {len(losing) - MAX_LISTED_SLICES} more" if len(losing) > MAX_LISTED_SLICES else ""
        finding = f"{'; '.join(f'in {record.message}' for record in losing[:MAX_LISTED_SLICES])}{more}, which is"
        limit += f", corrected for the {number} slices by {by}"
    return Guardrail(None, "slices", not losing, f"{finding} {limit}")


def _correct_differences(
    base: EvaluationSums, differences: Differences, others: Iterable[str]
) -> dict[str, ModelDifferences]:
    """Correct p-values by Holm's method, separately for the metrics in main tables and for the objective."""
    kinds = {SCORE: SCORE} | {task.name: task.kind for task in base.tasks}
    shown = {
        (group, metric.name)
        for group, kind in kinds.items()
        for metric in metrics_for_kind(kind)
        if metric.is_shown(group == SCORE)
    }
    corrected = dict(differences)
    for family in (shown, {OBJECTIVE}):
        family_differences = {key: difference for key, difference in differences.items() if key[1:] in family}
        corrected |= dict(zip(family_differences, holm_correct(list(family_differences.values())), strict=True))
    by_reference = {}
    for reference in others:
        by_metric = {key[1:]: difference for key, difference in corrected.items() if key[0] == reference}
        by_reference[reference] = ModelDifferences(by_metric.pop(OBJECTIVE, Difference(None)), nest(by_metric))
    return by_reference


def _weights_of_tasks(sums: EvaluationSums) -> dict[str, float]:
    """Return the weights of tasks in a row's relevance, which ranking metrics use."""
    return {task.name: task.weight for task in sums.tasks if task.weight}


@dataclass(frozen=True)
class RunsMean:
    """Mean of a metric over runs.

    Attributes:
        mean: Mean over runs.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        std_between_runs: Standard deviation of the runs' values.
        standard_error_over_users: Standard error of the mean that is due to the sample of users.
        values: Value of each run.
    """

    mean: float | None
    low: float | None
    high: float | None
    std_between_runs: float | None
    standard_error_over_users: float | None
    values: tuple[float | None, ...]


def average_runs(
    sums: Sequence[EvaluationSums], resamples: int, objective: Objective | None = None
) -> dict[str, dict[str, RunsMean]]:
    """Average metrics over two or more runs that were measured on the same rows.

    Args:
        sums: Sums for the metrics, one item for each run.
        resamples: Number of bootstrap resamples.
        objective: Metric that decides which settings are better. The result also has the mean of this metric, under
            the two keys in `OBJECTIVE`, if the runs measured all of its tasks.

    Returns:
        Task or `score` -> metric -> mean.
    """
    return nest({key: _mean_of(*mean) for key, mean in _bootstrap_mean(sums, resamples, objective).items()})


def _mean_of(values: np.ndarray, replicates: Estimate) -> RunsMean:
    run_values = tuple(float(value) if np.isfinite(value) else None for value in values)
    std = float(values.std(ddof=1))
    zero = Estimate(0.0, np.zeros_like(replicates.replicates), replicates.effective_users)
    mean = compute_difference(replicates, zero, [(std**2 / len(values), len(values) - 1)])
    if mean.value is None:
        return RunsMean(None, None, None, None, None, run_values)
    standard_error = None if mean.low is None else replicates.standard_error
    return RunsMean(mean.value, mean.low, mean.high, std, standard_error, run_values)


@dataclass(frozen=True)
class Results:
    """Results of an evaluation.

    Attributes:
        models: Name -> measured model. The first model is compared with the others.
        tasks: Tasks that `Comparison.objective` may average over and that guardrails check.
        rules: Settings of the decision.
        title: Title of the report.
        facts: Facts about the measured rows for the report, by name.
    """

    models: dict[str, MeasuredModel]
    tasks: tuple[str, ...]
    rules: Evaluation
    title: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the first model."""
        return next(iter(self.models))

    @property
    def summary(self) -> Summary:
        """Metrics of the first model."""
        return self.first.summary

    @property
    def first(self) -> MeasuredModel:
        """The first model."""
        return self.models[self.name]

    @property
    def summaries(self) -> dict[str, Summary]:
        """Summaries of all models by name."""
        return {name: model.summary for name, model in self.models.items()}

    @property
    def one_row_per_user(self) -> bool:
        """Whether each row has its own user, for all models."""
        return all(summary.one_row_per_user for summary in self.summaries.values())

    @cached_property
    def comparison(self) -> Comparison | None:
        """Comparison of the first model with the others, None for a single model.

        Raises:
            UserError: The models' rows differ, or `evaluation.guardrail_slices` has a name without slices.
        """
        if len(self.models) == 1:
            return None
        guarded, available = self.rules.guardrail_slices, dict.fromkeys(by for by, _ in self.first.slices)
        if unknown := [by for by in guarded or () if by not in available]:
            sliced = f"rows are sliced by: {', '.join(available) or 'nothing'}"
            raise UserError(f"evaluation.guardrail_slices names '{unknown[0]}', and {sliced}")
        slices = [record for record in self.slices if guarded is None or record.by in guarded]
        return compare(self.models, self.name, self.tasks, self.rules, slices)

    @cached_property
    def slices(self) -> list[SliceRecord]:
        """Metrics of the first model in all slices, each compared with all rows or with another model."""
        return compare_slices(self.models, self.name, min(self.rules.resamples, SLICE_RESAMPLES))
