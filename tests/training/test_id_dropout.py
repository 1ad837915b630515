"""Hidden ids: as many as validation rows have unseen ones, the same draws on any ranks, and a model that gains."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from mmoe_rec.batches.encoded_dataset import LabeledRows
from mmoe_rec.batches.row_reader import Position
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import DenseInput, EncodedInputs, IdInput
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.training.id_dropout import IdDropout
from tests.batches.encoded_files import columns_of
from tests.training.learnable import ROWS, scores, trained, write_prepared

BUCKETS = 4
LAYOUT = ModelLayout(
    tables=(EmbeddingTable("user", 500, 8, oov_buckets=BUCKETS), EmbeddingTable("device", 9, 4)),
    ids=(IdInput("user", "user"), IdInput("seen_users", "user", is_list=True), IdInput("device", "device")),
    dense=(DenseInput("price"),),
    tasks=(ModelTask("click", "binary", "engagement"),),
)


def rows_with(users: np.ndarray, numbers: np.ndarray | None = None) -> LabeledRows:
    """Rows with these users, and with row numbers from 0."""
    lists = Ragged(users.copy(), np.ones(len(users), np.int32))
    inputs = {"user": users, "seen_users": lists, "device": np.full(len(users), 2)}
    encoded = EncodedInputs(inputs, np.zeros((len(users), 1), np.float32))
    numbers = np.arange(len(users)) if numbers is None else numbers
    return LabeledRows(encoded, np.zeros((len(users), 1)), row_numbers=numbers)


@pytest.mark.parametrize(
    ("train", "validation", "maximum", "expected"),
    [
        (0.0, 0.3, 0.9, 0.3),
        (0.2, 0.6, 0.9, 0.5),
        (0.0, 1.0, 0.9, 0.9),
        (0.0, 0.3, 0.0, None),
        (0.3, 0.3, 0.9, None),
        (0.5, 0.2, 0.9, None),
        (1.0, 1.0, 0.9, None),
    ],
)
def test_training_rows_hide_as_many_ids_as_validation_rows_lack(
    tmp_path: Path, train: float, validation: float, maximum: float, expected: float | None
) -> None:
    for split, unseen in (("train", train), ("validation", validation)):
        (tmp_path / "encoded" / split).mkdir(parents=True)
        for part in range(2):  # Rows of all files count, and missing ids (0) are not unseen.
            users = np.where(np.arange(500) < 500 * unseen, 1 + np.arange(500) % BUCKETS, [0, BUCKETS + 1] * 250)
            table = pa.table(columns_of(rows_with(users).encoded, LAYOUT))
            pq.write_table(table, tmp_path / "encoded" / split / f"part-{part}.parquet", row_group_size=100)
    actual = IdDropout.measure(FeatureFolder(tmp_path), LAYOUT, maximum).fractions
    assert actual == ({} if expected is None else {"user": pytest.approx(expected)})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "encoded" / split).mkdir(parents=True)
        pq.write_table(
            pa.table(columns_of(rows_with(np.arange(50)).encoded, LAYOUT)), tmp_path / "encoded" / split / "0.parquet"
        )
    file = tmp_path / "encoded" / "validation" / "0.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"validation/0\.parquet' cannot be read"):
        IdDropout.measure(FeatureFolder(tmp_path), LAYOUT, 0.9)


def test_each_row_is_drawn_by_itself() -> None:
    users = np.random.default_rng(0).integers(BUCKETS + 1, 500, 20_000)
    users[::10] = 0
    dropout = IdDropout({"user": 0.3}, {"user": BUCKETS})

    def hide(epoch: int = 0, seed: int = 5, part: slice = slice(None)) -> np.ndarray:
        rows = rows_with(users[part], np.arange(20_000)[part])
        before = rows.encoded.ids["seen_users"]
        dropout.hide(rows, Position(epoch, 7, seed))
        assert rows.encoded.ids["seen_users"] is before
        assert (np.asarray(rows.encoded.ids["device"]) == 2).all()
        return np.asarray(rows.encoded.ids["user"])

    hidden = hide()
    changed = hidden != users
    assert not changed[::10].any(), "a missing id stays missing"
    assert changed.mean() / 0.9 == pytest.approx(0.3, abs=0.02)
    assert np.bincount(hidden[changed]) / changed.sum() == pytest.approx([0, *[1 / BUCKETS] * BUCKETS], abs=0.02)
    # Two ranks, or batches of another size, draw the same.
    parts = [hide(part=slice(0, 777)), hide(part=slice(777, None))]
    np.testing.assert_array_equal(np.concatenate(parts), hidden)
    for other in (hide(epoch=1), hide(seed=6)):
        assert (changed & (other != users)).mean() / 0.9 == pytest.approx(0.09, abs=0.02)


def test_a_model_for_unseen_users_gains(tmp_path: Path) -> None:
    """Users explain the training labels, and a number less so. All users of validation rows are unseen."""
    random, labels = np.random.default_rng(3), {}
    effects = random.normal(0, 2, 500)
    encoded = {}
    for split, rows in ROWS.items():
        users = random.integers(BUCKETS + 1, 500, rows)
        price = random.normal(effects[users], 2).astype(np.float32)
        labels[split] = (effects[users] + random.logistic(size=rows) > 0)[:, None].astype(np.float64)
        encoded[split] = users, price
    prepared = write_prepared(tmp_path / "prepared", LAYOUT, labels)
    for split, (users, price) in encoded.items():
        file = tmp_path / "prepared" / "encoded" / split / "part-00000.parquet"
        table = pq.read_table(file)
        ids = users if split == "train" else 1 + users % BUCKETS
        lists = Ragged(np.zeros(0, np.int64), np.zeros(len(users), np.int32))
        inputs = EncodedInputs(
            {"user": ids, "seen_users": lists, "device": np.ones(len(ids), np.int64)}, price[:, None]
        )
        for name, column in columns_of(inputs, LAYOUT).items():
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, file, row_group_size=1_000)
    losses = {}
    for maximum in (0.0, 0.9):
        model = trained(prepared, tmp_path / f"run {maximum}", max_id_dropout=maximum, epochs=2).model()
        logits, observed = scores(model, prepared)
        losses[maximum] = log_loss(observed[:, 0], expit(logits[:, 0]))
    assert losses[0.9] < losses[0.0] - 0.02, losses
