"""Structures of the network on a log, as sentences, a table and a page: which is worth it, and which tasks help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.report.formatting import difference, signed
from mmoe_rec.report.pages import render
from mmoe_rec.report.sentences import once_corrected

HELPS, HARMS, NOT_SHOWN, UNKNOWN = "helps", "harms", "not shown", "unknown"
STRUCTURES = SHARED_BOTTOM, ONE_GATE, MIXTURE, PLE = "shared bottom", "one gate", "MMoE", "PLE"
"""From simple to less so."""
OWN, TREES = "these settings", "trees alone"


@dataclass(frozen=True)
class Answer:
    """What the first variant's mean over trainings is above another one's.

    kind: of the question: `structure`, `trees`, `alone` (the task learnt alone) or `without` (another task left out);
    other: the other variant; task: that is judged, or None for what decides; left_out: the tasks that only the first
    one learns; metric, better: of which higher or lower is better; change: what makes the other one of the settings, in
    YAML; apart: corrected for all answers.
    """

    kind: str
    other: str
    task: str | None
    left_out: tuple[str, ...]
    metric: str
    better: str
    change: str
    apart: Difference

    @property
    def call(self) -> str:
        """Whether what the first variant has besides helps, harms, or is not shown to do either."""
        if self.apart.value is None or self.apart.low is None:
            return UNKNOWN
        if not self.apart.is_significant or (self.apart.low <= 0 <= (self.apart.high or 0.0)):
            return NOT_SHOWN
        return HELPS if (self.apart.value > 0) == (self.better == "higher") else HARMS

    @property
    def largest_loss(self) -> float | None:
        """What the other variant may lose at most, by the interval."""
        ends = self.apart.high, self.apart.low
        end = ends[0] if self.better == "higher" else ends[1]
        return None if end is None else max(0.0, end if self.better == "higher" else -end)


@dataclass(frozen=True)
class Cell:
    """A metric's mean over trainings, and how far the first variant's mean is above it, None of its own."""

    mean: float | None
    apart: Difference | None = None


@dataclass(frozen=True)
class StructureRow:
    """A variant: cells by task; parameters: of its network; seconds: that a training took, on average."""

    name: str
    cells: Mapping[str, Cell]
    parameters: int | None
    seconds: float


@dataclass(frozen=True)
class StructuresReport:
    """What structures and tasks are worth.

    title: of the page; name: of the first variant, the settings'; seeds: of the trainings; rows: that were measured;
    units: what was redrawn, `users` or `rows`; objective: what decides, None where nothing can; table: the variants;
    metrics: of each task that is judged; few: each other task -> rows of its rarer label; margin: what may be lost;
    has_trees: whether the settings have trees beside the network; warnings, facts: as in `TrainingsReport`.
    """

    title: str
    name: str
    seeds: tuple[int, ...]
    rows: int
    units: str
    objective: str | None
    table: Sequence[StructureRow]
    answers: Sequence[Answer]
    metrics: Mapping[str, str]
    few: Mapping[str, int]
    margin: float
    has_trees: bool
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """The verdicts, what to change, and what this log can show."""
        order = ("alone", "without", "structure", "trees")
        answers = sorted(self.answers, key=lambda each: order.index(each.kind))
        found = [_describe(each, self) for each in answers]
        for task, rows in self.few.items():
            found.append(f"`{task}` is not judged: {rows:,} test rows have its rarer label, which are too few")
        return [*found, *_advise(self), *_describe_power(self)]


def _describe(answer: Answer, report: StructuresReport) -> str:
    """What the first variant has and the other one lacks, and what that is worth."""
    if answer.kind in ("alone", "without"):
        one, verbs = len(answer.left_out) == 1, ("helps", "harms", "is")
        beside = "it" if answer.kind == "alone" else "the others"
        what, of = f"`{answer.left_out[0]}` beside {beside}", f"its {answer.metric}"
        if not one:
            what, verbs = "the other tasks", ("help", "harm", "are")
        shown = {HELPS: f"{what} {verbs[0]} `{answer.task}`", HARMS: f"{what} {verbs[1]} `{answer.task}`"}
        shown[NOT_SHOWN] = f"{what} {verbs[2]} not shown to help or harm `{answer.task}` here"
        shown[UNKNOWN] = f"whether {what} {verbs[0]} `{answer.task}`"
    else:
        first, other, of = _name(report.name), _name(answer.other), str(report.objective)
        shown = {HELPS: f"{first} is better than {other} here", HARMS: f"{first} is worse than {other} here"}
        shown[NOT_SHOWN] = f"{first} is not shown to differ from {other} here"
        shown[UNKNOWN] = f"how {first} differs from {other}"
    said = shown[answer.call]
    if answer.call == UNKNOWN:
        return f"{said} can't be told: too few labels, or users"
    why = once_corrected(answer.apart) if answer.call == NOT_SHOWN else ""
    return f"{said}{why}: {of} differs by {difference(answer.apart)}"


def _advise(report: StructuresReport) -> Iterator[str]:
    """What to write into the settings, if anything."""
    structures = [each for each in report.answers if each.kind == "structure" and each.call != UNKNOWN]
    better = [each for each in structures if each.call == HARMS]
    own = STRUCTURES.index(report.name) if report.name in STRUCTURES else len(STRUCTURES)
    simpler = [each for each in structures if STRUCTURES.index(each.other) < own and each.call != HELPS]
    enough = [each for each in simpler if each.largest_loss is not None and each.largest_loss <= report.margin]
    if better:
        best = min(better, key=lambda each: (each.apart.value or 0.0) * (1 if each.better == "higher" else -1))
        yield f"what to write: `{best.change}`, since {_name(best.other)} is better here"
    elif enough:
        first = min(enough, key=lambda each: STRUCTURES.index(each.other))
        (loss,) = signed(first.largest_loss or 0.0, sign=False)
        yield (
            f"what to write: `{first.change}`, since {_name(first.other)} is simpler and loses no more than {loss} "
            f"{report.objective} here"
        )
    elif structures:
        yield f"nothing to change in `model`: nothing simpler than {_name(report.name)} is shown to be as good"
    for each in report.answers:
        if each.call == HARMS and each.task is not None:
            lower = ", ".join(f"`tasks.{task}.loss_weight`" for task in each.left_out)
            yield f"for `{each.task}`: lower {lower}, or train it by settings of its own ({each.change})"
    if not report.has_trees and any(each.kind == "trees" and each.call == HARMS for each in report.answers):
        yield "what to write: `model: {trees: {}}`, which puts boosted trees beside the network"


def _describe_power(report: StructuresReport) -> Iterator[str]:
    """What comparisons like these can show at all."""
    of_objective = [each.apart for each in report.answers if each.task is None]
    sizes = {report.objective or "": [each.detectable for each in of_objective if each.detectable is not None]}
    for each in report.answers:
        if each.task is not None and each.apart.detectable is not None:
            sizes.setdefault(f"{each.metric} of `{each.task}`", []).append(each.apart.detectable)
    told = [f"{signed(max(each), sign=False)[0]} {name}" for name, each in sizes.items() if each]
    if told:
        yield (
            f"with these test rows and {len(report.seeds)} trainings of each, nine of ten comparisons alone would show "
            f"a difference of {', or '.join(told)}; smaller ones may be there"
        )


def _name(variant: str) -> str:
    """A variant in a sentence."""
    names = {SHARED_BOTTOM: "a shared bottom", ONE_GATE: "one gate for all tasks", TREES: "boosted trees alone"}
    return names.get(variant, f"{variant}' own structure" if variant == OWN else variant)


def terminal_parts(report: StructuresReport) -> Iterator[Table | str]:
    """Sentences, the table, and warnings, for the terminal."""
    yield from report.sentences
    table = Table(title=f"{len(report.seeds)} trainings of each, {report.rows:,} test rows", title_justify="left")
    table.add_column("", no_wrap=True)
    heads = [f"{metric} of {task}" for task, metric in report.metrics.items()]
    for name in (*heads, "parameters", "seconds"):
        table.add_column(name, justify="right")
    for row in report.table:
        cells = [_show(row.cells.get(task)) for task in report.metrics]
        parameters = "-" if row.parameters is None else f"{row.parameters:,}"
        table.add_row(Text(row.name), *cells, parameters, f"{row.seconds:.1f}")
    table.caption = f"under each mean: how far {report.name} is above it, with the 95% interval, which is not corrected"
    yield table
    yield from (f"warning: {each}" for each in report.warnings)


def _show(cell: Cell | None) -> str:
    """A mean; under it the difference, and its interval."""
    if cell is None or cell.mean is None:
        return "-"
    if cell.apart is None or cell.apart.value is None:
        return f"{cell.mean:.4f}"
    value, _, ends = difference(cell.apart).partition(" ")
    return f"{cell.mean:.4f}\n{value}\n{ends.strip('()')}".rstrip()


def page(report: StructuresReport) -> str:
    """The whole page."""
    return render("structures.html.j2", {"title": report.title, "report": report})
