"""Compare variants of settings over several runs, and say which variant to adopt.

The results are `comparison.json` and `report.html` in `data.work_dir`/comparison.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from mmoe_rec.atomic import write_text
from mmoe_rec.auc import MIN_RARER_ROWS
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import Differences, RunsMean, average_runs, find_differences
from mmoe_rec.evaluation.intervals import Difference, holm_correct
from mmoe_rec.evaluation.metrics import METRICS
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
"""Maximum units in the first layer of a shared bottom."""
COMPARISON_FOLDER, COMPARISON_FILE = "comparison", "comparison.json"
MetricColumns = dict[tuple[str, str], tuple[str, str]]
"""Task and metric -> label of the metric in reports, and which values are better, `higher` or `lower`."""


class MetricVerdict(StrEnum):
    """How a variant compares with the base variant in a metric."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SIGNIFICANT = "not significant"
    UNKNOWN = "unknown"


_MARKS: dict[MetricVerdict, Mark] = {MetricVerdict.BETTER: "good", MetricVerdict.WORSE: "problem"}


@dataclass(frozen=True)
class MetricMean:
    """Mean of a metric over the runs of a variant.

    Attributes:
        better: Which values are better, `higher` or `lower`.
        mean: Mean over runs.
        difference: Difference from the base variant, None for the base.
    """

    better: str
    mean: float | None
    difference: Difference | None = None

    @property
    def verdict(self) -> MetricVerdict:
        """How the variant compares with the base variant in this metric."""
        difference = self.difference
        if difference is None or difference.value is None or difference.low is None or difference.high is None:
            return MetricVerdict.UNKNOWN
        if not difference.is_significant:
            return MetricVerdict.NOT_SIGNIFICANT
        return MetricVerdict.BETTER if (difference.value > 0) == (self.better == "higher") else MetricVerdict.WORSE

    @property
    def gain(self) -> float:
        """Difference from the base variant, positive if the variant is better. 0 if undefined."""
        value = 0.0 if self.difference is None else self.difference.value or 0.0
        return value if self.better == "higher" else -value

    @property
    def max_drop(self) -> float | None:
        """Largest loss in the confidence interval of the difference, at least 0. None if undefined."""
        if self.difference is None:
            return None
        end = self.difference.low if self.better == "higher" else self.difference.high
        return None if end is None else max(0.0, -end if self.better == "higher" else end)


@dataclass(frozen=True)
class VariantResult:
    """Results of a variant.

    Attributes:
        name: Name of the variant.
        cli_options: Options that adopt the variant, "" if it can't be adopted.
        is_simpler: Whether the variant is simpler than the base, and so worth adopting without a gain.
        metric_means: Metric, such as `auc of click` -> mean over runs.
        verdict_metrics: Names of the metrics that decide whether to adopt the variant. Empty for the base.
        parameters: Number of parameters of the network, None for trees alone.
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
    """Results of variants over several runs.

    Attributes:
        title: Title of the report.
        seeds: Seeds of the runs.
        rows: Number of rows on which variants are compared.
        resampling_units: What the intervals resample, `users` or `rows`.
        means: Task or `score` -> metric -> mean over the runs of the base variant.
        variants: Results of the variants, the base variant first.
        margin: Largest loss at which a simpler variant is adopted.
        skipped_tasks: Task with too few labels to compare -> number of rows with its rarer label.
        notes: Sentences to show before the verdicts.
        tables: Tables to add to the report.
        warnings: Reasons to distrust the results.
        facts: Further facts for the report by name, such as `log`.
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
        """Name of the base variant."""
        return self.variants[0].name

    @property
    def recommended(self) -> VariantResult | None:
        """The variant with the largest significant gain, else the first simpler one within `margin`, else None."""
        judged = [variant for variant in self.variants[1:] if variant.verdict_metrics]
        better = [
            variant
            for variant in judged
            if variant.cli_options
            and {variant.metric_means[name].verdict for name in variant.verdict_metrics} == {MetricVerdict.BETTER}
        ]
        if better:
            return max(better, key=lambda variant: variant.metric_means[variant.verdict_metrics[0]].gain)
        for variant in judged:
            losses = [variant.metric_means[name].max_drop for name in variant.verdict_metrics]
            if variant.is_simpler and all(loss is not None and loss <= self.margin for loss in losses):
                return variant
        return None

    @property
    def sentences(self) -> list[str]:
        """Verdicts as sentences."""
        return [
            *self.notes,
            *(_describe(self.base, variant, name) for variant in self.variants[1:] for name in variant.verdict_metrics),
            *(
                f"`{task}` is not judged: only {rows:,} rows have its rarer label"
                for task, rows in self.skipped_tasks.items()
            ),
        ]

    @property
    def headline(self) -> str:
        """Recommendation, or the number of runs if there are no variants."""
        if not self.variants[1:]:
            return f"{len(self.seeds)} runs of `{self.base}`"
        recommended = self.recommended
        if recommended is None:
            return f"nothing to adopt: no variant is better than `{self.base}`, or simpler and as good"
        metric_means = [recommended.metric_means[name] for name in recommended.verdict_metrics]
        if all(mean.verdict == MetricVerdict.BETTER for mean in metric_means):
            return f"adopt `{recommended.cli_options}`, since `{recommended.name}` is better"
        (loss,) = format_signed(max(mean.max_drop or 0.0 for mean in metric_means), sign=False)
        return f"adopt `{recommended.cli_options}`, since `{recommended.name}` is simpler and loses at most {loss}"


