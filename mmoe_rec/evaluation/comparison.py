"""Compares a model with others on the same rows, and decides which one is better.

README.md has the rule (Is a model better?), which `decide` is in code. p-values of the metrics in tables are corrected
for how many they are by Holm's method (1979); those of what decides, `evaluation.decide_by`, for the number of models
alone, as it was named before anything was measured.

Another training, and other users, would have given other metrics, so a mean over S trainings errs by both. Its variance
is the variance of the trainings / S plus the variance by the users, from the bootstrap of the mean of all S on the same
redrawn users. The interval is Student's, with degrees of freedom by Welch and Satterthwaite. The difference of two
settings' means is computed alike.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.stats import t as student

from mmoe_rec.auc import FEWEST
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.intervals import (
    FEW_CHANGES,
    FEW_USERS,
    LEAST_FREEDOM,
    LEVEL,
    POWER,
    ROUNDING,
    Difference,
    Interval,
    Key,
    Resampled,
    Values,
    add_errors,
    correct_all,
    find_difference,
    level_after,
    limit_by_changes,
    resample,
)
from mmoe_rec.evaluation.metrics import metrics_of
from mmoe_rec.evaluation.metrics.metric import distance_from_one
from mmoe_rec.evaluation.slices import SliceRecord, compare_slices
from mmoe_rec.evaluation.summary import (
    OBJECTIVE,
    SCORE,
    GroupSummary,
    MeasuredModel,
    Objective,
    Summary,
    UserMetrics,
    nest,
)
from mmoe_rec.evaluation.sums import EvaluationSums, check_same_rows, count_rarer_label
from mmoe_rec.settings.sections import Evaluation
from mmoe_rec.task_kinds import KINDS

BETTER, HELD_BACK, NOT_SHOWN, WORSE, UNDECIDED = "better", "held back", "not shown", "worse", "undecided"


@dataclass(frozen=True)
class Guard:
    """Whether a guardrail of a task, or of slices, has passed.

    task: None of slices; metric: `auc` or `r2`, with the `difference`, or `calibration`, with the calibration of the
    model and of the other one, or `slices`, with the number of each that was looked at, by what rows are sliced by, and
    those that lose, the largest loss first; is_outside: whether the difference is shown to be a loss beyond the margin,
    or the model's probabilities to be beyond the limit.
    """

    task: str | None
    metric: str
    passed: bool
    is_outside: bool
    difference: Difference | None = None
    calibrations: tuple[Interval, Interval] | None = None
    looked_at: Mapping[str, int] = field(default_factory=dict)
    losing: tuple[SliceRecord, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is decided between two models.

    kind: `better`, `held back` (better, but for guardrails), `not shown`, `worse`, or `undecided`, where the objective
    is undefined; guards: all guardrails; detectable: the gain, the same for all tasks, with which nine of ten
    evaluations like this one would call a model better.
    """

    kind: str
    guards: tuple[Guard, ...]
    detectable: float | None


@dataclass(frozen=True)
class Versus:
    """Differences of a model from another one: of the objective, and of all metrics, task or `score` -> metric."""

    objective: Difference
    groups: dict[str, dict[str, Difference]]


@dataclass(frozen=True)
class Comparison:
    """A model beside others.

    units: users, or groups of them, that were redrawn; effective_users: by rows, of each task and the score; against:
    name of each other model -> the differences from it; judged: tasks with enough labels; left_out: each other task ->
    rows of its rarer label; verdicts: by the name of the other model; slices: those that are guarded; tried: decisions
    on these rows before, none of which promoted a model.
    """

    model: str
    units: int
    effective_users: dict[str, float]
    objective: Objective | None
    against: dict[str, Versus]
    rules: Evaluation = field(default_factory=Evaluation)
    judged: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    slices: Sequence[SliceRecord] = ()
    tried: int = 0


