"""Runs of settings with several seeds, for benchmarks that compare them with other systems."""

from mmoe_rec.evaluation.sums import EvaluationSums
from mmoe_rec.experiments.compare import FOLDER
from mmoe_rec.experiments.runner import BASE, TrainedVariant, open_runner
from mmoe_rec.settings.sections import Settings


def train_runs(settings: Settings, seeds: int) -> TrainedVariant:
    """Train with `training.seed` and the seeds after it, and predict the test rows. Complete runs stay."""
    first = settings.training.seed
    with open_runner(settings, "compare", "test", folder=FOLDER) as runner:
        return runner.train([BASE], range(first, first + seeds))[0]


def measure_runs(settings: Settings, seeds: int) -> list[EvaluationSums]:
    """Measure the test rows as predicted by the runs of all seeds."""
    return train_runs(settings, seeds).measure()
