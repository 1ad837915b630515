"""What a model has to beat, for any data set: popularity, and gradient-boosted trees on the same rows and features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mmoe_rec.batches.encoded_rows import EncodedRows, weights_of
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.baselines import PopularityBaseline, gradient_boosting
from mmoe_rec.evaluation.results import Results
from mmoe_rec.evaluation.summary import MeasuredModel
from mmoe_rec.features.layout import Layout
from mmoe_rec.jobs.places import check_out, features_in_use
from mmoe_rec.locks import writing
from mmoe_rec.preprocessing.prepare import Prepared
from mmoe_rec.progress import bar, say
from mmoe_rec.settings.sections import Settings

if TYPE_CHECKING:
    from mmoe_rec.evaluation.scoring import ScoredRows
    from mmoe_rec.jobs.evaluate import EvaluationResult


TREES, POPULARITY = "gradient boosting", "popularity"
ROWS_AT_A_TIME = 65_536
MOST_ROWS = 2_000_000
"""Training rows that are held in memory; of more, the last ones."""
MOST_TREES = 300


def measure_baselines(
    settings: Settings, out: Path, evaluated: EvaluationResult | None = None, name: str = "model"
) -> Results:
    """Trains both on the training rows, measures them on the test rows, and writes a report to a folder.

    evaluated: a model on the same rows, which is compared with them, under its name. Raises UserError where there are
    no rows of a split, or a task can't be learnt.
    """
    from mmoe_rec.report.documents import write_results

    check_out(out, settings)
    with (
        features_in_use(settings, "baselines") as prepared,
        writing(out, "an evaluation", "give another folder with --out"),
    ):
        prepared.require_rows("train", "validation", "test")
        scored = _predicted(settings, prepared)
        models = {} if evaluated is None else {name: next(iter(evaluated.results.models.values()))}
        models |= {each: _measured(settings, rows) for each, rows in scored.items()}
        facts = {"log": settings.data.log} if evaluated is None else evaluated.results.facts
        facts = facts | {"trees": f"at most {MOST_TREES:,} of each task, fewer where validation rows say so"}
        title = f"Baselines of {settings.name}"
        results = Results(models, tuple(settings.tasks), settings.evaluation, title, facts)
        write_results(results, out)
    return results


def _measured(settings: Settings, scored: ScoredRows) -> MeasuredModel:
    from mmoe_rec.evaluation.summary import summarise

    sums = scored.measure()
    return MeasuredModel(sums, summarise(sums, settings.evaluation.resamples))


def _predicted(settings: Settings, prepared: Prepared) -> dict[str, ScoredRows]:
    """The baselines' predictions of the test rows; without candidates, none is more popular than another."""
    layout = prepared.layout
    train, validation = (EncodedRows(prepared.split(name), layout) for name in ("train", "validation"))
    if train.rows > MOST_ROWS:
        say(f"the baselines learn from the last {MOST_ROWS:,} of {train.rows:,} training rows")
    weighted = settings.training.sampling_correction == "weights"
    learnt, held_out = (_Matrix.of(rows, layout, weighted, MOST_ROWS) for rows in (train, validation))
    test = _test_rows(settings, prepared)
    inputs = _Matrix.of(EncodedRows(prepared.split("test"), layout), layout, weighted)
    popularity, trees = [], []
    with bar() as progress:
        step = progress.add_task(TREES, total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            labels = learnt.labels[:, index]
            try:
                counted = PopularityBaseline(learnt.candidates, labels, weights=learnt.weights)
                popularity.append(counted.predict(inputs.candidates))
                model = gradient_boosting(
                    learnt.x,
                    labels,
                    _categorical(layout),
                    kind=task.kind,  # type: ignore[arg-type]
                    validation=_validation(held_out, index, task.kind),
                    weights=(learnt.weights, held_out.weights),
                    iterations=MOST_TREES,
                )
            except UserError as error:
                raise UserError(f"no baseline can learn task '{task.name}': {error}") from None
            trees.append(model.predict(inputs.x))
            progress.advance(step)
    predictions = {TREES: trees} | ({} if test.candidates is None else {POPULARITY: popularity})
    return {name: test.with_predictions(np.stack(each, 1)) for name, each in predictions.items()}


def _validation(rows: _Matrix, task: int, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows that say when to stop; None where they can't, for want of labels."""
    labels = rows.labels[:, task]
    enough = len(np.unique(labels[~np.isnan(labels)])) >= 2
    return (rows.x, labels) if enough or (kind != "binary" and (~np.isnan(labels)).any()) else None


def _test_rows(settings: Settings, prepared: Prepared) -> ScoredRows:
    """The test rows, whose predictions are still to come."""
    from mmoe_rec.evaluation.scoring import COLUMNS, ScoredRows
    from mmoe_rec.model.layout import ModelLayout

    layout, weighted = ModelLayout.of(prepared.layout, settings), settings.training.sampling_correction == "weights"
    rows = EncodedRows(prepared.split("test"), layout)
    more = [*(f"label.{name}" for name in layout.outcomes), *rows.weighing(weighted)]
    parts = list(rows.stream(ROWS_AT_A_TIME, (*COLUMNS, *more)))
    ids = pa.concat_tables([table for _, table in parts])
    labels = np.concatenate([part.labels for part, _ in parts])
    return ScoredRows(
        layout,
        users=ids.column("user").combine_chunks(),
        requests=ids.column("request").combine_chunks(),
        candidates=ids.column("candidate").combine_chunks() if settings.columns.has_candidate else None,
        predictions=np.zeros(labels.shape),
        labels=labels,
        score=np.zeros(len(labels)),
        experts=None,
        outcomes={name: ids.column(f"label.{name}").to_numpy() for name in layout.outcomes},
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weights=weights_of(ids),
    )


class _Matrix:
    """Inputs (N, F) float32, labels (N, T) float64, candidates (N,) and, where rows do not count alike, weights (N,) of
    encoded rows: all inputs but placement and lists."""

    def __init__(self, x: np.ndarray, labels: np.ndarray, candidates: pa.Array, weights: np.ndarray | None) -> None:
        self.x, self.labels, self.candidates, self.weights = x, labels, candidates, weights

    @staticmethod
    def of(rows: EncodedRows, layout: Layout, weighted: bool, most: int | None = None) -> _Matrix:
        """Of all rows, or of the last ones. weighted: whether rows count by the rate at which they were sampled."""
        dense = [index for index, each in enumerate(layout.dense) if not each.placement]
        names, taken = _columns(layout), min(rows.rows, most or rows.rows)
        x = np.empty((taken, len(dense) + len(names)), np.float32)
        labels = np.empty((taken, len(layout.tasks)))
        candidates: list[pa.Array] = []
        start = taken - rows.rows  # of rows before the first that is taken, below 0
        weights: list[np.ndarray] = []
        for part, table in rows.stream(ROWS_AT_A_TIME, ("candidate", *rows.weighing(weighted))):
            end = start + len(part)
            skip = max(0, min(-start, len(part)))
            if skip < len(part):
                x[start + skip : end, : len(dense)] = part.encoded.dense[skip:, dense]
                for offset, name in enumerate(names, start=len(dense)):
                    x[start + skip : end, offset] = np.asarray(part.encoded.ids[name])[skip:]
                labels[start + skip : end] = part.labels[skip:]
                candidates.append(table.column("candidate").slice(skip).combine_chunks())
                if (counted := weights_of(table.slice(skip))) is not None:
                    weights.append(counted)
            start = end
        counts = np.concatenate(weights) if weights else None
        return _Matrix(x, labels, pa.chunked_array(candidates).combine_chunks(), counts)


def _columns(layout: Layout) -> Sequence[str]:
    """The single-valued id inputs that serving knows."""
    return [each.name for each in layout.ids if not each.many and not each.placement]


def _categorical(layout: Layout) -> np.ndarray:
    dense = [index for index, each in enumerate(layout.dense) if not each.placement]
    return np.array([False] * len(dense) + [True] * len(_columns(layout)))
