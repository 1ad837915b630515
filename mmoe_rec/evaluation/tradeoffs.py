"""Choose the weights of tasks in the score, to rank better for one task at a limited loss for other tasks.

The score is the sum over tasks of weight x log prediction, so only ratios of weights matter. Here, weights sum to 1. A
ranking is measured for each task separately, by NDCG@10 with the label of this task alone as the relevance.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import PREDICTIONS_FILE, evaluation_folder
from mmoe_rec.evaluation.intervals import Difference, Replicates, bootstrap, compute_difference
from mmoe_rec.evaluation.prediction_files import columns_from_settings, load_predictions
from mmoe_rec.evaluation.summary import SCORE, BootstrapMetrics
from mmoe_rec.evaluation.sums import PredictedRows
from mmoe_rec.report.parts import Report, Row, Sentence, Table
from mmoe_rec.settings.sections import Settings

NDCG = "ndcg_at_10"
_STEPS = {2: 20, 3: 8, 4: 5}
"""Number of tasks -> number of steps between the weights 0 and 1 of the grid. For more tasks, there are 2 steps."""
_MIN_PROBABILITY = 1e-38  # smallest probability in a product, as in a model's score
Weights = tuple[float, ...]


def choose_weights(
    settings: Settings, goal: str, margins: Mapping[str, float], sources: Sequence[str] | None = None
) -> Report:
    """Choose weights of the tasks in the score on validation rows, and report their effect on test rows.

    Args:
        settings: Settings with the tasks.
        goal: Task whose NDCG@10 should increase.
        margins: Other task -> largest allowed loss of its NDCG@10 (default: `evaluation.max_metric_drop`).
        sources: Prediction files of the validation rows and of the test rows. None for the files that `evaluate` wrote
            to `data.work_dir`.

    Raises:
        UserError: A task is unknown, there is only one task, or each request has only one row.
    """
    tasks = list(settings.tasks)
    if len(tasks) < 2:
        raise UserError(f"the settings have one task, '{tasks[0]}', so there are no weights to choose")
    if unknown := [name for name in (goal, *margins) if name not in tasks]:
        raise UserError(f"there is no task '{unknown[0]}'; the settings have {', '.join(tasks)}")
    if goal in margins:
        raise UserError(f"'{goal}' is the goal, so it can't be in --max-drop")
    margins = {name: margins.get(name, settings.evaluation.max_metric_drop) for name in tasks if name != goal}
    weights = make_grid([task.score_weight for task in settings.tasks.values()])
    sources = sources or [
        f"{settings.data.work_dir}/{evaluation_folder(split)}/{PREDICTIONS_FILE}" for split in ("validation", "test")
    ]
    rows = [load_predictions(columns_from_settings(settings), source, "--predictions") for source in sources]
    if any(len(part.requests.unique()) == len(part.requests) for part in rows):
        raise UserError(
            "each request of the validation or test rows has only one row, so there is no ranking to improve"
        )
    on_validation, on_test = (WeightSweep(part, tasks, weights, settings.evaluation.resamples) for part in rows)
    chosen, front = on_validation.choose(goal, margins), on_test.find_pareto_front()
    notes, main, more = {chosen: "chosen", 0: "the settings'"}, list[Row](), list[Row]()
    for number, values in enumerate(on_test.values):
        ratios = " : ".join(f"{weight:.3g}" for weight in weights[number])
        row = (ratios, *(f"{value:.4f}" for value in values), notes.get(number, ""))
        (main if front[number] or number in notes else more).append(row)
    headline, sentences = (
        f"no other weights improve {goal} within the allowed losses, so keep the weights of the settings",
        [],
    )
    if chosen:  # number 0 has the weights of the settings
        named = zip(tasks, weights[chosen], strict=True)
        headline = f"set {', '.join(f'tasks.{task}.score_weight to {weight:.4g}' for task, weight in named)}"
        differences = on_test.compare_with_deployed(chosen)
        changes = {
            task: "nothing" if difference.value is None else difference.format()
            for task, difference in differences.items()
        }
        sentences = [f"{task}: NDCG@10 changes by {change} on the test rows" for task, change in changes.items()]
        if (differences[goal].low or 0.0) <= 0:
            sentences.append(
                f"the gain of {goal} is not significant on the test rows, so the settings' weights may be as good"
            )
    title, heads = "NDCG@10 of each task by weights in the score, test rows", (" : ".join(tasks), *tasks, "")
    return Report(
        title=f"Weights of the tasks: {settings.name}",
        headline=headline,
        tables=[Table(title, heads, main, folded=more)],
        sentences=list(map(Sentence, sentences)),
    )


def make_grid(deployed: Sequence[float]) -> list[Weights]:
    """Return weightings of the tasks that each sum to 1: first the settings' own weights (`deployed`), then a grid.

    Raises:
        UserError: No deployed weight is positive, or a weight is negative.
    """
    total, tasks = sum(deployed), len(deployed)
    if total <= 0 or min(deployed) < 0:
        raise UserError(
            f"the tasks have score weights {list(deployed)}. Set all to 0 or more, and at least one above 0."
        )
    first, steps = tuple(weight / total for weight in deployed), _STEPS.get(tasks, 2)
    parts = (
        combination for combination in itertools.product(range(steps + 1), repeat=tasks) if sum(combination) == steps
    )
    grid = [tuple(part / steps for part in combination) for combination in parts]
    return [first, *(weights for weights in grid if not np.allclose(weights, first))]


class WeightSweep:
    """NDCG@10 of T tasks when P weightings rank the rows. Weighting 0 has the settings' own (deployed) weights.

    Attributes:
        tasks: Names of the tasks.
        values: NDCG@10, shape (P, T) float64. NaN if no request has rows whose labels of the task differ.
    """

    def __init__(self, rows: PredictedRows, tasks: Sequence[str], weights: Sequence[Weights], resamples: int) -> None:
        """Rank the rows with each weighting, and measure the NDCG@10 of each task.

        Args:
            rows: Predictions and labels.
            tasks: Names of the T tasks.
            weights: P weightings, each with a weight for every task.
            resamples: Number of bootstrap resamples.
        """
        self.tasks, specs = list(tasks), {task.name: replace(task, weight=1.0) for task in rows.tasks}
        least = {task: max(_MIN_PROBABILITY, specs[task].kind.min_prediction) for task in tasks}
        logs = np.log([np.maximum(rows.predictions[task].astype(float), least[task]) for task in tasks])
        rankings = {
            (number, task): BootstrapMetrics(
                replace(rows, tasks=(specs[task],), score=task_weights @ logs).sum(), names=(NDCG,)
            )
            for number, task_weights in enumerate(np.array(weights))
            for task in tasks
        }

        def compute(counts: np.ndarray) -> Replicates:
            return {key: ranking.groups[SCORE].compute(counts)[NDCG] for key, ranking in rankings.items()}

        estimates = bootstrap(compute, rankings[0, tasks[0]].num_units, resamples)
        effective_users = {task: rankings[0, task].effective_users((SCORE, NDCG)) for task in tasks}
        self._resampled = {
            key: replace(estimate, effective_users=effective_users[key[1]]) for key, estimate in estimates.items()
        }
        self.values = np.array([[self._resampled[n, task].value for task in tasks] for n in range(len(weights))])

    def compare_with_deployed(self, number: int) -> dict[str, Difference]:
        """Return the difference in each task's NDCG@10 between weighting `number` and the deployed weights."""
        return {
            task: compute_difference(self._resampled[number, task], self._resampled[0, task]) for task in self.tasks
        }

    def choose(self, goal: str, margins: Mapping[str, float]) -> int:
        """Return the number of the weighting that ranks best for a task, without too large a loss for other tasks.

        Args:
            goal: Task whose NDCG@10 should be highest.
            margins: Other task -> largest allowed loss of its NDCG@10, compared with the deployed weights. The whole
                95% interval of the loss must be within this limit.
        """
        values, best = self.values[:, self.tasks.index(goal)], 0
        for number in range(1, len(values)):
            if values[number] > values[best]:
                lows = {task: difference.low for task, difference in self.compare_with_deployed(number).items()}
                if all((low := lows[task]) is not None and low >= -margin for task, margin in margins.items()):
                    best = number
        return best

    def find_pareto_front(self) -> np.ndarray:
        """Return a mask (P,) of Pareto-optimal weightings: no other one improves a task and harms none."""
        defined = self.values[:, ~np.isnan(self.values).any(axis=0)]
        return np.array([not ((defined >= mine).all(1) & (defined > mine).any(1)).any() for mine in defined])
