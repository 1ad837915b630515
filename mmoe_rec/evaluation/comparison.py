"""Compares a model with others on the same rows, and decides which one is better.

README.md has the rule (Is a model better?), which `decide` is in code. p-values of the metrics in tables are corrected
for how many they are by Holm's method (1979); those of what decides, `evaluation.primary_metric`, for the number of
models alone, as it was named before anything was measured.

Another training, and other users, would have given other metrics, so a mean over S trainings errs by both. Its variance
is the variance of the trainings / S plus the variance by the users, from the bootstrap of the mean of all S on the same
redrawn users. The interval is Student's, with degrees of freedom by Welch and Satterthwaite. The difference of two
settings' means is computed alike.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mmoe_rec.evaluation.sums import EvaluationSums, check_same_rows, count_minority
from mmoe_rec.report.formatting import format_signed
from mmoe_rec.settings.sections import Evaluation
from mmoe_rec.task_kinds import KINDS

BETTER, HELD_BACK, NOT_SHOWN, WORSE, UNDECIDED = "better", "held back", "not shown", "worse", "undecided"
MAX_LISTED_SLICES = 3
"""So many of the worst slices are told."""
SLICE_RESAMPLES = 200  # standard errors are good to 5%


@dataclass(frozen=True)
class Guardrail:
    """A guardrail: its task, None for slices; `auc`, `r2`, `calibration` or `slices`; and a sentence on the finding."""

    task: str | None
    metric: str
    passed: bool
    message: str


@dataclass(frozen=True)
class ModelDifferences:
    """Differences of a model from another one: of the objective, and of all metrics, task or `score` -> metric."""

    objective: Difference
    groups: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Verdict:
    """The decision between two models.

    kind: `better`, `held back` (better, but for guardrails), `not shown`, `worse`, or `undecided`, where the objective
    is undefined; message: the same as a sentence.
    """

    kind: str
    message: str
    guardrails: tuple[Guardrail, ...]


@dataclass(frozen=True)
class Comparison:
    """A model beside others.

    against: name of each other model -> the differences from it; judged: tasks with enough labels; left_out: each other
    task -> rows of its rarer label; verdicts: by the name of the other model.
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
    """Compares a model with all others in all metrics and decides, see `decide`.

    There is no `score` of a model that weighs relevance differently, as its truth is another one, nor are there tasks
    that one of the two lacks.

    tasks: those that may decide; rules: by which, see `Objective.of`; slices: those that are guarded. Raises UserError
    where the rows are not the same, or for a metric that there is not.
    """
    mine, others = models[model].sums, {name: each.sums for name, each in models.items() if name != model}
    objective = Objective.from_setting(rules.primary_metric, mine, tasks)
    alone = ((name, [sums]) for name, sums in others.items())
    against = correct_differences(mine, find_differences([mine], alone, objective, rules.resamples, name=model), others)
    labels = {task: count_minority(mine, task) for task in tasks}
    judged = tuple(task for task, rows in labels.items() if rows >= MIN_RARER_ROWS)
    verdicts = {}
    for other, differences in against.items():
        summaries = {name: models[name].summary for name in (model, other)}
        guardrails = list(check_guardrails(differences, summaries, judged, rules))
        if (of_slices := check_slice_guardrail(slices, other, judged, rules.max_metric_drop)) is not None:
            guardrails.append(of_slices)
        verdicts[other] = decide(model, other, objective, differences, guardrails)
    left_out = {task: rows for task, rows in labels.items() if rows < MIN_RARER_ROWS}
    return Comparison(model, objective, against, judged, left_out, verdicts)


Differences = dict[tuple[str, str, str], Difference]
"""By the name of the other model or settings, task or `score`, and metric; of what decides, the name and `OBJECTIVE`"""


