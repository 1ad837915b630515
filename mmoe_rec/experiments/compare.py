"""Compares variants of settings over several runs: `compare_variants`, `train_and_compare`. Says which variant is
better, and what to write into the settings.

data.work_dir/comparison/comparison.json, report.html    what was found
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mmoe_rec.atomic import write_text
from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import Differences, RunsMean, average_runs, find_differences
from mmoe_rec.evaluation.intervals import Difference, holm_correct
from mmoe_rec.evaluation.metrics.metric import BaseMetric, Metric
from mmoe_rec.evaluation.summary import OBJECTIVE, SCORE, Objective, find_objective_metric
from mmoe_rec.evaluation.sums import EvaluationSums, count_minority
from mmoe_rec.experiments.runner import Runner, TrainedVariant, Variant, open_runner
from mmoe_rec.report.formatting import NO_VALUE, format_count, format_fixed, format_signed
from mmoe_rec.report.parts import Cell, Mark, Report, Row, Sentence, Table
from mmoe_rec.report.report_files import REPORT_PAGE, write_report
from mmoe_rec.settings.model import Experts, Gates, Model
from mmoe_rec.settings.sections import Settings, diff_settings
from mmoe_rec.tracking.runs import bullet_list, code_block, command_line
from mmoe_rec.training.provenance import fixed_settings

MAX_BOTTOM_UNITS = 4096
"""Most units of a shared bottom's first layer."""
COMPARISON_FOLDER, COMPARISON_FILE = "comparison", "comparison.json"
BETTER, WORSE, NOT_SHOWN, UNKNOWN = "better", "worse", "not shown", "unknown"
_MARKS: dict[str, Mark] = {BETTER: "good", WORSE: "problem"}
MetricColumns = dict[tuple[str, str], tuple[str, str]]
"""Task and metric -> the metric in words, and whether higher or lower values are better."""


@dataclass(frozen=True)
class MetricMean:
    """A metric's mean over the runs of a variant.

    Attributes:
        better: Which values are better, `higher` or `lower`.
        mean: The mean over runs.
        difference: The difference from the base variant, None for the base.
    """

    better: str
    mean: float | None
    difference: Difference | None = None

    @property
    def verdict(self) -> str:
        """How the variant compares with the base in this metric."""
        difference = self.difference
        if difference is None or difference.value is None or difference.low is None or difference.high is None:
            return UNKNOWN
        if not difference.is_significant:
            return NOT_SHOWN
        return BETTER if (difference.value > 0) == (self.better == "higher") else WORSE

    @property
    def gain(self) -> float:
        """The difference, positive if the variant is better, 0 if undefined."""
        value = 0.0 if self.difference is None else self.difference.value or 0.0
        return value if self.better == "higher" else -value

    @property
    def max_drop(self) -> float | None:
        """The largest loss that the interval allows."""
        end = (
            None
            if self.difference is None
            else self.difference.low
            if self.better == "higher"
            else self.difference.high
        )
        return None if end is None else max(0.0, -end if self.better == "higher" else end)


@dataclass(frozen=True)
class VariantResult:
    """A variant.

    Attributes:
        name: Its name.
        cli_options: The options that adopt it.
        is_simpler: Whether it is worth adopting if it loses nothing.
        metric_means: Metric, such as `auc of click` -> its mean over runs.
        verdict_metrics: The metrics that judge the variant.
        parameters: Parameters of its network, None without one.
        seconds: Mean seconds of a run.
    """

    name: str
    cli_options: str
    is_simpler: bool
    metric_means: Mapping[str, MetricMean]
    verdict_metrics: tuple[str, ...]
    parameters: int | None
    seconds: float


