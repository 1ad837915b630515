"""Statistics of a log's columns and of dependencies between them, computed by SQL over the Parquet files.

The results don't depend on the order of rows and files, because samples are drawn by hashes, sums are of integers, and
quantiles are exact.
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
"""Approximate number of rows in a sample for measuring dependencies."""
MAX_ROWS_IN_MEMORY = 4_000_000
"""Maximum number of rows of a log that is kept in memory. The files of a larger log are read for each query."""
HALF_COLUMN = "\0half"
"""Bool column that `Profile.sample` adds: whether the row's key is in one of two random halves of the keys."""
_COLUMNS_PER_QUERY = 64
"""Maximum number of columns that one query sorts."""
_BINS, _PRIOR_ROWS = 64, 20.0
_MIN_ROWS = 20
"""On fewer rows than this, a column may rank a label well by chance."""
# Factors to convert times to microseconds. 0 stands for nanoseconds, which are divided by 1,000.
_MICROSECONDS_PER_UNIT = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 0}
_EARLIEST, _LATEST = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1990, 2033))
"""Seconds since 1970 between which integers may be times. Integer dates such as 2014102100 would be later seconds."""
_INTEGER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$")


@dataclass(frozen=True)
class Column:
    """Statistics of a column.

    Attributes:
        name: Name of the column.
        sql: Name of the column in queries.
        type: Type in DuckDB.
        kind: Kind of its values.
        rows: Number of rows of the log.
        nulls: Number of rows that are null, NaN or infinite.
        distinct: Approximate number of distinct values.
        low: Least value of numbers, text and times, None for other kinds.
        high: Greatest value of numbers, text and times, None for other kinds.
        is_binary: Whether the column is boolean, or a number that is 0 or 1.
        length_range: Lengths of the shortest and the longest list or text.
        mean_length: Mean length of lists or text.
        unit: Time unit of integers that may be times, None for all other columns.
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
        """Whether the column holds integers or text without nulls."""
        return self.kind in ("integer", "text") and not self.nulls

    @property
    def may_be_id(self) -> bool:
        """Whether the column can be a key, and doesn't hold integers that may be times."""
        return self.can_be_key and self.unit is None

    @property
    def may_be_time(self) -> bool:
        """Whether the column holds times or integers that may be times."""
        return self.kind == "time" or self.unit is not None

    @property
    def positive_sql(self) -> str:
        """SQL condition for rows with the positive label of a binary column."""
        return f"{self.sql} = {'true' if self.kind == 'boolean' else '1'}"

    @property
    def time_sql(self) -> str:
        """SQL for the time in microseconds since 1970 UTC."""
        if self.kind == "time":
            return f"epoch_us({self.sql}::TIMESTAMP)" if self.type == "DATE" else f"epoch_us({self.sql})"
        factor = _MICROSECONDS_PER_UNIT[self.unit or "us"]
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
    """Open a log of Parquet files.

    Args:
        source: Path or URI of the log.
        folder: Folder for data that doesn't fit into memory. It is created and removed.
        setting: Option or setting that named the log, for messages.

    Raises:
        UserError: There is no log, it can't be read, or it has no rows.
    """
    files = find_files(source, setting)
    with open_database(folder) as database:
        try:
            if is_remote(source):
                database.register_remote(source)
            yield Profile(database, [file.uri for file in files], source)
        except duckdb.Error as error:
            raise UserError(f"the log '{source}' can't be read as Parquet files: {first_line(error)}") from None


