"""The two baselines that a model is shown beside: popularity and gradient-boosted trees, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.build.prepare import Prepared
from mmoe_rec.evaluation.baselines import PopularityBaseline, gradient_boosting
from mmoe_rec.evaluation.scoring import Scored
from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.features.layout import Layout
from mmoe_rec.progress import bar
from mmoe_rec.settings import Settings

ROWS_AT_A_TIME = 65_536


def evaluate_baselines(settings: Settings, scored: Scored) -> dict[str, dict[str, Any]]:
    """Trains both baselines on the training rows and summarises them on the test rows of `scored`."""
    prepared = Prepared(Path(settings.data.work) / "features")
    layout = prepared.layout
    train = EncodedRows(prepared.split("train"), layout)
    test = EncodedRows(prepared.split("test"), layout)
    x_train, labels, candidates = _matrix(train, layout)
    x_test, _, _ = _matrix(test, layout)
    popularity, trees = [], []
    with bar() as progress:
        step = progress.add_task("gradient boosting", total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            popularity.append(PopularityBaseline(candidates, labels[:, index]).predict(scored.candidates))
            model = gradient_boosting(x_train, labels[:, index], _categorical(layout), kind=task.kind)  # type: ignore[arg-type]
            trees.append(model.predict(x_test))
            progress.advance(step)
    predictions = {"gradient boosting": np.stack(trees, 1), "popularity": np.stack(popularity, 1)}
    resamples = settings.evaluation.resamples
    return {name: summarise(scored.with_predictions(each).measure(), resamples) for name, each in predictions.items()}


def _columns(layout: Layout) -> list[str]:
    """The single-valued id inputs that serving knows."""
    return [each.name for each in layout.ids if not each.many and not each.placement]


def _categorical(layout: Layout) -> np.ndarray:
    dense = [index for index, each in enumerate(layout.dense) if not each.placement]
    return np.array([False] * len(dense) + [True] * len(_columns(layout)))


def _matrix(rows: EncodedRows, layout: Layout) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """All inputs but placement and lists as (N, F) float32, labels (N, T) float64, candidates (N,)."""
    dense = [index for index, each in enumerate(layout.dense) if not each.placement]
    names = _columns(layout)
    x = np.empty((rows.rows, len(dense) + len(names)), np.float32)
    labels = np.empty((rows.rows, len(layout.tasks)))
    candidates, start = [], 0
    for part, table in rows.stream(ROWS_AT_A_TIME, ("candidate",)):
        end = start + len(part)
        x[start:end, : len(dense)] = part.encoded.dense[:, dense]
        for offset, name in enumerate(names, start=len(dense)):
            x[start:end, offset] = np.asarray(part.encoded.ids[name])
        labels[start:end] = part.labels
        candidates.append(table.column("candidate"))
        start = end
    return x, labels, pa.chunked_array([chunk for each in candidates for chunk in each.chunks]).combine_chunks()
