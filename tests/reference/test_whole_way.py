"""From a log to metrics, by the reference and by the package."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmoe_rec.batches.batch import make_batch
from mmoe_rec.evaluation.summary import summarize
from mmoe_rec.evaluation.sums import MeasuredTask
from mmoe_rec.features import kinds, numeric_statistics
from mmoe_rec.log.rows import compute_labels
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.model.score import compute_log_scores, predictions, scores_from_log_scores
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.point_in_time.arrays import Ragged
from mmoe_rec.training.losses import masked_loss
from tests.evaluation.trees import measure
from tests.log.small_logs import BASE, DAY, START, fit, log_rows, random_log
from tests.model.examples import reference_logits, reference_weights, small_model, small_settings
from tests.reference import features, metrics, model
from tests.reference.log import Log

FEATURES = {
    "user": {"kind": "id", "column": "user", "min_count": 1, "oov_buckets": 2},
    "item": {"kind": "id", "column": "item", "min_count": 1},
    "brand": {"kind": "id", "column": "brand", "min_count": 1, "oov_buckets": 1},
    "slot": {"kind": "id", "column": "slot", "min_count": 1},
    "price": {"kind": "numeric", "column": "price"},
    "price_log": {"kind": "numeric", "column": "price", "transform": "log"},
    "age": {"kind": "numeric", "column": "age", "transform": "log", "values": "auto"},
    "clicks": {
        "kind": "counter",
        "task": "click",
        "by": ["item"],
        "outputs": ["log_count", "log_sum", "rate", "recency"],
        "window_days": [None, 1.5],
    },
    "likes": {"kind": "counter", "task": "liked", "by": ["user", "brand"], "outputs": ["rate"], "smoothing": 2.0},
    "clicked": {"kind": "history", "task": "click", "of": "item", "length": 3},
}
SETTINGS = {**BASE, "features": FEATURES}
TRAINING = (START + DAY, START + 9 * DAY)
BOTTOM = {"cross_layers": 1, "cross_rank": 2, "piecewise": True}
TASKS = (
    ModelTask("click", "binary", "engagement", 1.0, 0.7),
    ModelTask("liked", "binary", "satisfaction", 2.0, 0.5),
    ModelTask("spent", "regression", "engagement", 0.5, 1.0, mean=0.1, std=1.3),
)


@pytest.mark.parametrize("seed", range(3))
def test_a_log_becomes_the_same_features_losses_scores_and_metrics(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numeric_statistics, "_MIN_FREQUENT_ROWS", features.MIN_FREQUENT_ROWS)
    table, schema = random_log(seed, rows=100, strings=seed == 1), kinds.parse_schema(SETTINGS)
    frame = pa.table({**{name: table[name] for name in table.column_names}, "time": table["time"].cast(pa.int64())})
    log, rows = Log(SETTINGS, frame.to_pandas()), log_rows(table, schema)
    pipeline = fit(table, schema, TRAINING[1], TRAINING[0])
    encoded, known = pipeline.encode(rows), compute_labels(rows, TRAINING[1])
    ids, dense = features.encode(log, TRAINING)
    compare_features(pipeline.layout, encoded, ids, dense)
    for task in TASKS:
        expected = [log.label_known_by(row, task.name, TRAINING[1]) for row in log.rows]
        np.testing.assert_array_equal(known[task.name], np.array(expected, float))
    logits = compare_models(pipeline.layout, encoded, known)
    compare_metrics(log, logits, known)


def compare_features(layout, encoded, ids, dense) -> None:
    assert encoded.ids.keys() == ids.keys()
    for name, actual in encoded.ids.items():
        lists = (
            np.split(actual.values, np.cumsum(actual.lengths)[:-1]) if isinstance(actual, Ragged) else actual[:, None]
        )
        assert [item.tolist() for item in lists] == ids[name]
    assert [item.name for item in layout.dense] == list(dense)
    assert [item.name for item in (*layout.ids, *layout.dense) if item.placement] == ["slot"]
    np.testing.assert_allclose(encoded.dense, np.transpose(list(dense.values())), rtol=1e-6, atol=1e-6)


def compare_models(rows_layout, encoded, known) -> torch.Tensor:
    """Logits, loss and gradients; gives the logits."""
    tables = tuple(EmbeddingTable(table.name, table.rows, 4) for table in rows_layout.tables)
    layout = ModelLayout(tables, rows_layout.ids, rows_layout.dense, TASKS)
    ours = small_model(PlainTables(layout), layout, bottom=BOTTOM).train()
    labels = np.stack([known[task.name] for task in TASKS], axis=1)
    batch = make_batch(encoded, layout, labels, torchrec=False)
    logits = ours(batch).logits
    counts = batch.observed.sum(0)
    total, _ = masked_loss(logits, batch.labels.double(), batch.observed, tasks=TASKS, global_counts=counts)
    total.backward()
    weights = reference_weights(ours)
    expected_logits = reference_logits(weights, encoded, layout, small_settings(bottom=BOTTOM))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)
    expected_total, _ = model.loss(expected_logits, batch.labels, batch.observed, TASKS)
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=1e-6)
    expected_total.backward()
    for name, item in ours.named_parameters():
        torch.testing.assert_close(item.grad.double(), weights[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    return logits.detach()


def compare_metrics(log, logits, known) -> None:
    """Scores, and metrics of them and of a task."""
    names = [task.kind for task in TASKS]
    scores = scores_from_log_scores(compute_log_scores(logits, names, [task.score_weight for task in TASKS]).numpy())
    np.testing.assert_allclose(scores, model.score(logits, TASKS).numpy(), rtol=1e-12)
    scores = np.round(scores / scores.mean(), 1)  # some are equal
    measured = [MeasuredTask(task.name, task.kind, task.score_weight) for task in TASKS]
    users, requests = (
        np.unique([str(log.request(row)[: 1 + number]) for row in log.rows], return_inverse=True)[1]
        for number in (0, 1)
    )
    values = dict(
        zip([task.name for task in TASKS], predictions(logits, names).float().double().numpy().T, strict=True)
    )
    sums = measure(measured, users, requests, values, known, score=scores)
    summary = summarize(sums, resamples=2)
    gains = sum(np.nan_to_num(known[task.name]).clip(0) * task.score_weight for task in TASKS)
    ranked = list(zip(users, requests, scores, gains, strict=True))
    for name, metric, cutoff in (
        ("ndcg_at_5", metrics.ndcg, 5),
        ("mrr", metrics.reciprocal_rank, 0),
        ("map", metrics.average_precision, 0),
    ):
        value = summary.score.get(name).value
        assert value == pytest.approx(metrics.over_requests(ranked, metric, cutoff), abs=1e-9), name
    seen = ~np.isnan(known["click"])
    clicks = list(zip(users[seen], requests[seen], values["click"][seen], known["click"][seen], strict=True))
    actual = summary.tasks["click"]
    assert actual.get("logloss").value == pytest.approx(metrics.log_loss(clicks), abs=1e-9)
    assert actual.get("auc").value == pytest.approx(metrics.auc(clicks), abs=1e-9)
