"""Numbers of the health against naive pandas and scikit-learn on random encoded rows."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mmoe_rec.profiling import data_health
from mmoe_rec.profiling.data_health import SPLITS, measure_health, psi
from mmoe_rec.settings.log_columns import SplitColumn
from tests.profiling.encoded_data import (
    EDGES,
    SCHEMA,
    UNKNOWN,
    Frames,
    feature,
    health_of_frames,
    part,
    random_frames,
    write,
)


@pytest.fixture(scope="module")
def frames() -> Frames:
    return random_frames(3)


@pytest.fixture(scope="module")
def health(frames, tmp_path_factory) -> dict:
    return health_of_frames(tmp_path_factory.mktemp("rows"), frames)


def labels(frame: pd.DataFrame, task: str) -> pd.Series:
    """Two classes, NaN where unobserved; stars are positive above their mean in training, 3."""
    values = frame[f"label.{task}"]
    return values if task == "click" else (values > 3).astype(float).where(values.notna())


def auc_of(label: pd.Series, score: pd.Series | np.ndarray) -> float:
    seen = label.notna().to_numpy()
    return float(roc_auc_score(label[seen], np.asarray(score)[seen]))


def test_overview(health, frames):
    assert health["overview"]["rows_in_splits"] == sum(map(len, frames.values()))
    for split, frame in frames.items():
        message = health["overview"]["splits"][split]
        assert message["rows"] == len(frame)
        for name in ("user", "candidate", "request"):
            assert message[f"{name}s"] == frame[name].nunique()
        assert pd.Timestamp(message["first_request"]) == frame["time"].min()
        assert pd.Timestamp(message["last_request"]) == frame["time"].max()
        for task in ("click", "stars"):
            values = frame[f"label.{task}"].dropna()
            assert message["tasks"][task]["observed"] == len(values)
            assert message["tasks"][task]["rate"] == pytest.approx(values.mean())


def test_users_of_test_rows_that_training_has_too(tmp_path):
    """In a folder whose name means something to SQL and to patterns of files."""
    frames = random_frames(4, {"train": 200, "validation": 100, "test": 100})
    frames["test"]["user"] += 30
    both = set(frames["test"]["user"]) & set(frames["train"]["user"])
    folder = tmp_path / "it's [1]" / "user=1" / "time=2020-01-01"
    folder.parent.mkdir(parents=True)
    split = SplitColumn(column="part", **{name: (name,) for name in SPLITS})
    schema = SCHEMA.model_copy(update={"split": split})
    health = measure_health("made up", write(folder, frames), schema, folder / "database")
    actual = health["overview"]["shared_user_fraction"]
    assert 0 < actual < 1
    assert ("users", "users in training and test") in {
        (finding["check"], finding["subject"]) for finding in health["findings"]
    }
    assert actual == pytest.approx(len(both) / frames["test"]["user"].nunique())


def test_labels_by_week(health, frames):
    expected = {}
    for split, frame in frames.items():
        monday = frame["time"].dt.tz_localize(None).dt.to_period("W-SUN").dt.start_time
        for week, rows in frame.groupby(monday):
            expected[f"{week:%Y-%m-%d}", split] = rows
    message = {(item["week"], split): part for item in health["weeks"] for split, part in item["splits"].items()}
    assert message.keys() == expected.keys()
    assert [item["week"] for item in health["weeks"]] == sorted({week for week, _ in expected})
    for key, rows in expected.items():
        assert message[key]["rows"] == len(rows)
        for task in ("click", "stars"):
            assert message[key]["tasks"][task]["observed"] == rows[f"label.{task}"].count()
            assert message[key]["tasks"][task]["rate"] == pytest.approx(rows[f"label.{task}"].mean())


def test_coverage(health, frames):
    for split in ("train", "test"):
        frame = frames[split]
        present = {
            "item": frame["id.item"] != 0,
            "tags": frame["id.tags"].str.len() > 0,
            "price": ~frame["dense.price_missing"],
            "look": (frame["dense.look_0"] != 0) | (frame["dense.look_1"] != 0),
            "when": frame["id.when_weekday"] != 0,
        }
        for name, mask in present.items():
            assert feature(health, name)["coverage"][split] == pytest.approx(mask.mean()), name
    assert feature(health, "user_item")["coverage"] == {"train": None, "test": None}
    assert feature(health, "weight")["coverage"] == {"train": 1.0, "test": None}


def test_unknown_ids(health, frames):
    for split in ("train", "test"):
        ids = frames[split]["id.item"]
        assert feature(health, "item")["unknown"][split] == pytest.approx((ids[ids > 0] <= UNKNOWN).mean())
        tags = frames[split]["id.tags"].explode().dropna()
        assert feature(health, "tags")["unknown"][split] == pytest.approx((tags <= UNKNOWN).mean())
    assert feature(health, "user_item")["unknown"] == {"train": None, "test": None}


@pytest.mark.parametrize("task", ["click", "stars"])
def test_auc_of_ids_is_that_of_training_rates_on_validation_rows(health, frames, task):
    train, validation = frames["train"], frames["validation"]
    label = labels(train, task)
    for name in ("item", "user_item", "when_weekday"):
        by_id = label.groupby(train[f"id.{name}"])
        rates = (by_id.sum() + 20 * label.mean()) / (by_id.count() + 20)
        scores = validation[f"id.{name}"].map(rates).fillna(label.mean())
        assert part(health, name)["auc"][task] == pytest.approx(auc_of(labels(validation, task), scores), abs=1e-12)


def test_auc_of_a_list_is_that_of_the_mean_rate_of_its_ids(health, frames):
    train, validation = frames["train"], frames["validation"]
    long = pd.DataFrame({"id": train["id.tags"], "label": labels(train, "click")}).explode("id").fillna({"id": 0})
    by_id = long.groupby("id")["label"]
    rates = (by_id.sum() + 20 * long["label"].mean()) / (by_id.count() + 20)
    scores = [rates[id_tag or [0]].mean() for id_tag in validation["id.tags"]]
    expected = auc_of(labels(validation, "click"), np.array(scores))
    assert expected > 0.55
    assert part(health, "tags")["auc"]["click"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", ["click", "stars"])
def test_auc_of_numbers(health, frames, task):
    validation = frames["validation"]
    label = labels(validation, task)
    for name in ("weight", "item_click_rate"):
        expected = auc_of(label, validation[f"dense.{name}"])
        assert part(health, name)["auc"][task] == pytest.approx(max(expected, 1 - expected), abs=1e-12)
    price = validation["dense.price"]
    ends = [auc_of(label, price.mask(validation["dense.price_missing"], end)) for end in (-99, 99)]
    expected = max(max(item, 1 - item) for item in ends)
    assert part(health, "price")["auc"][task] == pytest.approx(expected, abs=1e-12)


def test_drift_of_numbers_is_that_of_their_bins(health, frames):
    bins = [-np.inf, *EDGES, np.inf]
    counts = []
    for split in ("train", "test"):
        frame = frames[split]
        present = frame["dense.price"][~frame["dense.price_missing"]]
        cut = pd.cut(present, bins).value_counts(sort=False).to_numpy()
        counts.append(np.append(cut, frame["dense.price_missing"].sum()))
    assert part(health, "price")["psi"] == pytest.approx(psi(*counts))
    weight = [pd.cut(frames[split]["dense.weight"], bins).value_counts(sort=False).to_numpy() for split in SPLITS[::2]]
    assert part(health, "weight")["psi"] == pytest.approx(psi(*weight))
    counted = [item["train"] for item in part(health, "weight")["bins"]]
    assert counted == pytest.approx(weight[0] / weight[0].sum()), "an edge belongs to the bin below it"
    # Without edges about 20 bins of equal mass, one over the largest, and the missing vectors.
    look = [item["train"] for item in part(health, "look_0")["bins"]]
    assert len(look) == 22
    np.testing.assert_allclose(look[:20], (1 - look[-1]) / 20, atol=0.005)


def test_drift_of_ids_is_that_of_the_50_most_frequent(health, frames):
    train, test = frames["train"]["id.item"], frames["test"]["id.item"]
    top = train[train > UNKNOWN].value_counts().index[:50]
    counts = []
    for ids in (train, test):
        unknown, missing = ((ids > 0) & (ids <= UNKNOWN)).sum(), (ids == 0).sum()
        named = [(ids == item).sum() for item in top]
        counts.append(np.array([*named, len(ids) - sum(named) - unknown - missing, unknown, missing]))
    message = part(health, "item")
    assert message["psi"] == pytest.approx(psi(*counts), rel=0.02)  # ties of frequency may fall either way
    assert [item["bin"] for item in message["bins"][-3:]] == ["all others", "unknown", "missing"]
    assert sum(item["test"] for item in message["bins"]) == pytest.approx(1)
    assert [item["bin"] for item in part(health, "when_weekday")["bins"]][-1] == "missing"
    days = [item["bin"] for item in part(health, "when_weekday")["bins"]]
    assert sorted(days[:-1]) == sorted(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"])


def test_a_sample_of_users_tells_about_the_same(health, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(data_health, "MAX_SAMPLE_ROWS", 1_500)
    sampled = health_of_frames(tmp_path, frames)
    assert sampled["overview"] == health["overview"]
    for item in health["features"]:
        actual = feature(sampled, item["name"])
        assert actual["auc"] == pytest.approx(item["auc"], abs=0.1)
        assert actual["auc"] != item["auc"]
        assert actual["coverage"] == pytest.approx(item["coverage"], abs=0.05)


def test_psi_of_two_bins_by_hand():
    # Shares with half a row added: 75.5/101, 25.5/101 in training; 50.5/101 each in test. One bin of freedom.
    expected = (50.5 - 75.5) / 101 * np.log(50.5 / 75.5) + (50.5 - 25.5) / 101 * np.log(50.5 / 25.5) - 2 / 100
    assert psi(np.array([75, 25]), np.array([50, 50])) == pytest.approx(expected, rel=1e-12)
    assert psi(np.array([3, 4]), np.array([3, 4])) == 0
    assert psi(np.array([1, 2]), np.array([0, 0])) is psi(np.array([0, 0]), np.array([1, 2])) is None


def test_equal_distributions_hardly_drift():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(20, 5.0))
    pairs = [(rng.multinomial(400, shares), rng.multinomial(100, shares)) for _ in range(400)]
    assert np.mean([psi(*pair) for pair in pairs]) < 0.05
