"""Guesses of mmoe-rec init that people got wrong: hidden labels, splits, labels that are none, missing users."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.profiling.name_hints import match_key_name
from mmoe_rec.profiling.profile import target_encoding_auc
from mmoe_rec.settings.load import load_settings
from mmoe_rec.settings.sections import Settings
from tests.commands import refuse, run_and_read
from tests.profiling.worlds import DAY, YEAR_2024, World, at, draw_world


def draft(folder: Path, columns: dict[str, Any], *more: str) -> tuple[str, str, Settings]:
    """Run init on a log. Returns its output, the text of the settings, and the settings."""
    pq.write_table(pa.table(columns), folder / "shop.parquet")
    printed = run_and_read("init", folder / "shop.parquet", "--out", folder / "shop.yaml", *more)
    return printed, (folder / "shop.yaml").read_text(encoding="utf-8"), load_settings(folder / "shop.yaml")


def keys_of(world: World, user: str = "user_id") -> dict[str, Any]:
    """Columns of the user, candidate, time and, if there are lists, of the request."""
    keys = {
        user: [f"U{number}" for number in world.user],
        "item_id": [f"I{number}" for number in world.item],
        "shown_at": at(world.time),
    }
    return keys if world.request[-1] == world.rows - 1 else {"request_id": world.request, **keys}


def columns_read(settings: Settings) -> set[str]:
    """Columns that a feature reads."""
    return set().union(*(feature.reads() for feature in settings.schema_.features.values()))


def why_left_out(text: str, column: str) -> str:
    """The reason beside a column that is left out and marked."""
    actual = re.search(rf"^#   {column}: (.*)  # check$", text, re.MULTILINE)
    assert actual is not None, f"{column} is not left out with a mark:\n{text}"
    return actual[1]


def sums(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) the sum of the values of each row's group."""
    return np.bincount(groups, values)[groups]


# Labels that hide in columns that are constant within a request, a user or a candidate


def test_a_label_that_hides_in_a_request_is_left_out(tmp_path: Path) -> None:
    world = draw_world(1, 9_000, 500, 200, 60, shown=6)
    bought = world.some(world.clicked.astype(bool), 0.15)
    value = sums(world.request, bought * world.of(world.item, np.arange(5, 99)))
    clicks = sums(world.request, world.clicked).astype(int)
    leaks = {
        "order_total": value,
        "method": np.where(value > 0, world.of(world.request, ["card", "cash"]), None),
        "carried": [["a", "b"][:number] for number in clicks],
    }
    coupon = np.where((value > 0) & world.of(world.request, [True, False, False]), "V", None)
    labels = {"clicked": world.clicked, "bought": bought}
    device = world.of(world.request, ["phone", "tablet"])
    _, text, settings = draft(tmp_path, {**keys_of(world), **labels, **leaks, "coupon": coupon, "device": device})
    for name in leaks:
        assert re.search(r"predicts requests with \w+ = 1 .*\(AUC (1\.000|0\.99\d) alone\)", why_left_out(text, name))
    assert "only for requests with bought = 1" in why_left_out(text, "coupon")
    assert "device" in columns_read(settings)


def test_a_label_that_hides_in_a_user_or_a_candidate_is_left_out(tmp_path: Path) -> None:
    world = draw_world(2, 9_000, 3_000, 3_000, 60, shown=1, bias=-3.0)
    clicks_of_user, clicks_of_item = (sums(which, world.clicked) for which in (world.user, world.item))
    leaks = {"spending_power": clicks_of_user * 17.5, "tier": np.where(clicks_of_user > 0, "x", "y")}
    leaks |= {"hotness": clicks_of_item}
    region = world.of(world.user, ["north", "south"])
    _, text, settings = draft(tmp_path, {**keys_of(world), "clicked": world.clicked, **leaks, "region": region})
    for name in leaks:
        assert re.search(r"\(AUC (1\.000|0\.99\d) alone\)", why_left_out(text, name))
    assert "region" in columns_read(settings)


def test_a_nearly_constant_label_of_users_is_found_among_their_columns(tmp_path: Path) -> None:
    world = draw_world(3, 9_000, 1_000, 100, 60, shown=1)
    leaving = world.random.random(1_000) < np.linspace(0.0, 0.5, 1_000)
    labels = (leaving[world.user] ^ (world.random.random(world.rows) < 0.02)) * 1
    columns = {
        "accepted": labels,
        "status": np.where(leaving, "closed", "open")[world.user],
        "tenure": 1_000 - world.user,
        "team": [f"t{number // 2}" for number in world.user],
    }
    _, text, settings = draft(tmp_path, {**keys_of(world), **columns})
    assert re.search(r"predicts accepted .*\(AUC 0\.9\d\d alone\)", why_left_out(text, "status"))
    assert {"tenure", "team"} <= columns_read(settings)