class Profile:
    """Statistics of a log and queries on it.

    Attributes:
        name: Path or URI of the log.
        rows: Number of rows.
        columns: Column name -> statistics.
        unreadable: Column -> why it can't be read, for example because a file lacks it.
        path_columns: Columns that come from the paths of files.
    """

    def __init__(self, database: Database, files: Sequence[str], name: str) -> None:
        """Open a log and compute the statistics of its columns.

        Args:
            database: Database for the queries.
            files: URIs of the Parquet files.
            name: Path or URI of the log.

        Raises:
            UserError: The log has no rows.
        """
        self._database, self.name = database, name
        self.path_columns = {column for file in files for column in parse_path_columns(file)}
        listed = ", ".join(f"'{file.replace(chr(39), chr(39) * 2)}'" for file in files)
        # Columns from paths stay text, since a path has no types.
        options = "hive_partitioning = true, hive_types_autocast = false, union_by_name = true"
        scan = f"read_parquet([{listed}], {options})"
        with open_parquet(files[0]) as parquet:
            # DuckDB lists the columns of this file first, but renames columns whose names differ only in case.
            schema = parquet.schema_arrow
        described = database.rows(f"DESCRIBE SELECT * FROM {scan}")
        names = [*schema.names, *(str(row[0]) for row in described[len(schema) :])]
        self.unreadable = _find_lacking(database, f"[{listed}]")
        self.unreadable |= {name: "several columns have this name" for name in names if names.count(name) > 1}
        self.unreadable |= {"": "it has no name"} if "" in names else {}
        self._sql = {column: f"c{index}" for index, column in enumerate(names)}
        kinds = dict(zip(names, (str(row[1]) for row in described), strict=True))
        kinds |= {field.name: str(field.type) for field in schema if not _is_readable(field, kinds[field.name])}
        database_names = {column: str(row[0]) for column, row in zip(names, described, strict=True)}
        parts = [f"{_clean_sql(database_names[column], kinds[column])} AS {sql}" for column, sql in self._sql.items()]
        view = f"SELECT {', '.join(parts)} FROM {scan}"
        self.rows = int(database.row(f"SELECT count(*) FROM {scan}")[0])
        if not self.rows:
            raise UserError(f"the log '{name}' has no rows")
        relation = "TABLE" if self.rows <= MAX_ROWS_IN_MEMORY else "VIEW"
        database.run(f"CREATE {relation} log AS {view}")
        self.columns = self._read_columns(kinds)
        self._base_rates: dict[str, float] = {}  # Column -> how often two random rows differ in it.
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
        columns = {}
        for index, (name, sql) in enumerate(self._sql.items()):
            count, distinct, low, high, is_binary, shortest, longest, length = values[8 * index : 8 * index + 8]
            kind = _kind_of(kinds[name]) if count else "empty"
            columns[name] = Column(
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
        return columns

    def time_range(self, time: str) -> tuple[int, int]:
        """Return the least and the greatest value of an SQL expression for times in microseconds."""
        first, last = self._database.row(f"SELECT min({time}), max({time}) FROM log")
        return int(first), int(last)

    def row(self, query: str) -> Sequence[Any]:
        """Return the single row of a query on `log`."""
        return self._database.row(query)

    def scalar(self, query: str) -> Any:
        """Return the single value of a query on `log`."""
        return self.row(query)[0]

    def _sample(self, keys: Sequence[str], limit: int = SAMPLE_ROWS) -> str:
        """Return SQL for a sample of about `limit` rows, which has all rows of each sampled key."""
        step = -(-self.rows // limit)
        return "log" if step <= 1 else f"(FROM log WHERE hash({', '.join(keys)}) % {step} = 0)"

    def change_rates(
        self, keys: Sequence[str], columns: Sequence[str], order: str = "0", merge_ties: bool = False
    ) -> dict[str, float]:
        """Measure how often each column changes between consecutive rows with the same keys.

        This rate is divided by how often any two rows of the log differ in the column. The result is 0 if the keys
        determine the column, and about 1 if the column is independent of the keys.

        Args:
            keys: Names of the key columns.
            columns: Names of the columns to measure.
            order: SQL expression to order the rows of a key by.
            merge_ties: Whether rows with the same keys and order count as one.

        Returns:
            Column -> change rate, 0 for a column with a single value, NaN if no key has two rows.
        """
        if not columns:
            return {}
        by = [self._sql[key] for key in keys]
        change_rates = {}
        for begin in range(0, len(columns), _COLUMNS_PER_QUERY):
            names = columns[begin : begin + _COLUMNS_PER_QUERY]
            hashes = [f"hash({self._sql[name]})" for name in names]
            row, values, group = self._row_hash, ", ".join(hashes), ""
            if merge_ties:
                row, values, group = "0", ", ".join(f"min({value})" for value in hashes), " GROUP BY ALL"
            rows = f"SELECT hash({', '.join(by)}), {order}, {row}, {values} FROM {self._sample(by)}{group}"
            within = self._count_changes(rows, len(names))
            if any(name not in self._base_rates for name in names):
                mixed = f"SELECT 0, 0, {self._row_hash}, {', '.join(hashes)} FROM {self._sample([self._row_hash])}"
                self._base_rates |= zip(names, self._count_changes(mixed, len(names)), strict=True)
            for name, fraction in zip(names, within, strict=True):
                change_rates[name] = float(fraction / base) if (base := self._base_rates[name]) else 0.0
        return change_rates

    def _count_changes(self, rows: str, number: int) -> np.ndarray:
        """Return the fraction of consecutive rows of a key that change each column, (number,), NaN without such rows.

        The first column of the query `rows` is the key, the next two order a key's rows, and `number` columns follow.
        """
        table = self._database.table(f"FROM ({rows}) ORDER BY ALL")
        keys, *columns = (table.column(index).to_numpy() for index in (0, *range(3, 3 + number)))
        same = keys[1:] == keys[:-1]
        changed = [np.count_nonzero((values[1:] != values[:-1]) & same) for values in columns]
        return np.array(changed, float) / (np.count_nonzero(same) or math.nan)

    def rows_per_key(self, keys: Sequence[str]) -> float:
        """Return the mean number of rows with the same values in the key columns."""
        by = [self._sql[key] for key in keys]
        counts = f"SELECT count(*) n FROM {self._sample(by)} GROUP BY {', '.join(by)}"
        count, groups = self._database.row(f"SELECT sum(n), count(*) FROM ({counts})")
        return float(count) / max(groups, 1)

    def count_duplicates(self, keys: Sequence[str]) -> int:
        """Return the number of rows that repeat the key values of another row, not counting the first of them."""
        by = ", ".join(self._sql[key] for key in keys)
        return self.rows - self.scalar(f"SELECT count(DISTINCT hash({by})) FROM log")

    def fraction(self, condition: str, of: str = "true") -> float:
        """Return the fraction of rows that satisfy a condition, 0 if there are no rows.

        Args:
            condition: SQL condition.
            of: SQL condition of the rows to consider.
        """
        counts = f"count(*) FILTER (({condition}) AND ({of})), count(*) FILTER ({of})"
        both, some = self._database.row(f"SELECT {counts} FROM log")
        return both / some if some else 0.0

    def count_rows(self, condition: str) -> int:
        """Return the number of rows that satisfy an SQL condition."""
        return int(self.scalar(f"SELECT count(*) FILTER ({condition}) FROM log"))

    def quantile(self, expression: str, fraction: float, where: str = "true") -> Any:
        """Return an exact quantile of an SQL expression without nulls, None if there are no rows.

        Args:
            expression: SQL expression.
            fraction: Level of the quantile, from 0 to 1.
            where: SQL condition of the rows to consider.
        """
        where = f"({where}) AND ({expression}) IS NOT NULL"
        return self.scalar(f"SELECT quantile_disc({expression}, {fraction}) FROM log WHERE {where}")

    def sample(self, keys: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Read about `SAMPLE_ROWS` rows: all rows of each sampled key. Lists are replaced by their lengths.

        Args:
            keys: Names of the key columns, none to sample single rows.
            columns: Names of the columns to read.

        Returns:
            A table with the columns and `HALF_COLUMN`. The order depends only on the content of the rows.
        """
        by = [self._sql[key] for key in keys] or [self._row_hash]
        lengths = ["len" if self.columns[name].kind in ("keys", "vector") else "" for name in columns]
        values = (f"{length}({self._sql[name]})" for length, name in zip(lengths, columns, strict=True))
        selected = ", ".join(f"{sql} AS v{index}" for index, sql in enumerate(values))
        half = f"hash({', '.join(by)}, 1) % 2 = 0 AS half"
        rows = self._database.table(f"SELECT {selected}, {half} FROM {self._sample(by)} ORDER BY {self._row_hash}")
        return rows.rename_columns([*columns, HALF_COLUMN])

    def value_hashes(self, column: str, limit: int) -> set[int]:
        """Return the smallest hashes of the distinct values of a column, or of the elements of its lists.

        Args:
            column: Name of the column.
            limit: Maximum number of hashes.
        """
        sql, is_list = self._sql[column], self.columns[column].kind == "keys"
        value, rows = (f"unnest({sql})", self._sample([sql])) if is_list else (sql, "log")
        values = f"SELECT DISTINCT value::VARCHAR AS value FROM (SELECT {value} AS value FROM {rows})"
        query = f"SELECT hash(value) FROM ({values}) WHERE value IS NOT NULL ORDER BY 1 LIMIT {limit}"
        return {row[0] for row in self._database.rows(query)}

    def is_unique(self, column: str) -> bool:
        """Return whether a column has a different value in each row."""
        counts = self.columns[column]
        likely = not counts.nulls and counts.distinct > 0.9 * counts.rows
        return likely and self.scalar(f"SELECT count(DISTINCT {counts.sql}) FROM log") == counts.rows

    def top_values(self, column: str, limit: int) -> list[Any]:
        """Return the most frequent values of a column except null, the most frequent first.

        Args:
            column: Name of the column.
            limit: Maximum number of values.
        """
        sql = self._sql[column]
        values = f"SELECT {sql} FROM log WHERE {sql} IS NOT NULL GROUP BY ALL"
        return [row[0] for row in self._database.rows(f"{values} ORDER BY count(*) DESC, {sql} LIMIT {limit}")]


_COLUMN_USES: dict[ColumnKind, ColumnUse] = {"number": "number", "time": "time", "keys": "keys", "vector": "vector"}


def _is_readable(field: pa.Field, kind: str) -> bool:
    """Return whether features can read a column's Arrow type in the way that its DuckDB type `kind` suggests."""
    if _kind_of(kind) in ("empty", "other"):
        return True
    try:
        canonical_type(field.name, _COLUMN_USES.get(_kind_of(kind), "key"), field.type)
    except UserError:
        return False
    return True


def _find_lacking(database: Database, files: str) -> dict[str, str]:
    """Return column -> clause that names the first file without it, for the columns that some files lack."""
    database.run(f"CREATE TABLE parts AS SELECT DISTINCT file_name, name FROM parquet_schema({files})")
    pairs = "FROM (SELECT DISTINCT file_name FROM parts), (SELECT DISTINCT name FROM parts) EXCEPT FROM parts"
    lacking = database.rows(f"SELECT name, min(file_name) FROM ({pairs}) GROUP BY name")
    return {str(name): f"'{file}' has no such column" for name, file in lacking}


def _clean_sql(name: str, kind: str) -> str:
    """Return SQL for a column in a type that queries support, with NaN and infinity as null."""
    quoted = '"' + name.replace('"', '""') + '"'
    if kind in ("DOUBLE", "FLOAT"):
        return f"CASE WHEN isfinite({quoted}) THEN {quoted} END"
    if kind == "TIMESTAMPTZ_NS":
        return f"{quoted}::TIMESTAMPTZ"
    return f"{quoted}::DOUBLE" if kind.startswith("DECIMAL") else quoted


def _unit_of(low: int, high: int) -> str | None:
    """Return the unit in which integers from `low` to `high` are times between 1990 and 2033, None if none is."""
    for unit, per_second in (("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)):
        if _EARLIEST * per_second <= low and high <= _LATEST * per_second:
            return unit
    return None


def target_encoding_auc(
    codes: np.ndarray, labels: np.ndarray, fit_mask: np.ndarray, min_class_rows: int = 3
) -> tuple[float, float]:
    """Measure how well the mean label of each value (target encoding) ranks other rows.

    Args:
        codes: Value of each row from `factorize_binned`, shape (N,), int64 from 0.
        labels: Labels between 0 and 1, shape (N,), NaN where not observed.
        fit_mask: Rows to compute mean labels from, shape (N,), bool. The rest are ranked.
        min_class_rows: Number of labels above 0, and of labels below 1, that fitted and ranked rows each need.

    Returns:
        The AUC, and the precision: the fraction of the rarer label (0 or 1) among the K best rows, where K is the
        number of rows with this label. A column that only enables a rare label, such as whether the page has a button
        to click, has a high AUC but a low precision. Both are NaN if there are too few rows.
    """
    observed = ~np.isnan(labels)
    codes, labels, fit_mask = codes[observed], labels[observed], fit_mask[observed]
    labels = 1 - labels if labels.sum() > 0.5 * len(labels) else labels
    fitted, tested = labels[fit_mask], labels[~fit_mask]
    rarest = min((rows > 0).sum() for part in (fitted, tested) for rows in (part, 1 - part))
    if rarest < min_class_rows or len(tested) < _MIN_ROWS:
        return math.nan, math.nan
    size = codes.max(initial=0) + 1
    rows, positives = (np.bincount(codes[fit_mask], weights, size) for weights in (None, fitted))
    means = (positives + _PRIOR_ROWS * fitted.mean()) / (rows + _PRIOR_ROWS)
    scores, group = np.unique(np.round(means, 12)[codes[~fit_mask]], return_inverse=True)
    ones, counts = np.bincount(group, tested, len(scores)), np.bincount(group, minlength=len(scores))
    top = np.interp(ones.sum(), [0, *np.cumsum(counts[::-1])], [0, *np.cumsum(ones[::-1])])
    return float(auc_of_counts(ones, counts - ones)), float(top / ones.sum())


def implies_positive(codes: np.ndarray, labels: np.ndarray, chance: np.ndarray | float) -> bool:
    """Return whether almost all rows without the most frequent value have label 1, although this is unlikely by chance.

    Args:
        codes: Value of each row, shape (N,), int64 from 0.
        labels: Labels 0, 1 or NaN, shape (N,).
        chance: Probability of label 1 regardless of the value, shape (N,) or the same for all rows.
    """
    unusual = codes != np.bincount(codes, minlength=1).argmax()
    if unusual.sum() < 20 or (labels[unusual] == 1).mean() <= 0.999:
        return False
    return bool(-np.log(np.broadcast_to(chance, len(codes))[unusual]).sum() > 20)


def factorize_binned(values: pa.ChunkedArray) -> np.ndarray:
    """Encode the texts of a column, or the bins of its numbers, as integers from 0, also null. Returns (N,) int64."""
    kind = values.type
    if pa.types.is_temporal(kind):
        values = values.cast(pa.int64()) if not pa.types.is_date(kind) else values.cast(pa.int32()).cast(pa.int64())
    if pa.types.is_boolean(values.type) or pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
        finite = numbers[~np.isnan(numbers)]
        if not len(finite):
            return np.zeros(len(numbers), np.int64)
        # Bins end at quantiles of the rows and at quantiles of the distinct values. The most frequent value, such as a
        # sum of 0, has its own bin. Otherwise the few rows with other values would share a bin with it.
        distinct, rows = np.unique(finite, return_counts=True)
        usual, parts = distinct[rows.argmax()], np.linspace(0, 1, _BINS + 1)[1:-1]
        edges = [*np.quantile(finite, parts), *np.quantile(distinct, parts), usual, np.nextafter(usual, np.inf)]
        return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(np.unique(edges), numbers, side="right"))
    return factorize(values)


def factorize(values: pa.ChunkedArray) -> np.ndarray:
    """Encode the values of a column as integers. Returns shape (N,), int64 from 0, with a code of its own for null."""
    codes = values.combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return codes.indices.fill_null(-1).to_numpy().astype(np.int64) + 1


def to_days(microseconds: float) -> float:
    """Convert microseconds to days."""
    return microseconds / MICROSECONDS_PER_DAY
