"""A model as an ONNX file, run by onnxruntime, against the ranker that it was made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.features.encoder import Inputs
from mmoe_rec.inference.artifact_writer import finalize_artifact, write_with_weights
from mmoe_rec.inference.export import (
    ModelOutputs,
    _ExportModule,
    build_onnx_inputs,
    encode_request,
    load_onnx,
    outputs_in_request_order,
    write_int8,
    write_onnx,
)
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.request_reader import Request
from mmoe_rec.model.mmoe import build_model
from mmoe_rec.model.model_layout import ModelLayout
from mmoe_rec.model.score import Calibration, TaskCalibration
from mmoe_rec.model.tables import PlainTables
from mmoe_rec.settings.model import Model
from tests.inference.small_model import SmallModel, draw_requests, random_inputs
from tests.log.small_logs import ALL_KINDS

pytestmark = pytest.mark.thorough

CALIBRATION = Calibration(
    {
        "click": TaskCalibration((-0.3, 0.0, 0.02, 0.4), (-1.0, -0.5, 0.1, 0.2), 0.7),
        "liked": TaskCalibration.linear(1.3, 0.1),
    }
)
VARIANTS: dict[str, dict[str, Any]] = {
    "soft": {
        "bottom": {"units": [16, 12], "dropout": 0.1, "cross_layers": 2, "cross_rank": 3},
        "experts": {"count": 3, "units": [8]},
    },
    "one gate": {
        "bottom": {"units": [], "cross_layers": 0},
        "experts": {"count": 3, "units": [8, 6], "normalize": True, "activation": "relu"},
        "gates": {"per_task": False},
    },
    "top_k": {
        "bottom": {"units": [16], "piecewise": False, "cross_layers": 0},
        "experts": {"count": 5, "units": [8], "compute": "grouped", "raw_inputs": True},
        "gates": {"routing": "top_k", "top_k": 2, "balance": "bias"},
    },
    "shared_route": {
        "bottom": {"units": [16]},
        "experts": {"count": 6, "units": [8]},
        "gates": {"routing": "shared_route", "top_k": 1, "serving_top_k": 4},
    },
    "levels": {
        "bottom": {"units": [16]},
        "experts": {"count": 2, "task_count": 1, "levels": 2, "units": [8]},
        "gates": {"routing": "expert_choice", "top_k": 2, "serving_top_k": 2},
        "towers": {"units": []},
    },
}


def variant(small: SmallModel, section: dict[str, Any], folder: Path) -> Ranker:
    """The small model's features under other settings of the model, whose weights are drawn, calibrated."""
    settings = Model.model_validate({"towers": {"units": [4]}, **section})
    layout = ModelLayout.read(small.folder)
    model = build_model(layout, settings, PlainTables(layout))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        scale = 0.5 if name.startswith("tables") else 1.5 * parameter.shape[-1] ** -0.5
        parameter.data.normal_(0.0, scale, generator=generator)
    for level in model.mixture.expert_levels():
        level.gates.masked[1] = True
        level.gates.selection_bias.normal_(0.0, 0.3, generator=generator)
    write_with_weights(small.folder, folder, settings, model.state_dict())
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION.to_dict()), encoding="utf-8")
    finalize_artifact(folder)
    return Ranker.load(folder)


def pairs(folder: Path, ranker: Ranker, made: Path) -> list[tuple[ModelOutputs, ModelOutputs]]:
    """What the ranker and the file give for requests that the ranker knows."""
    answer = load_onnx(made)
    return [
        (outputs_in_request_order(ranker.rank(**request)), answer(encode_request(ranker, request)))
        for request in draw_requests(folder, ranker, 8)
    ]


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """Of few features, as graphs of many take long to make."""
    names = ("item", "tags", "price", "price_bucket", "clicked", "item_click")
    return SmallModel(tmp_path_factory.mktemp("means"), features={name: ALL_KINDS[name] for name in names})


def assert_computes_the_same(ranker: Ranker, made: Path) -> None:
    """For any table rows and numbers."""
    random, answer = np.random.default_rng(0), load_onnx(made)
    for rows in (1, 2, 700):
        inputs, of = random_inputs(ranker.layout, rows, random), np.arange(rows)
        scored = ranker.scorer.score(ranker.input_builder.build_matrix(Inputs(), inputs, of))
        actual = answer(build_onnx_inputs(ranker.layout, Inputs(), inputs, of))
        for place, task in enumerate(ranker.task_names):
            np.testing.assert_allclose(actual[task], scored.predictions[:, place], rtol=1e-5, atol=1e-5)