def compare(
    models: Mapping[str, MeasuredModel],
    model: str,
    tasks: Sequence[str],
    rules: Evaluation,
    slices: Sequence[SliceRecord] = (),
    tried: int = 0,
) -> Comparison:
    """Compares a model with all others in all metrics and decides, see `decide`.

    There is no `score` of a model that weighs relevance differently, as its truth is another one, nor are there tasks
    that one of the two lacks.

    tasks: those that may decide; rules: by which, see `Objective.of`; slices: those that are guarded; tried: see
    `Comparison`. Raises UserError where the rows are not the same, or for a metric that there is not.
    """
    mine, others = models[model].sums, {name: each.sums for name, each in models.items() if name != model}
    objective = Objective.of(rules.decide_by, mine, tasks)
    alone = ((name, [sums]) for name, sums in others.items())
    differences = find_differences([mine], alone, objective, rules.resamples, name=model)
    measured = UserMetrics(mine, objective)
    for other, its in others.items():
        differences |= limit_few_changes(other, measured, UserMetrics(its, objective), differences)
    labels = {task: count_rarer_label(mine, task) for task in tasks}
    compared = Comparison(
        model,
        measured.units,
        {name: each.effective_rows for name, each in measured.groups.items()},
        objective,
        correct(mine, differences, others),
        rules,
        judged=tuple(task for task, rows in labels.items() if rows >= FEWEST),
        left_out={task: rows for task, rows in labels.items() if rows < FEWEST},
        slices=slices,
        tried=tried,
    )
    summaries = {name: each.summary for name, each in models.items()}
    return replace(compared, verdicts={other: decide(compared, other, summaries) for other in others})


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
    """The differences of the means over trainings from those of others, not corrected.

    Where one side has a single training, the intervals are over users alone. Tasks that one side lacks are left out,
    and so is the score of settings by which rows are worth something else.

    sums: of trainings; others: names of settings, with those of their trainings, of which one is held at a time;
    metrics: those that are wanted besides the objective's; None: all; name: of what is compared. Raises UserError where
    the rows are not the same.
    """
    mine, effective = resample_mean(sums, resamples, objective, metrics)
    differences: Differences = {}
    for other, its in others:
        for each in its:
            check_same_rows(name, sums[0], other, each)
        theirs, _ = resample_mean(its, resamples, objective, metrics)
        left_out = {SCORE} if _weights_of_tasks(sums[0]) != _weights_of_tasks(its[0]) else set[str]()
        if left_out and objective is not None and SCORE in objective.groups:
            left_out.add(OBJECTIVE[0])
        for key in (key for key in mine if key in theirs and key[0] not in left_out):
            (values, redrawn), (its_values, its_redrawn) = mine[key], theirs[key]
            sides = (values, its_values)
            of_seeds = [(each.var(ddof=1) / len(each), len(each) - 1) for each in sides if min(map(len, sides)) > 1]
            differences[other, *key] = find_difference(redrawn, its_redrawn, effective[key], besides=of_seeds)
    return differences


def resample_mean(
    sums: Sequence[EvaluationSums],
    resamples: int,
    objective: Objective | None = None,
    metrics: Collection[str] | None = None,
) -> tuple[dict[Key, tuple[np.ndarray, Resampled]], dict[Key, float]]:
    """Task or `score` and metric -> (S,) values of the trainings, and their mean when users are redrawn; and the
    effective number of users by their sizes."""
    trainings = [UserMetrics(each, objective, metrics) for each in sums]

    def mean_of(counts: np.ndarray) -> Values:
        values = [each.at(counts) for each in trainings]
        return {key: np.mean([each[key] for each in values], axis=0) for key in values[0]}

    once, resampled = [each.once for each in trainings], resample(mean_of, trainings[0].units, resamples)
    means = {key: (np.array([each[key] for each in once]), of) for key, of in resampled.items()}
    return means, trainings[0].effective


def limit_few_changes(other: str, mine: UserMetrics, its: UserMetrics, differences: Differences) -> Differences:
    """The differences from another model in groups where few users' sums differ, their intervals limited by these."""
    limited: Differences = {}
    if not (few := find_few_changes(mine, its)):
        return limited
    users = np.unique(np.concatenate([*few.values()]))
    counts = np.hstack([np.ones((mine.units, 1)), 1.0 - (np.arange(mine.units)[:, None] == users)])
    one, two = (each.at(counts) for each in (mine, its))
    for key, apart in differences.items():
        group, metric = key[1:]
        is_rare = key[0] == other and group in few and (apart.effective_users or 0.0) < FEW_USERS
        if is_rare and apart.value is not None:
            whole, *rest = one[group, metric] - two[group, metric]
            parts = whole - np.array(rest)
            limited[key] = limit_by_changes(apart, parts[np.isin(users, few[group])])
    return limited


