"""A routing rule is added by one class and one line: it then trains by the command, serves, and is in the settings."""

import json
from typing import Any

import numpy as np
import pytest

from tests.added_package import AddedPackage
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough
EXPERTS = 4
RULES = "RULES: list[RoutingRule] = [Soft(), TopK(), ExpertChoice(), SharedRoute()]"

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
    (request,) = json.load(file)["inputs"]
ranking = ranker.rank(**request)
with torch.no_grad():
    routing = mixture(inputs[-1], None).routings[0]
found = {name: getattr(routing, name).tolist() for name in ("probabilities", "selected", "weights")}
print("FOUND", json.dumps(found | {"order": [*map(int, ranking.order)]}))
"""


@pytest.fixture(scope="module")
def actual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found in a package that has a rule more."""
    folder = tmp_path_factory.mktemp("added")
    package = AddedPackage(folder)
    package.replace("model/routing.py", RULES, f"{RULE}\n\n{RULES[:-1]}, AboveAverage()]")
    model = {
        "bottom": {"units": [16], "cross_layers": 1, "cross_rank": 8},
        "experts": {"count": EXPERTS, "units": [8], "compute": "grouped"},
        "gates": {"routing": "above_average", "balance": "loss", "dropout": 0.1},
        "towers": {"units": [4]},
    }
    write_files(folder, training=settings_tree(folder)["training"] | {"epochs": 1}, model=model)
    printed = package.run(SCRIPT)
    return json.loads(printed.rpartition("FOUND ")[2])


def test_it_trains_and_serves_as_it_says(actual: dict[str, Any]) -> None:
    probabilities, selected, weights = (np.array(actual[name]) for name in ("probabilities", "selected", "weights"))
    assert len(actual["order"]) == len(weights)
    assert np.array_equal(selected, probabilities >= 1 / EXPERTS)
    assert 1 <= selected.sum(-1).min() < selected.sum(-1).max() < EXPERTS, "rows differ in how many they need"
    kept = probabilities * selected
    np.testing.assert_allclose(weights, kept / kept.sum(-1, keepdims=True), atol=1e-6)
