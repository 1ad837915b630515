"""Boosted trees beside a trained network. A blend, the weighted sum of both predictions, is fitted for each task.

The trees and the weights are chosen by the loss on the selection rows (one half of the validation users), which train
neither the network nor the trees.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize

from mmoe_rec.batches.encoded_dataset import EncodedDataset, ValidationPart
from mmoe_rec.evaluation.calibration import MIN_LABELS, predict_for_calibration
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.log.columns import hash_column
from mmoe_rec.model.mmoe import RankingModel
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.trees import Blend, Forest, Trees, read_ensemble
from mmoe_rec.preprocessing.prepare import FeatureFolder
from mmoe_rec.progress import say
from mmoe_rec.settings.model import Trees as TreesSection
from mmoe_rec.settings.sections import Settings
from mmoe_rec.task_kinds.task_kind import TaskKind
from mmoe_rec.training.boosting import TreeInputs, train_lightgbm

BLEND_PRIOR_STD = 0.25
"""Prior standard deviation of the difference of the network's and the trees' weights, as a fraction of their sum."""
SCALE_PRIOR_STD, MIN_SCALE = 0.5, 0.1
"""Prior standard deviation of the blend's scale around 1, and the minimum scale, because a scale of 0 would give all
rows the same prediction."""
MEAN_PRIOR_STD = 0.03
"""Prior standard deviation of the blend's mean prediction around the weighted mean of the network's and the trees' mean
predictions: in label standard deviations for a regression, and as a difference of logarithms for a binary task."""
ID_TREES_MIN_Z = 3.0
"""Number of standard errors by which the loss of trees with IDs must be lower to replace trees without IDs. The margin
is large because the effect of an ID fades sooner than the effect of a counter."""
EQUAL_BLEND = Blend(0.5, 0.5, 0.0)
"""Blend of a task with too few labels to fit the weights."""
BLEND_MIN_Z = 1.0
"""Number of standard errors by which the loss of a blend must be lower than the loss of the network alone. Trees alone
replace the blend by the same rule."""


def grow_trees(settings: Settings, prepared: FeatureFolder, layout: ModelLayout, model: RankingModel) -> Trees:
    """Grow trees for every task, and print the chosen trees and weights.

    A task keeps the network alone if trees have no input, if all labels are equal, or if neither the trees nor the
    blend (by `BLEND_MIN_Z` standard errors) have a lower loss on the selection rows.

    Args:
        settings: Settings of the run, with `model.trees`.
        prepared: Folder of the features.
        layout: Layout of the model.
        model: Trained network.
    """
    section = settings.model.trees
    assert section is not None
    weighted = settings.training.sampling_correction == "weights"
    train = EncodedDataset(prepared.split("train"), layout)
    selection = EncodedDataset(prepared.split("validation"), layout, part=ValidationPart.SELECTION)
    train_rows = TreeInputs.read(train, layout, train.weight_columns(weighted))
    held_out = TreeInputs.read(selection, layout, [*selection.weight_columns(weighted), "user"])
    users = np.unique(hash_column(held_out.column("user")), return_inverse=True)[1]
    logits, *_ = predict_for_calibration(model, layout, selection, settings.evaluation.batch_size)
    logits = logits[len(logits) - len(held_out.labels) :]
    # Without times, no rows are later than others. The effect of IDs can't fade, and trees with IDs need no margin.
    min_z = ID_TREES_MIN_Z if settings.columns.has_time else 0.0
    texts, blends = dict[str, str](), dict[str, Blend]()
    for index, task in enumerate(layout.tasks):
        observed = ~np.isnan(held_out.labels[:, index])
        rows = train_rows.select_task(index), held_out.select_task(index)
        network = logits[observed, index].astype(np.float64)
        fitted, choice = fit_task_trees(task, section, settings.training.seed, *rows, network, users[observed], min_z)
        if fitted is not None:
            texts[task.name], blends[task.name] = fitted
        say(f"  trees of {task.name}: {choice}")
    return Trees(texts, blends)


def fit_task_trees(
    task: TaskOutput,
    section: TreesSection,
    seed: int,
    train_rows: TreeInputs,
    held_out: TreeInputs,
    network: np.ndarray,
    users: np.ndarray,
    min_z: float = ID_TREES_MIN_Z,
) -> tuple[tuple[str, Blend] | None, str]:
    """Grow the trees of one task, and fit the weights of the trees and the network.

    Args:
        task: Task, with its kind and, for a regression, the mean and standard deviation of the labels.
        section: Settings of the trees.
        seed: Seed of the random columns of each tree.
        train_rows: Training rows with an observed label.
        held_out: N selection rows with an observed label.
        network: Predictions of the network for these N rows: logits, or values of a regression. Shape (N,).
        users: Index of each row's user, from 0. Shape (N,), int64.
        min_z: Number of standard errors by which trees with IDs must be better than trees without IDs.

    Returns:
        The trees in LightGBM's text format and their blend, or None to use the network alone. Then a description.
    """
    inputs = sorted({train_rows.num_numeric, train_rows.x.shape[1]} - {0})
    if not inputs or min(len(np.unique(rows.labels)) for rows in (train_rows, held_out)) < 2:
        return None, "no trees, because training or validation rows lack different labels, or there is no input"
    texts, halves = dict[str, str](), list[str]()
    for width in inputs:
        train, selection = (
            replace(rows, x=rows.x[:, :width], labels=(rows.labels - task.mean) / task.std)
            for rows in (train_rows, held_out)
        )
        options = section.leaves, seed, section.learning_rate, section.max_trees
        booster = train_lightgbm(task.kind, train, selection, *options)
        count = booster.best_iteration  # Further trees would raise the loss on the selection rows.
        name = "without ids" if width == train_rows.num_numeric else "with ids"
        texts[name] = booster.model_to_string(num_iteration=count)
        # If trees without IDs and trees with IDs are used together, they have at most `max_trees` trees in all.
        halves.append(booster.model_to_string(num_iteration=min(count, max(1, section.max_trees // 2))))
    choices = [(name, text, min_z) for name, text in texts.items()]
    if 1 < len(choices) <= section.max_trees:
        choices.append(("in all, without ids and with them", "\n".join(halves), 0.0))
    labels, weights, best = held_out.labels, held_out.weights, None
    _, std = task.kind.label_mean_and_std(labels)
    for name, text, required_z in choices:
        ensemble = read_ensemble(text)
        trees = task.mean + task.std * Forest([ensemble]).sums(held_out.x, torch.get_num_threads())[:, 0]
        blend = fit_blend(task.kind, network, trees, labels, weights)
        losses = task.kind.losses(blend.apply(network, trees), labels, std)
        if best is not None and not is_significantly_lower(losses, best.losses, weights, users, required_z):
            continue
        best = _FittedTrees(text, f"{len(ensemble.trees)} trees {name}", trees, blend, losses)
        if name == "with ids":
            break
    assert best is not None, "the first choice needs no margin"
    network_losses, trees_losses = (task.kind.losses(side, labels, std) for side in (network, best.trees))
    blended, *alone = (np.average(losses, weights=weights) for losses in (best.losses, network_losses, trees_losses))
    means = f"loss of selection rows: network {alone[0]:.4g}, trees {alone[1]:.4g}, blend {blended:.4g}"
    is_better = is_significantly_lower(best.losses, network_losses, weights, users, BLEND_MIN_Z)
    if best.blend.trees == 0 or (alone[0] <= alone[1] and not is_better):
        return None, f"no trees, because the blend is not clearly better than the network alone; {means}"
    trees_lead = is_significantly_lower(trees_losses, best.losses, weights, users, BLEND_MIN_Z)
    blend = Blend(0.0, 1.0, 0.0) if trees_lead else best.blend
    few = " (too few labels to fit the weights)" if blend == EQUAL_BLEND else ""
    return (best.text, blend), f"{best.name}; {blend.network:.3g} x network + {blend.trees:.3g} x trees{few}; {means}"


@dataclass(frozen=True)
class _FittedTrees:
    """Trees of a task as LightGBM's text, with predictions of the trees and losses of the blend on selection rows."""

    text: str
    name: str
    trees: np.ndarray
    blend: Blend
    losses: np.ndarray


