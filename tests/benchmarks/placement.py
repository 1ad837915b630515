"""python -m tests.benchmarks.placement

Does the placement tower find true relevance under position bias? `simulated_clicks.py` simulates clicks and
tells what its worlds are and why. A model is trained on the log in each of five ways, and then sorts the candidates of
fresh requests:

none    the model is not told positions;
input   position is an input like any other; all candidates are scored as if at the top;
tower   position goes through the placement tower, in training only, and is hidden in some rows (--hidden);
shown   the same, and hidden in no row;
oracle  the model is not told positions, and is trained on clicks without bias, of the same rows and random numbers.

NDCG@10 has sigmoid(relevance) as its gain. `closed` is the share of the gap between none and oracle that a way closes:
the ratio of mean gaps over seeds, with Fieller's 95% interval for pairs, or null where the gap itself may be 0. A seed
draws world, log, initial weights and order of rows, and all ways share them. Where several worlds are put together,
their gaps are added up, seed by seed.

Why hidden rows matter (`explained`, `kept` of a cell): let bias(position) have variance 1, of which a share e follows
from what the model is told of user and item, and let a share h of the rows be hidden. For squared errors, Gaussian
inputs and endless data, the tower then learns 1 - a of the bias, and the main model keeps h + (1 - h) a of what can be
expected of it, with a = h e / (h e + 1 - e). Hidden rows pull all of that into the main model, and in shown rows the
tower can give way at little cost, since only 1 - e of the variance tells them apart. At e = 1 all of it is kept if any
row is hidden, and if none is, nothing in the log decides.

Model and training are the default ones made small, and the same for all ways: bottom 32 with one cross layer, 4 experts
[32, 16], tower [16], AdamW on all weights, one pass, warm-up and cosine. The learning rate is ten times the default,
as a log is 390 batches long. The placement tower is as wide, and hidden in as many rows, as by default.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.special import expit

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.evaluation.metrics.ranking import RankedLists, ndcg
from mmoe_rec.features.layout import DenseInput, Encoded, IdInput
from mmoe_rec.model.layout import EmbeddingTable, ModelLayout, ModelTask
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.tables import plain_tables
from mmoe_rec.settings.model import Model
from mmoe_rec.training.losses import masked_loss
from mmoe_rec.training.steps import learning_rate_share
from tests.benchmarks.paired_ratio import ratio_of_means
from tests.benchmarks.simulated_clicks import ITEMS, LIST, NUMBERS, Requests, World, simulate

WAYS = ("none", "input", "tower", "shown", "oracle")
TREATMENTS = ("input", "tower", "shown")
WORLDS = (
    World(strength=0.3, swaps=0.0),
    World(strength=0.3, swaps=0.1),
    World(strength=0.8, swaps=0.0),
    World(strength=0.8, swaps=0.1),
    World(shelves=True, swaps=0.0),
    World(shelves=True, swaps=0.1),
    World(shelves=True, swaps=0.3),
    # More relevant than elsewhere: few rows are examined, and the form is the more wrong the less rare clicks are.
    World("multiplicative", swaps=0.1, base=0.5),
)
TEST_REQUESTS = 2000


@dataclass(frozen=True)
class Options:
    """What may be asked for on the command line, see there."""

    requests: int = 20_000
    epochs: int = 1
    batch: int = 1024
    learning_rate: float = 0.01
    hidden: float = 0.1
    placement_units: tuple[int, ...] = (16,)


def layout_of(way: str) -> ModelLayout:
    """The inputs of a way: numbers of user and item and the item's id in all, position in three."""
    tables = (EmbeddingTable("item", ITEMS, 8), EmbeddingTable("position", LIST, 4))
    ids = (IdInput("item", "item"), IdInput("position", "position", placement=way != "input"))
    inputs = 1 if way in ("none", "oracle") else 2
    dense = tuple(DenseInput(f"number_{index}") for index in range(2 * NUMBERS))
    return ModelLayout(tables[:inputs], ids[:inputs], dense, (ModelTask("click", "binary", "engagement"),))


def encoded_rows(requests: Requests, layout: ModelLayout, position: np.ndarray) -> Encoded:
    """The inputs of all rows, with the given positions (R, LIST) where the layout has them."""
    ids = {"item": requests.item.ravel(), "position": position.ravel()}
    return Encoded({each.name: ids[each.name] for each in layout.ids}, requests.numbers.reshape(-1, 2 * NUMBERS))


def logits_of(model: RankingModel, batch: Batch) -> torch.Tensor:
    """(B, T) logits, with placement if the model is in training."""
    return model(batch).logits


