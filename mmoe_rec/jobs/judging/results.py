"""What is measured of one or several models on the same rows, and the files that it makes.

OUT/metrics.json, sums/            of the model in question
OUT/against/1/metrics.json, ...    of each model that it is compared with
OUT/comparison.json                differences and verdicts, where there are others
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.settings.sections import Evaluation

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.evaluation.summary import Sums


@dataclass(frozen=True)
class Measured:
    """A model's sums, and the summary of its metrics."""

    sums: Sums
    summary: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What was measured. models: by name, the one in question first; tasks: those that may decide; rules: by which."""

    models: dict[str, Measured]
    tasks: tuple[str, ...]
    rules: Evaluation = field(default_factory=Evaluation)

    @property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return {name: each.summary for name, each in self.models.items()}

    @cached_property
    def comparison(self) -> dict[str, Any] | None:
        """Of the first model with the others, see `compare`; None where it is alone.

        Raises UserError where the rows are not the same.
        """
        if len(self.models) == 1:
            return None
        from mmoe_rec.evaluation.closed import as_closed
        from mmoe_rec.evaluation.judging.compare import compare
        from mmoe_rec.evaluation.judging.verdict import Rule

        rule, (model, *_) = Rule(self.rules.margin, self.rules.calibration), self.models
        sums = {name: as_closed(each.sums) for name, each in self.models.items()}
        resamples = self.models[model].summary["resamples"]
        return compare(sums, model, self.summaries, self.tasks, self.rules.decide_by, rule, resamples)

    def write(self, out: Path) -> None:
        """Writes the files, replacing those of an evaluation before."""
        comparison = self.comparison  # what can't be compared leaves all as it was
        shutil.rmtree(out / "against", ignore_errors=True)
        (out / "comparison.json").unlink(missing_ok=True)
        for place, each in enumerate(self.models.values()):
            folder = out / "against" / str(place) if place else out
            each.sums.save(folder / "sums")
            _write(folder / "metrics.json", each.summary)
        if comparison is not None:
            _write(out / "comparison.json", comparison)

    def told(self) -> Iterator[Table | str]:
        """For the terminal: tables, verdicts, notes and warnings."""
        from mmoe_rec.evaluation.findings import warnings
        from mmoe_rec.evaluation.judging.compare import told_of
        from mmoe_rec.evaluation.judging.table import differences_table
        from mmoe_rec.evaluation.notes import told
        from mmoe_rec.evaluation.table import results_table

        yield results_table(self.summaries)
        if self.comparison is not None:
            yield differences_table(self.comparison)
            yield from told_of(self.comparison)
        yield from (f"note: {note}" for note in told(list(self.summaries.values())))
        for name, summary in self.summaries.items():
            of = f"'{name}': " if len(self.models) > 1 else ""
            yield from (f"warning: {of}{warning}" for warning in warnings(summary))


def short_names(paths: Sequence[str]) -> list[str]:
    """Names for files or folders that are told apart by the ends of their paths."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def check_names(names: list[str], option: str) -> None:
    """Raises UserError where two models are called the same. option: of the command, for the others."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"'{twice}' is compared with itself; give other models with {option}")


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
