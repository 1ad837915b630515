"""What a model has to beat, for any data set: popularity, and gradient-boosted trees on the same rows and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from mmoe_rec.preprocessing.prepare import FeatureFolder
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
        scored = _predict(settings, prepared)
        models = {} if evaluated is None else {name: next(iter(evaluated.results.models.values()))}
        models |= {each: _measure(settings, rows) for each, rows in scored.items()}
        facts = {"log": settings.data.log} if evaluated is None else evaluated.results.facts
        facts = facts | {"trees": f"at most {MOST_TREES:,} of each task, fewer where validation rows say so"}
        title = f"Baselines of {settings.name}"
        results = Results(models, tuple(settings.tasks), settings.evaluation, title, facts)
        write_results(results, out)
    return results


def _measure(settings: Settings, scored: ScoredRows) -> MeasuredModel:
    from mmoe_rec.evaluation.summary import summarise

    sums = scored.measure()
    return MeasuredModel(sums, summarise(sums, settings.evaluation.resamples))


def _predict(settings: Settings, prepared: FeatureFolder) -> dict[str, ScoredRows]:
    """The baselines' predictions of the test rows; without candidates, none is more popular than another."""
    from mmoe_rec.evaluation.scoring import COLUMNS, ScoredRows
    from mmoe_rec.model.layout import ModelLayout

    layout = ModelLayout.of(prepared.layout, settings)
    train, validation, test = (EncodedRows(prepared.split(name), layout) for name in ("train", "validation", "test"))
    if train.rows > MOST_ROWS:
        say(f"the baselines learn from the last {MOST_ROWS:,} of {train.rows:,} training rows")
    weighted = settings.training.sampling_correction == "weights"
    learnt, held_out = (
        _Inputs.read(rows, layout, ("candidate", *rows.weighing(weighted)), MOST_ROWS) for rows in (train, validation)
    )
    outcomes = [f"label.{name}" for name in layout.outcomes]
    tested = _Inputs.read(test, layout, (*COLUMNS, *outcomes, *test.weighing(weighted)))
    popularity, trees = [], []
    with bar() as progress:
        step = progress.add_task(TREES, total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            labels, own = learnt.labels[:, index], held_out.labels[:, index]
            # Rows that say when to stop; none where they can't, for want of labels.
            enough = len(np.unique(own[~np.isnan(own)])) >= (2 if task.kind == "binary" else 1)
            try:
                counted = PopularityBaseline(learnt.ids("candidate"), labels, weights=learnt.weights)
                popularity.append(counted.predict(tested.ids("candidate")))
                model = gradient_boosting(
                    learnt.x,
                    labels,
                    learnt.categorical,
                    kind=task.kind,  # type: ignore[arg-type]
                    validation=(held_out.x, own) if enough else None,
                    weights=(learnt.weights, held_out.weights),
                    iterations=MOST_TREES,
                )
            except UserError as error:
                raise UserError(f"no baseline can learn task '{task.name}': {error}") from None
            trees.append(model.predict(tested.x))
            progress.advance(step)
    rows = ScoredRows(
        layout,
        users=tested.ids("user"),
        requests=tested.ids("request"),
        candidates=tested.ids("candidate") if settings.columns.has_candidate else None,
        predictions=np.zeros(tested.labels.shape),
        labels=tested.labels,
        score=np.zeros(len(tested.labels)),
        experts=None,
        outcomes={name: tested.table.column(f"label.{name}").to_numpy() for name in layout.outcomes},
        relevance={name: task.score_weight for name, task in settings.tasks.items()},
        weights=tested.weights,
    )
    predictions = {TREES: trees} | ({} if rows.candidates is None else {POPULARITY: popularity})
    return {name: rows.with_predictions(np.stack(each, 1)) for name, each in predictions.items()}


@dataclass(frozen=True)
class _Inputs:
    """Inputs (N, F) float32 of encoded rows, all but placement and lists, which of them are ids (F,) bool, labels
    (N, T) float64, and further columns."""

    x: np.ndarray
    categorical: np.ndarray
    labels: np.ndarray
    table: pa.Table

    @property
    def weights(self) -> np.ndarray | None:
        """(N,), None where all rows count alike."""
        return weights_of(self.table)

    def ids(self, name: str) -> pa.Array:
        """A column of ids (N,)."""
        return self.table.column(name).combine_chunks()

    @staticmethod
    def read(rows: EncodedRows, layout: Layout, columns: Sequence[str], most: int | None = None) -> _Inputs:
        """The inputs of all rows, or of the last `most`."""
        dense = [index for index, each in enumerate(layout.dense) if not each.placement]
        names = [each.name for each in layout.ids if not each.many and not each.placement]
        left_out, parts, labels, tables = max(0, rows.rows - (most or rows.rows)), [], [], []
        for part, table in rows.stream(ROWS_AT_A_TIME, columns):
            first = min(left_out, len(part))
            left_out -= first
            if first == len(part):
                continue  # a slice of no row would keep all of them in memory
            ids = [np.asarray(part.encoded.ids[name])[first:] for name in names]
            parts.append(np.column_stack([part.encoded.dense[first:, dense], *ids]).astype(np.float32))
            labels.append(part.labels[first:])
            tables.append(table.slice(first))
        categorical = np.arange(len(dense) + len(names)) >= len(dense)
        return _Inputs(np.concatenate(parts), categorical, np.concatenate(labels), pa.concat_tables(tables))