def compare_variants(settings: Settings, variants: Sequence[Variant], seeds: int) -> ExperimentResult:
    """Train variants of settings and compare them on the test rows.

    Args:
        settings: Settings that the variants change.
        variants: The base variant, and variants to compare with it, if any.
        seeds: Number of runs of each variant, with `training.seed` and the seeds after it.

    Raises:
        UserError: A variant has an unknown key or can't be trained, there are fewer than two seeds, or the split has
            no test rows.
        StoppedError: A signal came. Completed runs are kept.
    """
    check_variants(settings, variants, seeds)
    with open_runner(settings, "compare", "test", folder=COMPARISON_FOLDER) as runner:
        report = train_and_compare(runner, variants, seeds, settings.evaluation.max_metric_drop)
        save_result(runner, report)
    return report


def check_variants(settings: Settings, variants: Sequence[Variant], seeds: int) -> None:
    """Raise UserError for a wrong variant or too few seeds, before features are built.

    Args:
        settings: Settings that the variants change.
        variants: The variants.
        seeds: Number of runs of each variant.
    """
    if seeds < 2:
        raise UserError(f"{seeds} run of each variant can't show how far runs differ. Give --seeds 2 or more.")
    find_objective_metric(settings.evaluation.primary_metric)
    names = [variant.name for variant in variants]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two variants are named '{duplicate}'. Give each variant another name.")
    for variant in variants:
        variant.apply(settings)
        for name in variant.without_features:
            if name not in settings.features:
                features = ", ".join(settings.features)
                raise UserError(f"{variant.name}: there is no feature '{name}' to leave out. Features are {features}.")


