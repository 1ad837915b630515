"""What the columns of a log hold, by SQL over its Parquet files.

One pass counts each column; what goes together is looked for in samples of whole users, candidates or requests. All of
it is the same for the same rows, in whatever order and files they lie: samples are drawn by hashes, sums are of whole
numbers, and quantiles are exact.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from mmoe_rec.auc import auc_of_counts
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.checks import open_parquet
from mmoe_rec.log.columns import canonical_type
from mmoe_rec.log.database import Database, open_database
from mmoe_rec.log.files import find_files, is_remote, parse_path_columns
from mmoe_rec.log.rows import MICROSECONDS_PER_DAY
from mmoe_rec.profiling.name_hints import is_id_name
from mmoe_rec.settings.log_columns import ColumnUse

ColumnKind = Literal["integer", "number", "text", "boolean", "time", "keys", "vector", "empty", "other"]
SAMPLE_ROWS = 300_000
"""Rows in which one looks for what goes together."""
MAX_ROWS_IN_MEMORY = 4_000_000
"""Rows of a log that is read once; of a larger one, the files are read for each sample."""
HALF_COLUMN = "\0half"
"""Column of a sample that says to which half of the keys a row belongs."""
_AT_ONCE = 64
"""Columns that are sorted at a time."""
_BINS, _PRIOR = 64, 20.0
_FEWEST_ROWS = 20
"""Rows below which a column may rank a label well by chance."""
_UNITS = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 0}  # microseconds; 0: a thousandth
_EARLIEST, _LATEST = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1990, 2033))
"""As seconds, hours such as 2014102100 would lie after these."""
_INTEGER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$")


@dataclass(frozen=True)
class Column:
    """Statistics of a column.

    Attributes:
        name: Name of the column.
        sql: Name of the column in queries.
        type: Type in DuckDB.
        kind: Kind of its values.
        rows: Rows of the log.
        nulls: Rows that are null or NaN.
        distinct: Approximate number of distinct values.
        low: Least value of numbers and text.
        high: Greatest value of numbers and text.
        is_binary: Whether all values are 0 or 1.
        lengths: Lengths of the shortest and the longest list.
        mean_length: Mean characters of a text.
        unit: Time unit of integers that may be times, None for others.
    """

    name: str
    sql: str
    type: str
    kind: ColumnKind
    rows: int
    nulls: int
    distinct: int
    low: Any = None
    high: Any = None
    is_binary: bool = False
    length_range: tuple[int, int] = (0, 0)
    mean_length: float = 0.0
    unit: str | None = None

    @property
    def can_be_key(self) -> bool:
        """Whether rows can be grouped by it."""
        return self.kind in ("integer", "text") and not self.nulls

    @property
    def may_be_time(self) -> bool:
        """Whether it holds moments, or may."""
        return self.kind == "time" or self.unit is not None

    @property
    def positive_sql(self) -> str:
        """SQL of the rows where what a binary column tells has happened."""
        return f"{self.sql} = {'true' if self.kind == 'boolean' else '1'}"

    @property
    def time_sql(self) -> str:
        """SQL of its time, microseconds since 1970 UTC."""
        if self.kind == "time":
            return f"epoch_us({self.sql}::TIMESTAMP)" if self.type == "DATE" else f"epoch_us({self.sql})"
        factor = _UNITS[self.unit or "us"]
        return f"({self.sql}::BIGINT * {factor})" if factor else f"({self.sql}::BIGINT // 1000)"


def _kind_of(kind: str) -> ColumnKind:
    inner = kind[:-2] if kind.endswith("[]") else kind.partition("[")[0] if re.search(r"\[\d+\]$", kind) else None
    if inner is not None:
        element = _kind_of(inner)
        return "keys" if element in ("integer", "text") else "vector" if element == "number" else "other"
    if _INTEGER.match(kind):
        return "integer"
    if kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL"):
        return "number"
    if kind.startswith(("VARCHAR", "ENUM")):
        return "text"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return "time"
    return {"BOOLEAN": "boolean", '"NULL"': "empty", "NULL": "empty"}.get(kind, "other")  # type: ignore[return-value]


@contextmanager
def open_profile(source: str, folder: Path, setting: str = "the log") -> "Iterator[Profile]":
    """Reads a log of Parquet files. folder: of what doesn't fit into memory, made and removed. Raises UserError where
    there is none, or where it holds no row."""
    files = find_files(source, setting)
    with open_database(folder) as database:
        try:
            if is_remote(source):
                database.register_remote(source)
            yield Profile(database, [file.uri for file in files], source)
        except duckdb.Error as error:
            raise UserError(f"the log '{source}' can't be read as Parquet files: {first_line(error)}") from None


class Profile:
    """A log, and what is asked of it.

    name: source of the log; rows: how many; columns: by their names; unreadable: column -> why it can't be read from
    all files; in_path: columns of the files' paths.
    """

    def __init__(self, database: Database, files: Sequence[str], name: str) -> None:
        self._database, self.name = database, name
        self.path_columns = {each for file in files for each in parse_path_columns(file)}
        listed = ", ".join(f"'{file.replace(chr(39), chr(39) * 2)}'" for file in files)
        # Columns of paths are text: what they look like is nobody's type.
        options = "hive_partitioning = true, hive_types_autocast = false, union_by_name = true"
        scan = f"read_parquet([{listed}], {options})"
        with open_parquet(files[0]) as parquet:
            schema = parquet.schema_arrow  # its columns come first; their names may differ by capitals alone
        described = database.rows(f"DESCRIBE SELECT * FROM {scan}")
        names = [*schema.names, *(str(row[0]) for row in described[len(schema) :])]
        self.unreadable = _find_lacking(database, f"[{listed}]")
        self.unreadable |= {each: "several columns have this name" for each in names if names.count(each) > 1}
        self.unreadable |= {"": "it has no name"} if "" in names else {}
        self._sql = {each: f"c{place}" for place, each in enumerate(names)}
        kinds = dict(zip(names, (str(row[1]) for row in described), strict=True))
        kinds |= {each.name: str(each.type) for each in schema if not _is_readable(each, kinds[each.name])}
        told = {each: str(row[0]) for each, row in zip(names, described, strict=True)}
        parts = [f"{_cleaned(told[each], kinds[each])} AS {sql}" for each, sql in self._sql.items()]
        view = f"SELECT {', '.join(parts)} FROM {scan}"
        self.rows = int(database.row(f"SELECT count(*) FROM {scan}")[0])
        if not self.rows:
            raise UserError(f"the log '{name}' holds no row")
        made = "TABLE" if self.rows <= MAX_ROWS_IN_MEMORY else "VIEW"
        database.run(f"CREATE {made} log AS {view}")
        self.columns = self._read_columns(kinds)
        self._differ: dict[str, float] = {}  # column -> how often two rows of the log differ in it
        self._row_hash = f"hash({', '.join(self._sql.values())})"

    def _read_columns(self, kinds: Mapping[str, str]) -> dict[str, Column]:
        parts: list[str] = []
        for name, sql in self._sql.items():
            kind = _kind_of(kinds[name])
            ordered = kind in ("integer", "number", "text", "time")
            length = f"len({sql})" if kind in ("text", "keys", "vector") else "NULL::INTEGER"
            parts += [
                f"count({sql})",
                "0" if kind in ("empty", "other") else f"approx_count_distinct({sql})",
                *((f"min({sql})", f"max({sql})") if ordered else ("NULL", "NULL")),
                f"count({sql}) = count(*) FILTER ({sql} IN (0, 1))" if kind in ("integer", "number") else "false",
                f"min({length})",
                f"max({length})",
                f"sum({length})",
            ]
        (values,) = self._database.rows(f"SELECT {', '.join(parts)} FROM log")
        found = {}
        for place, (name, sql) in enumerate(self._sql.items()):
            count, distinct, low, high, is_binary, shortest, longest, length = values[8 * place : 8 * place + 8]
            kind = _kind_of(kinds[name]) if count else "empty"
            found[name] = Column(
                name,
                sql,
                kinds[name],
                kind,
                self.rows,
                self.rows - count,
                min(int(distinct), count),
                low,
                high,
                kind == "boolean" or (bool(is_binary) and low == 0 and high == 1),
                (shortest or 0, longest or 0),
                (length or 0) / max(count, 1),
                _unit_of(low, high) if kind == "integer" and not is_id_name(name) else None,
            )
        return found

    def time_range(self, time: str) -> tuple[int, int]:
        """The first and the last of SQL times, microseconds."""
        first, last = self._database.row(f"SELECT min({time}), max({time}) FROM log")
        return int(first), int(last)

    def row(self, query: str) -> Sequence[Any]:
        """The single row that a query on `log` gives."""
        return self._database.row(query)

    def scalar(self, query: str) -> Any:
        """The single value of a query on `log`."""
        return self.row(query)[0]

    def _sample(self, keys: Sequence[str], limit: int = SAMPLE_ROWS) -> str:
        """SQL of all rows of some values of keys, about `limit` in all."""
        every = -(-self.rows // limit)
        return "log" if every <= 1 else f"(FROM log WHERE hash({', '.join(keys)}) % {every} = 0)"

    def change_rates(
        self, keys: Sequence[str], columns: Sequence[str], order: str = "0", merge_ties: bool = False
    ) -> dict[str, float]:
        """How often each column changes from one row of the same keys to the next, as a share of how often it differs
        in two rows of the log: 0 where the keys determine it, about 1 where they say nothing of it.

        keys, among: names of columns; order: SQL of what orders the rows of a key; at_once: rows of the same keys and
        order are one. A column without two values has 0; all have NaN where no key has two rows.
        """
        if not columns:
            return {}
        by = [self._sql[each] for each in keys]
        found = {}
        for begin in range(0, len(columns), _AT_ONCE):
            names = columns[begin : begin + _AT_ONCE]
            hashes = [f"hash({self._sql[each]})" for each in names]
            row, values, group = self._row_hash, ", ".join(hashes), ""
            if merge_ties:
                row, values, group = "0", ", ".join(f"min({each})" for each in hashes), " GROUP BY ALL"
            rows = f"SELECT hash({', '.join(by)}), {order}, {row}, {values} FROM {self._sample(by)}{group}"
            within = self._count_changes(rows, len(names))
            if any(each not in self._differ for each in names):
                mixed = f"SELECT 0, 0, {self._row_hash}, {', '.join(hashes)} FROM {self._sample([self._row_hash])}"
                self._differ |= zip(names, self._count_changes(mixed, len(names)), strict=True)
            for name, fraction in zip(names, within, strict=True):
                found[name] = float(fraction / of) if (of := self._differ[name]) else 0.0
        return found

    def _count_changes(self, rows: str, number: int) -> np.ndarray:
        """(number,) how often each but the first three columns changes between rows of one value of the first, in the
        order of the next two; NaN where no value has two rows."""
        table = self._database.table(f"FROM ({rows}) ORDER BY ALL")
        keys, *values = (table.column(place).to_numpy() for place in (0, *range(3, 3 + number)))
        same = keys[1:] == keys[:-1]
        changed = [np.count_nonzero((each[1:] != each[:-1]) & same) for each in values]
        return np.array(changed, float) / (np.count_nonzero(same) or math.nan)

    def rows_per_key(self, keys: Sequence[str]) -> float:
        """Mean number of rows that have the same keys."""
        by = ", ".join(self._sql[each] for each in keys)
        rows = self._sample([self._sql[each] for each in keys])
        count, groups = self._database.row(
            f"SELECT sum(n), count(*) FROM (SELECT count(*) n FROM {rows} GROUP BY {by})"
        )
        return float(count) / max(groups, 1)

    def count_duplicates(self, keys: Sequence[str]) -> int:
        """Rows that have the same keys as another one, less one of each."""
        by = ", ".join(self._sql[each] for each in keys)
        return self.rows - self.scalar(f"SELECT count(DISTINCT hash({by})) FROM log")

    def fraction(self, condition: str, of: str = "true") -> float:
        """Share of the rows of one condition that fulfil another; 0 where there is none."""
        both, some = self._database.row(
            f"SELECT count(*) FILTER (({condition}) AND ({of})), count(*) FILTER ({of}) FROM log"
        )
        return both / some if some else 0.0

    def count_rows(self, condition: str) -> int:
        """Rows that fulfil a condition."""
        return int(self._database.row(f"SELECT count(*) FILTER ({condition}) FROM log")[0])

    def quantile(self, expression: str, fraction: float, where: str = "true") -> Any:
        """An exact quantile of SQL, None where there is no row."""
        query = (
            f"SELECT quantile_disc({expression}, {fraction}) FROM log WHERE ({where}) AND ({expression}) IS NOT NULL"
        )
        return self.scalar(query)

    def sample(self, keys: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Columns of all rows of some values of keys, lists by their lengths, in an order of the rows alone."""
        by = [self._sql[each] for each in keys] or [self._row_hash]
        lengths = ["len" if self.columns[each].kind in ("keys", "vector") else "" for each in columns]
        read = (f"{length}({self._sql[each]})" for length, each in zip(lengths, columns, strict=True))
        named = ", ".join(f"{sql} AS v{place}" for place, sql in enumerate(read))
        half = f"hash({', '.join(by)}, 1) % 2 = 0 AS half"
        found = self._database.table(f"SELECT {named}, {half} FROM {self._sample(by)} ORDER BY {self._row_hash}")
        return found.rename_columns([*columns, HALF_COLUMN])

    def is_unique(self, column: str) -> bool:
        """Whether each row has a value of its own."""
        each = self.columns[column]
        likely = not each.nulls and each.distinct > 0.9 * each.rows
        return likely and self.scalar(f"SELECT count(DISTINCT {each.sql}) FROM log") == each.rows

    def values(self, column: str, limit: int) -> list[Any]:
        """The most frequent values of a column."""
        sql = self._sql[column]
        query = (
            f"SELECT {sql} FROM log WHERE {sql} IS NOT NULL GROUP BY ALL ORDER BY count(*) DESC, {sql} LIMIT {limit}"
        )
        return [row[0] for row in self._database.rows(query)]