@dataclass(frozen=True)
class ExperimentResult:
    """Variants of settings over several runs.

    Attributes:
        title: Title of the page.
        seeds: Seeds of the runs.
        rows: Rows that judged.
        resampling_units: What was redrawn for intervals, `users` or `rows`.
        means: Task or `score` -> metric -> its mean over the runs of the base variant.
        variants: The base variant first.
        margin: Largest loss at which a simpler variant is adopted.
        skipped_tasks: Task that isn't judged -> rows of its rarer label.
        notes: Further sentences, which come first.
        tables: Further tables.
        warnings: Reasons for distrust.
        facts: Name -> text.
    """

    title: str
    seeds: tuple[int, ...]
    rows: int
    resampling_units: str
    means: Mapping[str, Mapping[str, RunsMean]]
    variants: Sequence[VariantResult]
    margin: float
    skipped_tasks: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name of the base variant."""
        return self.variants[0].name

    @property
    def recommended(self) -> VariantResult | None:
        """The variant to adopt: the best one that is better, or the first simpler one that loses nothing."""
        others = [each for each in self.variants[1:] if each.verdict_metrics]
        better = [
            each
            for each in others
            if each.cli_options and {each.metric_means[name].verdict for name in each.verdict_metrics} == {BETTER}
        ]
        if better:
            return max(better, key=lambda each: each.metric_means[each.verdict_metrics[0]].gain)
        for each in others:
            losses = [each.metric_means[name].max_drop for name in each.verdict_metrics]
            if each.is_simpler and all(loss is not None and loss <= self.margin for loss in losses):
                return each
        return None

    @property
    def sentences(self) -> list[str]:
        """The verdicts."""
        found = [
            *self.notes,
            *(_describe(self.base, each, name) for each in self.variants[1:] for name in each.verdict_metrics),
        ]
        for task, rows in self.skipped_tasks.items():
            found.append(f"`{task}` is not judged: {rows:,} rows have its rarer label, which are too few")
        return found

    @property
    def headline(self) -> str:
        """The variant to adopt. Without variants, the number of runs."""
        if not self.variants[1:]:
            return f"{len(self.seeds)} runs of `{self.base}`"
        recommended = self.recommended
        if recommended is None:
            return f"nothing to adopt: no variant is better than `{self.base}`, or simpler and as good"
        metric_means = [recommended.metric_means[name] for name in recommended.verdict_metrics]
        if all(cell.verdict == BETTER for cell in metric_means):
            return f"adopt `{recommended.cli_options}`, since `{recommended.name}` is better"
        (loss,) = format_signed(max(cell.max_drop or 0.0 for cell in metric_means), sign=False)
        return f"adopt `{recommended.cli_options}`, since `{recommended.name}` is simpler and loses at most {loss}"


def compare_variants(settings: Settings, variants: Sequence[Variant], seeds: int) -> ExperimentResult:
    """Train variants of settings, and compare them on the test rows.

    Args:
        settings: The settings.
        variants: The base variant and those that are compared with it, if any.
        seeds: Number of runs of each, with `training.seed` and the seeds after it.

    Raises:
        UserError: A variant has an unknown key or can't be trained, there are fewer than two seeds, or the split has
            no test rows.
        StoppedError: A signal came. Complete runs stay.
    """
    check_variants(settings, variants, seeds)
    with open_runner(settings, "compare", "test", folder=COMPARISON_FOLDER) as runner:
        report = train_and_compare(runner, variants, seeds, settings.evaluation.max_metric_drop)
        save_result(runner, report)
    return report


def check_variants(settings: Settings, variants: Sequence[Variant], seeds: int) -> None:
    """Raise UserError for a wrong variant or too few seeds, before features are built."""
    if seeds < 2:
        raise UserError(f"{seeds} run of each variant can't show how far runs differ. Give --seeds 2 or more.")
    find_objective_metric(settings.evaluation.primary_metric)
    names = [variant.name for variant in variants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two variants are named '{twice}'. Give each variant another name.")
    for variant in variants:
        variant.apply(settings)
        for name in variant.without_features:
            if name not in settings.features:
                there = ", ".join(settings.features)
                raise UserError(f"{variant.name}: there is no feature '{name}' to leave out. Features are {there}.")


def train_and_compare(runner: Runner, variants: Sequence[Variant], seeds: int, margin: float) -> ExperimentResult:
    """Train variants, the base first, and judge their differences from the base.

    Args:
        runner: Trains the variants.
        variants: The base variant and the others.
        seeds: Number of runs of each.
        margin: Largest loss at which a simpler variant is adopted.
    """
    settings, first = runner.settings, runner.settings.training.seed
    numbers, warnings = range(first, first + seeds), list[str]()
    trained = runner.train([each for each in variants if not each.trees_only], numbers)
    for variant in (each for each in variants if each.trees_only):
        try:
            trained += runner.train([variant], numbers)
        except UserError as error:  # Trees may have no input to learn from, and the networks' verdicts stand.
            warnings.append(f"{variant.name} is left out: {error}")
    for each in trained:
        if reason := next(filter(None, (facts.get("undertraining") for facts in each.facts)), None):
            warnings.append(f"the network of `{each.variant.name}` {reason}")
    base, *others = trained
    measured = base.measure()
    metrics = _choose_metrics(settings, measured[0])
    objective = Objective.from_setting(settings.evaluation.primary_metric, measured[0], list(settings.tasks))
    wanted, resamples = {metric.name for metric in metrics.values()}, settings.evaluation.resamples
    theirs = ((other.variant.name, other.measure()) for other in others)
    differences: Differences = {}
    if others and (wanted or objective is not None):
        differences = find_differences(measured, theirs, objective, resamples, wanted)
    means = average_runs(measured, resamples, objective)
    columns: MetricColumns = {
        (task, metric.name): (f"{metric.name} of {task}", metric.better) for task, metric in metrics.items()
    }
    decides = None
    if objective is not None:
        decides = OBJECTIVE if len(objective.groups) > 1 else (objective.groups[0], objective.metric)
        columns = {decides: (objective.name, objective.better)} | columns
    base_means = {key: means[key[0]][key[1]].mean for key in columns if key[1] in means.get(key[0], {})}
    results = [_summarize(each, base, columns, decides, base_means, differences) for each in trained]
    rows = measured[0].total("rows")
    precisions = sorted({facts["precision"] for each in trained for facts in each.facts if "precision" in facts})
    means.pop(OBJECTIVE[0], None)
    return ExperimentResult(
        title=f"Comparison of variants of {settings.name}" if others else f"{seeds} runs of {settings.name}",
        seeds=base.seeds,
        rows=rows,
        resampling_units="rows" if rows == measured[0].users else "users",
        means=means,
        variants=correct_p_values(results),
        margin=margin,
        skipped_tasks={task: count_minority(measured[0], task) for task in settings.tasks if task not in metrics},
        warnings=warnings,
        facts={
            "log": settings.data.log,
            "judged by": f"{'' if runner.part is None else f'the {runner.part} part of the '}{runner.split} rows",
            "precision": " or ".join(precisions),
            "command": command_line(),
        },
    )


def save_result(runner: Runner, report: ExperimentResult) -> None:
    """Write the report and log it to MLflow."""
    settings, run = runner.settings, runner.run
    identity = {"features": runner.prepared.manifest["fingerprint"], "settings": fixed_settings(settings)}
    recommended = None if report.recommended is None else report.recommended.name
    write_text(runner.folder / COMPARISON_FILE, json.dumps({"recommended": recommended, **asdict(report)}, indent=1))
    write_report(make_report(report, identity), runner.folder)
    for name in (COMPARISON_FILE, REPORT_PAGE):
        run.log_artifact(runner.folder / name)
    means = {
        re.sub(r"[^\w\-. :/]", "", f"{each.name}/{name}"): cell.mean  # MLflow allows no other characters.
        for each in report.variants
        for name, cell in each.metric_means.items()
        if cell.mean is not None
    }
    run.log_metrics(means)
    run.write_section(
        "Comparison", "\n\n".join([code_block(command_line()), bullet_list([report.headline, *report.sentences])])
    )


def _choose_metrics(settings: Settings, sums: EvaluationSums) -> dict[str, Metric[Any]]:
    """Return the metric that judges each task with enough labels: the one that decides, if it is of such tasks."""
    primary_metric = settings.evaluation.primary_metric
    decides, of_score = find_objective_metric(primary_metric), primary_metric.startswith(f"{SCORE}.")
    return {
        task.name: decides
        if decides.applies_to(task.kind) and not of_score
        else find_objective_metric(task.kind.guardrail_metric)
        for task in sums.tasks
        if count_minority(sums, task.name) >= MIN_RARER_ROWS
    }


def _summarize(
    trained: TrainedVariant,
    base: TrainedVariant,
    columns: MetricColumns,
    decides: tuple[str, str] | None,
    means: Mapping[tuple[str, str], float | None],
    differences: Differences,
) -> VariantResult:
    """Return the result of a variant, not corrected. A variant without a task is judged by the others, one by one."""
    variant, metric_means = trained.variant, dict[str, MetricMean]()
    for key, (label, better) in columns.items():
        mean, difference = means.get(key), None
        if trained is not base:
            difference = differences.get((variant.name, *key), Difference(None)).negated
            mean = None if mean is None or difference.value is None else mean + difference.value
        metric_means[label] = MetricMean(better, mean, difference)
    verdict_metrics = [] if decides is None else [decides]
    if variant.without_tasks:
        verdict_metrics = [key for key in columns if key != OBJECTIVE and key[0] not in variant.without_tasks]
    cli_options = "--model.trees={}" if variant.trees_only else variant.cli_options
    return VariantResult(
        name=variant.name,
        cli_options="" if variant.without_tasks else cli_options,
        is_simpler=variant.is_simpler,
        metric_means=metric_means,
        verdict_metrics=() if trained is base else tuple(columns[key][0] for key in verdict_metrics),
        parameters=trained.facts[0].get("parameters"),
        seconds=float(np.mean([facts["seconds"] for facts in trained.facts])),
    )


def correct_p_values(variants: Sequence[VariantResult]) -> list[VariantResult]:
    """Correct the p-values of all judged cells by Holm's method for their number."""
    places = [(number, name) for number, each in enumerate(variants) for name in each.verdict_metrics]
    metric_means = [dict(each.metric_means) for each in variants]
    difference = holm_correct([metric_means[number][name].difference or Difference(None) for number, name in places])
    for (number, name), corrected in zip(places, difference, strict=True):
        metric_means[number][name] = replace(metric_means[number][name], difference=corrected)
    return [replace(each, metric_means=own) for each, own in zip(variants, metric_means, strict=True)]


