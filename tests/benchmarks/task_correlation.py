"""python -m tests.benchmarks.task_correlation

Does a mixture of experts help when tasks differ? The synthetic study of the MMoE paper (Ma et al., KDD 2018, sections
3 and 4) on this project's own model, by settings alone: two regression tasks (`correlated_tasks.py`) at correlations
p = 0, .5, .9 and 1, learnt by

shared_bottom  one expert, on which both towers sit, as wide as gives it as many parameters as mmoe, gates counted;
omoe           8 experts of 16 units and one gate for both tasks;
mmoe           8 experts of 16 units and a gate for each task.

From the paper: 100 inputs, ReLU experts, towers of 8 units, no shared layer below, Adam at the best of three learning
rates, 200 trainings a cell (here one for each seed). It does not say c, m, how a and b are drawn, the batch, the number
of steps and of rows: c = .3, m = 5 and N(0, 1) are those of others who rebuilt it, and here every step has rows never
seen before. Towers have this project's SiLU.

Within a seed, all arms and correlations see the same inputs and noise in the same order, so arms are compared seed by
seed. The learning rate of an arm at a correlation is the one with the lowest mean loss over seeds of their own. A loss
is the mean squared error over both tasks on 2,000 rows that are not trained on; noise alone makes it 0.01.

Prints a table, saves the paper's plot (loss over steps, and each seed's last loss) to `--out`, and ends with a line of
JSON. With the defaults it takes 13 minutes of one core that others share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmoe_rec.allocation import freed_memory_kept
from mmoe_rec.model.mmoe import build_mixture
from mmoe_rec.settings.model import Model
from tests.benchmarks.correlated_tasks import NOISE_VARIANCE, CorrelatedTasks
from tests.benchmarks.many_trainings import ManyTrainings

INPUTS, TASKS, EXPERTS, EXPERT_UNITS, TOWER_UNITS = 100, 2, 8, 16, 8
CORRELATIONS = (0.0, 0.5, 0.9, 1.0)
LEARNING_RATES = (1e-4, 1e-3, 1e-2)
PAIRS = (("mmoe", "shared_bottom"), ("mmoe", "omoe"), ("omoe", "shared_bottom"))
UNSEEN_ROWS = 2000
STEPS_A_CHECK = 50
RESAMPLES = 10_000


class Cell(NamedTuple):
    """What is trained from every seed."""

    arm: str
    correlation: float
    learning_rate: float


class Sizes(NamedTuple):
    """How much is trained, and on which labels."""

    steps: int
    batch: int
    scale: float
    sines: int


class MixtureOnInputs(nn.Module):
    """The mixture that settings describe, without placement: inputs (N, D) -> predictions (N, 2)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.mixture = build_mixture(INPUTS, (), 0, TASKS, model)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, D) -> (N, 2)."""
        logits: Tensor = self.mixture(inputs, inputs[:, :0]).logits
        return logits


@cache
def arms() -> dict[str, Model]:
    """Settings of the arms."""
    mmoe = _settings(EXPERTS, EXPERT_UNITS, per_task=True)
    one, two = (_settings(1, width, per_task=False) for width in (1, 2))
    # Every unit of the one expert brings as many parameters.
    each = parameter_count(two) - parameter_count(one)
    width = 1 + round((parameter_count(mmoe) - parameter_count(one)) / each)
    return {
        "shared_bottom": _settings(1, width, per_task=False),
        "omoe": _settings(EXPERTS, EXPERT_UNITS, per_task=False),
        "mmoe": mmoe,
    }


def _settings(experts: int, units: int, per_task: bool) -> Model:
    return Model.model_validate(
        {
            "bottom": {"units": [], "piecewise": False, "cross_layers": 0},
            "experts": {"count": experts, "units": [units], "activation": "relu"},
            "gates": {"per_task": per_task},
            "towers": {"units": [TOWER_UNITS]},
        }
    )


def parameter_count(model: Model) -> int:
    """Parameters that can have an effect: a gate over one expert always gives 1."""
    with torch.device("meta"):
        mixture = build_mixture(INPUTS, (), 0, TASKS, model)
    count = sum(each.numel() for each in mixture.parameters())
    if model.experts.count > 1:
        return count
    return count - sum(each.numel() for gates in mixture.gates for each in gates.parameters())


def train(cells: Sequence[Cell], seeds: range, sizes: Sizes, what: str) -> dict[Cell, np.ndarray]:
    """Each cell's losses (checks, seeds), one check every `STEPS_A_CHECK` steps and one after the last."""
    # Even seeds for weights and odd ones for rows: equal ones would draw weights and rows from the same numbers.
    tasks = CorrelatedTasks([2 * seed + 1 for seed in seeds], INPUTS, sizes.scale, sizes.sines)
    models = {arm: partial(MixtureOnInputs, model) for arm, model in arms().items()}
    weight_seeds = [2 * seed for seed in seeds]
    trainings = {cell: ManyTrainings(models[cell.arm], weight_seeds, cell.learning_rate) for cell in cells}
    unseen = tasks.draw(UNSEEN_ROWS)
    losses: dict[Cell, list[Tensor]] = defaultdict(list)
    for check in _checks(sizes.steps):
        batches = [tasks.draw(sizes.batch) for _ in range(check.start, check.stop)]
        for cell, training in trainings.items():
            training.train((each.inputs, tasks.labels(each, cell.correlation)) for each in batches)
            losses[cell].append(training.losses(unseen.inputs, tasks.labels(unseen, cell.correlation)))
        print(f"{what}: {check.stop} of {sizes.steps} steps", flush=True)
    return {cell: torch.stack(each).numpy() for cell, each in losses.items()}


