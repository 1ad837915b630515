"""The ranking model against the reference: one row, one expert and one task at a time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

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
from tests.model.examples import (
    LAYOUT,
    is_weight,
    random_rows,
    reference_logits,
    reference_weights,
    small_model,
    small_settings,
)


def plain_batch(rows: int, seed: int = 0, layout: ModelLayout = LAYOUT) -> tuple[Encoded, Batch]:
    encoded, labels = random_rows(rows, seed, layout)
    return encoded, make_batch(encoded, layout, labels, torchrec=False)


PLE = {"count": 2, "task_count": 1, "levels": 2, "units": (8, 6)}
GROUPED = {"compute": "grouped"}
STRUCTURES: dict[str, dict[str, Any]] = {
    "MMoE": {},
    "no hidden layer in towers": {"experts": {"units": (7,)}, "towers": {"units": ()}},
    "deep": {"experts": {"units": (8, 7, 6)}, "towers": {"units": (5, 4)}},
    "bends and crosses": {"bottom": {"piecewise": True, "cross_layers": 2, "cross_rank": 3}},
    "no hidden layer in the bottom": {"bottom": {"units": (), "piecewise": True, "cross_layers": 1, "cross_rank": 2}},
    "shared bottom": {"experts": {"count": 1}},
    "one gate": {"gates": {"per_task": False}},
    "raw inputs, normalised relu": {"experts": {"raw_inputs": True, "normalise": True, "activation": "relu"}},
    "CGC": {"experts": {"count": 2, "task_count": 2}},
    "PLE": {"experts": PLE},
    "no shared experts": {"experts": {**PLE, "count": 0, "task_count": 2}},
    "top-k": {"experts": {"count": 5}, "gates": {"routing": "top_k", "top_k": 2}},
    "top-k, grouped": {"experts": {"count": 5, **GROUPED}, "gates": {"routing": "top_k", "top_k": 3}},
    "one of them, grouped": {
        "experts": {"count": 5, "normalise": True, **GROUPED},
        "gates": {"routing": "top_k", "top_k": 1},
    },
    "PLE, top-k, grouped": {"experts": {**PLE, "count": 3, **GROUPED}, "gates": {"routing": "top_k", "top_k": 2}},
    "shared route": {"experts": {"count": 5, **GROUPED}, "gates": {"routing": "shared_route", "top_k": 2}},
    "shared route to one": {"experts": {"count": 5}, "gates": {"routing": "shared_route", "top_k": 1}},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_logits_and_gradients_are_the_references(training: bool, structure: str) -> None:
    changes = STRUCTURES[structure]
    model = small_model(plain_tables(LAYOUT), **changes).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # far from the small first weights, where every mistake shows
    encoded, batch = plain_batch(9)
    logits = model(batch).logits
    assert logits.dtype == torch.float64  # a rating is a regression
    weights = reference_weights(model)
    expected = reference_logits(weights, encoded, LAYOUT, small_settings(**changes), placement=training)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    upstream = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view(logits.shape)
    for each in (logits, expected):
        (each * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(gradient.double(), wanted, atol=5e-5 * scale, rtol=1e-4, msg=name)


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
    expected = reference_logits(reference_weights(model), encoded, layout, small_settings(), placement=False)
    torch.testing.assert_close(logits, expected.to(logits.dtype), atol=1e-5, rtol=1e-5)
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