def _describe(base: str, variant: VariantResult, name: str) -> str:
    cell = variant.metric_means[name]
    if cell.difference is None or cell.verdict == UNKNOWN:
        return f"how `{variant.name}` differs from `{base}` can't be told: too few labels, or users"
    told = f"{name} differs by {cell.difference.format()}"
    if cell.verdict == NOT_SHOWN:
        return f"`{variant.name}` is not shown to differ from `{base}`{cell.difference.correction_note}: {told}"
    return f"`{variant.name}` is {cell.verdict} than `{base}`: {told}"


def make_report(experiment: ExperimentResult, identity: Mapping[str, Any] | None = None) -> Report:
    """Build the report of an experiment.

    Args:
        experiment: The results.
        identity: Features and settings of the runs, None on the terminal.
    """
    warnings = [Sentence(each, "warning") for each in experiment.warnings]
    tables = [] if len(experiment.variants) == 1 else [_table_of_variants(experiment)]
    tables += experiment.tables
    heads = ("", "mean", "95% interval", "between runs", f"between {experiment.resampling_units}")
    means = [
        (f"{group} {metric.label}", *_mean_cells(metric, mean))
        for group, metrics in experiment.means.items()
        for metric in every.METRICS
        if metric.is_shown(group == SCORE) and (mean := metrics.get(metric.name)) is not None and mean.mean is not None
    ]
    seeds = [f"seed {seed}" for seed in experiment.seeds]
    title = f"Metrics of {experiment.base}: {len(seeds)} runs, {experiment.rows:,} rows"
    tables.append(Table(title, (*heads, *seeds), means, page_only=len(experiment.variants) > 1))
    return Report(
        title=experiment.title,
        headline=experiment.headline,
        mark="warning" if warnings else "good",
        about=f"seeds {', '.join(map(str, experiment.seeds))}; {experiment.rows:,} rows judged",
        tables=tables,
        sentences=[*map(Sentence, experiment.sentences), *warnings],
        facts=experiment.facts,
        measures={
            "Differences": (
                f"Differences of means over runs from {experiment.base}. They err by the seeds, with the variance of "
                f"either side's runs / their number, and by the {experiment.resampling_units}, which are "
                "redrawn for both sides "
                "alike. Intervals are 95% and Student's. A verdict rests on the p-value, corrected by Holm's method "
                "for "
                "all questions; intervals are not corrected."
            ),
            "Between runs": "The standard deviation over runs.",
            f"Between {experiment.resampling_units}": f"The standard error of the mean from the choice of "
            f"{experiment.resampling_units}.",
        },
        identity=identity or {},
    )