_USES: dict[ColumnKind, ColumnUse] = {"number": "number", "time": "time", "keys": "keys", "vector": "vector"}


def _is_readable(field: pa.Field, kind: str) -> bool:
    """Whether features can read a column of that type as what it is by its type in queries."""
    if _kind_of(kind) in ("empty", "other"):
        return True
    try:
        canonical_type(field.name, _USES.get(_kind_of(kind), "key"), field.type)
    except UserError:
        return False
    return True


def _find_lacking(database: Database, files: str) -> dict[str, str]:
    """Columns that some files have and others have not, each with a sentence that names the first of the latter."""
    database.run(f"CREATE TABLE parts AS SELECT DISTINCT file_name, name FROM parquet_schema({files})")
    pairs = "FROM (SELECT DISTINCT file_name FROM parts), (SELECT DISTINCT name FROM parts) EXCEPT FROM parts"
    lacking = database.rows(f"SELECT name, min(file_name) FROM ({pairs}) GROUP BY name")
    return {str(name): f"'{file}' has no such column" for name, file in lacking}


def _cleaned(name: str, kind: str) -> str:
    """SQL of a column in which NaN is a null."""
    quoted = '"' + name.replace('"', '""') + '"'
    if kind in ("DOUBLE", "FLOAT"):
        return f"CASE WHEN isfinite({quoted}) THEN {quoted} END"
    if kind == "TIMESTAMPTZ_NS":
        return f"{quoted}::TIMESTAMPTZ"
    return f"{quoted}::DOUBLE" if kind.startswith("DECIMAL") else quoted