def find_differences(
    sums: Sequence[EvaluationSums],
    others: Iterable[tuple[str, Sequence[EvaluationSums]]],
    objective: Objective | None = None,
    resamples: int = 1000,
    metrics: Collection[str] | None = None,
    name: str = "these settings",
) -> Differences:
    """Compare the mean metrics of several trainings with those of other settings, without a correction.

    If one side has a single training, the intervals are over users alone. Tasks that one side lacks are left out. So is
    the score, if the settings weigh tasks differently.

    Args:
        sums: Sums of each training.
        others: Name of other settings, and the sums of their trainings. One of them is held at a time.
        objective: Metric that decides, None for no decision.
        resamples: Number of times that users are redrawn.
        metrics: Metrics to compare besides the objective's, None for all.
        name: Name of the settings that are compared.

    Raises:
        UserError: The trainings were measured on different rows.
    """
    mine = bootstrap_mean(sums, resamples, objective, metrics)
    differences: Differences = {}
    for other, its in others:
        for each in its:
            check_same_rows(name, sums[0], other, each)
        theirs = bootstrap_mean(its, resamples, objective, metrics)
        left_out = {SCORE} if _weights_of_tasks(sums[0]) != _weights_of_tasks(its[0]) else set[str]()
        if left_out and objective is not None and SCORE in objective.groups:
            left_out.add(OBJECTIVE[0])
        for key in (key for key in mine if key in theirs and key[0] not in left_out):
            (values, redrawn), (its_values, its_redrawn) = mine[key], theirs[key]
            sides = (values, its_values)
            of_seeds = [(each.var(ddof=1) / len(each), len(each) - 1) for each in sides if min(map(len, sides)) > 1]
            differences[other, *key] = compute_difference(redrawn, its_redrawn, of_seeds)
    return differences


def bootstrap_mean(
    sums: Sequence[EvaluationSums],
    resamples: int,
    objective: Objective | None = None,
    metrics: Collection[str] | None = None,
) -> dict[MetricKey, tuple[np.ndarray, Estimate]]:
    """Task or `score` and metric -> (S,) values of the trainings, and their mean when users are redrawn."""
    trainings = [BootstrapMetrics(each, objective, metrics) for each in sums]

    def mean_of(counts: np.ndarray) -> Replicates:
        values = [each.compute(counts) for each in trainings]
        return {key: np.mean([each[key] for each in values], axis=0) for key in values[0]}

    point_values = [each.point_values for each in trainings]
    means = trainings[0].bootstrap(resamples, mean_of)
    return {key: (np.array([each[key] for each in point_values]), mean) for key, mean in means.items()}


def decide(
    model: str,
    other: str,
    objective: Objective | None,
    differences: ModelDifferences,
    guardrails: Sequence[Guardrail] = (),
) -> Verdict:
    """The verdict on a model beside another one."""
    apart, both = differences.objective, f"'{model}' and '{other}'"
    if objective is None or apart.p_value is None or apart.value is None:
        why = f"no task has labels enough ({MIN_RARER_ROWS} rows of either)"
        if objective is not None:
            alone = "has no interval, as one user decides nearly alone, or many redraws leave it undefined"
            why = f"{objective.name} {'is undefined' if apart.value is None else alone}"
        return Verdict(UNDECIDED, f"{both} can't be told apart: {why}", tuple(guardrails))
    what = objective.name
    if not apart.is_significant:
        told = f"no difference is shown between {both}{apart.correction_note}: {what} differs by {apart.format()}"
        if apart.low == apart.high == 0:
            told = f"{both} do not differ: {what} is the same"
        return Verdict(NOT_SHOWN, told, tuple(guardrails))
    ends = sorted(abs(each or 0.0) for each in (apart.low, apart.high))
    size, *reach = format_signed(abs(apart.value), *ends, sign=False)
    which, size = "higher" if apart.value > 0 else "lower", f"{size} ({' to '.join(reach)})"
    is_gain = (apart.value > 0) == (objective.better == "higher")
    if is_gain and (failed := [guard.message for guard in guardrails if not guard.passed]):
        beats = f"although {what} is {which} than that of '{other}' by {size}"
        return Verdict(HELD_BACK, f"'{model}' is not called better, {beats}: {'; '.join(failed)}", tuple(guardrails))
    kind = BETTER if is_gain else WORSE
    return Verdict(kind, f"'{model}' is {kind} than '{other}': {what} is {which} by {size}", tuple(guardrails))


