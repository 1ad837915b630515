"""The ranking model against a naive reference in NumPy: one row, one expert and one task at a time."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.features.encoded import Encoded
from mmoe_rec.model.layout import ModelLayout
from mmoe_rec.model.mmoe import RankingModel, build_model
from mmoe_rec.model.tables import plain_tables, torchrec_tables
from mmoe_rec.point_in_time.lists import Ragged
from mmoe_rec.settings.model import Model
from tests.model.examples import LAYOUT, is_weight, random_rows, small_model

Weights = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def reference_inputs(weights: Weights, encoded: Encoded, layout: ModelLayout, row: int, placement: bool) -> np.ndarray:
    parts = []
    for each in layout.ids:
        if each.placement == placement:
            table = weights[f"tables.embedding_bags.{each.table}.weight"]
            ids = encoded.ids[each.name]
            found = ids.take(np.array([row])).values if isinstance(ids, Ragged) else ids[[row]]
            parts.append(sum((table[index] for index in found), np.zeros(table.shape[1])) / max(len(found), 1))
    parts += [encoded.dense[row, [index]] for index, each in enumerate(layout.dense) if each.placement == placement]
    return np.concatenate(parts)


def reference_layers(weights: Weights, prefix: str, x: np.ndarray, group: int) -> np.ndarray:
    """Stacked layers of one group, each followed by SiLU."""
    layer = 0
    while f"{prefix}.{layer}.weight" in weights:
        x = weights[f"{prefix}.{layer}.weight"][group] @ x + weights[f"{prefix}.{layer}.bias"][group]
        last_of_tower = prefix.endswith("towers.layers") and f"{prefix}.{layer + 1}.weight" not in weights
        x = x if last_of_tower else silu(x)
        layer += 1
    return x


def reference_bottom(weights: Weights, x: np.ndarray, layout: ModelLayout, piecewise: bool) -> np.ndarray:
    """Crosses, then each number's reach into the intervals between its edges, then one hidden layer."""
    crossed, layer = x, 0
    while f"mixture.bottom.crosses.up.{layer}.weight" in weights:
        up, down = (weights[f"mixture.bottom.crosses.{each}.{layer}.weight"] for each in ("up", "down"))
        crossed = x * (up @ down @ crossed + weights[f"mixture.bottom.crosses.up.{layer}.bias"]) + crossed
        layer += 1
    dense = [each for each in layout.dense if not each.placement]
    parts = [
        np.clip((value - low) / (high - low), 0, 1)
        for value, each in zip(x[len(x) - len(dense) :], dense, strict=True)
        for low, high in pairwise(each.edges if piecewise else ())
    ]
    hidden = np.concatenate([crossed, parts])
    return silu(weights["mixture.bottom.layers.0.weight"] @ hidden + weights["mixture.bottom.layers.0.bias"])


