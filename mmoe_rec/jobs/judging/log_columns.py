"""Columns of the log beside the rows of a split, by which these are sliced.

Encoded rows hold what a model reads, and slices are thought of afterwards: so the log is read once more, and its rows
are found by request and candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.slices import MOST_VALUES, SliceBy
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.jobs.places import build_options, read_by
from mmoe_rec.log.checks import BadFile, word_of
from mmoe_rec.log.columns import column_uses
from mmoe_rec.log.hashing import combine, hash_column
from mmoe_rec.log.parts import Noticed
from mmoe_rec.log.reader import Log
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.columns import Use
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows

OPTION = "slices"
_ADVICE = "leave slices by columns of the log out (--evaluation.slices '[]')"
BUCKETS = 10
"""Of a number that describes placement and has too many values, where nothing was asked for."""


@dataclass(frozen=True)
class LogColumns:
    """Columns that rows are to be sliced by. log: that has them; by: what was asked for, or, if `usual`, taken because
    nothing was; skips: whether files that can't be used are left out."""

    log: Log
    by: tuple[SliceBy, ...]
    usual: bool
    skips: bool

    @staticmethod
    def of(settings: Settings, artifact: Path) -> LogColumns | None:
        """Those of `evaluation.slices`, in files that have them; None where there are none.

        artifact: folder of the model, by whose keys rows are known. Raises UserError for columns that the log does not
        have, or can't be sliced by.
        """
        asked, options = settings.evaluation.slices, build_options(settings)
        pipeline = FeaturePipeline.load(artifact / "features", memories=False)
        schema = read_by(settings, pipeline.schema)
        uses = column_uses(schema)
        usual = [name for name in schema.roles.placement if uses.get(name) in ("key", "number", "any")]
        words = usual if asked is None else asked
        by = tuple(SliceBy.of(word, OPTION) for word in words)
        if not by:
            return None
        if twice := next((each.name for each in by if [one.name for one in by].count(each.name) > 1), None):
            raise UserError(f"{OPTION} names '{twice}' twice")
        if not schema.columns.has_candidate and options.skip_bad_files:
            told = (
                "slices by columns of the log need columns.candidate where files may be left out "
                "(data.skip_bad_files): without it rows are told apart by their number in the log"
            )
            _leave_out(told, asked is None)
            return None
        for each in by:
            if uses.get(each.column) in ("keys", "vector"):
                raise UserError(f"column '{each.column}' holds lists, which rows can't be sliced by ({OPTION})")
            if asked is not None and each.column in {task.label for task in schema.tasks.values()}:
                say(f"'{each.column}' is a label: slices by it are by what happened, not by what was known before")
        more: dict[str, Use] = {each.column: "any" for each in by if each.column not in uses}
        try:
            log = Log(
                settings.data.log,
                schema,
                skip_bad_files=options.skip_bad_files,
                types=pipeline.key_types,
                now=options.now,
                more=more,
            )
        except BadFile as error:
            raise UserError(f"{error} ({OPTION})" if more else str(error)) from None
        for each in by:
            if each.buckets is not None and word_of(log.types.get(each.column, pa.null())) == "string":
                raise UserError(
                    f"column '{each.column}' of the log holds strings, and buckets are of numbers ({OPTION})"
                )
        return LogColumns(log, by, asked is None, options.skip_bad_files)

    def read(self, scored: ScoredRows) -> SlicedRows | None:
        """The slices of rows; None where they can't be told, and nothing was asked for.

        Raises UserError where the log has other rows by now, or a column too many values.
        """
        wanted, keys, parts = np.sort(_keys(scored)), list[np.ndarray](), list[pa.Table]()
        with bar() as progress:
            task = progress.add_task("slicing", total=self.log.rows)
            for its, values in self._rows():
                progress.advance(task, len(its))
                there = wanted[np.minimum(np.searchsorted(wanted, its), len(wanted) - 1)] == its
                keys.append(its[there])
                parts.append(values.filter(pa.array(there)))
        found = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = np.argsort(found, kind="stable")
        if not np.array_equal(found[order], wanted):
            skipped = self.log.left_out
            why = f" ({len(skipped):,} files are left out, such as: {skipped[0].reason})" if skipped else ""
            told = (
                f"of the {len(wanted):,} rows that are measured, the log '{self.log.source}' has {len(found):,}{why}, "
                "so it can't be told what slices they are in"
            )
            _leave_out(told, self.usual)
            return None
        table = pa.concat_tables(parts, promote_options="default").take(pa.array(order))
        return SlicedRows(wanted, dict(self._sliced(table)))

    def _rows(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Keys (N,) uint64 of rows of the log, and the columns."""
        schema, log = self.log.schema, self.log
        names, split = schema.columns, schema.split
        keys = {names.user, names.candidate, names.request, names.time, None if split is None else split.column}
        columns = dict.fromkeys(each.column for each in self.by)
        uses = {name: use for name, use in log.uses.items() if name in keys or name in columns}
        reader, noticed = replace(log.reader, uses=uses), Noticed() if self.skips else None
        for part in log.parts():
            for rows in reader.read(part, noticed):
                its = combine([hash_column(rows.requests()), rows.hashes([names.candidate])])
                yield its, pa.table({name: rows.column(name) for name in columns})

    def _sliced(self, table: pa.Table) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for each in self.by:
            given = one_array(table[each.column])
            by = _usual(each, given) if self.usual else each
            if by is None:
                continue
            try:
                values = by.read(given)
            except (ValueError, pa.ArrowNotImplementedError) as error:
                raise UserError(f"column '{each.column}' of the log {error} ({OPTION})") from None
            yield by.name, dict(by.slices(by.count([values])).rows(values))


@dataclass(frozen=True)
class SlicedRows:
    """The slices of N rows of a split. keys: (N,) uint64, rising; places: what rows are sliced by -> slice -> (n,) its
    rows' places among the keys."""

    keys: np.ndarray
    places: Mapping[str, Mapping[str, np.ndarray]]

    def of(self, scored: ScoredRows) -> dict[str, dict[str, np.ndarray]]:
        """The same slices as numbers of scored rows, which may have another order."""
        keys = _keys(scored)
        order = np.argsort(keys, kind="stable")
        if not np.array_equal(keys[order], self.keys):
            raise UserError("the models were not measured on the same rows, so their slices can't be compared")
        return {by: {name: np.sort(order[rows]) for name, rows in each.items()} for by, each in self.places.items()}


def _leave_out(told: str, usual: bool) -> None:
    """Says why rows are not sliced by columns, where nobody has asked for it. Raises UserError where somebody has."""
    if not usual:
        raise UserError(f"{told}; {_ADVICE}")
    say(f"{told}: the report has no slices by placement")


def _keys(scored: ScoredRows) -> np.ndarray:
    """(N,) uint64 hash of each row's request and candidate, or its number in the log."""
    candidates = scored.row if scored.candidates is None else scored.candidates
    assert candidates is not None, "rows without candidates have numbers"
    return combine([hash_column(scored.requests), hash_column(candidates)])


def _usual(by: SliceBy, values: pa.Array) -> SliceBy | None:
    """As a column of placement is sliced where nothing was asked for: one of many values by ranges, if it has any."""
    if pc.count_distinct(values).as_py() <= MOST_VALUES:
        return by
    is_number = pt.is_integer(values.type) or pt.is_floating(values.type)
    return SliceBy(f"bucket({by.column}, {BUCKETS})", by.column, BUCKETS) if is_number else None