def check_guardrails(
    differences: ModelDifferences, summaries: Mapping[str, Summary], judged: Sequence[str], rules: Evaluation
) -> Iterator[Guardrail]:
    """The guardrails of each judged task: its loss, and its probabilities, which pass unless they are shown to be off
    by more than the limit, and by more than the other model's.

    summaries: by name, of the model and then of the other one.
    """
    other, (mine, its) = list(summaries)[-1], summaries.values()
    for task in judged:
        metric = mine.tasks[task].guardrail_metric
        limit = f"a loss of more than {rules.max_metric_drop:g} (evaluation.max_metric_drop)"
        loss = differences.groups.get(task, {}).get(metric, Difference(None))
        end = f"so {limit} can't be ruled out"
        if (
            passed := loss.low is not None and loss.low >= -rules.max_metric_drop
        ):  # the interval rules a larger loss out
            end = f"so {limit} is ruled out"
        elif loss.high is not None and loss.high < -rules.max_metric_drop:
            end = f"which is {limit}"
        told = f"the {metric} of {task} changes by {loss.format()}"
        if loss.low is None:
            missing = "is undefined" if loss.value is None else "has no interval"
            told = f"the difference in {metric} of {task} {missing}"
        yield Guardrail(task, metric, passed, f"{told}, {end}")
        ratio, its_ratio = (each.tasks[task].get("calibration") for each in (mine, its))
        if ratio.value is None or its_ratio.value is None:
            continue
        low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
        is_outside = low > rules.max_calibration_ratio or high < 1 / rules.max_calibration_ratio
        passed = not (is_outside and distance_from_one(ratio.value) > distance_from_one(its_ratio.value))
        told = (
            f"the probabilities of {task} are {ratio.format(2)} times what was observed, which is "
            f"{'beyond' if is_outside else 'not shown to be beyond'} a factor of {rules.max_calibration_ratio:g} "
            f"(evaluation.max_calibration_ratio); those of '{other}' are {its_ratio.value:.2f} times"
        )
        yield Guardrail(task, "calibration", passed, told)


def check_slice_guardrail(
    slices: Sequence[SliceRecord], other: str, tasks: Sequence[str], margin: float
) -> Guardrail | None:
    """Passes unless a slice is shown to lose more than the margin, corrected for how many are looked at: all of them
    together hold an equal model back in at most 2.5% of the cases, as the interval of a single one does.

    None where no slice can be judged.
    """
    guardrail_metric = {kind.guardrail_metric for kind in KINDS.values()}
    compared_to = [
        each for each in slices if each.compared_to == other and each.group in tasks and each.metric in guardrail_metric
    ]
    judged = [(each, each.loss_p_value(margin)) for each in compared_to if each.degrees_of_freedom]
    if not judged:
        return None
    losing = sorted((each for each, p in judged if p * len(judged) < ALPHA), key=lambda each: each.difference or 0.0)
    looked_at = dict.fromkeys((each.by, each.slice) for each, _ in judged)
    number, by = len(looked_at), ", ".join(dict.fromkeys(by for by, _ in looked_at))
    told, limit = (
        f"of {number} slices by {by} none is shown to have",
        f"a loss of more than {margin:g} (evaluation.max_metric_drop)",
    )
    if losing:
        more = f", and in {len(losing) - MAX_LISTED_SLICES} more" if len(losing) > MAX_LISTED_SLICES else ""
        told = f"{'; '.join(f'in {each.message}' for each in losing[:MAX_LISTED_SLICES])}{more}, which is"
        limit += f", corrected for the {number} slices by {by}"
    return Guardrail(None, "slices", not losing, f"{told} {limit}")


