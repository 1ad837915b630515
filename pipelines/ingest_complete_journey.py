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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.progress import bar
from pipelines.data_sets.complete_journey import (
    DEMOGRAPHICS,
    PRODUCTS,
    TRANSACTIONS,
    WeekPromotions,
    collapse_promotions,
    find_purchases,
    packaged_folder,
    read_promotions,
    read_table,
    row_changes,
    to_numpy,
)
from pipelines.data_sets.ingest_common import (
    REQUEST_TIME,
    command_parser,
    non_negative,
    run_ingest,
    sample_negatives,
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


# Requests


def select_purchases(purchases: pa.Table, selection: Selection) -> pa.Table:
    """Keep the purchases of the selected weeks and households."""
    week = purchases["week"]
    kept = pc.and_(pc.greater_equal(week, selection.first_week), pc.less_equal(week, selection.last_week))
    if selection.households is not None:
        smallest = np.unique(to_numpy(purchases["household_id"]))[: selection.households]
        kept = pc.and_(kept, pc.is_in(purchases["household_id"], value_set=pa.array(smallest)))
    return purchases.filter(kept)


def build_week_log(
    purchases: pa.Table, promotions: WeekPromotions, products: pa.Table, demographics: pa.Table, selection: Selection
) -> pa.Table:
    """Build the log of one week, sorted by request time, request and product.

    A request has the bought products that were on promotion and a sample of the others; without the former, no rows.

    Args:
        purchases: the week's purchases, as `find_purchases` sorts them.
    """
    request, store, product = (to_numpy(purchases[name]) for name in ("request_id", "store_id", "product_id"))
    starts = np.flatnonzero(row_changes(request))
    request_at, bought_at, shown_at, rates = [], [], [], []
    for start, end in zip(starts, np.append(starts[1:], len(product)), strict=True):
        where = promotions.slices.get(int(store[start]))
        if where is None:
            continue
        shown = promotions.products[where]
        found = np.searchsorted(shown, product[start:end])
        promoted = np.flatnonzero(shown[np.minimum(found, len(shown) - 1)] == product[start:end])
        taken, others = found[promoted], len(shown) - len(promoted)
        wanted = selection.negatives_per_bought * len(taken)
        sampled = sample_negatives(len(shown), taken, wanted, (selection.seed, int(request[start])))
        request_at.append(np.full(len(taken) + len(sampled), start))
        bought_at.append(np.append(start + promoted, np.full(len(sampled), -1)))
        shown_at.append(where.start + np.append(taken, sampled))
        rates.append(np.append(np.ones(len(taken)), np.full(len(sampled), len(sampled) / max(others, 1))))
    if not request_at:
        return LOG.empty_table()
    order = np.lexsort((np.concatenate(shown_at), np.concatenate(request_at)))
    requests, shown = (
        table.take(pa.array(np.concatenate(places)[order]))
        for table, places in ((purchases, request_at), (promotions.table, shown_at))
    )
    bought = np.concatenate(bought_at)[order]
    product = products.take(pc.index_in(shown["product_id"], value_set=products["product_id"]))
    household = demographics.take(pc.index_in(requests["household_id"], value_set=demographics["household_id"]))
    columns = {name: table[name] for table in (product, household, requests, shown) for name in table.column_names}
    columns |= {
        "age_group": household["age"],
        "bought": pa.array((bought >= 0).astype(np.int8)),
        "rebought": purchases["rebought"].take(pa.array(bought, mask=bought < 0)),
        "sampling_rate": pa.array(np.concatenate(rates)[order]),
    }
    return pa.table([columns[field.name] for field in LOG], schema=LOG)


# The job


def ingest(source: Path, out: Path, selection: Selection) -> dict[str, int]:
    """Write the log to `out`/log and all purchases to `out`/purchases, replacing what is there.

    Args:
        source: folder of the package's Parquet files.

    Returns:
        What the log holds, by name.

    Raises:
        UserError: a source file is missing or wrong, or nothing was selected.
    """
    products = read_table(source / "products.parquet", PRODUCTS)
    demographics = read_table(source / "demographics.parquet", DEMOGRAPHICS)
    # Labels come from all purchases: a slice of the log holds the same rows as the whole.
    all_purchases = find_purchases(read_table(source / "transactions.parquet", TRANSACTIONS))
    purchases = select_purchases(all_purchases, selection)
    counts = dict.fromkeys(("rows", "requests", "bought", "rebought known", "rebought"), 0)
    # The log comes last: where there is one, its purchases are there too.
    with atomic_folder(out / "log") as folder, atomic_folder(out / "purchases") as events:
        promotions = read_promotions(source / "promotions.parquet", purchases)
        with bar() as progress:
            for week in progress.track(sorted(promotions), description="writing weeks"):
                of_week = purchases.filter(pc.equal(purchases["week"], week))
                shown = collapse_promotions(promotions.pop(week))
                table = build_week_log(of_week, shown, products, demographics, selection)
                if table.num_rows:
                    write_log_file(table, folder / f"week-{week:02d}.parquet")
                    counts["rows"] += table.num_rows
                    counts["requests"] += pc.count_distinct(table["request_id"]).as_py()
                    counts["bought"] += pc.sum(table["bought"]).as_py()
                    counts["rebought known"] += table.num_rows - table["rebought"].null_count
                    counts["rebought"] += pc.sum(table["rebought"]).as_py() or 0
        if counts["rows"] == 0:
            raise UserError("no basket of the selected weeks and households holds a promoted product: select more")
        write_purchases(all_purchases, purchases, products, events)
    return {"baskets with a purchase": pc.count_distinct(purchases["request_id"]).as_py(), **counts}


def write_purchases(all_purchases: pa.Table, selected: pa.Table, products: pa.Table, folder: Path) -> None:
    """Write what the selected households bought in any week, promoted or not, one row a basket and product."""
    households = pc.unique(selected["household_id"].combine_chunks())
    bought = all_purchases.filter(pc.is_in(all_purchases["household_id"], value_set=households))
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


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line."""
    parser = command_parser("python -m pipelines.ingest_complete_journey", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write log/ into; a log that is there is replaced")
    add("--source", type=Path, help="folder of the package's Parquet files (default: the installed package)")
    add("--weeks", type=_week_range, default=(1, 53), metavar="A-B", help="weeks of the data to keep (default: 1-53)")
    add("--households", type=_positive, metavar="N", help="keep the N smallest household ids (default: all)")
    add("--negatives-per-bought", type=non_negative, default=4, metavar="N", help="(default: %(default)s)")
    add("--seed", type=non_negative, default=17, help="seed of the sampled candidates (default: %(default)s)")

    def ingest_selection(options: argparse.Namespace) -> dict[str, int]:
        weeks, negatives = options.weeks, options.negatives_per_bought
        selection = Selection(weeks[0], weeks[1], options.households, negatives, options.seed)
        return ingest(options.source or packaged_folder(), options.out, selection)

    following = "mmoe-rec train --config configs/complete_journey.yaml"
    run_ingest("Complete Journey", parser, arguments, ingest_selection, following)


if __name__ == "__main__":
    main()
