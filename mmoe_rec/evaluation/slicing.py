"""What the rows that a model is measured on are sliced by, and what they have to do with its training.

`LogColumns` are columns of the log. Encoded rows hold what a model reads, and slices are thought of afterwards: so the
log is read once more, and its rows are found by request and candidate. `TrainingRows` say who is new and who comes
often; `overlap` says whether the model has seen labels of these rows before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.slices import SliceBy
from mmoe_rec.evaluation.summary import RowsBySlice
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.batch_scoring import text_of
from mmoe_rec.log.checks import BadFile
from mmoe_rec.log.columns import column_uses, combine, hash_column
from mmoe_rec.log.reader import Log, find_fault
from mmoe_rec.point_in_time.arrays import one_array
from mmoe_rec.preprocessing.logs import BuildInputs, BuildOptions, adapt_schema
from mmoe_rec.preprocessing.prepare import existing
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows


OPTION = "slices"
_ADVICE = "leave out slices by columns of the log (--evaluation.slices '[]')"


@dataclass
class LogColumns:
    """Columns that rows are to be sliced by.

    Attributes:
        log: The log that has the columns.
        by: The slices that were asked for.
        skips: Whether files that can't be used are left out.
        read: Once the log was read, the rising keys of the rows, (N,) uint64, and the slices as numbers of these.
    """

    log: Log
    by: tuple[SliceBy, ...]
    skips: bool
    read: tuple[np.ndarray, RowsBySlice] | None = None

    @staticmethod
    def of(settings: Settings, artifact: Path) -> LogColumns:
        """Those of `evaluation.slices`, in files that have them.

        artifact: folder of the model, by whose keys rows are known. Raises UserError for columns that the log does not
        have, or can't be sliced by.
        """
        by = tuple(SliceBy.of(word, OPTION) for word in dict.fromkeys(settings.evaluation.slices))
        source, options = settings.data.log, BuildOptions.of(settings.data)
        skip = options.skip_bad_files
        pipeline = FeaturePipeline.load(artifact / "features", memories=False)
        schema = adapt_schema(settings, pipeline.schema)
        uses = column_uses(schema)
        if not schema.columns.has_candidate and skip:
            raise UserError(
                "slices by columns of the log need columns.candidate where files may be left out "
                f"(data.skip_bad_files): without it rows are told apart by their number in the log; {_ADVICE}"
            )
        for each in by:
            if each.column in {task.label for task in schema.tasks.values()}:
                say(f"'{each.column}' is a label: slices by it are by what happened, not by what was known before")
        more: dict[str, Use] = {each.column: "any" for each in by if each.column not in uses}
        try:
            log = Log(source, schema, skip_bad_files=skip, types=pipeline.key_types, now=options.now, more=more)
        except BadFile as error:
            raise UserError(f"{error} ({OPTION})" if more else str(error)) from None
        for each in by:  # before rows are scored
            _values_of(each, pa.nulls(0, log.types.get(each.column, pa.null())))
        return LogColumns(log, by, skip)

    def find(self, scored: ScoredRows) -> RowsBySlice:
        """Find the slices of rows. The log is read for the first rows alone; other models have the same rows.

        Returns:
            What rows are sliced by -> name of the slice -> (n,) numbers of the rows.

        Raises:
            UserError: The log has other rows by now, a column has too many values, or models have other rows.
        """
        keys = _keys(scored)
        order = np.argsort(keys, kind="stable")
        if self.read is None:
            self.read = keys[order], self._read(keys[order])
        known, slices = self.read
        if not np.array_equal(keys[order], known):
            raise UserError("the models were not measured on the same rows, so their slices can't be compared")
        return {by: {name: np.sort(order[rows]) for name, rows in each.items()} for by, each in slices.items()}

    def _read(self, wanted: np.ndarray) -> RowsBySlice:
        """Slices of rows by the places of their keys (N,) uint64, which rise."""
        schema = self.log.schema
        names, split, columns = schema.columns, schema.split, dict.fromkeys(each.column for each in self.by)
        needed = {names.user, names.candidate, names.request, names.time, None if split is None else split.column}
        uses = {name: use for name, use in self.log.uses.items() if name in needed or name in columns}
        reader = replace(self.log.reader, uses=uses)
        log = self.log.without(map(find_fault, self.log.pieces(reader))) if self.skips else self.log
        keys, parts = list[np.ndarray](), list[pa.Table]()
        with bar() as progress:
            task = progress.add_task("slicing", total=log.rows)
            for rows in chain.from_iterable(map(reader.read, log.parts())):
                its = combine([hash_column(rows.requests()), rows.hashes([names.candidate])])
                progress.advance(task, len(its))
                there = wanted[np.minimum(np.searchsorted(wanted, its), len(wanted) - 1)] == its
                keys.append(its[there])
                parts.append(pa.table({name: rows.column(name) for name in columns}).filter(pa.array(there)))
        hashes = np.concatenate(keys) if keys else np.empty(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        if len(order) > len(wanted):  # rows that came again count once
            order = order[np.unique(hashes[order], return_index=True)[1]]
        if not np.array_equal(hashes[order], wanted):
            skipped = log.left_out
            why = f" ({len(skipped):,} files are left out, such as: {skipped[0].reason})" if skipped else ""
            told = f"of the {len(wanted):,} rows that are measured, the log '{log.source}' has {len(hashes):,}{why}"
            raise UserError(f"{told}, so it can't be told what slices they are in; {_ADVICE}")
        table = pa.concat_tables(parts, promote_options="default").take(pa.array(order))
        places = {}
        for each in self.by:
            values = _values_of(each, one_array(table[each.column]))
            places[each.name] = each.find_slices(values).rows(values)
        return places


def _keys(scored: ScoredRows) -> np.ndarray:
    """(N,) uint64 hash of each row's request and candidate, or its number in the log."""
    candidates = scored.row if scored.candidates is None else scored.candidates
    assert candidates is not None, "rows without candidates have numbers"
    return combine([hash_column(scored.requests), hash_column(candidates)])


