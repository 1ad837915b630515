"""Runs of variants, in sentences, tables and a page: which variant is better, and what to write into the settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import write_text
from mmoe_rec.evaluation import metrics as every
from mmoe_rec.evaluation.comparison import TrainingsMean
from mmoe_rec.evaluation.intervals import Difference, correct_all
from mmoe_rec.evaluation.metrics.metric import Named
from mmoe_rec.evaluation.sentences import once_corrected
from mmoe_rec.evaluation.summary import SCORE
from mmoe_rec.report.formatting import NONE, fixed, signed, thousands
from mmoe_rec.report.parts import Cell, Mark, Report, Row, Sentence, Table
from mmoe_rec.report.report_files import write_report

FILE = "comparison.json"
"""File of an experiment that holds all values."""


class Call(StrEnum):
    """How a variant compares with the base."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "not shown"
    UNKNOWN = "unknown"


_MARKS: dict[Call, Mark] = {Call.BETTER: "good", Call.WORSE: "problem"}


@dataclass(frozen=True)
class MetricMean:
    """A metric's mean over the runs of a variant.

    Attributes:
        better: Which values are better, `higher` or `lower`.
        mean: The mean over runs.
        apart: The difference from the base variant, None for the base.
    """

    better: str
    mean: float | None
    apart: Difference | None = None

    @property
    def call(self) -> Call:
        """How the variant compares with the base in this metric."""
        apart = self.apart
        if apart is None or apart.value is None or apart.low is None or apart.high is None:
            return Call.UNKNOWN
        if not apart.is_significant or apart.low <= 0 <= apart.high:
            return Call.NOT_SHOWN
        return Call.BETTER if (apart.value > 0) == (self.better == "higher") else Call.WORSE

    @property
    def gain(self) -> float:
        """The difference, positive if the variant is better, 0 if undefined."""
        value = 0.0 if self.apart is None else self.apart.value or 0.0
        return value if self.better == "higher" else -value

    @property
    def max_loss(self) -> float | None:
        """The largest loss that the interval allows."""
        end = None if self.apart is None else self.apart.low if self.better == "higher" else self.apart.high
        return None if end is None else max(0.0, -end if self.better == "higher" else end)


@dataclass(frozen=True)
class VariantResult:
    """A variant.

    Attributes:
        name: Its name.
        change: The options that adopt it.
        simpler: Whether it is worth adopting if it loses nothing.
        cells: Metric, such as `auc of click` -> its mean over runs.
        judged: The metrics that judge the variant.
        parameters: Parameters of its network, None without one.
        seconds: Mean seconds of a run.
    """

    name: str
    change: str
    simpler: bool
    cells: Mapping[str, MetricMean]
    judged: tuple[str, ...]
    parameters: int | None
    seconds: float


@dataclass(frozen=True)
class ExperimentResult:
    """Variants of settings over several runs.

    Attributes:
        title: Title of the page.
        seeds: Seeds of the runs.
        rows: Rows that judged.
        units: What was redrawn for intervals, `users` or `rows`.
        means: Task or `score` -> metric -> its mean over the runs of the base variant.
        variants: The base variant first.
        margin: Largest loss at which a simpler variant is adopted.
        few: Task that isn't judged -> rows of its rarer label.
        notes: Further sentences, which come first.
        tables: Further tables.
        warnings: Reasons for distrust.
        facts: Name -> text.
    """

    title: str
    seeds: tuple[int, ...]
    rows: int
    units: str
    means: Mapping[str, Mapping[str, TrainingsMean]]
    variants: Sequence[VariantResult]
    margin: float
    few: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The name of the base variant."""
        return self.variants[0].name

    @property
    def adopted(self) -> VariantResult | None:
        """The variant to adopt: the best one that is better, or the first simpler one that loses nothing."""
        others = [each for each in self.variants[1:] if each.judged]
        better = [each for each in others if each.change and {*_calls(each)} == {Call.BETTER}]
        if better:
            return max(better, key=lambda each: each.cells[each.judged[0]].gain)
        for each in others:
            losses = [each.cells[name].max_loss for name in each.judged]
            if each.simpler and all(loss is not None and loss <= self.margin for loss in losses):
                return each
        return None

    @property
    def sentences(self) -> list[str]:
        """The verdicts, and the differences that these rows and runs can show."""
        found = [*self.notes, *(_describe(self.base, each, name) for each in self.variants[1:] for name in each.judged)]
        for task, rows in self.few.items():
            found.append(f"`{task}` is not judged: {rows:,} rows have its rarer label, which are too few")
        return [*found, *self._describe_power()]

    @property
    def headline(self) -> str:
        """The variant to adopt. Without variants, the number of runs."""
        if not self.variants[1:]:
            return f"{len(self.seeds)} runs of `{self.base}`"
        adopted = self.adopted
        if adopted is None:
            return f"nothing to adopt: no variant is better than `{self.base}`, or simpler and as good"
        cells = [adopted.cells[name] for name in adopted.judged]
        if all(cell.call == Call.BETTER for cell in cells):
            return f"adopt `{adopted.change}`, since `{adopted.name}` is better"
        (loss,) = signed(max(cell.max_loss or 0.0 for cell in cells), sign=False)
        return f"adopt `{adopted.change}`, since `{adopted.name}` is simpler and loses at most {loss}"

    def _describe_power(self) -> Iterator[str]:
        sizes: dict[str, list[float]] = {}
        for each in self.variants[1:]:
            for name in each.judged:
                apart = each.cells[name].apart
                if apart is not None and apart.detectable is not None:
                    sizes.setdefault(name, []).append(apart.detectable)
        largest = [f"{signed(max(each), sign=False)[0]} {name}" for name, each in sizes.items()]
        if largest:
            yield (
                f"with these rows and {len(self.seeds)} runs of each variant, nine of ten comparisons alone would "
                f"show a difference of {', or '.join(largest)}"
            )


def correct_cells(variants: Sequence[VariantResult]) -> list[VariantResult]:
    """Correct the p-values of all judged cells by Holm's method for their number."""
    places = [(number, name) for number, each in enumerate(variants) for name in each.judged]
    cells = [dict(each.cells) for each in variants]
    apart = correct_all([cells[number][name].apart or Difference(None) for number, name in places])
    for (number, name), corrected in zip(places, apart, strict=True):
        cells[number][name] = replace(cells[number][name], apart=corrected)
    return [replace(each, cells=own) for each, own in zip(variants, cells, strict=True)]