def train(way: str, log: Requests, seed: int, options: Options) -> RankingModel:
    """A model trained on a log in one of the ways."""
    layout = layout_of(way)
    settings = Model.model_validate(
        {
            "bottom": {"units": [32], "cross_layers": 1, "cross_rank": 8},
            "experts": {"count": 4, "units": [32, 16]},
            "towers": {"units": [16]},
            "placement": {"units": options.placement_units, "dropout": 0.0 if way == "shown" else options.hidden},
        }
    )
    model = build_model(layout, settings, plain_tables(layout, seed), seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    encoded = encoded_rows(log, layout, log.position)
    labels = (log.fair_clicks if way == "oracle" else log.clicks).reshape(-1, 1).astype(np.float32)
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    batches = [
        rows
        for _ in range(options.epochs)
        for rows in np.array_split(random.permutation(len(labels)), len(labels) // options.batch)
    ]
    for step, rows in enumerate(batches):
        share = learning_rate_share(step, len(batches), 0.05)
        optimizer.param_groups[0]["lr"] = options.learning_rate * share
        batch = make_batch(encoded.take(rows), layout, labels[rows], torchrec=False)
        logits, counts = logits_of(model, batch), batch.observed.sum(0)
        loss, _ = masked_loss(logits, batch.labels, batch.observed, tasks=layout.tasks, global_counts=counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def true_ndcg(model: RankingModel, way: str, test: Requests) -> float:
    """Mean NDCG@10 against true relevance of requests sorted by the model."""
    layout = layout_of(way)
    encoded = encoded_rows(test, layout, np.zeros_like(test.position))
    logits = logits_of(model, make_batch(encoded, layout, torchrec=False))
    request, requests = np.repeat(np.arange(len(test.item)), LIST), len(test.item)
    lists = RankedLists.of(request, logits[:, 0].double().numpy(), expit(test.relevance).ravel(), requests)
    return float(ndcg(lists, 10).mean())


@dataclass(frozen=True, eq=False)
class Cell:
    """What a world gave. ndcg: (seeds, ways) NDCG@10; explained: (seeds,)."""

    world: World
    ndcg: np.ndarray
    explained: np.ndarray


def measure(world: World, seeds: int, options: Options) -> Cell:
    """Trains in all ways, once a seed."""
    result, share = np.empty((seeds, len(WAYS))), np.empty(seeds)
    for seed in range(seeds):
        log, test = simulate(world, options.requests, seed), simulate(world, TEST_REQUESTS, seed, draw=1)
        for index, way in enumerate(WAYS):
            result[seed, index] = true_ndcg(train(way, log, seed, options), way, test)
        share[seed] = explained(world, log)
    return Cell(world, result, share)


def explained(world: World, log: Requests) -> float:
    """Share of the variance of log(rank) that follows from what the policy sorted by.

    Log(rank) is averaged over rows of an item on a shelf, or of almost the same score of the policy.
    """
    rank = np.log1p(log.position).ravel()
    order = np.argsort(log.policy, axis=None).argsort()
    group = log.item.ravel() if world.shelves else order * (len(rank) // 200) // len(rank)
    rows = np.bincount(group)
    mean = np.bincount(group, rank) / np.maximum(rows, 1)
    return float(mean[group].var() / rank.var())


def kept(share: float, hidden: float) -> float:
    """Share of the expected bias that the main model keeps, given the explained (below 1) and the hidden share."""
    given_way = hidden * share / (hidden * share + 1 - share)
    return hidden + (1 - hidden) * given_way


def closed(cells: Sequence[Cell], way: str) -> dict[str, float | None]:
    """The share of the gap that a way closes in some worlds together."""
    total = np.sum([cell.ndcg for cell in cells], axis=0)
    gaps = total - total[:, [WAYS.index("none")]]
    found = ratio_of_means(gaps[:, WAYS.index(way)], gaps[:, WAYS.index("oracle")])
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def summary(cells: Sequence[Cell], hidden: float) -> dict[str, object]:
    """What each world gave, and worlds of a kind together."""
    told = [
        asdict(cell.world)
        | {"ndcg": dict(zip(WAYS, cell.ndcg.mean(0).round(4).tolist(), strict=True))}
        | {"closed": {way: closed([cell], way) for way in TREATMENTS}}
        | {"explained": round(share := cell.explained.mean(), 3)}
        | {"kept": round(kept(share, hidden), 3) if share < 1 - 1e-9 else None}
        for cell in cells
    ]
    kinds = {
        "with_swaps": [cell for cell in cells if cell.world.form == "additive" and cell.world.swaps > 0],
        "without_swaps": [cell for cell in cells if cell.world.form == "additive" and cell.world.swaps == 0],
        "multiplicative": [cell for cell in cells if cell.world.form == "multiplicative"],
    }
    result: dict[str, object] = {"cells": told}
    for kind, some in kinds.items():
        if some:
            together = {way: closed(some, way) for way in TREATMENTS}
            result |= {f"gap_closed_{kind}": together["tower"]["value"], f"closed_{kind}": together}
    return result


def main() -> None:
    """Run the command."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: %(default)s)")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=range(len(WORLDS)), help="numbers, from 0; all if left out"
    )
    parser.add_argument("--requests", type=int, default=default.requests, help="in a log (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes over a log (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="rows a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    parser.add_argument(
        "--hidden", type=float, default=default.hidden, help="share of rows of `tower` without placement (%(default)s)"
    )
    parser.add_argument("--placement-units", type=int, nargs="*", default=default.placement_units)
    options = vars(parser.parse_args())
    seeds, numbers = options.pop("seeds"), options.pop("worlds")
    torch.set_num_threads(1)
    cells = []
    for world in (WORLDS[number] for number in numbers):
        started = time.perf_counter()
        cells.append(measure(world, seeds, Options(**options)))
        shares = {way: closed(cells[-1:], way)["value"] for way in TREATMENTS}
        print(f"{world} {shares} {time.perf_counter() - started:.0f} s", flush=True)
    print(json.dumps(summary(cells, options["hidden"])))


if __name__ == "__main__":
    main()