def is_significantly_lower(
    losses: np.ndarray,
    other_losses: np.ndarray,
    weights: np.ndarray | None,
    users: np.ndarray,
    min_z: float = ID_TREES_MIN_Z,
) -> bool:
    """Return whether the mean of `losses` is lower than the mean of `other_losses` by over `min_z` standard errors.

    The standard error is computed over users, because rows of one user aren't independent.

    Args:
        losses: Losses, shape (N,).
        other_losses: Losses to compare with, shape (N,).
        weights: Weights of the rows, None for equal weights. Shape (N,).
        users: Index of each row's user, from 0. Shape (N,), int64.
        min_z: Number of standard errors.
    """
    gains = (other_losses - losses) * (1 if weights is None else weights)
    deviations = np.bincount(users, gains - gains.mean())[np.unique(users)]
    count = len(deviations)
    return count > 1 and bool(gains.sum() > min_z * math.sqrt(count / (count - 1) * (deviations @ deviations)))


def fit_blend(
    kind: TaskKind, network: np.ndarray, trees: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> Blend:
    """Fit the weights of network and trees on rows that trained neither of them (stacking: Wolpert, 1992).

    The blend is scale x (w x network + (1 - w) x trees) + offset, with the lowest mean loss. Normal priors keep w near
    1/2, the scale near 1, and the mean prediction near the mean predictions of network and trees, so that few labels,
    or labels of an unusual month, change the blend little.

    Args:
        kind: Kind of the task.
        network: Logits or values of the network. Shape (N,).
        trees: Logits or values of the trees. Shape (N,).
        labels: Labels. Shape (N,).
        weights: Positive weights of the rows, None for equal ones. Shape (N,).

    Returns:
        The blend. With too few labels, it is `EQUAL_BLEND`.
    """
    if kind.count_minority(labels) < MIN_LABELS["temperature"]:
        return EQUAL_BLEND
    mean, std = kind.label_mean_and_std(labels)
    left, right, y = ((torch.from_numpy(values).double() - mean) / std for values in (network, trees, labels))
    weight = torch.full_like(y, 1 / len(y)) if weights is None else torch.from_numpy(weights / weights.sum())
    levels = [weight @ kind.prediction(side) + 1e-300 for side in (left, right)]

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean loss with priors, and the gradient, for the values of scale, w and offset."""
        scale, w, offset = parameters = torch.tensor(values, requires_grad=True)
        logits = scale * (w * left + (1 - w) * right) + offset
        level, expected = weight @ kind.prediction(logits) + 1e-300, w * levels[0] + (1 - w) * levels[1]
        mean_error = level - expected if kind.is_linear else (level / expected).log()
        w_error, scale_error = (2 * w - 1) / BLEND_PRIOR_STD, (scale - 1) / SCALE_PRIOR_STD
        priors = (w_error**2 + scale_error**2 + (mean_error / MEAN_PRIOR_STD) ** 2) / 2
        loss = weight @ kind.loss(logits, y) + priors / len(y)
        (gradient,) = torch.autograd.grad(loss, parameters)
        return loss.item(), gradient.numpy()

    bounds, limits = [(MIN_SCALE, None), (0, 1), (None, None)], {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    start = [1.0, 0.5, 0.0]
    scale, w, offset = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=limits).x
    return Blend(float(scale * w), float(scale * (1 - w)), float(std * offset + mean * (1 - scale)))