def train_and_compare(runner: Runner, variants: Sequence[Variant], seeds: int, margin: float) -> ExperimentResult:
    """Train variants and judge their differences from the base variant.

    Args:
        runner: Runner that trains the variants.
        variants: The base variant, then the variants to compare with it.
        seeds: Number of runs of each variant.
        margin: Largest loss at which a simpler variant is adopted.
    """
    settings, first_seed = runner.settings, runner.settings.training.seed
    seed_range, warnings = range(first_seed, first_seed + seeds), list[str]()
    trained = runner.train([variant for variant in variants if not variant.trees_only], seed_range)
    for variant in (variant for variant in variants if variant.trees_only):
        try:
            trained += runner.train([variant], seed_range)
        except UserError as error:  # Without inputs for trees, the networks are still compared.
            warnings.append(f"{variant.name} is left out: {error}")
    base, *rivals = trained
    measured = base.measure()
    metrics = _choose_metrics(settings, measured[0])
    objective = Objective.from_setting(settings.evaluation.primary_metric, measured[0], list(settings.tasks))
    names, resamples = {metric.name for metric in metrics.values()}, settings.evaluation.resamples
    rival_sums = ((rival.variant.name, rival.measure()) for rival in rivals)
    differences: Differences = {}
    if rivals and (names or objective is not None):
        differences = find_differences(measured, rival_sums, objective, resamples, names)
    means = average_runs(measured, resamples, objective)
    columns: MetricColumns = {
        (task, metric.name): (f"{metric.name} of {task}", metric.better) for task, metric in metrics.items()
    }
    primary = None
    if objective is not None:
        primary = OBJECTIVE if len(objective.groups) > 1 else (objective.groups[0], objective.metric)
        columns = {primary: (objective.name, objective.better)} | columns
    base_means = {key: means[key[0]][key[1]].mean for key in columns if key[1] in means.get(key[0], {})}
    results = [_summarize(result, base, columns, primary, base_means, differences) for result in trained]
    rows = measured[0].total("rows")
    precisions = sorted({facts["precision"] for result in trained for facts in result.facts if "precision" in facts})
    means.pop(OBJECTIVE[0], None)
    return ExperimentResult(
        title=f"Comparison of variants of {settings.name}" if rivals else f"{seeds} runs of {settings.name}",
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
    """Write the report and log it to MLflow.

    Args:
        runner: Runner of the command.
        report: Results of the variants.
    """
    settings, run = runner.settings, runner.run
    identity = {"features": runner.prepared.manifest["fingerprint"], "settings": fixed_settings(settings)}
    recommended = None if report.recommended is None else report.recommended.name
    write_text(runner.folder / COMPARISON_FILE, json.dumps({"recommended": recommended, **asdict(report)}, indent=1))
    write_report(make_report(report, identity), runner.folder)
    for name in (COMPARISON_FILE, REPORT_PAGE):
        run.log_artifact(runner.folder / name)
    run.log_metrics(
        {
            re.sub(r"[^\w\-. :/]", "", f"{variant.name}/{name}"): metric.mean  # MLflow allows no other characters.
            for variant in report.variants
            for name, metric in variant.metric_means.items()
            if metric.mean is not None
        }
    )
    verdicts = bullet_list([report.headline, *report.sentences])
    run.write_section("Comparison", f"{code_block(command_line())}\n\n{verdicts}")


def _choose_metrics(settings: Settings, sums: EvaluationSums) -> dict[str, Metric[Any]]:
    """Return a metric for each task with enough labels: the primary metric, or the task kind's `guardrail_metric`."""
    primary_metric = settings.evaluation.primary_metric
    primary, is_of_score = find_objective_metric(primary_metric), primary_metric.startswith(f"{SCORE}.")
    return {
        task.name: primary
        if primary.applies_to(task.kind) and not is_of_score
        else find_objective_metric(task.kind.guardrail_metric)
        for task in sums.tasks
        if count_minority(sums, task.name) >= MIN_RARER_ROWS
    }


def _summarize(
    trained: TrainedVariant,
    base: TrainedVariant,
    columns: MetricColumns,
    primary: tuple[str, str] | None,
    means: Mapping[tuple[str, str], float | None],
    differences: Differences,
) -> VariantResult:
    """Return a variant's result, without corrected p-values. If it leaves out tasks, the others give the verdict."""
    variant, metric_means = trained.variant, dict[str, MetricMean]()
    for key, (label, better) in columns.items():
        mean, difference = means.get(key), None
        if trained is not base:
            difference = differences.get((variant.name, *key), Difference(None)).negated
            mean = None if mean is None or difference.value is None else mean + difference.value
        metric_means[label] = MetricMean(better, mean, difference)
    verdict_metrics = [] if primary is None else [primary]
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
    """Correct the p-values of the variants' `verdict_metrics` for the number of tests, by Holm's method."""
    judged = [(index, name) for index, variant in enumerate(variants) for name in variant.verdict_metrics]
    metric_means = [dict(variant.metric_means) for variant in variants]
    differences = holm_correct([metric_means[index][name].difference or Difference(None) for index, name in judged])
    for (index, name), corrected in zip(judged, differences, strict=True):
        metric_means[index][name] = replace(metric_means[index][name], difference=corrected)
    return [replace(variant, metric_means=means) for variant, means in zip(variants, metric_means, strict=True)]


def _describe(base: str, variant: VariantResult, name: str) -> str:
    metric = variant.metric_means[name]
    if metric.difference is None or metric.verdict == MetricVerdict.UNKNOWN:
        return f"`{variant.name}` can't be compared with `{base}`: there are too few labels or users"
    text = f"{name} differs by {metric.difference.format()}"
    if metric.verdict == MetricVerdict.NOT_SIGNIFICANT:
        note = metric.difference.correction_note
        return f"`{variant.name}` does not differ significantly from `{base}`{note}: {text}"
    return f"`{variant.name}` is {metric.verdict} than `{base}`: {text}"


def make_report(experiment: ExperimentResult, identity: Mapping[str, Any] | None = None) -> Report:
    """Build the report of an experiment.

    Args:
        experiment: Results of the variants.
        identity: Fingerprint of the features, and settings (`Report.identity`). None for a report without them.
    """
    warnings = [Sentence(warning, "warning") for warning in experiment.warnings]
    tables = [] if len(experiment.variants) == 1 else [_variant_table(experiment)]
    tables += experiment.tables
    header = ("", "mean", "95% interval", "between runs", f"between {experiment.resampling_units}")
    means = [
        (f"{group} {metric.label}", *_mean_cells(metric, mean))
        for group, metrics in experiment.means.items()
        for metric in METRICS
        if metric.is_shown(group == SCORE) and (mean := metrics.get(metric.name)) is not None and mean.mean is not None
    ]
    seeds = [f"seed {seed}" for seed in experiment.seeds]
    title = f"Metrics of {experiment.base}: {len(seeds)} runs, {experiment.rows:,} rows"
    tables.append(Table(title, (*header, *seeds), means, page_only=len(experiment.variants) > 1))
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
                f"Differences of means over runs from {experiment.base}. Their variance has two parts: the variance "
                f"between the runs of each variant, divided by their number, and the variance over "
                f"{experiment.resampling_units}, resampled jointly for both variants. Intervals are 95% Student's t "
                "intervals. A verdict uses the p-value, corrected for the number of comparisons by Holm's method. "
                "Intervals are not corrected."
            ),
            "Between runs": "Standard deviation over runs.",
            f"Between {experiment.resampling_units}": "Standard error of the mean due to the sample of "
            f"{experiment.resampling_units}.",
        },
        identity=identity or {},
    )


