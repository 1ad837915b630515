"""python -m pipelines.ingest_complete_journey --out data/complete_journey

Turn the Complete Journey grocery data into an interaction log, `OUT/log/week-01.parquet` ... `week-53.parquet`, and a
log of events, all purchases of its households, `OUT/purchases/week-01.parquet` ...: 78% of the purchases are of
products that were not on promotion, and what a household bought before says much of what it buys next.

A request is one basket; its candidates are the products on promotion in that store in that week. All bought candidates
are kept, with a few sampled others for each; `sampling_rate` says at which rate, so that the full list can be weighted
back. A basket without a promoted purchase gives no rows: nothing in it could be ranked.

A purchase is a transaction with a positive quantity and a positive sales value (the rest are voids, returns and free
items), dated by its basket's first timestamp. The two labels:

bought    the household bought the candidate in this basket (engagement).
rebought  it bought the same product again, promoted or not and in any store, on a later day (of New York, where the
          data's weeks turn) and at most 56 x 24 hours after the request (satisfaction). Null where the candidate was
          not bought, and where those 56 days run past the last transaction.

Nothing known only after the request (quantities, prices paid, coupons) enters the log.
"""

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.atomic import atomic_folders
from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.progress import bar
from pipelines.data_sets.complete_journey import (
    DEMOGRAPHICS,
    PRODUCTS,
    TRANSACTIONS,
    WeekPromotions,
    changes,
    collapse_promotions,
    find_purchases,
    packaged_folder,
    stream_promotions,
    to_numpy,
)
from pipelines.data_sets.parquet_source import read_keyed, read_table
from pipelines.data_sets.sampled_log import (
    REQUEST_TIME,
    IntArray,
    command_parser,
    non_negative,
    print_summary,
    sample_others,
    write_log_file,
)

LOG = pa.schema(
    [
        pa.field("request_id", pa.int64()),
        pa.field("request_time", REQUEST_TIME),
        pa.field("household_id", pa.int64()),
        pa.field("store_id", pa.int64()),
        pa.field("week", pa.int64()),
        pa.field("product_id", pa.int64()),
        *[field for field in PRODUCTS if field.name != "product_id"],
        pa.field("age_group", pa.string()),
        *[field for field in DEMOGRAPHICS if field.name not in ("household_id", "age")],
        pa.field("display_location", pa.string()),
        pa.field("mailer_location", pa.string()),
        pa.field("bought", pa.int8()),
        pa.field("rebought", pa.int8()),
        pa.field("sampling_rate", pa.float64()),
    ]
)
"""The columns of the log, in order; data/README.md describes them."""

PURCHASES = pa.schema(
    [
        pa.field("request_time", REQUEST_TIME),
        pa.field("household_id", pa.int64()),
        pa.field("store_id", pa.int64()),
        pa.field("product_id", pa.int64()),
        *[field for field in PRODUCTS if field.name not in ("product_id", "package_size")],
    ]
)
"""The columns of the purchases, in order."""


@dataclass(frozen=True)
class Selection:
    """Which requests enter the log, and how many others stand beside what was bought.

    Attributes:
        first_week, last_week: weeks of the data, both included.
        households: keep the requests of so many smallest household ids; None keeps all.
        negatives_per_bought: sampled candidates for each bought one.
        seed: with the basket id, decides which candidates are sampled.
    """

    first_week: int = 1
    last_week: int = 53
    households: int | None = None
    negatives_per_bought: int = 4
    seed: int = 17


@dataclass
class Counts:
    """What a log holds; `add` sums it up file by file. `baskets` counts those with a purchase, promoted or not."""

    baskets: int = 0
    rows: int = 0
    requests: int = 0
    bought: int = 0
    rebought_known: int = 0
    rebought: int = 0

    def add(self, table: pa.Table) -> None:
        """Count one file of the log."""
        self.rows += table.num_rows
        self.requests += pc.count_distinct(table["request_id"]).as_py()
        self.bought += pc.sum(table["bought"]).as_py() or 0
        self.rebought_known += table.num_rows - table["rebought"].null_count
        self.rebought += pc.sum(table["rebought"]).as_py() or 0


