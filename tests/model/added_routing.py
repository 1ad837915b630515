"""A routing rule that this package does not have, registered by a line, in a process of its own: `python -m` with a
folder to work in. Trains by the command, loads what would be served, and prints what it found as JSON."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmoe_rec.model.routing import RULES, Gated, RoutingRule

EXPERTS = 4


class AboveAverage(RoutingRule):
    """The experts whose probability is at least the average: as many as the row needs."""

    name = "above_average"
    summary = "those experts that are at least average"
    takes_k = False

    def select(self, gated: Gated) -> Tensor:
        """Those of each gate."""
        return gated.probabilities >= 1 / gated.allowed.sum(-1, keepdim=True)


RULES.append(AboveAverage())


def main(folder: Path) -> None:
    """Prints what settings say of the rule, and predictions as they are served and by a plain loop."""
    from mmoe_rec.errors import UserError
    from mmoe_rec.settings import describe, load_settings
    from pipelines import train
    from tests.pipelines.learnable_log import settings_tree, write_files

    model = {
        "bottom": {"units": [16], "cross_layers": 1, "cross_rank": 8},
        "experts": {"count": EXPERTS, "units": [8], "compute": "grouped"},
        "gates": {"routing": "above_average", "balance": "loss", "dropout": 0.1},
        "towers": {"units": [4]},
    }
    training = settings_tree(folder)["training"] | {"epochs": 1}
    config = write_files(folder, training=training, model=model)
    refused = []
    for setting, value in (("routing", "above_averag"), ("random_top_k", "true"), ("balance", "bias")):
        try:
            load_settings(config, [f"--model.gates.{setting}", value])
        except UserError as error:
            refused.append(str(error))
    train.main(["--config", str(config)])
    print("found:" + json.dumps({"help": describe(), "refused": refused} | scores(folder / "work" / "model")))


@torch.no_grad()
def scores(folder: Path) -> dict[str, Any]:
    """served: (B, T) predictions of the example request; expected: the same by a plain loop; used: experts that each
    row and gate of the loop used."""
    from mmoe_rec.serving.loaded import LoadedRanker

    ranker = LoadedRanker.read(folder)
    mixture, seen = ranker.model.mixture, []
    mixture.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ranking = ranker.rank(**json.loads((folder / "example_request.json").read_text(encoding="utf-8")))
    served = np.array(list(ranking.predictions.values())).T[np.argsort(ranking.order)]
    hidden = mixture.bottom(seen[-1]).double().numpy()
    level = mixture.each_level()[0]
    gates, experts, towers = (
        [[each.double().numpy() for each in layer.parameters()] for layer in layers]
        for layers in ([level.gates.linear], level.each_group()[0].layers, mixture.towers.layers)
    )
    expected, used = np.zeros_like(served), []
    for row, task in itertools.product(range(len(served)), range(served.shape[1])):
        logits = gates[0][0][task] @ hidden[row] + gates[0][1][task]
        probabilities = np.exp(logits) / np.exp(logits).sum()
        chosen = [expert for expert in range(EXPERTS) if probabilities[expert] >= 1 / EXPERTS]
        mixed = np.zeros(8)
        for expert in chosen:
            mixed += probabilities[expert] / probabilities[chosen].sum() * network(experts, expert, hidden[row])
        logit = towers[-1][0][task] @ network(towers[:-1], task, mixed) + towers[-1][1][task]
        expected[row, task] = 1 / (1 + np.exp(-logit[0]))
        used.append(len(chosen))
    return {"served": served.tolist(), "expected": expected.tolist(), "used": used}


def network(layers: list[list[np.ndarray]], index: int, x: np.ndarray) -> np.ndarray:
    """The output of one of several stacked networks, with SiLU after each layer."""
    for weight, bias in layers:
        x = weight[index] @ x + bias[index]
        x = x / (1 + np.exp(-x))
    return x


if __name__ == "__main__":
    main(Path(sys.argv[1]))