def _calls(variant: VariantResult) -> list[Call]:
    return [variant.cells[name].call for name in variant.judged]


def _describe(base: str, variant: VariantResult, name: str) -> str:
    cell = variant.cells[name]
    if cell.apart is None or cell.call == Call.UNKNOWN:
        return f"how `{variant.name}` differs from `{base}` can't be told: too few labels, or users"
    told = f"{name} differs by {cell.apart.shown()}"
    if cell.call == Call.NOT_SHOWN:
        return f"`{variant.name}` is not shown to differ from `{base}`{once_corrected(cell.apart)}: {told}"
    return f"`{variant.name}` is {cell.call} than `{base}`: {told}"


def make_report(experiment: ExperimentResult, identity: Mapping[str, Any]) -> Report:
    """Build the report of an experiment.

    Args:
        experiment: The results.
        identity: Features and settings of the runs.
    """
    warnings = [Sentence(each, "warning") for each in experiment.warnings]
    tables = [] if len(experiment.variants) == 1 else [_table_of_variants(experiment)]
    tables += experiment.tables
    heads = ("", "mean", "95% interval", "between runs", f"between {experiment.units}")
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
                f"either side's runs / their number, and by the {experiment.units}, which are redrawn for both sides "
                "alike. Intervals are 95% and Student's. A verdict rests on the p-value, corrected by Holm's method "
                "for "
                "all questions; intervals are not corrected."
            ),
            "Between runs": "The standard deviation over runs.",
            f"Between {experiment.units}": f"The standard error of the mean from the choice of {experiment.units}.",
        },
        identity=identity,
    )


def _table_of_variants(experiment: ExperimentResult) -> Table:
    names = list(experiment.variants[0].cells)
    heads = ("", *names, "parameters", "seconds")
    rows: list[Row] = [
        (
            each.name,
            *(_cell(each.cells.get(name)) for name in names),
            thousands(each.parameters),
            fixed(each.seconds, 1),
        )
        for each in experiment.variants
    ]
    title = f"Variants: {len(experiment.seeds)} runs of each, {experiment.rows:,} rows"
    return Table(title, heads, rows, f"means, and differences from {experiment.base}; colored: shown")


def _cell(cell: MetricMean | None) -> Cell:
    if cell is None or cell.mean is None:
        return Cell(NONE)
    apart = "" if cell.apart is None or cell.apart.value is None else cell.apart.shown()
    return Cell(f"{cell.mean:.4f}", apart, _MARKS.get(cell.call, ""))


def _mean_cells(metric: Named, mean: TrainingsMean) -> list[str]:
    """Return a mean, its interval, the spread between runs, the error by users, and the value of each run."""
    numbers = [mean.mean, mean.between_trainings, mean.between_users, *mean.values]
    value, *others = (NONE if number is None else metric.shown(number) for number in numbers)
    ends = [metric.shown(end) for end in (mean.low, mean.high) if end is not None]
    return [value, " to ".join(ends) or NONE, *others]


def write(experiment: ExperimentResult, folder: Path, identity: Mapping[str, Any]) -> None:
    """Write `comparison.json` with all values, and the report. identity: features and settings of the runs."""
    adopted = None if experiment.adopted is None else experiment.adopted.name
    tree = {"adopted": adopted, **asdict(experiment)}
    write_text(folder / FILE, json.dumps(tree, indent=1))
    write_report(make_report(experiment, identity), folder)