def test_attention_is_refused(small: SmallModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'clicked' is pooled by attention, .* Train with pooling: mean\."):
        write_onnx(small.folder, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_computes_what_the_ranker_does(means: SmallModel, tmp_path: Path, name: str) -> None:
    ranker = variant(means, VARIANTS[name], tmp_path / "model")
    made = tmp_path / "onnx"
    made.mkdir()
    write_onnx(tmp_path / "model", made)
    for first, second in pairs(tmp_path / "model", ranker, made):
        assert first.keys() == second.keys()
        for task, values in first.items():
            assert task == "score" or np.std(values) > 1e-4
            np.testing.assert_allclose(second[task], values, rtol=1e-5, atol=1e-5)
    assert_computes_the_same(ranker, made)


@pytest.fixture(scope="module")
def given(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranker, Path]:
    """A model in int8 with a task that is given another one, and without a regression: its folder, and ONNX of it."""
    work = tmp_path_factory.mktemp("given")
    tasks = small.settings.model_dump(mode="json", exclude_unset=True)["tasks"]
    del tasks["spent"]
    tasks["liked"] |= {"conditional_on": "click", "score_weight": 0.5}
    features = {name: item for name, item in ALL_KINDS.items() if name not in ("brand_spent", "among")}
    model = SmallModel(work, tasks=tasks, features=features)
    for name in ("int8", "onnx"):
        (work / name).mkdir()
    write_int8(model.folder, work / "int8")
    ranker = Ranker.load(work / "int8")
    write_onnx(work / "int8", work / "onnx")
    return work / "int8", ranker, work / "onnx"


def test_gives_both_of_two_tasks(given: tuple[Path, Ranker, Path]) -> None:
    folder, ranker, made = given
    for first, second in pairs(folder, ranker, made):
        assert list(second) == ["click", "liked", "click_and_liked", "score"]
        for task, values in first.items():
            np.testing.assert_allclose(second[task], values, rtol=1e-5)


def test_a_stranger_finds_the_inputs(given: tuple[Path, Ranker, Path]) -> None:
    """Inputs put together by `inputs.json` alone, from rows of ids and numbers, with lists padded to more places."""
    folder, ranker, made = given
    about = json.loads((made / "inputs.json").read_text())
    (request,) = draw_requests(folder, ranker, 1)
    shared, own = ranker.pipeline.request_inputs(ranker.reader.rows([Request.of(request)]))
    count = len(request["candidates"]["item"])
    ids, dense = {**shared.ids, **own.ids}, {**shared.dense, **own.dense}
    inputs = {"ids": np.empty((count, len(about["ids"])), np.int64)}
    inputs["numbers"] = np.array([np.broadcast_to(dense[name], count) for name in about["numbers"]]).T
    for name, table in about["tables"].items():
        assert about["rows"][table] == ranker.layout.table(table).rows
        if name in about["ids"]:
            inputs["ids"][:, about["ids"].index(name)] = ids[name]
        else:
            lists = np.split(ids[name].values, ids[name].offsets[1:-1])
            padded = np.array([[*item, *[-1] * (9 - len(item))] for item in lists])
            inputs[f"ids.{name}"] = np.broadcast_to(padded, (count, 9))
    actual, expected = load_onnx(made)(inputs), outputs_in_request_order(ranker.rank(**request))
    for task, values in expected.items():
        np.testing.assert_allclose(actual[task], values, rtol=1e-5)


def test_the_readme_runs(given: tuple[Path, Ranker, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = given[2]
    text = (made / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(made)
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})


def test_another_value_is_refused(means: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = _ExportModule._dense

    def off(self: _ExportModule, inputs: torch.Tensor, tree_logits: None) -> tuple[torch.Tensor, ...]:
        values, *scores = dense(self, inputs, tree_logits)
        return values + torch.tensor([0.0, 1e-4, 0.0]), *scores

    monkeypatch.setattr(_ExportModule, "_dense", off)
    with pytest.raises(UserError, match=r"differs from the model: .* 'liked' is off by 0\.0001"):
        write_onnx(means.folder, tmp_path)


def test_a_model_that_the_exporter_can_not_follow_is_refused(
    means: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: object, inputs: torch.Tensor, tree_logits: None) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else -inputs

    monkeypatch.setattr(_ExportModule, "_dense", forward)
    with pytest.raises(UserError, match="torch's exporter can't turn this model into ONNX"):
        write_onnx(means.folder, tmp_path)
