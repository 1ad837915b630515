"""Grows the boosted trees that stand beside a trained network, and fits how much each of both counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.evaluation.calibration import FEWEST, calibration_rows, cross_entropy
from mmoe_rec.jobs.trees import Inputs, grow_lightgbm
from mmoe_rec.log.columns import hash_column
from mmoe_rec.model.forest import Forest, read_ensemble
from mmoe_rec.model.trees import Blend, Trees
from mmoe_rec.progress import bar, say

if TYPE_CHECKING:
    from mmoe_rec.model.layout import ModelLayout
    from mmoe_rec.model.mmoe import RankingModel
    from mmoe_rec.preprocessing.prepare import FeatureFolder
    from mmoe_rec.settings.sections import Settings

HALF = Blend(0.5, 0.5, 0.0)
"""Where validation rows have too few labels to say more."""
SPREAD = 0.5
"""Standard deviation that is expected of the difference of both weights, so that few labels leave them about equal."""

CERTAINTY = 3.0
"""Standard errors by which ids have to help before trees with them stand alone: what an id was worth lasts less long
than what counters say. Where they help less, the mean of both sets stands."""


def grow_trees(settings: Settings, prepared: FeatureFolder, layout: ModelLayout, model: RankingModel) -> Trees:
    """The trees of all tasks that have both labels (or several values) in training and validation rows.

    model: the trained network. Says what each task takes.
    """
    section = settings.model.trees
    assert section is not None
    weighted = settings.training.sampling_correction == "weights"
    train, validation = (EncodedRows(prepared.split(name), layout) for name in ("train", "validation"))
    learnt = Inputs.read(train, layout, train.weighing(weighted))
    held_out = Inputs.read(validation, layout, [*validation.weighing(weighted), "user"])
    users = np.unique(hash_column(held_out.column("user")), return_inverse=True)[1]
    logits, *_ = calibration_rows(model, layout, validation, settings.evaluation.batch_size)
    logits = logits[len(logits) - len(held_out.labels) :]
    # In a table without times there is no later, and there are no counters that say what ids do.
    certainty = CERTAINTY if settings.columns.has_time else 0.0
    shape = section.leaves, settings.training.seed, section.learning_rate, section.number
    texts: dict[str, str] = {}
    blends: dict[str, Blend] = {}
    with bar() as progress:
        step = progress.add_task("trees", total=len(layout.tasks))
        for index, task in enumerate(layout.tasks):
            rows, judged = learnt.of_task(index), held_out.of_task(index)
            observed = ~np.isnan(held_out.labels[:, index])
            network = logits[observed, index].astype(np.float64)
            inputs = sorted({rows.numbers, rows.x.shape[1]} - {0})
            if min(len(np.unique(each.labels)) for each in (rows, judged)) < 2:
                inputs = []
            grown = {}
            for first in inputs:
                learnt_from, tried_on = (
                    replace(each, x=each.x[:, :first], labels=(each.labels - task.mean) / task.deviation)
                    for each in (rows, judged)
                )
                booster = grow_lightgbm(task.kind, learnt_from, tried_on, *shape)
                most = booster.best_iteration  # further ones were too many
                grown["without ids" if first == rows.numbers else "with ids"] = booster.model_to_string(
                    num_iteration=most
                )
            ways = [(name, text, certainty) for name, text in grown.items()]
            if len(ways) > 1:
                ways.append(("in all, without ids and with them", join_trees([*grown.values()]), 0.0))
            before: np.ndarray | None = None
            for name, text, needed in ways:
                ensemble = read_ensemble(text)
                sums = Forest([ensemble]).sums(judged.x, torch.get_num_threads())[:, 0]
                trees = task.mean + task.deviation * sums
                blend = fit_blend(task.kind, network, trees, judged.labels, judged.weights)
                blended = blend.network * network + blend.trees * trees + blend.offset
                losses = [_losses_of(task.kind, each, judged.labels) for each in (blended, network, trees)]
                witnesses = judged.weights, users[observed]
                if before is not None and not is_clearly_less(losses[0], before, *witnesses, needed):
                    continue
                before, texts[task.name], blends[task.name] = losses[0], text, blend
                together, alone, of_trees = (np.average(each, weights=judged.weights) for each in losses)
                told = (
                    f"{len(ensemble.trees)} trees {name}; {blend.network:.3g} x network + {blend.trees:.3g} x trees, "
                    f"loss of validation rows {together:.4g} (network {alone:.4g}, trees {of_trees:.4g})"
                )
                if name == "with ids":
                    break
            if not inputs:
                told = "no trees: training or validation rows lack labels that differ, or there is no input"
            say(f"  {task.name}: {told}")
            progress.advance(step)
    return Trees(texts, blends)


def join_trees(texts: Sequence[str]) -> str:
    """The mean of several sets of trees as one, in LightGBM's text. texts: the last reads the inputs of all others."""

    def divide(line: re.Match[str]) -> str:
        return f"{line[1]}={' '.join(repr(float(each) / len(texts)) for each in line[2].split())}"

    head, blocks = texts[-1].partition("\nTree=")[0], list[str]()
    for text in texts:
        for block in text.partition("\nend of trees")[0].split("\nTree=")[1:]:
            numbered = f"Tree={re.sub('^[0-9]+', str(len(blocks)), block.rstrip())}\n\n\n"
            blocks.append(re.sub(r"(?m)^(leaf_value|internal_value)=(.*)$", divide, numbered))
    head = re.sub(r"(?m)^tree_sizes=.*", f"tree_sizes={' '.join(str(len(each)) for each in blocks)}", head).rstrip()
    return f"{head}\n\n{''.join(blocks)}end of trees\n"