def _table_of_variants(experiment: ExperimentResult) -> Table:
    names = list(experiment.variants[0].metric_means)
    heads = ("", *names, "parameters", "seconds")
    rows: list[Row] = [
        (
            each.name,
            *(_cell(each.metric_means.get(name)) for name in names),
            format_count(each.parameters),
            format_fixed(each.seconds, 1),
        )
        for each in experiment.variants
    ]
    title = f"Variants: {len(experiment.seeds)} runs of each, {experiment.rows:,} rows"
    return Table(title, heads, rows, f"means, and differences from {experiment.base}; colored: shown")


def _cell(cell: MetricMean | None) -> Cell:
    if cell is None or cell.mean is None:
        return Cell(NO_VALUE)
    difference = "" if cell.difference is None or cell.difference.value is None else cell.difference.format()
    return Cell(f"{cell.mean:.4f}", difference, _MARKS.get(cell.verdict, ""))


def _mean_cells(metric: BaseMetric, mean: RunsMean) -> list[str]:
    """Return a mean, its interval, the spread between runs, the error by users, and the value of each run."""
    numbers = [mean.mean, mean.std_between_runs, mean.standard_error_over_users, *mean.values]
    value, *others = (NO_VALUE if number is None else metric.format(number) for number in numbers)
    ends = [metric.format(end) for end in (mean.low, mean.high) if end is not None]
    return [value, " to ".join(ends) or NO_VALUE, *others]