def test_a_copy_of_a_number_that_is_predicted_is_left_out(tmp_path: Path) -> None:
    world = draw_world(4, 6_000, 300, 200, 60, shown=1)
    stars = np.clip(np.round(3 + np.log(world.probability) + world.random.normal(0, 0.7, world.rows), 1), 0.5, 5)
    columns = {"rating": stars, "mood": 20 * stars + world.random.normal(0, 1, world.rows)}
    _, text, _ = draft(tmp_path, {**keys_of(world), **columns})
    assert "predicts rating above its median" in why_left_out(text, "mood")


def test_good_columns_stay(tmp_path: Path) -> None:
    """Long lists, heavy users and popular items have a click more often. Few users and rare labels fit by chance."""
    random = np.random.default_rng(5)
    lengths = np.exp(random.uniform(0, np.log(100), 1_500)).astype(int)
    request = np.repeat(np.arange(1_500), lengths)
    user, taste = (random.pareto(1, 1_500) * 20).astype(int)[request] % 400, random.normal(0, 1.5, 400)
    checkout = (random.random(1_500) < 0.04)[request]
    item = np.concatenate([random.choice(300, length, replace=False) for length in lengths])
    clicked = random.random(len(user)) < 1 / (1 + np.exp(4 - taste[user]))
    heavy = np.bincount(user, minlength=400)
    columns = {
        "request_id": request,
        "user_id": [f"U{number}" for number in user],
        "item_id": item,
        "shown_at": at(YEAR_2024 + request * DAY // 30),
        "results": lengths[request],
        "visits": random.poisson(heavy)[user],
        "affinity": np.round(taste + random.normal(0, 0.3, 400), 2)[user],
        "team": [f"t{number}" for number in user],
        "page": np.where(checkout, "checkout", "home"),
        "popularity": random.poisson(np.bincount(item))[item],
        "clicked": clicked * 1,
        "purchased": (random.random(len(user)) < np.where(checkout, 0.04, 0.00002)) * 1,
    }
    _, text, settings = draft(tmp_path, columns)
    assert {"results", "visits", "affinity", "page", "popularity"} <= columns_read(settings)
    assert "beforehand" not in text
    assert re.search(r"# check: is it known before\? alone it predicts .*purchased.* AUC of 0\.9.*\n  page:", text)


def test_the_length_of_a_list_is_no_label(tmp_path: Path) -> None:
    """A click is nearly certain in one of 1,500 candidates, and nearly impossible in a single one."""
    random = np.random.default_rng(18)
    lengths = random.permutation(np.repeat([1_500, 1], [40, 600]))
    request = np.repeat(np.arange(640), lengths)
    columns = {
        "request_id": request,
        "user_id": random.integers(0, 300, 640)[request],
        "item_id": np.concatenate([random.choice(2_000, length, replace=False) for length in lengths]),
        "shown_at": at(YEAR_2024 + request * DAY // 10),
        "results": lengths[request],
        "clicked": (random.random(len(request)) < 0.002) * 1,
    }
    some = np.bincount(request, columns["clicked"]) > 0
    assert roc_auc_score(some, lengths) > 0.985
    _, _, settings = draft(tmp_path, columns)
    assert "results" in columns_read(settings)


def test_few_users_and_few_labels_call_no_column_a_label(tmp_path: Path) -> None:
    world = draw_world(6, 4_000, 12, 60, 60, shown=4)
    liked = np.arange(12) % 2 == 0
    others = {f"user{place}": world.of(world.user, ["a", "b", "c"]) for place in range(20)}
    others |= {f"context{place}": world.of(world.request, np.arange(50)) for place in range(20)}
    rare = np.zeros(world.rows, int)
    rare[world.random.choice(world.rows, 8, replace=False)] = 1
    clicked = world.random.random(world.rows) < np.where(liked[world.user], 0.99, 0.01)
    _, text, settings = draft(tmp_path, {**keys_of(world), "clicked": clicked, "bought": rare, **others})
    assert others.keys() <= columns_read(settings)
    assert "beforehand" not in text


def test_auc_alone_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(7)
    codes, half = random.integers(0, 30, 4_000), np.arange(4_000) % 2 == 0
    labels = (random.random(4_000) < codes / 40) * 1.0
    means = [labels[half & (codes == code)].mean() for code in range(30)]
    auc, precision = target_encoding_auc(codes, np.where(random.random(4_000) < 0.01, np.nan, labels), half)
    scores, asked = np.array(means)[codes[~half]], labels[~half]
    assert auc == pytest.approx(roc_auc_score(asked, scores), abs=0.01)
    assert precision == pytest.approx(asked[np.argsort(-scores)][: int(asked.sum())].mean(), abs=0.03)
    assert np.isnan(target_encoding_auc(codes, np.arange(4_000) < 4, half)[0])


def test_the_few_values_beside_the_usual_one_have_their_own_ranges(tmp_path: Path) -> None:
    """Sums of orders are 0 in nearly all rows, so quantiles of the rows are 0."""
    world = draw_world(8, 20_000, 8_000, 100, 60, shown=1, bias=-6.0)
    assert 0.002 < world.clicked.mean() < 0.01
    worth = world.clicked * world.random.integers(1, 99, world.rows)
    _, text, _ = draft(tmp_path, {**keys_of(world), "clicked": world.clicked, "worth": worth})
    assert "(AUC 1.000 alone)" in why_left_out(text, "worth")


# Splits


def split_parts(settings: Settings, times: np.ndarray) -> list[float]:
    """Fractions of rows that train, validate and test."""
    ends = [
        int(getattr(settings.split, name).timestamp() * 1_000_000 + 0.5) for name in ("train_end", "validation_end")
    ]
    train, both = ((times < end).mean() for end in ends)
    return [train, both - train, 1 - both]


def log_of(moments: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A log with requests at some moments, in days, and the times of its rows."""
    world = draw_world(9, 6_000, 300, 100, 60)
    times = YEAR_2024 + (np.sort(moments) * DAY).astype(np.int64)[world.request]
    return {**keys_of(world), "shown_at": at(times), "clicked": world.clicked}, times


@pytest.mark.parametrize(
    ("days", "busy_day", "busy"),
    [(30, 29, 0.5), (30, 29, 0.9), (90, 89, 0.99), (60, 0, 0.95), (5, 4, 0.9), (0.9, 0, 0), (30, 0, 0), (0.01, 0, 0)],
)
def test_a_split_counts_rows(days: float, busy_day: int, busy: float, tmp_path: Path) -> None:
    random = np.random.default_rng(10)
    moments = np.where(random.random(1_200) < busy, busy_day + random.random(1_200), random.random(1_200) * days)
    columns, times = log_of(moments)
    _, text, settings = draft(tmp_path, columns)
    train, validation, test = split_parts(settings, times)
    assert 0.6 < train < 0.8
    assert 0.05 < validation < 0.2
    assert 0.1 < test < 0.3
    if days == 30 and not busy:
        assert re.search(r"train_end: 2024-01-\d\dT00:00:00Z", text)  # a midnight if it serves


def test_a_split_by_dates_leaves_rows_to_each_part(tmp_path: Path) -> None:
    """A day can't be cut, so the rows before the last one are shared out, and that is said."""
    random = np.random.default_rng(11)
    columns, times = log_of(np.where(random.random(1_200) < 0.9, 29.5, random.random(1_200) * 29))
    columns["shown_at"] = columns["shown_at"].cast(pa.date32())
    printed, _, settings = draft(tmp_path, columns)
    train, validation, test = split_parts(settings, times // DAY * DAY)
    assert 0.005 < validation < train
    assert test == pytest.approx(0.9, abs=0.03)
    assert f"{train:.0%}, {validation:.0%}, {test:.0%} of the rows" in printed


def test_two_times_are_no_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    columns, _ = log_of(np.arange(1_200) // 600)
    pq.write_table(pa.table(columns), tmp_path / "shop.parquet")
    said = refuse(capsys, "init", tmp_path / "shop.parquet", "--out", tmp_path / "shop.yaml")
    assert "fewer than three different times" in said


# Labels that are none


def compute_labels(kind: str, world: World) -> Any:
    """A column with the values that some logs have instead of a label."""
    bought = world.some(world.clicked.astype(bool), 0.3)
    return {
        "three": world.clicked + bought,
        "signed": world.clicked - 2 * bought,
        "text": np.where(bought, "yes", "no"),
        "null": pa.array(bought, mask=bought == 0),
        "request": (sums(world.request, world.clicked) > 1) * 1,
        "boolean": sums(world.request, world.clicked) > 1,
    }[kind]


WRONG = {
    "three": "holds 0, 1, 2 instead of 0 and 1",
    "signed": "holds -1, 0, 1 instead of 0 and 1",
    "text": "holds no, yes instead of 0 and 1",
    "null": "holds 1 and null instead of 0 and 1",
    "request": "is the same in all rows of a request",
    "boolean": "is the same in all rows of a request",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_label_that_is_none_is_said(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    world = draw_world(12, 6_000, 300, 100, 60, shown=6)
    columns = {**keys_of(world), "open_tabs": world.of(world.request, [1, 2, 3]), "bought": compute_labels(kind, world)}
    printed, text, settings = draft(tmp_path, {**columns, "clicked": world.clicked})
    assert f"warning: 'bought' is left out: it has a label's name, but {WRONG[kind]}" in printed
    assert WRONG[kind] in why_left_out(text, "bought")
    assert [task.label for task in settings.tasks.values()] == ["clicked"]
    assert "open_tabs" in settings.roles.context
    pq.write_table(pa.table(columns), tmp_path / "alone.parquet")
    assert f"'bought' {WRONG[kind]}" in refuse(capsys, "init", tmp_path / "alone.parquet", "--out", tmp_path / "a.yaml")


def test_an_unnamed_flag_does_not_replace_a_label_of_three_values(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    world = draw_world(13, 6_000, 300, 100, 60, shown=6)
    columns = {
        **keys_of(world),
        "bought": compute_labels("three", world),
        "on_offer": world.random.integers(0, 2, 6_000),
    }
    pq.write_table(pa.table(columns), tmp_path / "shop.parquet")
    said = refuse(capsys, "init", tmp_path / "shop.parquet", "--out", tmp_path / "shop.yaml")
    assert "'bought' holds 0, 1, 2" in said
    assert "name a label with --task" in said
    _, _, settings = draft(tmp_path, columns, "--task", "bought")
    assert settings.tasks["bought"].kind == "regression"
    plain = {name: columns[name] for name in ("item_id", "shown_at", "bought", "on_offer")}
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    said = refuse(capsys, "init", tmp_path / "plain.parquet", "--out", tmp_path / "plain.yaml")
    assert "'bought' holds 0, 1, 2" in said


# Users


def test_users_have_many_names(tmp_path: Path) -> None:
    names = "reviewerID buyer account_no member cust_id customer_unique_id user_pseudo_id rater borrowerId usr"
    assert [name for name in names.split() if match_key_name(name, "user") != 2] == []
    assert [name for name in ("user_country", "member_city", "reviewer_score") if match_key_name(name, "user")] == []
    world = draw_world(15, 3_000, 300, 100, 60, shown=1)
    printed, _, settings = draft(tmp_path, {**keys_of(world, "reviewerID"), "clicked": world.clicked})
    assert settings.columns.user == "reviewerID"
    assert "no user column" not in printed


def test_ids_that_differ_in_each_row_or_may_be_another_things_stand_back(tmp_path: Path) -> None:
    world = draw_world(18, 3_000, 300, 100, 60, shown=1)
    columns = keys_of(world, "customer_id") | {"account_id": np.arange(world.rows), "clicked": world.clicked}
    columns["login_id"] = world.user * 1_000 + world.random.integers(0, 9, world.rows)
    _, _, settings = draft(tmp_path, columns)
    assert settings.columns.user == "customer_id"


def test_texts_that_people_type_are_no_user(tmp_path: Path) -> None:
    world = draw_world(19, 6_000, 400, 150, 60, shown=5)
    queries = world.of(world.request, [f"q{number}" for number in range(500)])
    _, _, settings = draft(
        tmp_path, {**keys_of(world, "pid"), "pid": world.user, "query": queries, "clicked": world.clicked}
    )
    assert settings.columns.user == "pid"
    assert "query" in settings.roles.context


def test_values_tell_a_user_whatever_it_is_called(tmp_path: Path) -> None:
    world = draw_world(16, 6_000, 400, 150, 60)
    columns = keys_of(world, "whose")
    columns.pop("request_id", None)
    columns |= {
        "town": world.of(world.user, [f"k{number}" for number in range(40)]),
        "brand_name": world.of(world.item, [f"b{number}" for number in range(50)]),
        "points": world.random.integers(0, 900, world.rows),
        "clicked": world.clicked,
    }
    _, text, settings = draft(tmp_path, columns)
    assert settings.columns.user == "whose"
    assert re.search(r"  user: whose # check: no name says so, but ", text)
    assert settings.roles.user == ("town",)


def test_a_missing_user_is_said_first(tmp_path: Path) -> None:
    world = draw_world(17, 4_000, 300, 100, 60, shown=1)
    columns = {**keys_of(world), "store": world.random.choice([f"s{n}" for n in range(60)], world.rows)}
    del columns["user_id"]
    printed, text, _ = draft(tmp_path, {**columns, "clicked": world.clicked})
    assert "\n  user: " not in text
    assert printed.startswith("warning: no user column was found")
    assert "name it with --user" in printed.splitlines()[0]
    assert "# check: no user column was found" in text
    columns["whose"], columns["thing"] = [f"U{n}" for n in world.user], columns.pop("item_id")
    printed, _, _ = draft(tmp_path, {**columns, "clicked": world.clicked}, "--out", str(tmp_path / "other.yaml"))
    assert "(perhaps whose, thing)" in printed.splitlines()[0]