@dataclass(frozen=True)
class RequestRows:
    """The log rows of one request, R of them, ascending by product.

    Attributes:
        positions: (R,) positions in the request's candidate list.
        bought: (R,) positions in the request's purchases, -1 where the candidate was not bought.
        sampling_rate: the rate of the rows that were not bought.
    """

    positions: IntArray
    bought: IntArray
    sampling_rate: float


# Requests


def select_purchases(purchases: pa.Table, selection: Selection) -> pa.Table:
    """Keep the purchases of the selected weeks and households."""
    week = purchases["week"]
    kept = pc.and_(pc.greater_equal(week, selection.first_week), pc.less_equal(week, selection.last_week))
    if selection.households is not None:
        smallest = np.unique(to_numpy(purchases["household_id"]))[: selection.households]
        kept = pc.and_(kept, pc.is_in(purchases["household_id"], value_set=pa.array(smallest)))
    return purchases.filter(kept)


def request_rows(candidates: IntArray, bought: IntArray, request_id: int, selection: Selection) -> RequestRows | None:
    """Choose the rows of one request: all bought candidates and a sample of the others.

    Args:
        candidates: (C,) product ids on promotion, ascending.
        bought: (B,) product ids in the basket, ascending, promoted or not.
        request_id: the basket, which seeds the sample.

    Returns:
        None where no bought product was on promotion.
    """
    found = np.searchsorted(candidates, bought)
    promoted = np.flatnonzero(candidates[np.minimum(found, len(candidates) - 1)] == bought)
    if len(promoted) == 0:
        return None
    taken = found[promoted]
    wanted = selection.negatives_per_bought * len(taken)
    sampled = sample_others(len(candidates), taken, wanted, (selection.seed, request_id))
    others = len(candidates) - len(taken)

    positions = np.concatenate([taken, sampled])
    purchase = np.concatenate([promoted, np.full(len(sampled), -1)])
    order = np.argsort(positions)
    return RequestRows(positions[order], purchase[order], len(sampled) / others if others else 1.0)


def log_of_week(
    purchases: pa.Table, promotions: WeekPromotions, products: pa.Table, demographics: pa.Table, selection: Selection
) -> pa.Table:
    """Build the log of one week, sorted by request time, request and product.

    Args:
        purchases: the week's purchases, as `find_purchases` sorts them.
    """
    request_id, store = to_numpy(purchases["request_id"]), to_numpy(purchases["store_id"])
    product = to_numpy(purchases["product_id"])
    starts = np.flatnonzero(changes(request_id))
    request_at, purchase_at, promotion_at, rates = [], [], [], []
    for start, end in zip(starts, np.append(starts[1:], len(product)), strict=True):
        where = promotions.slices.get(int(store[start]))
        if where is None:
            continue
        rows = request_rows(promotions.products[where], product[start:end], int(request_id[start]), selection)
        if rows is None:
            continue
        request_at.append(np.full(len(rows.positions), start))
        purchase_at.append(np.where(rows.bought >= 0, start + rows.bought, -1))
        promotion_at.append(where.start + rows.positions)
        rates.append(np.where(rows.bought >= 0, 1.0, rows.sampling_rate))
    if not request_at:
        return LOG.empty_table()
    return _assemble(
        purchases.take(pa.array(np.concatenate(request_at))),
        promotions.table.take(pa.array(np.concatenate(promotion_at))),
        _labels(purchases, np.concatenate(purchase_at), np.concatenate(rates)),
        products,
        demographics,
    )


def _labels(purchases: pa.Table, purchase_at: IntArray, rates: npt.NDArray[np.float64]) -> pa.Table:
    """bought, rebought and sampling_rate of each row; `purchase_at` is the row of its purchase, -1 where not bought."""
    bought = purchase_at >= 0
    rebought = purchases["rebought"].take(pa.array(purchase_at, mask=~bought))
    return pa.table({"bought": bought.astype(np.int8), "rebought": rebought, "sampling_rate": rates})


def _assemble(
    requests: pa.Table, promotions: pa.Table, labels: pa.Table, products: pa.Table, demographics: pa.Table
) -> pa.Table:
    """Join the columns of the log; the first three tables are row by row, the last two are looked up by id."""
    product = products.take(pc.index_in(promotions["product_id"], value_set=products["product_id"]))
    household = demographics.take(pc.index_in(requests["household_id"], value_set=demographics["household_id"]))
    known = {"age_group" if name == "age" else name: household[name] for name in household.column_names}
    columns = {name: product[name] for name in product.column_names} | known
    for table in (requests.drop_columns(["product_id", "rebought"]), promotions, labels):
        columns |= {name: table[name] for name in table.column_names}
    return pa.table([columns[field.name] for field in LOG], schema=LOG)