# The variants of a command


def parse_variants(words: Sequence[str]) -> list[Variant]:
    """Read the variants of a command line.

    Args:
        words: A name, then its overrides such as `training.epochs=2`, then the next name. `features.NAME=null` leaves
            a feature out.

    Raises:
        UserError: A name is missing, comes twice, or has no overrides.
    """
    named: dict[str, list[str]] = {}
    for word in words:
        if "=" in word:
            if not named:
                raise UserError(f"--variant '{word}' has no name. Write --variant NAME {word}.")
            named[list(named)[-1]].append(word)
        elif word in named:
            raise UserError(f"--variant '{word}' is given twice. Give each variant another name.")
        else:
            named[word] = []
    variants = []
    for name, overrides in named.items():
        if not overrides:
            raise UserError(f"--variant '{name}' changes nothing. Give it overrides, such as training.epochs=2.")
        left_out = [word for word in overrides if word.startswith("features.") and word.endswith("=null")]
        left_out = [word for word in left_out if word.count(".") == 1]
        features = tuple(word.removeprefix("features.").removesuffix("=null") for word in left_out)
        variants.append(Variant(name, tuple(word for word in overrides if word not in left_out), features))
    return variants


def list_architectures(settings: Settings) -> list[Variant]:
    """List the architectures of one budget, each task alone, each task left out, and trees alone.

    The first variant has the settings' own architecture, under its standard name if it has one. Trees beside the
    network take no part, because they would hide the differences. All networks have the same rows, steps, and rates,
    and as many units in the first layer of their experts.
    """
    own, tasks = settings.model.model_copy(update={"trees": None}), tuple(settings.tasks)
    base = () if settings.model.trees is None else ("model.trees=null",)
    models = dict(_list_models(own, len(tasks)))
    name = next((name for name, model in models.items() if model == own), "these settings")
    order = list(models)
    variants = [Variant(name, base)]
    for other, model in models.items():
        if other != name:
            is_simpler = name not in order or order.index(other) < order.index(name)
            variants.append(Variant(other, (*base, *_describe_change(own, model)), is_simpler=is_simpler))
    if len(tasks) > 1:
        for task in tasks:
            others = tuple(other for other in tasks if other != task)
            variants.append(Variant(f"only {task}", base, without_tasks=others))
    if len(tasks) > 2:
        variants += [Variant(f"without {task}", base, without_tasks=(task,)) for task in tasks]
    return [*variants, Variant("trees alone", base, trees_only=True)]


def _describe_change(own: Model, model: Model) -> Iterator[str]:
    for section in ("experts", "gates"):
        before, after = (getattr(each, section).model_dump(mode="json") for each in (own, model))
        for name, *_ in diff_settings(before, after):
            yield f"model.{section}.{name}={json.dumps(after[name])}"


def _list_models(own: Model, tasks: int) -> Iterator[tuple[str, Model]]:
    """Yield architectures with as many units in the first layer of their experts, the simplest first."""
    experts, gates = own.experts, own.gates
    total = experts.count + experts.task_count * tasks
    if gates.routing == "soft":
        gates = gates.model_copy(update={"serving_top_k": None})
    else:  # The budget is what a row takes.
        total = min(total, gates.serving_top_k or gates.top_k)
        gates = Gates(dropout=gates.dropout)
    width, (first, *rest) = min(total * experts.units[0], MAX_BOTTOM_UNITS), experts.units
    if total == 1:  # A shared bottom is divided into experts.
        total = max(2, min(Experts().count, first // 8))
        first = max(1, first // total)
    one_level = {"task_count": 0, "levels": 1}
    mixture = experts.model_copy(update={**one_level, "count": total, "units": (first, *rest)})
    bottom = experts.model_copy(update={**one_level, "count": 1, "units": (width, *rest)})
    count = max(1, round(total / (tasks + 1)))
    ple = mixture.model_copy(update={"count": count, "task_count": count, "levels": 2})
    per_task, shared = (gates.model_copy(update={"per_task": value}) for value in (True, False))
    yield "shared bottom", _with(own, bottom, per_task.model_copy(update={"dropout": 0.0}))
    if tasks > 1:
        yield "one gate", _with(own, mixture, shared)
    yield "MMoE", _with(own, mixture, per_task)
    if tasks > 1:
        yield "PLE", _with(own, ple, per_task)


def _with(own: Model, experts: Experts, gates: Gates) -> Model:
    return own.model_copy(update={"experts": experts, "gates": gates})