def find_few_changes(mine: UserMetrics, its: UserMetrics) -> dict[str, np.ndarray]:
    """Task, `score` or `objective` -> (K,) int64 places of users whose sums differ between two models, if few do."""
    changed, objective = {}, mine.objective
    for group in mine.groups.keys() & its.groups.keys():
        names = [name for name in mine.groups[group].table.column_names if name != "user"]
        one, two = (np.stack([of.groups[group].column(name) for name in names]) for of in (mine, its))
        changed[group] = np.flatnonzero(~np.isclose(one, two, rtol=ROUNDING, atol=0).all(axis=0))
    if objective is not None and changed.keys() >= {*objective.groups}:
        changed[OBJECTIVE[0]] = np.unique(np.concatenate([changed[group] for group in objective.groups]))
    most = min(FEW_CHANGES, mine.units // 5)
    return {group: users for group, users in changed.items() if 0 < len(users) <= most}


def decide(compared: Comparison, other: str, summaries: Mapping[str, Summary]) -> Verdict:
    """The verdict on the model that is compared with another one. summaries: of both, by name."""
    objective, versus = compared.objective, compared.against[other]
    mine, its = summaries[compared.model], summaries[other]
    guards = []
    for task in compared.judged:
        metric, margin = mine.tasks[task].guarded, compared.rules.margin
        loss = versus.groups.get(task, {}).get(metric, Difference(None))
        passed = loss.low is not None and loss.low >= -margin  # the interval rules a larger loss out
        guards.append(Guard(task, metric, passed, loss.high is not None and loss.high < -margin, loss))
        limit = compared.rules.calibration
        if (guard := guard_calibration(task, mine.tasks[task], its.tasks[task], limit)) is not None:
            guards.append(guard)
    if (of_slices := guard_slices(compared, other)) is not None:
        guards.append(of_slices)
    apart, kind = versus.objective, BETTER
    if objective is None or apart.p is None or apart.value is None:
        return Verdict(UNDECIDED, tuple(guards), None)
    if not apart.is_significant or (apart.low or 0.0) <= 0 <= (apart.high or 0.0):
        kind = NOT_SHOWN
    elif (apart.value > 0) != (objective.better == "higher"):
        kind = WORSE
    elif (apart.p_corrected or 0.0) >= level_after(compared.tried):
        kind = NOT_SHOWN
    elif not all(guard.passed for guard in guards):
        kind = HELD_BACK
    return Verdict(kind, tuple(guards), find_detectable_gain(compared, versus, mine))


def guard_calibration(task: str, model: GroupSummary, other: GroupSummary, limit: float) -> Guard | None:
    """Passes unless the probabilities are shown to be off by more than the limit, and by more than the other model's.

    None for a regression, or without a positive label.
    """
    mine, its = model.get("calibration"), other.get("calibration")
    if mine.value is None or its.value is None:
        return None
    low, high = (mine.value, mine.value) if mine.low is None or mine.high is None else (mine.low, mine.high)
    is_outside = low > limit or high < 1 / limit
    passed = not (is_outside and distance_from_one(mine.value) > distance_from_one(its.value))
    return Guard(task, "calibration", passed, is_outside, calibrations=(mine, its))


def guard_slices(compared: Comparison, other: str) -> Guard | None:
    """Passes unless a slice is shown to lose more than the margin, corrected for how many are looked at: all of them
    together hold an equal model back in at most 2.5% of the cases, as the interval of a single one does.

    None where no slice can be judged.
    """
    judged = [
        (each, each.test_loss(compared.rules.margin))
        for each in compared.slices
        if each.beside == other
        and each.metric in {kind.guarded for kind in KINDS.values()}
        and each.group in compared.judged
        and each.effective_users
    ]
    losing = [each for each, p in judged if p * len(judged) < LEVEL]
    worst_first = tuple(sorted(losing, key=lambda each: each.apart or 0.0))
    looked_at = Counter(by for by, _ in {(each.by, each.slice): None for each, _ in judged})
    return Guard(None, "slices", not losing, bool(losing), looked_at=looked_at, losing=worst_first) if judged else None


def find_detectable_gain(compared: Comparison, versus: Versus, summary: Summary) -> float:
    """The gain, the same for all tasks, with which nine of ten evaluations would call a model better.

    The objective and all guardrails of its metric have to hold at once, so each has to fail that much more rarely; and
    where several models are compared, the first p-value has to be that much smaller.
    """
    assert compared.objective is not None, "without an objective there is no gain"
    guarded = []
    for task in compared.judged:
        metric = summary.tasks[task].guarded
        apart = versus.groups.get(task, {}).get(metric, Difference(None))
        if metric == compared.objective.metric and apart.error and apart.effective_users is not None:
            guarded.append((apart.error, apart.effective_users))
    power, own, sizes = 1 - (1 - POWER) / (1 + len(guarded)), versus.objective, [0.0]
    if own.error and own.effective_users is not None:
        levels = [1 - level_after(compared.tried) / len(compared.against) / 2, power]
        sizes = [own.error * sum(student.ppf(levels, own.effective_users - 1))]
    margin = compared.rules.margin
    sizes += [error * sum(student.ppf([1 - LEVEL / 2, power], users - 1)) - margin for error, users in guarded]
    return float(max(sizes))


def correct(base: EvaluationSums, differences: Differences, others: Iterable[str]) -> dict[str, Versus]:
    """Each other model -> differences with corrected p-values: of the metrics that tables show, and of the objectives.

    differences: by (other model, task or `score`, metric).
    """
    kinds = {SCORE: SCORE} | {task.name: task.kind for task in base.tasks}
    shown = {
        (group, each.name)
        for group, kind in kinds.items()
        for each in metrics_of(kind)
        if each.is_shown(group == SCORE)
    }
    corrected = dict(differences)
    for family in (shown, {OBJECTIVE}):
        its = {key: each for key, each in differences.items() if key[1:] in family}
        corrected |= dict(zip(its, correct_all(list(its.values())), strict=True))
    found = {}
    for other in others:
        flat = {key[1:]: each for key, each in corrected.items() if key[0] == other}
        found[other] = Versus(flat.pop(OBJECTIVE, Difference(None)), nest(flat))
    return found


def _weights_of_tasks(sums: EvaluationSums) -> dict[str, float]:
    """What labels of tasks are worth in the relevance of a row, which rankings are measured by."""
    return {task.name: task.weight for task in sums.tasks if task.weight}


@dataclass(frozen=True)
class TrainingsMean:
    """A metric over trainings: their mean with its 95% interval; between_trainings: their standard deviation;
    between_users: the standard error of the mean from the choice of users; values: of each training."""

    mean: float | None
    low: float | None
    high: float | None
    between_trainings: float | None
    between_users: float | None
    values: tuple[float | None, ...]


def average_trainings(
    sums: Sequence[EvaluationSums], resamples: int, objective: Objective | None = None
) -> dict[str, dict[str, TrainingsMean]]:
    """Task or `score` -> metric -> its mean over two or more trainings that were measured on the same rows.

    objective: what decides, whose mean is under `OBJECTIVE`, if all of its tasks are measured.
    """
    means, effective = resample_mean(sums, resamples, objective)
    return nest({key: _mean_of(*each, effective[key]) for key, each in means.items()})


def _mean_of(values: np.ndarray, redrawn: Resampled, effective: float) -> TrainingsMean:
    each = tuple(float(value) if np.isfinite(value) else None for value in values)
    if None in each:
        return TrainingsMean(None, None, None, None, None, each)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    of_users, effective = redrawn.error(effective)
    if of_users is None or effective - 1 < LEAST_FREEDOM:
        return TrainingsMean(mean, None, None, spread, None, each)
    error, freedom = add_errors([(spread**2 / len(values), len(values) - 1), (of_users**2, effective - 1)])
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * error
    return TrainingsMean(mean, mean - reach, mean + reach, spread, of_users, each)


RESAMPLES_OF_SLICES = 200  # standard errors are good to 5%


@dataclass(frozen=True)
class Results:
    """What was measured. models: by name, the one in question first; tasks: those that may decide; rules: by which;
    title, facts: what a report says of the rows; tried: see `Comparison`."""

    models: dict[str, MeasuredModel]
    tasks: tuple[str, ...]
    rules: Evaluation
    title: str
    facts: dict[str, str]
    tried: int = 0

    @property
    def name(self) -> str:
        """The name of the model in question."""
        return next(iter(self.models))

    @property
    def first(self) -> MeasuredModel:
        """The model in question."""
        return self.models[self.name]

    @property
    def summaries(self) -> dict[str, Summary]:
        """The summaries of all models, by name."""
        return {name: each.summary for name, each in self.models.items()}

    @property
    def each_row_is_a_user(self) -> bool:
        """True if each row has a user of its own, for all models."""
        return all(each.each_row_is_a_user for each in self.summaries.values())

    @cached_property
    def comparison(self) -> Comparison | None:
        """The first model beside the others; None where it is alone.

        Raises UserError where the rows are not the same, or not sliced by what is to be guarded.
        """
        if len(self.models) == 1:
            return None
        wanted, there = self.rules.guarded_slices, dict.fromkeys(by for by, _ in self.first.slices)
        if unknown := [each for each in wanted or () if each not in there]:
            sliced = f"rows are sliced by: {', '.join(there) or 'nothing'}"
            raise UserError(f"evaluation.guarded_slices names '{unknown[0]}', and {sliced}")
        slices = [each for each in self.slices if wanted is None or each.by in wanted]
        return compare(self.models, self.name, self.tasks, self.rules, slices, self.tried)

    @cached_property
    def slices(self) -> list[SliceRecord]:
        """All slices of the first model, beside all rows and other models."""
        resamples = min(self.rules.resamples, RESAMPLES_OF_SLICES)
        return compare_slices(self.models, self.name, resamples)
