"""What several trainings of a setting are worth: the files that say it, and what a terminal shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.trainings import SettingsDifference, TrainingsMean, average_trainings, compare_trainings
from mmoe_rec.jobs.run_page import command
from mmoe_rec.jobs.seeds.measuring import FILE, warnings_of
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.evaluation.results import MeasuredModel

_PAGE = "report.html"


@dataclass(frozen=True)
class Found:
    """What was found. title: of the page; seeds: of the trainings; rows: measured; units: what was redrawn for the
    intervals, such as `users`; summary: of `average_trainings`; against: name of each other setting -> differences, of
    `compare_trainings`; warnings: what is suspicious; facts: what a reader wants to know; folder: for the files."""

    title: str
    seeds: tuple[int, ...]
    rows: int
    units: str
    summary: dict[str, dict[str, TrainingsMean]]
    folder: Path
    against: Mapping[str, SettingsDifference] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        settings: Settings,
        seeds: tuple[int, ...],
        mine: Sequence[MeasuredModel],
        others: Mapping[str, Sequence[MeasuredModel]],
        precision: str,
    ) -> Found:
        """By what was measured of these trainings, and of those of other settings. Raises UserError where they were
        not measured on the same rows."""
        from mmoe_rec.evaluation.comparison import Objective

        rules, sums, first = settings.evaluation, [each.closed for each in mine], mine[0].summary
        units = "rows" if first.each_row_is_a_user else "users"
        facts = {"log": settings.data.log, "rows": f"{first.rows:,} test rows", "precision": precision}
        facts |= {f"resamples of {units}": f"{rules.resamples:,}", "command": command()}
        if others:  # whatever they rank by, what a row is worth is the same for all
            facts["relevance"] = ", ".join(
                f"{weight:g} x {name}" for name, weight in first.facts["relevance_weights"].items()
            )
        warnings = warnings_of("these settings", mine)
        for name, each in others.items():
            warnings += warnings_of(f"'{name}'", each)
        found = Found(
            f"{len(seeds)} trainings of {settings.name}",
            seeds,
            first.rows,
            units,
            average_trainings(sums, rules.resamples),
            Path(settings.data.work) / "seeds",
            warnings=warnings,
            facts=facts,
        )
        if not others:
            return found
        theirs = {name: [one.closed for one in each] for name, each in others.items()}
        try:
            objective = Objective.of(rules.decide_by, sums[0], list(settings.tasks))
            return found.beside(compare_trainings(sums, theirs, objective, rules.resamples))
        except UserError:
            found.write()  # what these settings are worth was found all the same
            raise

    def beside(self, against: Mapping[str, SettingsDifference]) -> Found:
        """The same with the differences from other settings."""
        return Found(**{**self.__dict__, "against": against})

    @property
    def file(self) -> Path:
        """That holds all numbers."""
        return self.folder / FILE

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / _PAGE

    @property
    def sentences(self) -> list[str]:
        """Beside which settings these are better, and what one training is worth."""
        from mmoe_rec.report.trainings import describe_differences, describe_uncertainty

        return [*describe_differences(self.against), *describe_uncertainty(self.summary, self.units)]

    @staticmethod
    def forget(folder: Path) -> None:
        """Removes the files of an earlier run."""
        for name in (FILE, _PAGE):
            (folder / name).unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def put_away(folder: Path, models: Callable[[], object]) -> Iterator[None]:
        """Removes the files of an earlier run while others are trained, for whose they would be taken; where these are
        refused and the models are as they were, the files come back. models: what tells them from others."""
        before = models()
        kept = {name: (folder / name).read_bytes() for name in (FILE, _PAGE) if (folder / name).is_file()}
        Found.forget(folder)
        try:
            yield
        except UserError:
            if models() == before:
                for name, content in kept.items():
                    with atomic_file(folder / name) as path:
                        path.write_bytes(content)
            raise

    def write(self) -> None:
        """Writes the files, the page last."""
        from mmoe_rec.report.trainings import page

        Found.forget(self.folder)
        tree = {"seeds": self.seeds, "rows": self.rows, **self.summary}
        tree |= {"against": self.against} if self.against else {}
        tree |= {"warnings": list(self.warnings)} if self.warnings else {}
        with atomic_file(self.file) as path:
            path.write_text(json.dumps(tree, indent=1, default=asdict), encoding="utf-8")
        with atomic_file(self.report) as path:
            path.write_text(page(self), encoding="utf-8")

    def told(self) -> Iterator[Table | str]:
        """For the terminal."""
        from mmoe_rec.report.trainings import trainings_table

        yield trainings_table(self)
        yield from self.sentences
        yield from (f"warning: {each}" for each in self.warnings)