def reference_logits(
    model: RankingModel, encoded: Encoded, layout: ModelLayout, placement: bool, piecewise: bool = False
) -> np.ndarray:
    """Logits, and a regression's prediction in its own unit."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    logits = np.zeros((len(encoded), len(layout.tasks)))
    for row in range(len(encoded)):
        hidden = reference_inputs(weights, encoded, layout, row, placement=False)
        hidden = reference_bottom(weights, hidden, layout, piecewise)
        count = len(weights["mixture.levels.0.experts.0.layers.0.weight"])
        experts = [
            reference_layers(weights, "mixture.levels.0.experts.0.layers", hidden, expert) for expert in range(count)
        ]
        all_gates = (
            weights["mixture.levels.0.gates.linear.weight"] @ hidden + weights["mixture.levels.0.gates.linear.bias"]
        )
        for task in range(len(layout.tasks)):
            gate = np.exp(all_gates[task])
            gate /= gate.sum()
            mixed = sum(gate[expert] * experts[expert] for expert in range(count))
            logits[row, task] = reference_layers(weights, "mixture.towers.layers", mixed, task)[0]
        if placement:
            x = reference_inputs(weights, encoded, layout, row, placement=True)
            x = silu(weights["mixture.placement.layers.0.weight"] @ x + weights["mixture.placement.layers.0.bias"])
            logits[row] += weights["mixture.placement.logits.weight"] @ x + weights["mixture.placement.logits.bias"]
    return logits * [task.deviation for task in layout.tasks] + [task.mean for task in layout.tasks]


def plain_batch(rows: int, seed: int = 0, layout: ModelLayout = LAYOUT) -> tuple[Encoded, Batch]:
    encoded, labels = random_rows(rows, seed, layout)
    return encoded, make_batch(encoded, layout, labels, torchrec=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": {"units": (7,)}, "towers": {"units": ()}},
        {"experts": {"units": (8, 7, 6)}, "towers": {"units": (5, 4)}},
        {"bottom": {"piecewise": True, "cross_layers": 2, "cross_rank": 3}},
    ],
)
def test_equals_the_naive_reference(training: bool, changes: dict[str, Any]) -> None:
    model = small_model(plain_tables(LAYOUT), **changes).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from the small first weights, where every mistake shows
    encoded, batch = plain_batch(9)
    logits = model(batch).logits
    assert logits.dtype == torch.float64  # a rating is a regression
    piecewise = changes.get("bottom", {}).get("piecewise", False)
    expected = reference_logits(model, encoded, LAYOUT, placement=training, piecewise=piecewise)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=2e-5, rtol=2e-5)


def test_placement_counts_in_training_alone_unless_asked_for() -> None:
    model = small_model(plain_tables(LAYOUT))
    encoded, batch = plain_batch(8)
    changed_dense = encoded.dense.copy()
    changed_dense[:, 1] += 1.0
    slot = encoded.ids["slot"]
    assert not isinstance(slot, Ragged)
    changed = Encoded({**encoded.ids, "slot": (slot + 1) % 30}, changed_dense)
    other = make_batch(changed, LAYOUT, torchrec=False)
    assert not torch.equal(model(batch).logits, model(other).logits)
    assert torch.equal(model(batch, use_placement=False).logits, model(other, use_placement=False).logits)
    trained = model(batch).logits
    model.eval()
    assert torch.equal(model(batch).logits, model(other).logits)
    torch.testing.assert_close(model(batch, use_placement=True).logits, trained)


@pytest.mark.parametrize(
    "layout",
    [
        ModelLayout((), (), LAYOUT.dense, LAYOUT.tasks),
        ModelLayout(LAYOUT.tables, LAYOUT.ids, (), LAYOUT.tasks),
        ModelLayout(LAYOUT.tables, LAYOUT.ids[:-1], LAYOUT.dense[:1], LAYOUT.tasks[:1]),
    ],
    ids=["no ids", "no dense", "no placement, one task"],
)
def test_parts_may_be_missing(layout: ModelLayout) -> None:
    model = small_model(plain_tables(layout), layout)
    assert (model.mixture.placement is None) == (layout.width(placement=True) == 0)
    encoded, batch = plain_batch(6, 1, layout)
    logits = model.eval()(batch).logits
    np.testing.assert_allclose(
        logits.detach().numpy(), reference_logits(model, encoded, layout, placement=False), atol=1e-5
    )
    torchrec = small_model(torchrec_tables(layout, "cpu"), layout).eval()
    torchrec.load_state_dict(model.state_dict())
    torch.testing.assert_close(torchrec(make_batch(encoded, layout, torchrec=True)).logits, logits, atol=1e-6, rtol=0)


def test_placement_alone_is_refused() -> None:
    with pytest.raises(UserError, match="no feature describes user, candidate or context"):
        small_model(plain_tables(LAYOUT), ModelLayout((), (), LAYOUT.dense[1:2], LAYOUT.tasks))


def test_bf16_autocast_stays_near_fp32() -> None:
    model = small_model(plain_tables(LAYOUT))
    _, batch = plain_batch(64)
    exact = model(batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch).logits
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)
    rounded.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)


def test_build_model_follows_settings_and_seed() -> None:
    settings = Model.model_validate({"bottom": {"units": [10]}, "experts": {"count": 5, "units": [6, 4]}})
    torch.manual_seed(1)
    first = build_model(LAYOUT, settings, plain_tables(LAYOUT, 3), seed=3)
    torch.manual_seed(2)
    untouched = torch.rand(1)
    torch.manual_seed(2)
    again = build_model(LAYOUT, settings, plain_tables(LAYOUT, 3), seed=3)
    assert torch.equal(torch.rand(1), untouched)
    other = build_model(LAYOUT, settings, plain_tables(LAYOUT, 4), seed=4)
    assert first.state_dict()["mixture.levels.0.experts.0.layers.1.weight"].shape == (5, 4, 6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) != is_weight(name)


def test_weights_have_the_names_of_saved_models() -> None:
    """Checkpoints and served models of earlier releases are read by these names."""
    section = {
        "bottom": {"units": [4], "cross_layers": 1},
        "experts": {"count": 1, "task_count": 1, "levels": 2, "units": [3]},
        "towers": {"units": []},
    }
    model = build_model(LAYOUT, Model.model_validate(section), plain_tables(LAYOUT))
    tables = {f"tables.embedding_bags.t{index}.weight" for index in range(5)}
    layers = ["bottom.layers.0", "bottom.crosses.up.0", "towers.layers.0", "placement.layers.0", "placement.logits"]
    layers += [f"levels.{level}.gates.linear" for level in range(2)]
    layers += ["levels.0.experts.0.layers.0", *(f"levels.1.experts.{group}.layers.0" for group in range(4))]
    dense = {f"mixture.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    dense.add("mixture.bottom.crosses.down.0.weight")
    kept = {f"mixture.levels.{i}.gates.{name}" for i in range(2) for name in ("masked", "ramp", "selection_bias")}
    assert set(model.state_dict()) == tables | dense | kept
    route = build_model(LAYOUT, Model.model_validate({"gates": {"routing": "shared_route"}}), plain_tables(LAYOUT))
    assert {"mixture.levels.0.gates.route.weight", "mixture.levels.0.gates.route.bias"} <= set(route.state_dict())


def test_the_forward_pass_down_to_its_parts_can_be_traced() -> None:
    """As torchrec's CUDA pipeline does to find the tables' input, which must come straight from the batch."""

    class PartsTracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, module_qualified_name: str) -> bool:
            return not isinstance(module, RankingModel)

    graph = PartsTracer().trace(small_model(plain_tables(LAYOUT)))
    (tables,) = (node for node in graph.nodes if node.target == "tables")
    assert tables.args[0].target is getattr
    assert tables.args[0].args[1] == "ids"


def test_model_is_importable_without_the_training_stack() -> None:
    code = (
        "import sys, mmoe_rec.batches.batch, mmoe_rec.model.mmoe, mmoe_rec.model.score, mmoe_rec.model.tables;"
        "print(sorted({'torchrec', 'fbgemm_gpu', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
