"""Grows the boosted trees that stand beside a trained network, and fits how much each of both counts."""

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
"""Standard deviation that is expected of the difference of both weights, as a fraction of their sum."""
SCALE_PRIOR_STD, MIN_SCALE = 0.5, 0.1
"""Standard deviation that is expected of the scale around 1; and the least scale, as 0 would make all rows alike."""
MEAN_PRIOR_STD = 0.03
"""Standard deviation that is expected of the mean prediction's error: of its logarithm, or in those of a regression."""
ID_TREES_MIN_Z = 3.0
"""Standard errors by which trees with ids must be better to stand alone, since an id's worth lasts less long than a
counter's. Where they help less, the mean of both sets stands."""
EQUAL_BLEND = Blend(0.5, 0.5, 0.0)
"""The blend of a task with too few labels to fit one."""
BLEND_MIN_Z = 1.0
"""Standard errors by which a blend must be better than the network alone, and trees alone better than a blend."""


def grow_trees(settings: Settings, prepared: FeatureFolder, layout: ModelLayout, model: RankingModel) -> Trees:
    """Grow trees beside a trained network, for every task, by the validation rows that select.

    Prints for each task the trees that were taken, and their weights. A task keeps the network alone if trees have
    nothing to learn from, or if a blend with them is not clearly better.
    """
    section = settings.model.trees
    assert section is not None
    weighted = settings.training.sampling_correction == "weights"
    train = EncodedDataset(prepared.split("train"), layout)
    selecting = EncodedDataset(prepared.split("validation"), layout, part=ValidationPart.SELECTION)
    train_rows = TreeInputs.read(train, layout, train.weight_columns(weighted))
    held_out = TreeInputs.read(selecting, layout, [*selecting.weight_columns(weighted), "user"])
    users = np.unique(hash_column(held_out.column("user")), return_inverse=True)[1]
    logits, *_ = predict_for_calibration(model, layout, selecting, settings.evaluation.batch_size)
    logits = logits[len(logits) - len(held_out.labels) :]
    # In a table without times there is no later, and there are no counters that say what ids do.
    min_z = ID_TREES_MIN_Z if settings.columns.has_time else 0.0
    texts: dict[str, str] = {}
    blends: dict[str, Blend] = {}
    for index, task in enumerate(layout.tasks):
        observed = ~np.isnan(held_out.labels[:, index])
        rows = train_rows.select_task(index), held_out.select_task(index)
        network = logits[observed, index].astype(np.float64)
        found, told = fit_task_trees(task, section, settings.training.seed, *rows, network, users[observed], min_z)
        if found is not None:
            texts[task.name], blends[task.name] = found
        say(f"  trees of {task.name}: {told}")
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
    """Grow the trees of one task and fit how much they and the network count.

    Args:
        task: The task, for its kind and the mean and deviation of a regression.
        section: Settings of the trees.
        seed: Seed of the columns that each tree looks at.
        train_rows: Training rows with an observed label.
        held_out: Selecting rows with an observed label, N of them.
        network: The network's logits, or values of a regression, of the N rows. Shape (N,).
        users: Number of each row's user. Shape (N,) int64.
        min_z: Standard errors by which trees with ids must be better than trees without.

    Returns:
        The trees as LightGBM's text with their blend, or None for the network alone; and a sentence about the choice.
    """
    inputs = sorted({train_rows.num_numeric, train_rows.x.shape[1]} - {0})
    if not inputs or min(len(np.unique(each.labels)) for each in (train_rows, held_out)) < 2:
        return None, "no trees: training or validation rows lack labels that differ, or there is no input"
    texts, halves = dict[str, str](), list[str]()
    for width in inputs:
        train, selecting = (
            replace(each, x=each.x[:, :width], labels=(each.labels - task.mean) / task.std)
            for each in (train_rows, held_out)
        )
        shape = section.leaves, seed, section.learning_rate, section.max_trees
        booster = train_lightgbm(task.kind, train, selecting, *shape)
        most = booster.best_iteration  # further trees lost more on the selecting rows
        texts["without ids" if width == train_rows.num_numeric else "with ids"] = booster.model_to_string(
            num_iteration=most
        )
        # Both sets together have no more trees than one may have.
        halves.append(booster.model_to_string(num_iteration=min(most, max(1, section.max_trees // 2))))
    ways = [(name, text, min_z) for name, text in texts.items()]
    if 1 < len(ways) <= section.max_trees:
        ways.append(("in all, without ids and with them", "\n".join(halves), 0.0))
    labels, weights, taken = held_out.labels, held_out.weights, None
    _, std = task.kind.label_mean_and_std(labels)
    for name, text, needed in ways:
        ensemble = read_ensemble(text)
        trees = task.mean + task.std * Forest([ensemble]).sums(held_out.x, torch.get_num_threads())[:, 0]
        blend = fit_blend(task.kind, network, trees, labels, weights)
        losses = task.kind.losses(blend.apply(network, trees), labels, std)
        if taken is not None and not is_significantly_lower(losses, taken.losses, weights, users, needed):
            continue
        taken = _Taken(text, f"{len(ensemble.trees)} trees {name}", trees, blend, losses)
        if name == "with ids":
            break
    assert taken is not None, "the first way is taken where no other one is"
    of_network, of_trees = (task.kind.losses(side, labels, std) for side in (network, taken.trees))
    blended, *alone = (np.average(each, weights=weights) for each in (taken.losses, of_network, of_trees))
    told = f"loss of selecting rows {alone[0]:.4g} by the network, {alone[1]:.4g} by the trees, {blended:.4g} by both"
    is_better = is_significantly_lower(taken.losses, of_network, weights, users, BLEND_MIN_Z)
    if taken.blend.trees == 0 or (alone[0] <= alone[1] and not is_better):
        return None, f"no trees: both together are not clearly better than the network alone; {told}"
    trees_lead = is_significantly_lower(of_trees, taken.losses, weights, users, BLEND_MIN_Z)
    blend = Blend(0.0, 1.0, 0.0) if trees_lead else taken.blend
    few = " (too few labels to fit the weights)" if blend == EQUAL_BLEND else ""
    return (taken.text, blend), f"{taken.name}; {blend.network:.3g} x network + {blend.trees:.3g} x trees{few}; {told}"


@dataclass(frozen=True)
class _Taken:
    """A set of trees, and what it gives the selecting rows."""

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
    """Whether rows lose less by more than `min_z` standard errors, over users, since rows of a user are no
    independent witnesses."""
    gains = (other_losses - losses) * (1 if weights is None else weights)
    apart = np.bincount(users, gains - gains.mean())[np.unique(users)]
    return len(apart) > 1 and bool(gains.sum() > min_z * math.sqrt(len(apart) / (len(apart) - 1) * (apart @ apart)))


def fit_blend(
    kind: TaskKind,
    network: np.ndarray,
    trees: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
) -> Blend:
    """Fit the weights of network and trees on rows that neither learnt from (stacking: Wolpert, 1992).

    The blend is scale x (w x network + (1 - w) x trees) + offset, of logits or of a regression's values, with the least
    mean loss. Either side may stand alone, with w at 1 or 0. Normal priors hold w near 1/2, the scale near 1, and the
    mean prediction near that of the sides, so that few labels, or labels of an unusual month, move none of them far.

    Args:
        kind: Kind of the task.
        network: Logits or values of the network. Shape (N,).
        trees: Logits or values of the trees. Shape (N,).
        labels: Labels. Shape (N,).
        weights: Positive weights of the rows, None for equal ones. Shape (N,).

    Returns:
        The blend, half of each without enough labels.
    """
    if kind.count_minority(labels) < MIN_LABELS["temperature"]:
        return EQUAL_BLEND
    middle, unit = kind.label_mean_and_std(labels)
    one, other, y = ((torch.from_numpy(each).double() - middle) / unit for each in (network, trees, labels))
    weight = torch.full_like(y, 1 / len(y)) if weights is None else torch.from_numpy(weights / weights.sum())
    levels = [weight @ kind.prediction(side) + 1e-300 for side in (one, other)]

    def objective(at: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean loss and the priors' part in it for a scale, w and an offset, and the slopes of both."""
        scale, w, offset = parameters = torch.tensor(at, requires_grad=True)
        logits = scale * (w * one + (1 - w) * other) + offset
        level, expected = weight @ kind.prediction(logits) + 1e-300, w * levels[0] + (1 - w) * levels[1]
        far = level - expected if kind.is_linear else (level / expected).log()
        uneven, steep = (2 * w - 1) / BLEND_PRIOR_STD, (scale - 1) / SCALE_PRIOR_STD
        priors = (uneven**2 + steep**2 + (far / MEAN_PRIOR_STD) ** 2) / 2
        loss = weight @ kind.loss(logits, y) + priors / len(y)
        (slopes,) = torch.autograd.grad(loss, parameters)
        return loss.item(), slopes.numpy()

    bounds, most = [(MIN_SCALE, None), (0, 1), (None, None)], {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    scale, w, offset = minimize(objective, [1.0, 0.5, 0.0], jac=True, method="L-BFGS-B", bounds=bounds, options=most).x
    return Blend(float(scale * w), float(scale * (1 - w)), float(unit * offset + middle * (1 - scale)))
