"""DuckDB, for what is joined or grouped over a whole log: in bounded memory, the rest in files.

Names of a user's columns never go into SQL: tables have names of columns of their own, and the user's columns are
numbered, so that neither quotes nor two names that differ by case only can be mistaken.
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
"""Memory of a database, by default."""


class Database:
    """A database that `open_database` gives."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def register_remote(self, uri: str) -> None:
        """Lets queries read the files of a remote place."""
        self._connection.register_filesystem(file_system(uri)[0])

    def create_table(self, table: str, schema: pa.Schema, batches: Iterable[pa.Table]) -> int:
        """Makes a table of Arrow tables whose columns have the names and types of `schema`; gives its rows."""
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
        """Makes a table of a data set. (Where a query, as a join with nothing, leaves off while it reads Arrow files,
        Arrow crashes now and then. A copy is always read to the end, and costs no time.)"""
        self._connection.register("files", data)
        self.run(f"CREATE TABLE {table} AS FROM files")
        self._connection.unregister("files")

    def run(self, *statements: str) -> None:
        """Runs statements one after the other."""
        for each in statements:
            self._connection.execute(each).fetchall()  # a result that is left keeps the connection

    def row(self, query: str) -> Sequence[Any]:
        """The first row of a result that has one."""
        return self.rows(query)[0]

    def rows(self, query: str) -> Sequence[Sequence[Any]]:
        """All rows of a result that has few."""
        return self._connection.execute(query).fetchall()

    def table(self, query: str) -> pa.Table:
        """A result that fits into memory."""
        return self._connection.sql(query).to_arrow_table()

    def read(self, query: str, rows: int) -> Iterator[pa.Table]:
        """The result of a query, as tables of at most so many rows."""
        batches = pa.RecordBatchReader.from_stream(self._connection.sql(query))
        return rebatch((pa.Table.from_batches([batch]) for batch in batches), rows)

    def write(self, query: str, path: Path, schema: pa.Schema, **options: Any) -> None:
        """Writes the result of a query to a Parquet file, some rows at a time."""
        with pq.ParquetWriter(path, schema, compression="zstd", **options) as writer:
            for table in self.read(query, 262_144):
                writer.write_table(table.cast(schema))


@contextmanager
def open_database(
    folder: Path, memory_gib: float = DEFAULT_MEMORY_GIB, workers: int | None = None
) -> Iterator[Database]:
    """A new database that is gone afterwards. It holds `memory_gib` in memory and the rest in `folder`, which it makes
    and removes, with what a killed process has left there. workers: threads; None is one a core. Raises UserError where
    it needs more memory, or the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "memory_limit": f"{memory_gib}GiB",
        "temp_directory": str(folder),
        "threads": workers or usable_cores(),
        "preserve_insertion_order": False,  # what needs an order asks for it
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    try:
        with duckdb.connect(":memory:", config=config) as connection:
            yield Database(connection)
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"data.memory_gib is {memory_gib:g}, which does not suffice here ({first_line(error)}): set it higher, or "
            f"data.workers lower, and see that the disk of '{folder.parent}' has room"
        ) from None
    except duckdb.IOException as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"the disk of '{folder.parent}' is full ({first_line(error)}): make room there") from None
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error  # which DuckDB hides
    finally:
        shutil.rmtree(folder, ignore_errors=True)
