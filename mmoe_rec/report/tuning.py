"""What a search within a time has found, as sentences, a table and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.report.formatting import difference, percent
from mmoe_rec.report.pages import render


@dataclass(frozen=True)
class TriedAlternative:
    """What was tried. name: in words; effect: what it gives on the users that choose, by the trainings of all rungs, of
    which so many took it; dropped: whether the last rung did not try it; taken: whether it is in the settings that were
    found."""

    name: str
    effect: Difference
    trainings: int
    dropped: bool = False
    taken: bool = False

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.taken:
            return "taken"
        if self.effect.is_significant and self.effect.value is not None:
            return "better" if self.effect.value > 0 else "worse"
        return "not shown"


@dataclass(frozen=True)
class TuningReport:
    """A search, from the settings `file`.

    metric: that decides, on validation rows; minutes: budget, and spent; trainings: that ended; failed: each training
    that did not, why; tried: all alternatives, in the order of their effects; joined: names of the best, which were
    compared with the file; compared: their difference from it on the other users, by `sides` trainings of each; taken:
    names of those in `best`, the file that was written; seconds: of a training by the best and by the file; sample:
    share of the users whose rows were trained on; not_tried: what takes other features; facts: name -> text.
    """

    title: str
    file: str
    best: str
    metric: str
    minutes: tuple[float, float]
    trainings: int
    failed: Mapping[str, str]
    tried: Sequence[TriedAlternative]
    joined: Sequence[str]
    compared: Difference
    sides: tuple[int, int]
    taken: Sequence[str]
    seconds: tuple[float, float]
    sample: float = 1.0
    not_tried: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        """What to take, how sure that is, and what was not tried."""
        return list(_describe(self))

    def to_tree(self) -> dict[str, Any]:
        """All of it as JSON can hold it, with the sentences."""
        tree = {"sentences": self.sentences} | vars(self)
        del tree["not_tried"]
        return tree | {"tried": [{**vars(each), "verdict": each.verdict} for each in self.tried]}


_ON_OTHERS = "on validation rows of users who had no say in the choice"


def _describe(report: TuningReport) -> Iterator[str]:
    both = f"{report.sides[0]} trainings of each" if report.sides[0] == report.sides[1] else ""
    both = both or f"{report.sides[0]} trainings of these and {report.sides[1]} of the file's"
    apart = difference(report.compared) if report.compared.value is not None else ""
    joined, effects = (
        "; ".join(report.joined),
        {each.name: difference(each.effect) for each in report.tried if each.taken},
    )
    taken = list(report.taken)
    if not report.tried:
        yield (
            f"too few trainings fit into {report.minutes[0]:g} minutes to tell anything from chance: give more with "
            f"--minutes; '{report.file}' is kept as it is"
        )
    elif taken and taken == list(report.joined):
        shown = report.compared.low is not None and report.compared.low > 0
        how = "is better than the file" if shown else "is simpler than the file, and not worse"
        yield f"'{report.best}' {how}: {report.metric} differs by {apart}, by {both}, {_ON_OTHERS}"
        yield f"it changes: {joined}"
    elif taken:
        yield (
            f"'{report.best}' takes what is shown by itself to be better than the file, in {report.metric} of the "
            "validation rows of half of the users: "
            f"{'; '.join(f'{name}, {effects[name]}' for name in taken)}"
        )
        yield f"{joined}: together they differ from the file by {apart}, by {both}, {_ON_OTHERS}"
    elif apart:
        yield (
            f"nothing is shown to be better than '{report.file}': the best alternatives together ({joined}) differ in "
            f"{report.metric} by {apart}, by {both}, {_ON_OTHERS}"
        )
    elif report.joined:
        yield f"the time was over before the best alternatives ({joined}) were compared with the file, which is kept"
    else:
        yield f"no alternative gives more than '{report.file}' by more than its standard error: the file is kept"
    if worse := [each.name for each in report.tried if each.verdict == "worse"]:
        yield f"shown to be worse than the file: {'; '.join(worse)}"
    if taken == list(report.joined) and report.seconds[1]:
        yield f"a training of {joined} takes {report.seconds[0]:.0f} s, and {report.seconds[1]:.0f} s by the file"
    if report.sample < 1:
        yield (
            f"all was tried on the rows of {percent(report.sample)} of the users, since too few trainings on all rows "
            "fit into the time: what needs many rows, such as wide vectors of ids, may be worth more on all of them"
        )
    if report.failed:
        number, reason = len(report.failed), next(iter(report.failed.values()))
        yield f"{number} training{'s' * (number > 1)} failed and did not count; the first one: {reason}"
    if report.not_tried:
        yield f"not tried: {'; '.join(report.not_tried)}"


def terminal_parts(report: TuningReport) -> Iterator[Table | str]:
    """A table and sentences, for the terminal."""
    if report.tried:
        title = f"{report.trainings} trainings, {report.minutes[1]:.0f} of {report.minutes[0]:g} minutes"
        table = Table(title=title, title_justify="left", caption="gives: of the validation rows, beside the file")
        table.add_column("alternative")
        for name in (f"gives {report.metric.partition(' of ')[0]}", "trainings", ""):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for each in report.tried:
            effect = "-" if each.effect.value is None else difference(each.effect)
            style = {"taken": "green", "worse": "red"}.get(each.verdict, "")
            table.add_row(each.name, effect, str(each.trainings), Text(each.verdict, style=style))
        yield table
    yield from report.sentences


def page(report: TuningReport) -> str:
    """The whole page."""
    return render("tuning.html.j2", {"title": report.title, "tuning": report})