def _checks(steps: int) -> list[range]:
    """The steps before each check."""
    return [range(start, min(start + STEPS_A_CHECK, steps)) for start in range(0, steps, STEPS_A_CHECK)]


def choose(losses: Mapping[Cell, np.ndarray]) -> list[Cell]:
    """For each arm and correlation the cell whose mean loss is lowest after the last step; NaN is never lowest."""
    best: dict[tuple[str, float], Cell] = {}
    for cell in sorted(losses, key=lambda cell: float(np.nan_to_num(losses[cell][-1].mean(), nan=np.inf))):
        best.setdefault((cell.arm, cell.correlation), cell)
    return [best[arm, correlation] for correlation in CORRELATIONS for arm in arms()]


def summary(cell: Cell, losses: np.ndarray) -> dict[str, Any]:
    """Mean and deviation of the last losses (seeds,), and the mean of the worst and of the best tenth of seeds."""
    ordered = np.sort(losses)
    tenth = max(1, round(len(losses) / 10))
    numbers = {
        "mean": ordered.mean(),
        "deviation": ordered.std(ddof=1),
        "best_decile": ordered[:tenth].mean(),
        "worst_decile": ordered[-tenth:].mean(),
    }
    return {"arm": cell.arm, "p": cell.correlation, "learning_rate": cell.learning_rate} | _rounded(numbers)


def interval(differences: np.ndarray) -> dict[str, float]:
    """Mean of seeds' differences (seeds,) and its 95% interval, by the bootstrap over seeds."""
    picks = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return _rounded({"mean": differences.mean(), "low": low, "high": high})


def compare(last: Mapping[tuple[str, float], np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """Differences of arms at each correlation, and how much larger each is at p = 0 than at p = 1.

    last: (arm, correlation) -> losses (seeds,) of the same seeds.
    """
    differences, growth = [], []
    for first, second in PAIRS:
        arms_compared = f"{first} - {second}"
        by_correlation = {p: last[first, p] - last[second, p] for p in CORRELATIONS}
        differences += [{"p": p, "arms": arms_compared} | interval(each) for p, each in by_correlation.items()]
        change = by_correlation[CORRELATIONS[0]] - by_correlation[CORRELATIONS[-1]]
        growth.append({"arms": arms_compared} | interval(change))
    return {"differences": differences, "difference_at_0_minus_at_1": growth}


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def draw_plot(losses: Mapping[Cell, np.ndarray], sizes: Sizes, path: Path) -> None:
    """For each correlation, mean loss over steps with the middle 80% of seeds, and below it the seeds' last losses.

    The dotted line is the loss that noise alone makes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(CORRELATIONS), sharex="row", sharey="row")
    steps = [check.stop for check in _checks(sizes.steps)]
    names = list(arms())
    for cell, each in losses.items():
        curves, last = panels[:, CORRELATIONS.index(cell.correlation)]
        colour = f"C{names.index(cell.arm)}"
        curves.plot(steps, each.mean(1), color=colour, label=f"{cell.arm}, {cell.learning_rate:g}")
        curves.fill_between(steps, *np.quantile(each, [0.1, 0.9], axis=1), color=colour, alpha=0.15, linewidth=0)
        curves.set(title=f"p = {cell.correlation:g}", xlabel="step", yscale="log")
        last.ecdf(each[-1], color=colour, label=cell.arm)
        last.set(xlabel="loss after the last step")
        for axes in (curves, last):
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.3, which="both")
    for curves in panels[0]:
        curves.axhline(NOISE_VARIANCE, color="grey", linestyle=":", linewidth=1)
    panels[0, 0].set_ylabel("mean squared error on unseen rows")
    panels[1, 0].set_ylabel("share of seeds at or below")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def study(seeds: int, tuning_seeds: int, sizes: Sizes, plot: Path) -> dict[str, Any]:
    """Runs the study and gives what the last line holds."""
    candidates = [Cell(*each) for each in product(arms(), CORRELATIONS, LEARNING_RATES)]
    # Seeds of their own: those of the study come before them.
    chosen = choose(train(candidates, range(seeds, seeds + tuning_seeds), sizes, "choosing learning rates"))
    losses = train(chosen, range(seeds), sizes, "training")
    draw_plot(losses, sizes, plot)
    print(f"plot: {plot}")
    cells = [summary(cell, each[-1]) for cell, each in losses.items()]
    comparison = compare({(cell.arm, cell.correlation): each[-1] for cell, each in losses.items()})
    parameters = {arm: parameter_count(model) for arm, model in arms().items()}
    widths = {arm: f"{model.experts.count} x {model.experts.units[0]}" for arm, model in arms().items()}
    for title, table in ({"losses": cells} | comparison).items():
        print(f"\n{title}")
        _print_table(table)
    setting = {"seeds": seeds, "tuning_seeds": tuning_seeds, "noise": NOISE_VARIANCE} | sizes._asdict()
    return {"cells": cells} | comparison | {"parameters": parameters, "experts": widths, "sizes": setting}


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print("".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value!s:>22}" for value in row.values()))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="trainings a cell (default: %(default)s)")
    parser.add_argument(
        "--tuning-seeds", type=int, default=6, help="trainings a learning rate is chosen by (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1600, help="steps of each training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="rows a step, never repeated (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.3, help="c, the length of w1 and w2 (default: %(default)s)")
    parser.add_argument("--sines", type=int, default=5, help="m, sines in a label (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_task_correlation"))
    options = parser.parse_args()
    sizes = Sizes(options.steps, options.batch, options.scale, options.sines)
    with freed_memory_kept():
        result = study(options.seeds, options.tuning_seeds, sizes, options.out / "task_correlation.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