def correct_differences(
    base: EvaluationSums, differences: Differences, others: Iterable[str]
) -> dict[str, ModelDifferences]:
    """Each other model -> differences with corrected p-values: of the metrics that tables show, and of the objectives.

    differences: by (other model, task or `score`, metric).
    """
    kinds = {SCORE: SCORE} | {task.name: task.kind for task in base.tasks}
    shown = {
        (group, each.name)
        for group, kind in kinds.items()
        for each in metrics_for_kind(kind)
        if each.is_shown(group == SCORE)
    }
    corrected = dict(differences)
    for family in (shown, {OBJECTIVE}):
        its = {key: each for key, each in differences.items() if key[1:] in family}
        corrected |= dict(zip(its, holm_correct(list(its.values())), strict=True))
    found = {}
    for other in others:
        flat = {key[1:]: each for key, each in corrected.items() if key[0] == other}
        found[other] = ModelDifferences(flat.pop(OBJECTIVE, Difference(None)), nest(flat))
    return found


def _weights_of_tasks(sums: EvaluationSums) -> dict[str, float]:
    """What labels of tasks are worth in the relevance of a row, which rankings are measured by."""
    return {task.name: task.weight for task in sums.tasks if task.weight}


@dataclass(frozen=True)
class RunsMean:
    """A metric over trainings: their mean with its 95% interval; between_trainings: their standard deviation;
    standard_error_over_users: the standard error of the mean from the choice of users; values: of each training."""

    mean: float | None
    low: float | None
    high: float | None
    std_between_runs: float | None
    standard_error_over_users: float | None
    values: tuple[float | None, ...]


def average_runs(
    sums: Sequence[EvaluationSums], resamples: int, objective: Objective | None = None
) -> dict[str, dict[str, RunsMean]]:
    """Task or `score` -> metric -> its mean over two or more trainings that were measured on the same rows.

    objective: what decides, whose mean is under `OBJECTIVE`, if all of its tasks are measured.
    """
    return nest({key: _mean_of(*each) for key, each in bootstrap_mean(sums, resamples, objective).items()})


def _mean_of(values: np.ndarray, replicates: Estimate) -> RunsMean:
    each = tuple(float(value) if np.isfinite(value) else None for value in values)
    spread, nothing = (
        float(values.std(ddof=1)),
        Estimate(0.0, np.zeros_like(replicates.replicates), replicates.effective_users),
    )
    mean = compute_difference(replicates, nothing, [(spread**2 / len(values), len(values) - 1)])
    if mean.value is None:
        return RunsMean(None, None, None, None, None, each)
    of_users = None if mean.low is None else replicates.standard_error
    return RunsMean(mean.value, mean.low, mean.high, spread, of_users, each)


@dataclass(frozen=True)
class Results:
    """What was measured. models: by name, the one in question first; tasks: those that may decide; rules: by which;
    title, facts: what a report says of the rows."""

    models: dict[str, MeasuredModel]
    tasks: tuple[str, ...]
    rules: Evaluation
    title: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """The name of the model in question."""
        return next(iter(self.models))

    @property
    def summary(self) -> Summary:
        """The metrics of the model in question."""
        return self.first.summary

    @property
    def first(self) -> MeasuredModel:
        """The model in question."""
        return self.models[self.name]

    @property
    def summaries(self) -> dict[str, Summary]:
        """The summaries of all models, by name."""
        return {name: each.summary for name, each in self.models.items()}

    @property
    def one_row_per_user(self) -> bool:
        """True if each row has a user of its own, for all models."""
        return all(each.one_row_per_user for each in self.summaries.values())

    @cached_property
    def comparison(self) -> Comparison | None:
        """The first model beside the others; None where it is alone.

        Raises UserError where the rows are not the same, or not sliced by what is to be guarded.
        """
        if len(self.models) == 1:
            return None
        wanted, there = self.rules.guardrail_slices, dict.fromkeys(by for by, _ in self.first.slices)
        if unknown := [each for each in wanted or () if each not in there]:
            sliced = f"rows are sliced by: {', '.join(there) or 'nothing'}"
            raise UserError(f"evaluation.guardrail_slices names '{unknown[0]}', and {sliced}")
        slices = [each for each in self.slices if wanted is None or each.by in wanted]
        return compare(self.models, self.name, self.tasks, self.rules, slices)

    @cached_property
    def slices(self) -> list[SliceRecord]:
        """All slices of the first model, beside all rows and other models."""
        resamples = min(self.rules.resamples, SLICE_RESAMPLES)
        return compare_slices(self.models, self.name, resamples)
