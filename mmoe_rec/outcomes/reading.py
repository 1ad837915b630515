"""Parquet files of requests or events, in canonical types; of old ones, only what is late enough is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.log.checks import LeftOut, LogFile, check_files, open_parquet
from mmoe_rec.log.columns import canonical
from mmoe_rec.log.files import find_files
from mmoe_rec.log.values import file_column, next_batch
from mmoe_rec.settings.columns import Use

ROWS_AT_A_TIME = 131_072


@dataclass(frozen=True)
class Source:
    """Files whose columns are good, as far as their footers tell.

    uses: columns to read; time: the one by which old rows are left out; unit: of integers in it; types: of the columns
    in all files; left_out: files that can't be used.
    """

    uses: dict[str, Use]
    time: str
    unit: str | None
    files: list[LogFile]
    types: dict[str, pa.DataType]
    left_out: list[LeftOut]

    @staticmethod
    def open(
        address: str, setting: str, uses: Mapping[str, Use], time: str, unit: str | None, skip_bad_files: bool
    ) -> Source:
        """Reads all footers. setting: holds the address, for messages. Raises UserError, as `Log` does."""
        files, types, left_out = check_files(find_files(address, setting), dict(uses), unit, skip_bad_files, {})
        if not files:
            raise UserError(f"none of the files of '{address}' can be used; the first: {left_out[0].reason}")
        return Source(dict(uses), time, unit, files, types, left_out)

    def read(self, after: int) -> Iterator[tuple[LogFile, pa.Table | int]]:
        """Batches of rows, of all row groups that may hold a time (microseconds) later than `after`; of other groups
        the number of their rows. Raises BadFile."""
        for file in self.files:
            with open_parquet(file.address) as parquet:
                late = [n for n in range(parquet.metadata.num_row_groups) if self._may_be_later(parquet, n, after)]
                if old := sum(file.group_rows) - sum(file.group_rows[group] for group in late):
                    yield file, old
                in_path = dict(file.in_path)
                names = [name for name in self.uses if name not in in_path]
                start, batches = 0, parquet.iter_batches(ROWS_AT_A_TIME, late, names)
                while (batch := next_batch(batches, file.address, parquet.schema_arrow)) is not None:
                    columns = {}
                    for name, use in self.uses.items():
                        raw = batch.column(name) if name in names else pa.repeat(in_path[name], batch.num_rows)
                        column = file_column(file.address, name, use, raw, self.unit, start)
                        columns[name] = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                    start += batch.num_rows
                    yield file, pa.table(columns)

    def _may_be_later(self, parquet: pq.ParquetFile, group: int, after: int) -> bool:
        place = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)].index(self.time)
        found = parquet.metadata.row_group(group).column(place).statistics
        if found is None or not found.has_min_max:
            return True
        try:
            last = canonical(self.time, "time", pa.array([found.max]), self.unit)
        except (UserError, pa.ArrowException, OverflowError):
            return True
        return int(last.cast(pa.int64())[0].as_py()) > after


def has_column(address: str, setting: str, column: str) -> bool:
    """Whether some file has a column."""
    for file in find_files(address, setting):
        with open_parquet(file.address) as parquet:
            if column in parquet.schema_arrow.names:
                return True
    return False


def microseconds_of(column: pa.Array) -> np.ndarray:
    """(N,) int64 of a column of times, the least int64 where null."""
    least = np.iinfo(np.int64).min
    if pa.types.is_null(column.type):
        return np.full(len(column), least)
    return column.cast(pa.int64()).fill_null(least).to_numpy(zero_copy_only=False)
