"""The ranking model against the reference, one row, expert and task at a time; its tables and batches."""

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from mmoe_rec.batches.batch import Batch, make_batch
from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import AttentionHistory, EncodedInputs
from mmoe_rec.model import tables as tables_module
from mmoe_rec.model.fused import build_fused_forward
from mmoe_rec.model.matmul import has_onednn
from mmoe_rec.model.mmoe import Outputs, RankingModel, build_model
from mmoe_rec.model.model_layout import EmbeddingTable, ModelLayout
from mmoe_rec.model.tables import INITIAL_STD, PlainTables, initial_rows, torchrec_tables
from mmoe_rec.point_in_time.arrays import Ragged
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


def plain_batch(rows: int, seed: int = 0, layout: ModelLayout = LAYOUT) -> tuple[EncodedInputs, Batch]:
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
    "raw inputs, normalised relu": {"experts": {"raw_inputs": True, "normalize": True, "activation": "relu"}},
    "CGC": {"experts": {"count": 2, "task_count": 2}},
    "PLE": {"experts": PLE},
    "no shared experts": {"experts": {**PLE, "count": 0, "task_count": 2}},
    "top-k": {"experts": {"count": 5}, "gates": {"routing": "top_k", "top_k": 2}},
    "top-k, grouped": {"experts": {"count": 5, **GROUPED}, "gates": {"routing": "top_k", "top_k": 3}},
    "one of them, grouped": {
        "experts": {"count": 5, "normalize": True, **GROUPED},
        "gates": {"routing": "top_k", "top_k": 1},
    },
    "PLE, top-k, grouped": {"experts": {**PLE, "count": 3, **GROUPED}, "gates": {"routing": "top_k", "top_k": 2}},
    "shared route": {"experts": {"count": 5, **GROUPED}, "gates": {"routing": "shared_route", "top_k": 2}},
    "shared route to one": {"experts": {"count": 5}, "gates": {"routing": "shared_route", "top_k": 1}},
}
BY_MODULES = {
    name for name in STRUCTURES if any(word in name for word in ("PLE", "top-k", "route", "one of", "raw", "no shared"))
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_logits_and_gradients_are_the_references(training: bool, structure: str) -> None:
    changes = STRUCTURES[structure]
    model = small_model(PlainTables(LAYOUT), LAYOUT, **changes).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # far from the small first weights, where every mistake shows
    encoded, batch = plain_batch(9, layout=LAYOUT)
    logits = model(batch).logits
    assert logits.dtype == torch.float64  # a rating is a regression
    weights = reference_weights(model)
    expected = reference_logits(weights, encoded, LAYOUT, small_settings(**changes), placement=training)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert (build_fused_forward(model.mixture, "blas") is None) == (structure in BY_MODULES)
    if structure not in BY_MODULES and not training:
        with torch.inference_mode():
            inputs, _ = model.concat_inputs(batch)
            for matmul_backend in ("blas", *["onednn"] * has_onednn()):
                fused = build_fused_forward(model.mixture, matmul_backend)
                assert fused is not None
                actual = model.postprocess(inputs, Outputs(fused(inputs), ())).logits
                torch.testing.assert_close(actual, logits, atol=2e-6, rtol=2e-6)
    upstream = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view(logits.shape)
    for item in (logits, expected):
        (item * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(gradient.double(), wanted, atol=5e-5 * scale, rtol=1e-4, msg=name)


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
    model = small_model(PlainTables(layout), layout)
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
        small_model(PlainTables(LAYOUT), ModelLayout((), (), LAYOUT.dense[1:2], LAYOUT.tasks))


def test_bf16_autocast_stays_near_fp32() -> None:
    model = small_model(PlainTables(LAYOUT))
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
    first = build_model(LAYOUT, settings, PlainTables(LAYOUT, 3), seed=3)
    torch.manual_seed(2)
    untouched = torch.rand(1)
    torch.manual_seed(2)
    again = build_model(LAYOUT, settings, PlainTables(LAYOUT, 3), seed=3)
    assert torch.equal(torch.rand(1), untouched)
    second = build_model(LAYOUT, settings, PlainTables(LAYOUT, 4), seed=4)
    assert first.state_dict()["mixture.levels.0.experts.0.layers.1.weight"].shape == (5, 4, 6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        at_zero = name.endswith((".later", ".output.weight"))  # attention adds nothing at first
        assert torch.equal(tensor, second.state_dict()[name]) != (is_weight(name) and not at_zero), name


def test_weights_have_the_names_of_saved_models() -> None:
    """Checkpoints and served models of earlier releases are read by these names."""
    section = {
        "bottom": {"units": [4], "cross_layers": 1},
        "experts": {"count": 1, "task_count": 1, "levels": 2, "units": [3]},
        "towers": {"units": []},
    }
    model = build_model(LAYOUT, Model.model_validate(section), PlainTables(LAYOUT))
    tables = {f"tables.embedding_bags.{table.name}.weight" for table in LAYOUT.tables}
    layers = ["bottom.layers.0", "bottom.crosses.up.0", "towers.layers.0", "placement.layers.0", "placement.logits"]
    layers += [f"levels.{level}.gates.linear" for level in range(2)]
    layers += ["levels.0.experts.0.layers.0", *(f"levels.1.experts.{group}.layers.0" for group in range(4))]
    dense = {f"mixture.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    dense.add("mixture.bottom.crosses.down.0.weight")
    attention = [
        *(f"{item}.weight" for item in ("event", "candidate", "product", "same", "output")),
        "event.bias",
        "later",
    ]
    dense |= {f"mixture.histories.history.{item}" for item in attention}
    kept = {f"mixture.levels.{i}.gates.{name}" for i in range(2) for name in ("masked", "ramp", "selection_bias")}
    assert set(model.state_dict()) == tables | dense | kept
    route = build_model(LAYOUT, Model.model_validate({"gates": {"routing": "shared_route"}}), PlainTables(LAYOUT))
    assert {"mixture.levels.0.gates.route.weight", "mixture.levels.0.gates.route.bias"} <= set(route.state_dict())


def test_the_forward_pass_down_to_its_parts_can_be_traced() -> None:
    """As torchrec's CUDA pipeline does to find the tables' input, which must come straight from the batch."""

    class PartsTracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, module_qualified_name: str) -> bool:
            return not isinstance(module, RankingModel)

    graph = PartsTracer().trace(small_model(PlainTables(LAYOUT)))
    (tables,) = (node for node in graph.nodes if node.target == "tables")
    assert tables.args[0].target is getattr
    assert tables.args[0].args[1] == "ids"


def test_first_weights_do_not_depend_on_how_rows_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "BLOCK_ROWS", 7)
    table = EmbeddingTable("t", 40, 3)
    whole = initial_rows(table, 1, 0, 40)
    for bounds in ([0, 20, 40], [0, 7, 14, 40], [0, 5, 6, 33, 40]):
        parts = [initial_rows(table, 1, a, b) for a, b in pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)


def test_first_weights_differ_by_seed_table_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "BLOCK_ROWS", 500)
    table = EmbeddingTable("t", 1000, 8)
    weights = initial_rows(table, 1, 0, 1000)
    assert weights.std().item() == pytest.approx(INITIAL_STD, rel=0.05)
    others = [
        initial_rows(table, 2, 0, 1000),
        initial_rows(EmbeddingTable("u", 1000, 8), 1, 0, 1000),
        weights.roll(500, 0),
    ]
    for second in others:
        assert abs(np.corrcoef(weights.flatten(), second.flatten())[0, 1]) < 0.1


def rows_of(values: torch.Tensor, offsets: torch.Tensor) -> list[list[int]]:
    bounds = offsets.tolist()
    return [values[a:b].tolist() for a, b in pairwise(bounds)]


def expected_rows(column: np.ndarray | Ragged) -> list[list[int]]:
    if not isinstance(column, Ragged):
        return [[int(value)] for value in column]
    values = iter(column.values.tolist())
    return [[next(values) for _ in range(length)] for length in column.lengths]


@pytest.mark.parametrize("seed", range(5))
def test_ids_are_those_of_the_rows_and_of_torchrec(seed: int) -> None:
    encoded, labels = random_rows(17, seed)
    separate = make_batch(encoded, LAYOUT, labels, torchrec=True).ids
    layout = replace(LAYOUT, attention=())
    ids = make_batch(encoded, layout, labels, torchrec=False).ids
    keyed = make_batch(encoded, layout, labels, torchrec=True).ids
    assert list(ids.keys) == keyed.keys()
    assert torch.equal(ids.values, keyed.values())
    assert torch.equal(ids.lengths, keyed.lengths())
    for name in ids.keys:
        rows = rows_of(*ids.column(name))
        assert rows == expected_rows(encoded.ids[name])
        assert rows == [row.tolist() for row in keyed[name].to_dense()]
        if name.startswith("history"):  # attention looks at each: the first ids of all lists, then the second ones
            for place in range(4):
                assert [row.tolist() for row in separate[f"{name}@{place}"].to_dense()] == [
                    row[place : place + 1] for row in rows
                ]
    assert separate.keys() == [
        lookup_input.name
        for lookup_input in sorted(
            LAYOUT.lookup_inputs(), key=lambda lookup_input: LAYOUT.tables.index(LAYOUT.table(lookup_input.table))
        )
    ]


def test_a_list_longer_than_attention_looks_at_is_refused() -> None:
    layout = replace(LAYOUT, attention=(AttentionHistory("history", 3),))
    with pytest.raises(ValueError, match="'history' has a list of 4 ids, and at most 3 are read"):
        make_batch(random_rows(40)[0], layout, torchrec=True)


def test_labels_are_zero_where_unobserved() -> None:
    encoded, labels = random_rows(11)
    batch = make_batch(encoded, LAYOUT, labels, position=40, torchrec=False)
    assert np.array_equal(batch.observed.numpy(), ~np.isnan(labels))
    assert np.array_equal(batch.labels.numpy(), np.nan_to_num(labels))
    assert batch.labels.dtype == batch.dense.dtype == torch.float32
    assert batch.position == 40
    assert len(batch) == 11


def test_what_does_not_fit_the_layout_is_named() -> None:
    encoded, labels = random_rows(5)
    with pytest.raises(ValueError, match=r"labels: expected shape \(5, 3\).*found \(5, 2\)"):
        make_batch(encoded, LAYOUT, labels[:, :2], torchrec=False)
    without = EncodedInputs({name: ids for name, ids in encoded.ids.items() if name != "city"}, encoded.dense)
    with pytest.raises(KeyError, match="city"):
        make_batch(without, LAYOUT, labels, torchrec=False)


def test_weights_of_rows() -> None:
    encoded, labels = random_rows(5)
    plain = make_batch(encoded, LAYOUT, labels, torchrec=False)
    assert plain.weights is None
    assert plain.to("cpu").weights is None
    assert plain.observed_weights.tolist() == (~np.isnan(labels)).sum(0).tolist()
    weights = np.array([1.0, 2.5, 1.0, 8.0, 4.0], np.float32)
    batch = make_batch(encoded, LAYOUT, labels, None, weights, torchrec=False)
    assert torch.equal(batch.to("cpu").weights, torch.from_numpy(weights))
    assert batch.observed_weights.tolist() == (~np.isnan(labels) * weights[:, None]).sum(0).tolist()
    with pytest.raises(ValueError, match=r"weights: expected shape \(5,\)"):
        make_batch(encoded, LAYOUT, labels, None, weights[:4], torchrec=False)


@pytest.mark.parametrize("optional", [True, False])
def test_every_tensor_goes_the_whole_way_to_a_gpu(optional: bool) -> None:
    """One that is forgotten in `record_stream` has its memory reused while a GPU still reads it."""
    encoded, labels = random_rows(5)
    more = (np.ones(5, np.float32), np.arange(5)) if optional else (None, None)
    batch = make_batch(encoded, LAYOUT, labels, None, *more, torchrec=True)
    held = [field.name for field in fields(Batch) if hasattr(getattr(batch, field.name), "to")]
    assert {"ids", "dense", "labels", "observed"} <= set(held)
    assert {"weights", "row_numbers"} <= set(held) or not optional
    for method, *arguments, named in (
        ("pin_memory", {}),
        ("to", torch.device("cpu"), {"non_blocking": True}),
        ("record_stream", "stream", {}),
    ):
        spies = {name: MagicMock() for name in held}
        getattr(replace(batch, **spies), method)(*arguments, **named)
        for spy in spies.values():
            getattr(spy, method).assert_called_once_with(*arguments, **named)


def test_plain_ids_go_the_whole_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = make_batch(random_rows(5)[0], LAYOUT, torchrec=False).ids
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: seen.append(tensor))
    ids.record_stream("stream")
    held = [var for var in vars(ids).values() if isinstance(var, torch.Tensor)]
    assert {item.data_ptr() for item in seen} == {item.data_ptr() for item in held}
    moved = ids.to("cpu", non_blocking=True)
    assert moved.starts == ids.starts
    for name in ids.keys:
        assert all(torch.equal(*pair) for pair in zip(ids.column(name), moved.column(name), strict=True))
