"""What features are worth, as sentences, a table, a page, and numbers for others to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from mmoe_rec.atomic import atomic_file, write_text
from mmoe_rec.evaluation.ablation import FEATURE, GROUP, Worth
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.summary import Objective
from mmoe_rec.report.formatting import NONE, difference, signed, size
from mmoe_rec.report.pages import render

if TYPE_CHECKING:
    from mmoe_rec.inference.costs import Cost

FILE, NUMBERS, PAGE = "ablation.json", "ablation.parquet", "report.html"
_FIRST = 3  # features that matter most, which are told


@dataclass(frozen=True)
class AblationReport:
    """What features of a model are worth and cost.

    title: of the page; objective, value: what decides, and what the model has of it; margin: loss of it that is none;
    worths: of features, then of groups; leave_out: what may be left out, with what is lost without all of it; costs: by
    name of a part; readers: feature -> others that read its tables; placement: features that are absent in serving;
    units: what was redrawn, `users` or `rows`; fingerprint: of the features; facts: name -> text; retrained: what
    models lose that never had features, by so many `seeds` of trainings.
    """

    title: str
    objective: Objective
    value: float
    margin: float
    worths: Sequence[Worth]
    leave_out: Worth | None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    readers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    placement: Sequence[str] = ()
    units: str = "users"
    fingerprint: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    retrained: Sequence[Worth] = ()
    seeds: int = 0

    def of_kind(self, kind: str) -> list[Worth]:
        """Worths of features, or of groups, the largest first."""
        found = [each for each in self.worths if each.part.kind == kind]
        return sorted(found, key=lambda each: -(each.objective.value or 0.0))

    @property
    def sections(self) -> dict[str, list[Worth]]:
        """Title -> worths, the largest first; only those that there are."""
        retrained = sorted(self.retrained, key=lambda each: -(each.objective.value or 0.0))
        found = {"Features": self.of_kind(FEATURE), "Groups": self.of_kind(GROUP), "Trained without": retrained}
        return {title: its for title, its in found.items() if its}

    @property
    def left_out(self) -> tuple[str, ...]:
        """The features that may be left out: a loss that trainings without them show speaks against it."""
        together = self._trained_together
        if self.leave_out is None or (together is not None and together.is_shown):
            return ()
        return self.leave_out.part.features

    @property
    def _trained_together(self) -> Worth | None:
        """What trainings lose without all that permutations say may be left out."""
        left = () if self.leave_out is None else self.leave_out.part.features
        return next((each for each in self.retrained if {*each.part.features} == {*left}), None)

    @property
    def overrides(self) -> str:
        """What leaves features out when it is added to a command."""
        return " ".join(f"--features.{name} null" for name in self.left_out)

    @property
    def sentences(self) -> list[str]:
        """What to leave out, what matters most, and what can't be told."""
        features = self.of_kind(FEATURE)
        return [
            self._describe_leaving_out(),
            *_describe_best(features, self.objective.name),
            *self._describe_open(features),
            *self._describe_retrained(),
            *self._describe_kept(features),
            *self._describe_placement(),
        ]

    def _describe_leaving_out(self) -> str:
        if self.leave_out is None:
            margin = f"{self.margin:g} of {self.objective.name}"
            return f"leave nothing out: without each feature a loss is shown, or one of {margin} is not ruled out"
        names, apart, together = self.leave_out.part.features, self.leave_out.objective, self._trained_together
        trained = ""
        if together is not None:
            trained = f"; {self.seeds} trainings without lose {difference(together.objective)}"
            if together.is_shown:
                return f"leave nothing out: this model hardly uses {_listed(names)} ({difference(apart)}){trained}"
        saved = "" if (cost := self.costs.get(self.leave_out.part.name)) is None else _describe_saving(cost)
        most = signed(max(apart.high or 0.0, 0.0), sign=False)[0]
        loses = "loses" if self.leave_out.is_shown else "is not shown to lose anything,"
        return (
            f"leave out {_listed(names)}: that {loses} at most {most} of {self.objective.name} ({difference(apart)})"
            f"{saved}{trained}"
        )

    def _describe_open(self, features: Sequence[Worth]) -> Iterator[str]:
        left = self.leave_out.part.features if self.leave_out is not None else ()
        unknown = [each for each in features if not each.is_shown and each.part.name not in left]
        if unknown:
            yield (
                f"without {_listed([each.part.name for each in unknown])} no loss is shown, but one of {self.margin:g} "
                "is not ruled out, alone or with what is left out: more --rows or --repeats tell more"
            )

    def _describe_retrained(self) -> Iterator[str]:
        if not self.retrained:
            yield (
                "this tells what the model uses: of features that say the same, each may seem to be needed, or none; "
                "--retrain tells what models lose that never had them"
            )
            return
        ranked = sorted(self.retrained, key=lambda each: -(each.objective.value or 0.0))
        shown = [each for each in ranked if each.is_shown]
        others = [each for each in ranked if not each.is_shown and each is not self._trained_together]
        if shown:
            told = ", ".join(f"`{each.part.name}` ({difference(each.objective)})" for each in shown)
            yield f"{self.seeds} trainings lose without {told}"
        if others:
            most = max(_largest_loss(each) for each in others)
            size = "of any size" if np.isinf(most) else f"of up to {signed(most, sign=False)[0]}"
            names = _listed([each.part.name for each in others], "or")
            yield f"{self.seeds} trainings without {names} show no loss, but one {size} is not ruled out"
        used = {each.part.name for each in self.worths if each.is_shown}
        spared = [each.part.name for each in others if _largest_loss(each) <= self.margin]
        if copies := [name for name in spared if name in used]:
            yield (
                f"this model uses {_listed(copies)}, though models that never had it lose {self.margin:g} at most: "
                "other features say the same, so leave out one at a time"
            )

    def _describe_kept(self, features: Sequence[Worth]) -> Iterator[str]:
        for each in features:
            readers = [name for name in self.readers.get(each.part.name, ()) if name not in self.left_out]
            if readers and not each.is_shown:
                reads = "reads" if len(readers) == 1 else "read"
                yield f"`{each.part.name}` stays as long as {_listed(readers)} {reads} its ids"

    def _describe_placement(self) -> Iterator[str]:
        if self.placement:
            verb = "describes" if len(self.placement) == 1 else "describe"
            yield (
                f"{_listed(self.placement)} {verb} placement, which is absent when the model ranks: only a training "
                "without them tells what they are worth"
            )

    def records(self) -> list[dict[str, Any]]:
        """A row for each part, and what decides or a task."""
        rows = []
        permuted = [*self.worths, *filter(None, [self.leave_out])]
        for how, each in [
            *(("permuted", each) for each in permuted),
            *(("retrained", each) for each in self.retrained),
        ]:
            cost = self.costs.get(each.part.name) if how == "permuted" else None
            about = {"how": how, "part": each.part.name, "kind": each.part.kind, "features": list(each.part.features)}
            of_cost = {} if cost is None else vars(cost)
            for group, apart in {"objective": each.objective, **each.tasks}.items():
                rows.append({**about, "of": group, **asdict(apart), **of_cost})
        return rows