# The job


def ingest(source: Path, out: Path, selection: Selection) -> Counts:
    """Write the log to `out`/log and all purchases to `out`/purchases, replacing what is there.

    Args:
        source: folder of the package's Parquet files.

    Raises:
        UserError: a source file is missing or wrong, or nothing was selected.
    """
    products = read_keyed(source / "products.parquet", PRODUCTS)
    demographics = read_keyed(source / "demographics.parquet", DEMOGRAPHICS)
    transactions = read_table(source / "transactions.parquet", TRANSACTIONS)
    # Labels come from all purchases: a slice of the log holds the same rows as the whole.
    every = find_purchases(transactions)
    purchases = select_purchases(every, selection)
    del transactions
    counts = Counts(baskets=pc.count_distinct(purchases["request_id"]).as_py())
    # The log comes last: where there is one, its purchases are there too.
    with bar() as progress, atomic_folders(out / "purchases", out / "log") as (events, folder):
        promotions = stream_promotions(source / "promotions.parquet", purchases, progress)
        for week in progress.track(sorted(promotions), description="writing weeks"):
            of_week = purchases.filter(pc.equal(purchases["week"], week))
            shown = collapse_promotions(pa.concat_tables(promotions.pop(week)))
            table = log_of_week(of_week, shown, products, demographics, selection)
            if table.num_rows:
                write_log_file(table, folder / f"week-{week:02d}.parquet")
                counts.add(table)
        if counts.rows == 0:
            raise UserError("no basket of the selected weeks and households holds a promoted product: select more")
        write_purchases(every, purchases, products, events)
    return counts


def write_purchases(every: pa.Table, selected: pa.Table, products: pa.Table, folder: Path) -> None:
    """Write what the selected households bought in any week, promoted or not, one row a basket and product."""
    households = pc.unique(selected["household_id"].combine_chunks())
    bought = every.filter(pc.is_in(every["household_id"], value_set=households))
    product = products.take(pc.index_in(bought["product_id"], value_set=products["product_id"]))
    table = pa.table({f.name: (bought if f.name in bought.column_names else product)[f.name] for f in PURCHASES})
    for week in pc.unique(bought["week"]).to_pylist():
        write_log_file(table.filter(pc.equal(bought["week"], week)), folder / f"week-{week:02d}.parquet")


def _week_range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"expected weeks such as 1-53 or 7, found {text!r}")
    return first, last


def _positive(text: str) -> int:
    if non_negative(text) == 0:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1, found 0")
    return int(text)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m pipelines.ingest_complete_journey", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write log/ into; a log that is there is replaced")
    add("--source", type=Path, help="folder of the package's Parquet files (default: the installed package)")
    add("--weeks", type=_week_range, default=(1, 53), metavar="A-B", help="weeks of the data to keep (default: 1-53)")
    add("--households", type=_positive, metavar="N", help="keep the N smallest household ids (default: all)")
    add("--negatives-per-bought", type=non_negative, default=4, metavar="N", help="(default: %(default)s)")
    add("--seed", type=non_negative, default=17, help="seed of the sampled candidates (default: %(default)s)")
    return parser.parse_args(arguments)


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line."""
    options = _arguments(arguments)
    started = time.perf_counter()
    selection = Selection(
        first_week=options.weeks[0],
        last_week=options.weeks[1],
        households=options.households,
        negatives_per_bought=options.negatives_per_bought,
        seed=options.seed,
    )
    counts = ingest(options.source or packaged_folder(), options.out, selection)
    print_summary(
        "Complete Journey",
        {
            "rows": counts.rows,
            "baskets with a purchase": counts.baskets,
            "requests (baskets with a promoted purchase)": counts.requests,
            "bought": counts.bought,
            "rebought known": counts.rebought_known,
            "rebought": counts.rebought,
            "seconds": time.perf_counter() - started,
        },
        log=options.out / "log",
        next_command="mmoe-rec train --config configs/complete_journey.yaml",
    )