def _variant_table(experiment: ExperimentResult) -> Table:
    names = list(experiment.variants[0].metric_means)
    header = ("", *names, "parameters", "seconds")
    rows: list[Row] = [
        (
            variant.name,
            *(_cell(variant.metric_means.get(name)) for name in names),
            format_count(variant.parameters),
            format_fixed(variant.seconds, 1),
        )
        for variant in experiment.variants
    ]
    title = f"Variants: {len(experiment.seeds)} runs of each, {experiment.rows:,} rows"
    return Table(
        title, header, rows, f"means, and differences from {experiment.base}. Colored differences are significant"
    )


def _cell(metric: MetricMean | None) -> Cell:
    if metric is None or metric.mean is None:
        return Cell(NO_VALUE)
    difference = "" if metric.difference is None or metric.difference.value is None else metric.difference.format()
    return Cell(f"{metric.mean:.4f}", difference, _MARKS.get(metric.verdict, ""))


def _mean_cells(metric: BaseMetric, mean: RunsMean) -> list[str]:
    """Return the cells of a metric's row: mean, interval, spread between runs and between users, value of each run."""
    numbers = [mean.mean, mean.std_between_runs, mean.standard_error_over_users, *mean.values]
    value, *rest = (NO_VALUE if number is None else metric.format(number) for number in numbers)
    ends = [metric.format(end) for end in (mean.low, mean.high) if end is not None]
    return [value, " to ".join(ends) or NO_VALUE, *rest]


