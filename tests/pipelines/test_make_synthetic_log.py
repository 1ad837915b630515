"""The synthetic log: the same for a seed however it is cut, true to its formulas, read by its settings file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pipelines.data_sets import synthetic_rows
from pipelines.data_sets.synthetic_rows import LABEL_DELAY_DAYS, LOG, START, Plan, position_bias
from pipelines.make_synthetic_log import generate, main, make_log, next_command
from tests.commands import run

DAY = np.timedelta64(1, "D")


def all_rows(plan: Plan, requests_at_a_time: int = 8_192) -> pa.Table:
    return pa.concat_tables(table for _, table in generate(plan, requests_at_a_time))


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return all_rows(Plan(rows=200_000, users=5_000, candidates=1_000))


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def within_error(outcomes: np.ndarray, chances: np.ndarray) -> bool:
    """Whether the mean of 0s and 1s is that of their probabilities, to four standard errors."""
    error = np.sqrt((chances * (1 - chances)).sum()) / len(chances)
    return abs(outcomes.mean() - chances.mean()) < 4 * error


@pytest.mark.parametrize("rows", [1, 49, 50, 51])
def test_so_many_rows_and_no_more(rows):
    table = all_rows(Plan(rows=rows, users=10, candidates=30))
    assert table.num_rows == rows
    assert table.schema.equals(LOG)


def test_rows_depend_on_the_seed_and_on_nothing_else(tmp_path):
    plan = Plan(rows=5_000, users=200, candidates=300, days=12)
    rows = all_rows(plan)
    assert all_rows(plan, requests_at_a_time=7).equals(rows)
    assert not all_rows(Plan(rows=5_000, users=200, candidates=300, days=12, seed=18)).equals(rows)
    for files_per_day in (1, 3):
        make_log(plan, tmp_path / "log", files_per_day)
        files = sorted((tmp_path / "log").iterdir())
        assert len(files) == 12 * files_per_day
        assert pa.concat_tables(map(pq.read_table, files)).equals(rows)
    assert files[0].name == "day-001-001.parquet"


def test_requests(log):
    rows = log.to_pandas()
    assert rows["request_time"].is_monotonic_increasing
    assert rows["request_id"].is_monotonic_increasing
    assert not rows.duplicated(["request_id", "candidate_id"]).any()
    of = rows.groupby("request_id")
    assert (of["user_id"].nunique() == 1).all()
    assert (of["request_time"].nunique() == 1).all()
    assert (of["position"].max() == of.size()).all()
    assert set(of.size()) == {8, 9, 10, 11, 12}
    assert of.size().mean() == 10
    moment = column(log, "request_time")
    assert moment.min() >= START
    assert moment.max() < START + 60 * DAY
    # Every hour has requests, the evening three times as many as the night.
    hours = np.bincount(moment.astype("datetime64[h]").astype(np.int64) % 24, minlength=24)
    assert hours.min() > 0
    assert hours[19:22].sum() > 3 * hours[2:5].sum()


def test_labels_follow_the_truth(log):
    position, true_click, true_like = (column(log, name) for name in ("position", "true_click", "true_like"))
    odds = true_click / (1 - true_click) * np.exp(position_bias(position))
    click, clicked = odds / (1 + odds), column(log, "clicked")
    for where in (1, 2, 5, 10, 12):
        assert within_error(clicked[position == where], click[position == where]), where
    assert within_error(clicked, click)
    # Better candidates stand higher, so a reader of positions would be misled.
    assert true_click[position == 1].mean() > true_click[position == 10].mean() + 0.05
    liked = log["liked"].to_pandas()
    known = column(log, "request_time") < START + (60 - LABEL_DELAY_DAYS) * DAY
    assert (liked.notna().to_numpy() == ((clicked == 1) & known)).all()
    seen = liked.notna().to_numpy()
    assert within_error(liked[seen].to_numpy(), true_like[seen])
    for name in ("category", "country", "device"):
        for value in log[name].unique().to_pylist()[:4]:
            of_value = (log[name].to_pandas() == value).to_numpy()
            assert within_error(clicked[of_value], click[of_value]), value


def test_truth_is_the_documented_formula():
    """The logit's differences between rows of one request are the candidates' own, whatever the request's share is."""
    plan = Plan(rows=20_000, users=1, candidates=500)
    table = all_rows(plan)
    catalog = synthetic_rows.Catalog.of(plan)
    candidate = column(table, "candidate_id")
    odds = column(table, "true_click") / (1 - column(table, "true_click"))
    price = np.where(np.isnan(column(table, "price")), 20, column(table, "price"))
    rest = np.log(odds) - catalog.quality[candidate] + 0.4 * np.log(price / 20)
    like = column(table, "true_like")
    affinity = (np.log(like / (1 - like)) - 0.2 - catalog.craft[candidate]) / 0.7
    hour = (column(table, "request_time").astype(np.int64) % 86_400_000_000) / 3.6e9
    effect = {"phone": 0.0, "desktop": -0.2, "tablet": 0.1, "tv": -0.6}
    device = np.array([effect[value] for value in table["device"].to_pylist()])
    expected = -1.6 + affinity + device + 0.3 * np.cos(2 * np.pi * (hour - 20) / 24)
    np.testing.assert_allclose(rest, expected, atol=2e-3)
    # One user: one affinity for each category.
    spread = table.append_column("affinity", pa.array(affinity)).group_by("category")
    assert column(spread.aggregate([("affinity", "stddev")]), "affinity_stddev").max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows must be from 1 to "),
        (["--candidates", "11"], "--candidates must be from 12 to 1,000,000, found 11"),
        (["--days", "9"], "--days must be from 10 to 3,650, found 9"),
        (["--files-per-day", "0"], "--files-per-day must be at least 1, found 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["--out", str(tmp_path / "log"), *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("days", [30, 60])
def test_the_command_and_the_next_ones(tmp_path, capsys, days):
    assert next_command(Plan(rows=1), Path("data/synthetic/log")) == "mmoe-rec train --config configs/synthetic.yaml"
    out = tmp_path / "log"
    main(["--out", str(out), "--rows", "20000", "--users", "300", "--candidates", "200", "--days", str(days)])
    printed = capsys.readouterr().out
    assert f"log:  {out}" in printed
    table, (_, begin, end) = pq.read_table(out), Plan(rows=1, days=days).split_days()
    day = (table["request_time"].to_numpy() - START) // DAY
    inside = (day >= begin) & (day < end)
    area = roc_auc_score(column(table, "clicked")[inside], column(table, "true_click")[inside])
    assert float(printed.split("clicked, by true_click ")[1].split()[0]) == pytest.approx(area, abs=1e-4)
    train = printed.split("next: ")[1].split()
    assert train[:2] == ["mmoe-rec", "train"]
    assert ("--split.train_end" in train) == (days != 60)
    run("features", *train[2:])
    splits = dict(line.split(":")[0:2] for line in capsys.readouterr().out.splitlines()[1:])
    rows = [int(splits[f"  {name}"].split()[0].replace(",", "")) for name in ("train", "validation", "test")]
    assert 0.7 * 20_000 < rows[0] < 0.85 * 20_000
    assert min(rows[1:]) > 0.05 * 20_000
