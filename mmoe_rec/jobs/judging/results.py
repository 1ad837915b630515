"""What is measured of one or several models on the same rows, and the files that it makes.

OUT/metrics.json, sums/            of the model in question
OUT/against/1/metrics.json, ...    of each model that it is compared with
OUT/comparison.json                differences and verdicts, where there are others
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.errors import UserError
from mmoe_rec.log.files import is_remote
from mmoe_rec.settings.sections import Evaluation, Settings

if TYPE_CHECKING:
    from rich.table import Table

    from mmoe_rec.evaluation.slices import SlicedModel
    from mmoe_rec.evaluation.summary import Sums
    from mmoe_rec.evaluation.sums import ClosedSums

RESAMPLES_OF_SLICES = 200  # standard errors are good to 5%


@dataclass(frozen=True)
class Measured:
    """A model's sums, and the summary of its metrics.

    address: where it, or its predictions, come from; gates: task -> mean weight of each expert, None where they are
    unknown; seen: sentences on how it has seen these rows before; users: on how it has seen their users; slices: its
    sums in each, see `sliced`; tradeoffs: records of other weights, see `told_of_sweep`; placement: records of
    what it has learnt of it, see `placement_told`.
    """

    sums: Sums
    summary: dict[str, Any]
    address: str
    gates: dict[str, list[float]] | None = None
    seen: Sequence[str] = ()
    users: Sequence[str] = ()
    slices: Mapping[tuple[str, str], ClosedSums] = field(default_factory=dict)
    tradeoffs: Sequence[dict[str, Any]] = ()
    placement: Sequence[dict[str, Any]] = ()

    @cached_property
    def closed(self) -> ClosedSums:
        """The sums, ready to be compared."""
        from mmoe_rec.evaluation.sums import as_closed

        return as_closed(self.sums)


@dataclass(frozen=True)
class Results:
    """What was measured. models: by name, the one in question first; tasks: those that may decide; rules: by which;
    title, facts: what a report says of the rows."""

    models: dict[str, Measured]
    tasks: tuple[str, ...]
    rules: Evaluation
    title: str
    facts: dict[str, str]

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
        from mmoe_rec.evaluation.comparison import Rule, compare

        rule, (model, *_) = Rule.of(self.rules), self.models
        sums = {name: each.closed for name, each in self.models.items()}
        resamples = self.models[model].summary["resamples"]
        return compare(sums, model, self.summaries, self.tasks, self.rules.decide_by, rule, resamples)

    @cached_property
    def slices(self) -> list[dict[str, Any]]:
        """Records of all slices, see `sliced`."""
        from mmoe_rec.evaluation.slices import sliced

        (model, *_) = self.models
        return sliced(self._sliced, model, min(self.models[model].summary["resamples"], RESAMPLES_OF_SLICES))

    @property
    def _sliced(self) -> dict[str, SlicedModel]:
        from mmoe_rec.evaluation.slices import SlicedModel

        return {name: SlicedModel(each.closed, each.slices) for name, each in self.models.items()}

    @property
    def findings(self) -> list[dict[str, str]]:
        """What is suspicious: each with the `model`, the `check` that found it, and a `message`."""
        from mmoe_rec.report.findings import findings

        found = []
        for name, each in self.models.items():
            for check, sentences in (("seen", each.seen), ("users", each.users)):
                found += [{"model": name, "check": check, "message": f"the model {told}"} for told in sentences]
            found += [{"model": name, **finding} for finding in findings(each.summary)]
        return found

    @property
    def verdicts(self) -> list[str]:
        """How the first model compares with each other one, or what it is worth where it is alone, as sentences."""
        from mmoe_rec.evaluation.comparison import told_of
        from mmoe_rec.report.evaluation import told_alone

        return (
            told_alone(next(iter(self.summaries.values()))) if self.comparison is None else [*told_of(self.comparison)]
        )

    def write(self, out: Path) -> None:
        """Writes the files, replacing those of an evaluation before; the page last.

        Raises UserError, before anything is written, where the rows are not the same, or other files are in the way.
        """
        from mmoe_rec.evaluation.sums import check_folder
        from mmoe_rec.report.evaluation import Made

        comparison, against = self.comparison, out / "against"
        made = Made.of(
            {
                "title": self.title,
                "models": {
                    name: {"address": each.address, "summary": each.summary, "gates": each.gates}
                    for name, each in self.models.items()
                },
                "comparison": comparison,
                "findings": self.findings,
                "slices": self.slices,
                "tradeoffs": next(iter(self.models.values())).tradeoffs,
                "placement": next(iter(self.models.values())).placement,
                "facts": self.facts,
            }
        )
        _check_ours(against)
        check_folder(out / "sums")
        (out / "report.html").unlink(missing_ok=True)  # it would tell of other numbers than lie beside it
        shutil.rmtree(against, ignore_errors=True)
        (out / "comparison.json").unlink(missing_ok=True)
        for place, each in enumerate(self.models.values()):
            folder = against / str(place) if place else out
            each.sums.save(folder / "sums")
            _write(folder / "metrics.json", each.summary)
        if comparison is not None:
            _write(out / "comparison.json", comparison)
        made.write(out)

    def told(self) -> Iterator[Table | str]:
        """For the terminal: tables, verdicts, notes and warnings."""
        from mmoe_rec.evaluation.comparison import LEVEL, told_of
        from mmoe_rec.evaluation.notes import are_alone, told
        from mmoe_rec.evaluation.slices import of_other_rows, told_of_slices
        from mmoe_rec.report.tables import differences_table, results_table

        yield results_table(self.summaries)
        if self.comparison is not None:
            yield differences_table(self.comparison)
            yield from told_of(self.comparison)
            alone = all(map(are_alone, self.summaries.values()))
            if not alone and not all("catalogue" in each for each in self.summaries.values()):
                yield "note: without candidates it can't be told whether labels belong to the same rows of a request"
        yield from (f"note: {note}" for note in told(list(self.summaries.values())))
        if caution := self.facts.get("caution"):
            yield f"note: {caution}"
        yield from told_of_slices(self.slices, LEVEL)
        if others := list(of_other_rows(self._sliced, next(iter(self.models)))):
            yield (
                f"note: slices by {', '.join(others)} hold other rows for other models, so these are not compared there"
            )
        for each in self.findings:
            of = f"'{each['model']}': " if len(self.models) > 1 else ""
            yield f"warning: {of}{each['message']}"


def _check_ours(against: Path) -> None:
    """Raises UserError where a folder that is to be replaced holds something else than models' metrics."""
    for each in against.iterdir() if against.is_dir() else ():
        if not (each.name.isdigit() and {path.name for path in each.iterdir()} <= {"sums", "metrics.json"}):
            raise UserError(
                f"'{each}' lies where results go, and is none of an evaluation: give another folder with --out"
            )


def short_names(addresses: Sequence[str]) -> list[str]:
    """Names for files and folders, by the ends of their paths that tell them apart; other addresses are names."""
    parts = [[each] if ":" in each else each.rstrip("/").split("/") for each in addresses]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(addresses)


def check_out(out: Path, settings: Settings | None = None) -> None:
    """Raises UserError for a folder of results that is a file, or lies where the log or what is made of it lies."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out '{out}' is a file; name a folder")
    if settings is None:
        return
    real, work = Path(os.path.realpath(out)), Path(settings.data.work)
    sources = [settings.data.log, *(each.path for each in settings.data.events.values())]
    taken = [Path(each) for each in sources if not is_remote(each) and Path(each).is_dir()]
    taken += [
        work / name for name in ("features", "checkpoints", "model", "seeds", "tuning", "unsent", "before_training")
    ]
    inside = next((each for each in taken if real.is_relative_to(os.path.realpath(each))), None)
    if inside is not None or real == Path(os.path.realpath(work)):
        raise UserError(f"--out '{out}' lies in '{inside or work}', which holds other things; name another folder")


def check_names(names: list[str], option: str) -> None:
    """Raises UserError where two models are called the same. option: of the command, for the others."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"'{twice}' is compared with itself; give other models with {option}")


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
