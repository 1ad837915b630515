"""A routing rule is added by one class and one line: it then trains by the command, serves, and is in the settings."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from tests.added_package import AddedPackage
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough
EXPERTS = 4
RULES = "RULES: list[RoutingRule] = [Soft()"

RULE = '''class AboveAverage(RoutingRule):
    """The experts whose probability is at least the average: as many as the row needs."""

    name = "above_average"
    summary = "those experts that are at least average"
    takes_k = False

    def select(self, gated: Gated) -> Tensor:
        """Those of each gate."""
        return gated.probabilities >= 1 / gated.allowed.sum(-1, keepdim=True)
'''

SCRIPT = """
import json
from pathlib import Path
import torch
from mmoe_rec.cli.main import main
from mmoe_rec.inference.ranker import Ranker

main(["train", "--config", "settings.yaml"])

ranker, inputs = Ranker.load(Path("work/model")), []
mixture = ranker.model.mixture
mixture.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
with open("work/model/example_request.json", encoding="utf-8") as file:
    ranking = ranker.rank(**json.load(file))
with torch.no_grad():
    hidden = mixture.bottom(inputs[-1])
level = mixture.each_level()[0]
weights = {
    name: [[each.tolist() for each in layer.parameters()] for layer in layers]
    for name, layers in (
        ("gates", [level.gates.linear]), ("experts", level.each_group()[0].layers), ("towers", mixture.towers.layers)
    )
}
served = [[*map(float, each)] for each in ranking.predictions.values()]
found = {"hidden": hidden.tolist(), "order": [*map(int, ranking.order)]}
print("FOUND", json.dumps({**found, "served": served, "weights": weights}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found in a package that has a rule more."""
    folder = tmp_path_factory.mktemp("added")
    package = AddedPackage(folder)
    package.replace("model/routing.py", RULES, f"{RULE}\n\n{RULES}, AboveAverage()")
    model = {
        "bottom": {"units": [16], "cross_layers": 1, "cross_rank": 8},
        "experts": {"count": EXPERTS, "units": [8], "compute": "grouped"},
        "gates": {"routing": "above_average", "balance": "loss", "dropout": 0.1},
        "towers": {"units": [4]},
    }
    write_files(folder, training=settings_tree(folder)["training"] | {"epochs": 1}, model=model)
    printed = package.run(SCRIPT)
    found: dict[str, Any] = json.loads(printed.rpartition("FOUND ")[2])
    return found


def test_it_trains_and_serves_as_a_loop_says(found: dict[str, Any]) -> None:
    served = np.array(found["served"]).T[np.argsort(found["order"])]  # (B, T)
    hidden = np.array(found["hidden"])
    gates, experts, towers = (
        [[np.array(each) for each in layer] for layer in found["weights"][name]]
        for name in ("gates", "experts", "towers")
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
    assert set(used) >= {1, 2}, "rows differ in how many experts they need"
    assert max(used) < EXPERTS
    assert np.ptp(served, axis=0).min() > 1e-3
    np.testing.assert_allclose(served, expected, atol=1e-6)


def network(layers: list[list[np.ndarray]], index: int, x: np.ndarray) -> np.ndarray:
    """The output of one of several stacked networks, with SiLU after each layer."""
    for weight, bias in layers:
        x = weight[index] @ x + bias[index]
        x = x / (1 + np.exp(-x))
    return x