def _unit_of(low: int, high: int) -> str | None:
    """The unit in which integers are moments of these decades, None where they are none."""
    for unit, per_second in (("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)):
        if _EARLIEST * per_second <= low and high <= _LATEST * per_second:
            return unit
    return None


def target_encoding_auc(
    codes: np.ndarray, labels: np.ndarray, fit_mask: np.ndarray, min_class_rows: int = 3
) -> tuple[float, float]:
    """Rank rows by the mean label of their value, learned from one half of the keys, and judge the other half.

    Args:
        codes: (N,) int64 from 0, the value of each row, see `factorize_binned`.
        labels: (N,) between 0 and 1, NaN where not observed.
        fit_mask: (N,) bool, whether the mean label is learned from the row.
        min_class_rows: Number of rows of either label, in whole or in part, that each half needs.

    Returns:
        The area under the ROC curve, and the fraction of the rarer label among as many top rows as there are rows of
        it. A condition of a rare label, such as the page that has the button, has a high area and a low fraction. Both
        are NaN if there are too few rows to tell.
    """
    observed = ~np.isnan(labels)
    codes, labels, fit_mask = codes[observed], labels[observed], fit_mask[observed]
    labels = 1 - labels if labels.sum() > 0.5 * len(labels) else labels
    known, asked = labels[fit_mask], labels[~fit_mask]
    least = min((rows > 0).sum() for part in (known, asked) for rows in (part, 1 - part))
    if least < min_class_rows or len(asked) < _FEWEST_ROWS:
        return math.nan, math.nan
    places = codes.max(initial=0) + 1
    rows, positives = (np.bincount(codes[fit_mask], weights, places) for weights in (None, known))
    means = (positives + _PRIOR * known.mean()) / (rows + _PRIOR)
    predicted, place = np.unique(np.round(means, 12)[codes[~fit_mask]], return_inverse=True)
    ones, every = np.bincount(place, asked, len(predicted)), np.bincount(place, minlength=len(predicted))
    top = np.interp(ones.sum(), [0, *np.cumsum(every[::-1])], [0, *np.cumsum(ones[::-1])])
    return float(auc_of_counts(ones, every - ones)), float(top / ones.sum())


def implies_positive(codes: np.ndarray, labels: np.ndarray, chance: np.ndarray | float) -> bool:
    """Whether a column has another value than its most frequent one only in rows of label 1, by more than chance.

    Args:
        codes: (N,) int64 from 0, the value of each row.
        labels: (N,) 0, 1 or NaN.
        chance: Probability that a label is 1 whatever the value, (N,) or the same for all rows.
    """
    others = codes != np.bincount(codes, minlength=1).argmax()
    if others.sum() < 20 or (labels[others] == 1).mean() <= 0.999:
        return False
    return bool(-np.log(np.broadcast_to(chance, len(codes))[others]).sum() > 20)


def factorize_binned(values: pa.ChunkedArray) -> np.ndarray:
    """Number the values of a column. Returns (N,) int64 from 0: one for each text, range of numbers, and for null."""
    kind = values.type
    if pa.types.is_temporal(kind):
        values = values.cast(pa.int64()) if not pa.types.is_date(kind) else values.cast(pa.int32()).cast(pa.int64())
    if pa.types.is_boolean(values.type) or pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
        known = numbers[~np.isnan(numbers)]
        if not len(known):
            return np.zeros(len(numbers), np.int64)
        # Ranges of equally many rows and of equally many values. The most frequent value, such as a sum of 0, has its
        # own range, or the few rows with another value would share one with it.
        held, rows = np.unique(known, return_counts=True)
        usual, parts = held[rows.argmax()], np.linspace(0, 1, _BINS + 1)[1:-1]
        edges = [*np.quantile(known, parts), *np.quantile(held, parts), usual, np.nextafter(usual, np.inf)]
        return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(np.unique(edges), numbers, side="right"))
    return factorize(values)


def factorize(values: pa.ChunkedArray) -> np.ndarray:
    """Number the different values of a column. Returns (N,) int64 from 0, null has its own."""
    codes = values.combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return codes.indices.fill_null(-1).to_numpy().astype(np.int64) + 1


def to_days(microseconds: float) -> float:
    """Days of so many microseconds."""
    return microseconds / MICROSECONDS_PER_DAY