def write(report: AblationReport, folder: Path) -> None:
    """Writes all files, the page last."""
    tree = {
        "sentences": report.sentences,
        "fingerprint": report.fingerprint,
        "objective": {"name": report.objective.name, "better": report.objective.better, "value": report.value},
        "margin": report.margin,
        "leave_out": list(report.left_out),
        "overrides": report.overrides,
        "losses": report.records(),
        "facts": dict(report.facts),
    }
    text = page(report)
    (folder / PAGE).unlink(missing_ok=True)
    with atomic_file(folder / NUMBERS) as path:
        pq.write_table(pa.Table.from_pylist(report.records(), _SCHEMA), path)
    write_text(folder / FILE, json.dumps(tree, indent=1, allow_nan=False))
    write_text(folder / PAGE, text)


_NUMBERS = ("value", "low", "high", "error", "effective_users", "p", "p_corrected", "detectable")
_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("how", "part", "kind"), pa.string()),
        "features": pa.list_(pa.string()),
        "of": pa.string(),
        **dict.fromkeys((*_NUMBERS, "milliseconds", "error_milliseconds"), pa.float64()),
        "bytes": pa.int64(),
    }
)


def terminal_parts(report: AblationReport) -> Iterator[Table | str]:
    """Sentences, then tables, for the terminal."""
    yield from report.sentences
    if report.overrides:
        yield f"to leave them out: {report.overrides}"
    for title, worths in report.sections.items():
        yield _table(report, worths, title)


