"""python -m pipelines.ingest_complete_journey --out data/complete_journey

Convert the Complete Journey grocery data into an interaction log and an event log. The interaction log is
`OUT/log/week-01.parquet` to `week-53.parquet`. The event log `OUT/purchases/week-01.parquet` and so on has all
purchases of the same households. Earlier purchases help to predict later purchases, and 78% of the purchases are of
products that were not on promotion.

A request is one basket. The candidates are the products on promotion in the same store and week. The log has all bought
candidates and a few sampled candidates that were not bought. The column `sampling_rate` makes it possible to weight the
rows like the full list. A basket without a promoted purchase gives no rows.

A purchase is a transaction with a positive quantity and a positive sales value. Other transactions are voids, returns
and free items. The time of a purchase is the first timestamp of the basket. The two labels:

bought    the household bought the candidate in this basket (engagement).
rebought  the household bought the product again, promoted or not and in any store, on a later day and at most 56 x 24
          hours after the request (satisfaction). Days are those of New York, as the weeks of the data. The label is
          null if the candidate was not bought, or if the 56 days end after the last transaction.

The log has no data that become available only after the request, such as quantities, paid prices and coupons.
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
"""Columns of the log, in order, as described in data/README.md."""

PURCHASES = pa.schema(
    [
        pa.field("request_time", REQUEST_TIME),
        pa.field("household_id", pa.int64()),
        pa.field("store_id", pa.int64()),
        pa.field("product_id", pa.int64()),
        *[field for field in PRODUCTS if field.name not in ("product_id", "package_size")],
    ]
)
"""Columns of the purchases, in order."""


@dataclass(frozen=True)
class Selection:
    """Selection of requests and candidates for the log.

    Attributes:
        first_week: First week of the data.
        last_week: Last week of the data, included.
        households: Number of households with the smallest IDs. None selects all households.
        negatives_per_bought: Number of sampled candidates for each bought candidate.
        seed: Seed of the sampled candidates, together with the basket ID.
    """

    first_week: int = 1
    last_week: int = 53
    households: int | None = None
    negatives_per_bought: int = 4
    seed: int = 17


def _select_purchases(purchases: pa.Table, selection: Selection) -> pa.Table:
    """Return the purchases of the selected weeks and households."""
    week = purchases["week"]
    kept = pc.and_(pc.greater_equal(week, selection.first_week), pc.less_equal(week, selection.last_week))
    if selection.households is not None:
        smallest = np.unique(to_numpy(purchases["household_id"]))[: selection.households]
        kept = pc.and_(kept, pc.is_in(purchases["household_id"], value_set=pa.array(smallest)))
    return purchases.filter(kept)


def _build_week_log(
    purchases: pa.Table, promotions: WeekPromotions, products: pa.Table, demographics: pa.Table, selection: Selection
) -> pa.Table:
    """Build the log of one week from the week's purchases, sorted as in `find_purchases`, and promotions.

    A request has the bought products that were on promotion, and a sample of the other products on promotion. A request
    without a bought product on promotion gives no rows. Rows are sorted by request time, request and product.
    """
    request, store, product = (to_numpy(purchases[name]) for name in ("request_id", "store_id", "product_id"))
    starts = np.flatnonzero(row_changes(request))
    request_at, bought_at, shown_at, rates = [], [], [], []
    for start, end in zip(starts, np.append(starts[1:], len(product)), strict=True):
        store_rows = promotions.slices.get(int(store[start]))
        if store_rows is None:
            continue
        shown = promotions.products[store_rows]
        index = np.searchsorted(shown, product[start:end])
        promoted = np.flatnonzero(shown[np.minimum(index, len(shown) - 1)] == product[start:end])
        positives, negatives = index[promoted], len(shown) - len(promoted)
        wanted = selection.negatives_per_bought * len(positives)
        sampled = sample_negatives(len(shown), positives, wanted, (selection.seed, int(request[start])))
        request_at.append(np.full(len(positives) + len(sampled), start))
        bought_at.append(np.append(start + promoted, np.full(len(sampled), -1)))
        shown_at.append(store_rows.start + np.append(positives, sampled))
        rates.append(np.append(np.ones(len(positives)), np.full(len(sampled), len(sampled) / max(negatives, 1))))
    if not request_at:
        return LOG.empty_table()
    order = np.lexsort((np.concatenate(shown_at), np.concatenate(request_at)))
    requests, shown = (
        table.take(pa.array(np.concatenate(indices)[order]))
        for table, indices in ((purchases, request_at), (promotions.table, shown_at))
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


def ingest(source: Path, out: Path, selection: Selection) -> dict[str, int]:
    """Write the log to `out`/log and all purchases to `out`/purchases. Return counts of rows, requests and labels.

    Existing files are replaced.

    Args:
        source: Folder of the package's Parquet files.
        out: Folder for both logs.
        selection: Requests and candidates to select.

    Raises:
        UserError: A source file is missing or invalid, or the selection is empty.
    """
    products = read_table(source / "products.parquet", PRODUCTS)
    demographics = read_table(source / "demographics.parquet", DEMOGRAPHICS)
    # Labels come from all purchases, so that the selected rows are the same as in the full log.
    all_purchases = find_purchases(read_table(source / "transactions.parquet", TRANSACTIONS))
    purchases = _select_purchases(all_purchases, selection)
    counts = dict.fromkeys(("rows", "requests", "bought", "rebought known", "rebought"), 0)
    # The log is moved to its path last, so that an existing log always has its purchases.
    with atomic_folder(out / "log") as folder, atomic_folder(out / "purchases") as events:
        promotions = read_promotions(source / "promotions.parquet", purchases)
        with bar() as progress:
            for week in progress.track(sorted(promotions), description="writing weeks"):
                week_purchases = purchases.filter(pc.equal(purchases["week"], week))
                shown = collapse_promotions(promotions.pop(week))
                table = _build_week_log(week_purchases, shown, products, demographics, selection)
                if table.num_rows:
                    write_log_file(table, folder / f"week-{week:02d}.parquet")
                    counts["rows"] += table.num_rows
                    counts["requests"] += pc.count_distinct(table["request_id"]).as_py()
                    counts["bought"] += pc.sum(table["bought"]).as_py()
                    counts["rebought known"] += table.num_rows - table["rebought"].null_count
                    counts["rebought"] += pc.sum(table["rebought"]).as_py() or 0
        if counts["rows"] == 0:
            raise UserError("no basket of the selected weeks and households has a promoted product. Select more.")
        _write_purchases(all_purchases, purchases, products, events)
    return {"baskets with a purchase": pc.count_distinct(purchases["request_id"]).as_py(), **counts}


def _write_purchases(all_purchases: pa.Table, selected: pa.Table, products: pa.Table, folder: Path) -> None:
    """Write a file for each week with all purchases of the households that occur in `selected`."""
    households = pc.unique(selected["household_id"].combine_chunks())
    bought = all_purchases.filter(pc.is_in(all_purchases["household_id"], value_set=households))
    product = products.take(pc.index_in(bought["product_id"], value_set=products["product_id"]))
    table = pa.table({f.name: (bought if f.name in bought.column_names else product)[f.name] for f in PURCHASES})
    for week in pc.unique(bought["week"]).to_pylist():
        write_log_file(table.filter(pc.equal(bought["week"], week)), folder / f"week-{week:02d}.parquet")


def _week_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"expected weeks such as 1-53 or 7, found {text!r}")
    return first, last


def _positive(text: str) -> int:
    if non_negative(text) == 0:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1, found 0")
    return int(text)


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.ingest_complete_journey", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder in which log/ and purchases/ are written or replaced")
    add("--source", type=Path, help="folder of the package's Parquet files (default: the installed package)")
    add("--weeks", type=_week_range, default=(1, 53), metavar="A-B", help="weeks of the data to keep (default: 1-53)")
    add("--households", type=_positive, metavar="N", help="number of households with the smallest ids (default: all)")
    negatives_help = "sampled candidates for each bought candidate (default: %(default)s)"
    add("--negatives-per-bought", type=non_negative, default=4, metavar="N", help=negatives_help)
    add("--seed", type=non_negative, default=17, help="seed of the sampled candidates (default: %(default)s)")

    def ingest_selection(options: argparse.Namespace) -> dict[str, int]:
        weeks, negatives = options.weeks, options.negatives_per_bought
        selection = Selection(weeks[0], weeks[1], options.households, negatives, options.seed)
        return ingest(options.source or packaged_folder(), options.out, selection)

    next_command = "mmoe-rec train --config configs/complete_journey.yaml"
    run_ingest("Complete Journey", parser, arguments, ingest_selection, next_command)


if __name__ == "__main__":
    main()
