"""Read Parquet files that others made: what is missing, corrupt or of another type is named, file and column."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError


@contextmanager
def open_source(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file that must hold the columns of `schema`; whatever makes it unreadable names the file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the source folder must hold {path.name}")
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            for name in schema.names:
                if name not in found:
                    raise UserError(f"{path} has no column {name!r}; it has {', '.join(found)}")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet, get a fresh copy of it: {error}") from error


def conform(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """Give the columns the types of `schema`, refusing what does not fit and missing values in required columns.

    Raises:
        UserError: naming `path`, the column, what was expected and what was found.
    """
    columns = []
    for field in schema:
        column = table[field.name]
        try:
            column = column.cast(field.type)
        except pa.ArrowException as error:
            raise UserError(f"{path}: column {field.name!r} must be {field.type}, found {column.type}") from error
        if column.null_count and not field.nullable:
            raise UserError(f"{path}: column {field.name!r} has {column.null_count:,} missing values, expected none")
        columns.append(column)
    return pa.table(columns, schema=schema)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema`.

    Raises:
        UserError: the file is missing or corrupt, or a column is missing, of another type or incomplete.
    """
    with open_source(path, schema) as file:
        return conform(file.read(columns=schema.names), schema, path)


def read_keyed(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table whose first column is its key.

    Raises:
        UserError: as `read_table`, and where a key occurs twice.
    """
    table = read_table(path, schema)
    key = schema.names[0]
    distinct = pc.count_distinct(table[key]).as_py()
    if distinct < table.num_rows:
        raise UserError(f"{path}: column {key!r} must be unique, {table.num_rows - distinct:,} rows repeat a key")
    return table