def _table(report: AblationReport, worths: Sequence[Worth], title: str) -> Table:
    caption = f"loss of {report.objective.name} without, with its 95% interval; bold: shown (corrected)"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", caption=caption)
    table.add_column("", no_wrap=True)
    for name in ("loss", "95% interval", *report.worths[0].tasks, "ms", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in worths:
        value, ends = _cells(each.objective)
        tasks = [_cells(apart)[0] for apart in each.tasks.values()]
        cost = report.costs.get(each.part.name)
        costs = ["-", "-"] if cost is None else [f"{cost.milliseconds:.2f}", size(cost.bytes)]
        style = "bold" if each.is_shown else ""
        table.add_row(Text(each.part.name, style=style), Text(value, style=style), ends, *tasks, *costs)
    return table


def page(report: AblationReport) -> str:
    """The whole page."""

    def verdict(each: Worth) -> tuple[str, str]:
        if each.part.name in report.left_out:
            return "leave out", "good"
        return ("needed", "") if each.is_shown else ("open", "warning")

    tables = {}
    for title, worths in report.sections.items():
        largest = max((each.objective.value or 0.0 for each in worths), default=0.0) or 1.0
        tables[title] = [
            {
                "worth": each,
                "share": max(each.objective.value or 0.0, 0.0) / largest,
                "cost": report.costs.get(each.part.name),
                "verdict": verdict(each) if title == "Features" else None,
            }
            for each in worths
        ]
    tasks = list(report.worths[0].tasks)
    return render("ablation.html.j2", {"title": report.title, "report": report, "tables": tables, "tasks": tasks})


def _cells(apart: Difference) -> tuple[str, str]:
    if apart.value is None:
        return NONE, NONE
    value, *ends = (f"{each:+.4f}" for each in (apart.value, apart.low, apart.high) if each is not None)
    return value, " to ".join(ends) or NONE


def _describe_best(features: Sequence[Worth], name: str) -> Iterator[str]:
    shown = [each for each in features if each.is_shown][:_FIRST]
    if shown:
        first, *others = (f"`{each.part.name}` ({difference(each.objective)})" for each in shown)
        then = f"; then {' and '.join(others)}" if others else ""
        yield f"what matters most is {first}, by what {name} loses without it{then}"


def _largest_loss(worth: Worth) -> float:
    """By the interval, which is of any size where there is none."""
    return np.inf if worth.objective.high is None else max(0.0, worth.objective.high)


def _describe_saving(cost: Cost) -> str:
    """What is worth telling: time beyond its noise, and a kibibyte."""
    saved = [f"{cost.milliseconds:.1f} ms of a request"] * (cost.milliseconds > max(2 * cost.error_milliseconds, 0.05))
    saved += [f"{size(cost.bytes)} of memory"] * (cost.bytes >= 1024)
    return f", and saves {' and '.join(saved)}" if saved else ""


def _listed(names: Sequence[str], last: str = "and") -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"