def _losses_of(kind: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) the loss of each row: cross-entropy of a logit, or squared error of a value in deviations of the labels."""
    if kind == "binary":
        return cross_entropy(logits, labels)
    return ((logits - labels) / (labels.std() or 1.0)) ** 2


def is_clearly_less(
    losses: np.ndarray, others: np.ndarray, weights: np.ndarray | None, users: np.ndarray, certainty: float = CERTAINTY
) -> bool:
    """Whether rows lose less by more than `certainty` standard errors, over users, since rows of a user are no
    independent witnesses."""
    gains = (others - losses) * (1 if weights is None else weights)
    apart = np.bincount(users, gains - gains.mean())[np.unique(users)]
    return len(apart) > 1 and bool(gains.sum() > certainty * math.sqrt(len(apart) / (len(apart) - 1) * (apart @ apart)))


def fit_blend(
    kind: str, network: np.ndarray, trees: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> Blend:
    """The blend of the least loss on rows that neither learnt from (stacking: Wolpert, 1992), with no weight below 0,
    and a normal prior of deviation SPREAD on the difference of the weights; HALF where there are few.

    network, trees, labels: (N,), logits of a binary task or values; weights: (N,) positive, None is 1.
    """
    if (min(labels.sum(), (1 - labels).sum()) if kind == "binary" else len(labels)) < FEWEST["temperature"]:
        return HALF
    share = np.full(len(labels), 1 / len(labels)) if weights is None else weights / weights.sum()
    # A regression is fitted in deviations from its labels' mean.
    middle, scale = (0.0, 1.0) if kind == "binary" else (labels.mean(), labels.std())
    x, y = (np.column_stack([network, trees]) - middle) / scale, (labels - middle) / scale

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean loss and the prior's share of a row, and their slopes."""
        logit, apart = x @ at[:2] + at[2], (at[0] - at[1]) / SPREAD
        if kind == "binary":
            losses, slopes = cross_entropy(logit, y), expit(logit) - y
        else:
            losses, slopes = (logit - y) ** 2, 2 * (logit - y)
        of_prior = apart / SPREAD / len(labels) * np.array([1, -1, 0])
        loss = float(share @ losses) + apart**2 / 2 / len(labels)
        return loss, np.append((share * slopes) @ x, share @ slopes) + of_prior

    bounds = [(0, None), (0, None), (None, None)]
    a, b, c = minimize(objective, [0.5, 0.5, 0.0], jac=True, method="L-BFGS-B", bounds=bounds).x
    return Blend(float(a), float(b), float(scale * c + middle * (1 - a - b)))