def parse_variants(words: Sequence[str]) -> list[Variant]:
    """Parse the variants of a command line.

    Args:
        words: A name, its overrides such as `training.epochs=2`, the next name, and so on. `features.NAME=null` leaves
            out a feature.

    Raises:
        UserError: A name is missing, is given twice, or has no overrides.
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
        left_out = [word for word in overrides if re.fullmatch(r"features\.[^.]*=null", word)]
        features = tuple(word.removeprefix("features.").removesuffix("=null") for word in left_out)
        variants.append(Variant(name, tuple(word for word in overrides if word not in left_out), features))
    return variants


def list_architectures(settings: Settings) -> list[Variant]:
    """List variants that compare architectures, each task alone, each task left out, and trees alone.

    The first variant has the settings' own architecture, under its standard name if it has one. No network is combined
    with trees, which would hide the differences. All networks have equally many units in the experts' first layer.
    """
    current, tasks = settings.model.model_copy(update={"trees": None}), tuple(settings.tasks)
    base = () if settings.model.trees is None else ("model.trees=null",)
    models = {
        name: current.model_copy(update={"experts": experts, "gates": gates})
        for name, experts, gates in _list_architectures(current, len(tasks))
    }
    base_name = next((name for name, model in models.items() if model == current), "these settings")
    order = list(models)
    variants = [Variant(base_name, base)]
    for name, model in models.items():
        if name != base_name:
            is_simpler = base_name not in order or order.index(name) < order.index(base_name)
            variants.append(Variant(name, (*base, *_describe_change(current, model)), is_simpler=is_simpler))
    if len(tasks) > 1:
        for task in tasks:
            variants.append(Variant(f"only {task}", base, without_tasks=tuple(name for name in tasks if name != task)))
    if len(tasks) > 2:
        variants += [Variant(f"without {task}", base, without_tasks=(task,)) for task in tasks]
    return [*variants, Variant("trees alone", base, trees_only=True)]


def _describe_change(current: Model, changed: Model) -> Iterator[str]:
    for section in ("experts", "gates"):
        before, after = (getattr(model, section).model_dump(mode="json") for model in (current, changed))
        for name, *_ in diff_settings(before, after):
            yield f"model.{section}.{name}={json.dumps(after[name])}"


def _list_architectures(current: Model, tasks: int) -> Iterator[tuple[str, Experts, Gates]]:
    """Yield architectures with equally many units in the first layer of their experts, the simplest first."""
    experts, gates = current.experts, current.gates
    total = experts.count + experts.task_count * tasks
    if gates.routing == "soft":
        gates = gates.model_copy(update={"serving_top_k": None})
    else:  # With sparse routing, only the experts that a row uses count.
        total = min(total, gates.serving_top_k or gates.top_k)
        gates = Gates(dropout=gates.dropout)
    width, (first, *rest) = min(total * experts.units[0], MAX_BOTTOM_UNITS), experts.units
    if total == 1:  # Split the shared bottom into experts.
        total = max(2, min(Experts().count, first // 8))
        first = max(1, first // total)
    one_level = {"task_count": 0, "levels": 1}
    mixture = experts.model_copy(update={**one_level, "count": total, "units": (first, *rest)})
    bottom = experts.model_copy(update={**one_level, "count": 1, "units": (width, *rest)})
    count = max(1, round(total / (tasks + 1)))
    ple = mixture.model_copy(update={"count": count, "task_count": count, "levels": 2})
    per_task, shared = (gates.model_copy(update={"per_task": value}) for value in (True, False))
    yield "shared bottom", bottom, per_task.model_copy(update={"dropout": 0.0})
    if tasks > 1:
        yield "one gate", mixture, shared
    yield "MMoE", mixture, per_task
    if tasks > 1:
        yield "PLE", ple, per_task
