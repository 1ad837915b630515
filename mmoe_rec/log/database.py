"""DuckDB for joins and groupings over a whole log, in bounded memory with temporary files.

SQL never contains the column names of the user's log. Tables use fixed column names or numbers instead. Names with
quotes, and names that differ only by case, therefore cause no errors.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import Dataset

from mmoe_rec.devices import usable_cores
from mmoe_rec.errors import UserError, first_line
from mmoe_rec.log.files import file_system
from mmoe_rec.point_in_time.arrays import rebatch

DEFAULT_MEMORY_GIB = 4.0
"""Default memory limit of a database."""


class Database:
    """A temporary DuckDB database, opened by `open_database`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def register_remote(self, uri: str) -> None:
        """Let queries read files from the file system of `uri`."""
        self._connection.register_filesystem(file_system(uri)[0])

    def create_table(self, table: str, schema: pa.Schema, batches: Iterable[pa.Table]) -> int:
        """Create a table from Arrow tables, and return its number of rows.

        Args:
            table: Name of the new table.
            schema: Names and types of the columns to store.
            batches: Arrow tables with these columns.
        """
        rows = 0
        self._connection.register("batch", schema.empty_table())
        self.run(f"CREATE TABLE {table} AS SELECT * FROM batch")
        for batch in batches:
            self._connection.register("batch", batch.select(schema.names).cast(schema))
            self.run(f"INSERT INTO {table} SELECT * FROM batch")
            rows += len(batch)
        self._connection.unregister("batch")
        return rows

    def copy(self, table: str, data: Dataset) -> None:
        """Copy a data set into a new table, so that queries don't read the data set itself.

        Arrow sometimes crashes if a query stops before it has read all files of a data set, as in a join with an empty
        table. A copy always reads all files, and takes no longer than a query.

        Args:
            table: Name of the new table.
            data: Data set to copy.
        """
        self._connection.register("files", data)
        self.run(f"CREATE TABLE {table} AS FROM files")
        self._connection.unregister("files")

    def run(self, *statements: str) -> None:
        """Execute `statements` in order."""
        for statement in statements:
            self._connection.execute(statement).fetchall()  # an unread result would block the connection

    def row(self, query: str) -> Sequence[Any]:
        """Return the first row of the result of `query`."""
        return self.rows(query)[0]

    def rows(self, query: str) -> Sequence[Sequence[Any]]:
        """Return all rows of the result of `query`, which should be small."""
        return self._connection.execute(query).fetchall()

    def table(self, query: str) -> pa.Table:
        """Return the result of `query` as one table, which must fit into memory."""
        return self._connection.sql(query).to_arrow_table()

    def read(self, query: str, rows: int) -> Iterator[pa.Table]:
        """Yield the result of a query in batches.

        Args:
            query: SQL query.
            rows: Maximum number of rows of a batch.
        """
        batches = pa.RecordBatchReader.from_stream(self._connection.sql(query))
        return rebatch((pa.Table.from_batches([batch]) for batch in batches), rows)

    def write(self, query: str, path: Path, schema: pa.Schema, **options: Any) -> None:
        """Write the result of a query to a Parquet file in batches.

        Args:
            query: SQL query.
            path: Output file.
            schema: Schema of the file.
            options: Additional options of `pyarrow.parquet.ParquetWriter`.
        """
        with pq.ParquetWriter(path, schema, compression="zstd", **options) as writer:
            for table in self.read(query, 262_144):
                writer.write_table(table.cast(schema))


@contextmanager
def open_database(
    folder: Path, memory_gib: float = DEFAULT_MEMORY_GIB, workers: int | None = None
) -> Iterator[Database]:
    """Open a new temporary database, and remove it at the end of the `with` block.

    Args:
        folder: Folder for temporary files. Its previous content is deleted, and the folder itself at the end.
        memory_gib: Memory limit in GiB.
        workers: Number of threads, by default one per core.

    Raises:
        UserError: A query needs more memory, or the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "memory_limit": f"{memory_gib}GiB",
        "temp_directory": str(folder),
        "threads": workers or usable_cores(),
        "preserve_insertion_order": False,  # queries that need an order have ORDER BY
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    try:
        with duckdb.connect(":memory:", config=config) as connection:
            yield Database(connection)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"data.memory_gib: {memory_gib:g} GiB are not enough ({first_line(error)}). Increase data.memory_gib or "
            f"decrease data.workers, and check that the disk of '{folder.parent}' has free space."
        ) from None
    except duckdb.IOException as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"the disk of '{folder.parent}' is full ({first_line(error)}). Free some space.") from None
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # DuckDB replaces KeyboardInterrupt by an error of its own.
    finally:
        shutil.rmtree(folder, ignore_errors=True)