def _values_of(by: SliceBy, values: pa.Array) -> pa.Array:
    """Raises UserError where rows can't be sliced by them."""
    try:
        return by.read(values)
    except (ValueError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column '{by.column}' of the log {error} ({OPTION})") from None


ACTIVITY = 10  # groups of users of equal size, by how many training rows they have


@dataclass(frozen=True)
class TrainingRows:
    """Training rows of each user and candidate, by id, None where the log has no such ids; fingerprint: of features."""

    fingerprint: str
    users: pd.Series | None
    candidates: pd.Series | None

    @staticmethod
    def of(settings: Settings) -> TrainingRows | None:
        """Those of the settings' log and split, where features were built of them."""
        prepared = existing(BuildInputs.of(settings))
        if prepared is None:
            return None
        columns, folder = settings.columns, prepared.split("train")
        return TrainingRows(
            prepared.manifest["fingerprint"],
            _count_by(folder, "user") if columns.has_user else None,
            _count_by(folder, "candidate") if columns.has_candidate else None,
        )

    def slices(self, scored: ScoredRows) -> dict[str, dict[str, np.ndarray]]:
        """What rows are sliced by -> slice -> (n,) numbers of its rows among those that were scored."""
        slices = {}
        for name, ids, counts in (
            ("user", scored.users, self.users),
            ("candidate", scored.candidates, self.candidates),
        ):
            if ids is not None and counts is not None:
                known = _count_rows(ids, counts) > 0
                slices[name] = {"new": ~known, "returning": known}
        if self.users is not None:
            slices["training rows of the user"] = _group_by_size(_count_rows(scored.users, self.users))
        return {
            by: {name: np.flatnonzero(rows) for name, rows in each.items() if rows.any()} for by, each in slices.items()
        }


@dataclass
class Slicing:
    """What models' rows, which are the same, are sliced by: how their users and candidates stand in training, and
    columns of the log, which is read for the first of them."""

    training: TrainingRows | None = None
    columns: LogColumns | None = None

    @staticmethod
    def of(settings: Settings, artifact: Path) -> Slicing:
        """That of the settings, see `LogColumns.of`."""
        columns = LogColumns.of(settings, artifact) if settings.evaluation.slices else None
        return Slicing(TrainingRows.of(settings), columns)

    def find(self, scored: ScoredRows) -> RowsBySlice:
        """Find the slices of rows: what rows are sliced by -> name of the slice -> (n,) numbers of the rows."""
        slices: dict[str, Mapping[str, np.ndarray]] = {}
        if self.training is not None:
            slices |= self.training.slices(scored)
        for by, rows in ({} if self.columns is None else self.columns.find(scored)).items():
            slices[f"column {by}" if by in slices else by] = rows
        return slices


def _count_by(folder: Path, name: str) -> pd.Series:
    """How many encoded rows have each value of a column."""
    files = sorted(folder.glob("*.parquet"))
    counts = [pq.read_table(file, columns=[name])[name].to_pandas().value_counts() for file in files]
    return pd.concat(counts).groupby(level=0).sum() if counts else pd.Series(dtype="int64")


def _count_rows(ids: pa.Array, counts: pd.Series) -> np.ndarray:
    """(N,) int64, how many training rows there are of each of N ids."""
    return counts.reindex(ids.to_pandas()).fillna(0).to_numpy(np.int64)


def _group_by_size(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Ranges of numbers of rows, 1 or more, that about equally many have -> (N,) bool, who has so many."""
    groups, some = dict[str, np.ndarray](), rows > 0
    if some.any():
        edges = np.unique(np.quantile(rows[some], np.arange(1, ACTIVITY) / ACTIVITY, method="lower"))
        group = np.where(some, np.searchsorted(edges, rows, side="left"), -1)
        for number in np.unique(group[some]):
            low, high = (int(end(rows[group == number])) for end in (np.min, np.max))
            groups[f"{low:,}" if low == high else f"{low:,} to {high:,}"] = group == number
    return groups


def overlap(settings: Settings, artifact: Path, split: str = "test") -> list[str]:
    """Say what the training of a model had to do with the rows that it is measured on.

    Args:
        settings: Settings whose rows measure it.
        artifact: Its folder, whose own settings say on which rows it was trained.
        split: Split of the rows, `test` or `validation`. Of the latter, judging rows have chosen no state of a model.

    Returns:
        Sentences without their subject, none if it has not seen these rows.
    """
    of_test = split == "test"
    its, now = load_settings(artifact / "settings.yaml").split, settings.split
    if now.column != its.column:
        ways = ["times" if each is None else f"column '{each}'" for each in (its.column, now.column)]
        rows = f"rows that {ways[0]} split, and those that it is measured on {ways[1]}"
        return [f"was trained on {rows}: it may have seen labels that it is measured by"]
    rows, (end, begin) = "", ((each.validation_end if of_test else each.train_end) for each in (its, now))
    if now.column is not None:
        seen = {text_of(each) for each in (*its.train, *(its.validation if of_test else ()))}
        if both := ", ".join(repr(each) for each in getattr(now, split) if text_of(each) in seen):
            rows = f"on rows with {both} in column '{now.column}', which are those that it is measured on"
    elif begin is not None and end is not None and end > begin:
        rows = f"on requests before {end:%Y-%m-%d %H:%M}, and is measured on those from {begin:%Y-%m-%d %H:%M} UTC on"
    return [f"was trained, or its best state chosen, {rows}: it has seen labels that it is measured by"] if rows else []
