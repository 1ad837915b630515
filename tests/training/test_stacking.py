"""Boosted trees beside the network: what they add to logits by plain loops, offline and served, and what is refused."""

import json
import re
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from scipy.special import expit

from mmoe_rec.batches.encoded_dataset import EncodedDataset
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.calibration import predict_for_calibration
from mmoe_rec.features.encoder import Inputs as ModelInputs
from mmoe_rec.features.layout import TaskOutput
from mmoe_rec.inference.artifact import MANIFEST_FILE, write_manifest
from mmoe_rec.inference.export import (
    add_trees,
    build_onnx_inputs,
    encode_request,
    load_onnx,
    outputs_in_request_order,
    write_onnx,
)
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model.trees import Blend, Forest, Trees, read_ensemble
from mmoe_rec.settings.log_columns import NO_TIME
from mmoe_rec.settings.model import Trees as Settings
from mmoe_rec.task_kinds import KINDS
from mmoe_rec.tracking import registry
from mmoe_rec.training import stacking
from mmoe_rec.training.boosting import TreeInputs, train_lightgbm
from mmoe_rec.training.stacking import fit_blend, fit_task_trees, is_significantly_lower
from tests.inference.small_model import ITEMS, WITHOUT_COMPARISONS, SmallModel, as_request, draw_requests, random_inputs
from tests.inference.test_ranker import in_request_order, offline
from tests.log.small_logs import ALL_KINDS

MODEL: dict[str, Any] = {
    "bottom": {"units": [16]},
    "experts": {"count": 3, "units": [8]},
    "towers": {"units": [4]},
    "trees": {"max_trees": 30, "leaves": 8, "learning_rate": 0.5},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """The small log's model with trees, whose steps are large, as its labels are random."""
    # Without compared candidates, the trees of every task get a weight.
    return SmallModel(tmp_path_factory.mktemp("trees"), model=MODEL, features=WITHOUT_COMPARISONS)


def roots_of(text: str) -> list[dict[str, Any]]:
    """Trees as LightGBM describes them, of one set or several."""
    sets = re.findall(r"(?ms)^tree\nversion=.*?^end of trees.*?(?=^tree$|\Z)", text)
    trees = [item for own in sets for item in lightgbm.Booster(model_str=own).dump_model()["tree_info"]]
    return [tree["tree_structure"] | {"sets": len(sets)} for tree in trees]


def grown(node: dict[str, Any], row: np.ndarray) -> float:
    """What a tree, as LightGBM describes it, gives a row."""
    sets = node["sets"]
    while "leaf_value" not in node:
        value, threshold = float(row[node["split_feature"]]), node["threshold"]
        left = value in map(float, threshold.split("||")) if node["decision_type"] == "==" else value <= threshold
        node = node["left_child" if left else "right_child"]
    return node["leaf_value"] / sets


def test_logits_are_weighted_sums_of_the_networks_and_those_of_trees(small: SmallModel) -> None:
    """All rows, whose batches may be of any size, by a loop over trees."""
    model, trees = small.model, small.model.trees
    assert trees is not None
    assert set(trees.blends) == {task.name for task in small.model_layout.tasks}
    rows = EncodedDataset(small.prepared.split("test"), small.model_layout)
    blended, *_ = predict_for_calibration(model, small.model_layout, rows, 7)
    model.trees = None
    network, *_ = predict_for_calibration(model, small.model_layout, rows, 1000)
    model.trees = trees
    ((part, _),) = rows.stream(1000)
    own = [index for index, item in enumerate(small.model_layout.dense) if not item.placement]
    ids = [item.name for item in small.model_layout.ids if not item.is_list and not item.placement]
    numbers = np.column_stack([part.encoded.dense[:, own], *(part.encoded.ids[name] for name in ids)])
    for index, task in enumerate(small.model_layout.tasks):
        blend, roots = trees.blends[task.name], roots_of(trees.texts[task.name])
        sums = np.array([sum(grown(root, row) for root in roots) for row in numbers])
        assert sums.std() > 1e-3 or task.name == "liked", "of which too few rows are observed for a split"
        sums = task.mean + task.std * sums
        expected = blend.network * network[:, index] + blend.trees * sums + blend.offset
        np.testing.assert_allclose(blended[:, index], expected, rtol=1e-5, atol=1e-6)


def test_a_served_request_gets_what_a_batch_job_gives(small: SmallModel) -> None:
    ranker = Ranker.load(small.folder)
    table, rows = small.later_rows()
    expected, scores = offline(small, rows)
    actual, served = in_request_order(ranker.rank(**as_request(table)), ranker)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(served, np.exp(scores), rtol=1e-5)
    ranker.model.trees = Trees({}, {})
    without, _ = in_request_order(ranker.rank(**as_request(table)), ranker)
    assert (np.abs(without - actual).max(axis=0) > 1e-4).all()


def test_an_onnx_file_has_the_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights lie in a file of their own, as large ones do.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    features = {name: ALL_KINDS[name] for name in WITHOUT_COMPARISONS}  # without attention
    small = SmallModel(tmp_path / "work", model=MODEL, features=features)
    ranker = Ranker.load(small.folder)
    write_onnx(small.folder, tmp_path)
    onnx, random = load_onnx(tmp_path), np.random.default_rng(0)
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size / 10
    for request in draw_requests(small.folder, ranker, 5):
        actual = onnx(encode_request(ranker, request))
        for task, values in outputs_in_request_order(ranker.rank(**request)).items():
            np.testing.assert_allclose(actual[task], values, rtol=1e-5, atol=1e-5)
    # Then numbers at the edges of trees, where rounding would take the other branch.
    edges = re.findall(r"(?m)^threshold=(.*)$", small.model.trees.texts["click"])  # type: ignore[union-attr]
    thresholds, of = np.array(" ".join(edges).split(), float), np.arange(200)
    inputs = random_inputs(ranker.layout, len(of), random)
    for name in inputs.dense:
        inputs.dense[name] = random.choice(thresholds, len(of)).astype(np.float32)
    scored = ranker.scorer.score(ranker.input_builder.build_matrix(ModelInputs(), inputs, of))
    actual = onnx(build_onnx_inputs(ranker.layout, ModelInputs(), inputs, of))
    for place, task in enumerate(ranker.task_names):
        np.testing.assert_allclose(actual[task], scored.predictions[:, place], rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "inputs.json").read_text())["ids"] == small.model_layout.single_ids()


def test_few_ids_are_split_into_any_two_sets(tmp_path: Path) -> None:
    """By a loop over trees, as they are and as ONNX, also of ids that no training row has."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    x = np.column_stack([random.normal(size=5000), random.integers(0, 40, 5000)]).astype(np.float32)
    labels = (random.random(5000) < np.where((x[:, 1] % 7 < 3) ^ (x[:, 0] > 0), 0.8, 0.2)).astype(float)
    text = train_lightgbm(
        KINDS["binary"], TreeInputs(x, 1, labels, categories=(1,)), None, 8, 0, 0.3, 20
    ).model_to_string()
    roots = roots_of(text)
    assert {"==", "<="} == set(re.findall(r"'decision_type': '(..)'", str(roots)))
    rows = np.column_stack([random.normal(size=400), random.integers(0, 60, 400)]).astype(np.float32)
    expected = [sum(grown(root, row) for root in roots) for row in rows]
    np.testing.assert_allclose(Forest([read_ensemble(text)]).sums(rows)[:, 0], expected, rtol=1e-9)
    kinds = {"ids": TensorProto.INT64, "numbers": TensorProto.FLOAT, "tree_logits": TensorProto.FLOAT}
    given = [helper.make_tensor_value_info(name, kind, [None, 1]) for name, kind in kinds.items()]
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, [None, 1])
    graph = helper.make_graph([helper.make_node("Identity", ["tree_logits"], ["answer"])], "trees", given, [answer])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "trees.onnx")
    add_trees(tmp_path / "trees.onnx", Trees({"click": text}, {}), ["click"])
    session = onnxruntime.InferenceSession(str(tmp_path / "trees.onnx"), providers=["CPUExecutionProvider"])
    (actual,) = session.run(["answer"], {"numbers": rows[:, :1], "ids": rows[:, 1:].astype(np.int64)})
    np.testing.assert_allclose(actual[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_served_model_needs_no_lightgbm(small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = registry.build_log_model_args(small.folder, tmp_path)["pip_requirements"]
    assert not any(item.startswith("lightgbm") for item in needed)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert Ranker.load(small.folder).rank({"user": 5}, {}, {"item": ITEMS}, explain=True).explanations


def penalized_loss(kind: str, network: np.ndarray, trees: np.ndarray, labels: np.ndarray, *at: float) -> float:
    """The mean loss of a blend of rows that all count alike, with its priors, by plain formulas."""
    first, second, offset = at
    unit = 1.0 if kind == "binary" else labels.std()
    logits = first * network + second * trees + offset
    level, losses = logits.mean() / unit, ((logits - labels) / unit) ** 2
    share, levels = first / (first + second), [network.mean() / unit, trees.mean() / unit]
    expected = share * levels[0] + (1 - share) * levels[1]
    if kind == "binary":
        losses = np.log(1 + np.exp(np.where(labels == 1, -logits, logits)))
        level, *means = (np.mean(1 / (1 + np.exp(-item))) for item in (logits, network, trees))
        level, expected = np.log(level), np.log(share * means[0] + (1 - share) * means[1])
    priors = ((2 * share - 1) / 0.25) ** 2 + ((first + second - 1) / 0.5) ** 2 + ((level - expected) / 0.03) ** 2
    return float(losses.mean() + priors / 2 / len(labels))


@pytest.mark.parametrize("kind", ["binary", "regression"])
@pytest.mark.parametrize("rows", [4000, 300])
def test_a_blend_loses_least_on_the_rows(kind: str, rows: int) -> None:
    """No step away from it loses less, by formulas of our own; and trees that only add noise hardly count."""
    random = np.random.default_rng(3)
    truth = random.normal(size=(3, rows))
    labels = (random.random(rows) < 1 / (1 + np.exp(-truth[0] - truth[1]))).astype(float)
    network, trees, unit = truth[0] + 0.4, 2 * truth[1] + truth[0], 1.0
    if kind == "regression":
        labels = 500 + 40 * (truth[0] + truth[1]) + random.normal(size=rows)
        network, trees, unit = 480 + 30 * truth[0], 510 + 20 * truth[1], labels.std()
    blend = fit_blend(KINDS[kind], network, trees, labels)
    middle = 0.0 if kind == "binary" else labels.mean()
    own = [network - middle, trees - middle, labels - middle]
    actual = np.array([blend.network, blend.trees, blend.offset - middle * (1 - blend.network - blend.trees)])
    least = penalized_loss(kind, *own, *actual)
    for step in 1e-3 * random.normal(size=(100, 3)) * [1, 1, unit]:
        assert penalized_loss(kind, *own, *(actual + step)) > least
    noise = network + 3 * unit * truth[2]
    assert fit_blend(KINDS[kind], network, noise, labels).trees < (0.05 if rows == 4000 else 0.2)


def test_weights_of_rows_count_as_copies() -> None:
    random = np.random.default_rng(4)
    network, trees = random.normal(size=(2, 5000))
    labels = (random.random(5000) < 1 / (1 + np.exp(-network - trees))).astype(float)
    copies = random.integers(1, 4, 5000)
    weighted = fit_blend(KINDS["binary"], network, trees, labels, 0.1 * copies)
    copied = fit_blend(KINDS["binary"], *(np.repeat(item, copies) for item in (network, trees, labels)))
    for first, second in zip(astuple(weighted), astuple(copied), strict=True):  # the priors weigh less beside more rows
        assert first == pytest.approx(second, abs=0.02)


def test_of_few_labels_half_of_each_is_taken() -> None:
    labels = np.array([0.0] * 500 + [1.0] * 99)
    assert fit_blend(KINDS["binary"], labels - 0.5, labels, labels) == Blend(0.5, 0.5, 0.0)


@pytest.mark.parametrize(("ids", "most"), [(1, 10), (0, 20)])
def test_no_task_has_more_trees_than_the_settings_allow(ids: int, most: int) -> None:
    """Sets with and without ids are joined from halves; and beside trees that only do harm the network stands alone."""
    random = np.random.default_rng(1)
    x = np.column_stack([random.normal(size=(4000, 2)), random.integers(0, 30, (4000, ids))]).astype(np.float32)
    truth = x[:, 0] + (x[:, -1] % 3 if ids else 0)
    labels = (truth + random.normal(size=4000) > 1).astype(float)
    rows, section = TreeInputs(x, 2, labels), Settings().model_copy(update={"max_trees": most})
    task = TaskOutput("click", "binary")
    users = np.arange(4000)
    (actual, message) = fit_task_trees(task, section, 0, rows, rows, np.full(4000, labels.mean()), users, 1e9)
    assert actual is not None
    assert len(read_ensemble(actual[0]).trees) == most
    assert ("in all" in message) == bool(ids)
    opposite = replace(rows, labels=1 - labels)
    harmful = section.model_copy(update={"learning_rate": 1.0})
    assert fit_task_trees(task, harmful, 0, opposite, rows, 1.7 * (truth - 1), users)[0] is None


@pytest.mark.parametrize(("of_network", "of_trees"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_each_side_may_stand_alone(of_network: float, of_trees: float) -> None:
    """Trees that know nothing beside a network that knows all, the reverse, and two that know different things."""
    random, selecting = np.random.default_rng(7), 3000 if of_network else 150  # of which the blend would be even
    known, noise = random.normal(size=(2, 6000)), random.normal(size=(2, 6000))
    labels = (random.random(6000) < expit(of_network * known[0] + of_trees * known[1])).astype(float)
    halves = slice(0, 3000), slice(3000, 3000 + selecting)
    learnt, held_out = (TreeInputs(np.float32([known[1, half], noise[1, half]]).T, 2, labels[half]) for half in halves)
    network = (of_network * known[0] if of_network else 2 * noise[0])[halves[1]]
    actual, message = fit_task_trees(
        TaskOutput("click", "binary"), Settings(), 0, learnt, held_out, network, np.arange(selecting)
    )
    blend = Blend(1.0, 0.0, 0.0) if actual is None else actual[1]
    assert (blend.network > 0, blend.trees > 0) == (of_network > 0, of_trees > 0), message


def test_a_users_rows_are_one_witness() -> None:
    """A gain of five standard errors over independent rows, which are one of 1.6 where each user has ten equal ones."""
    random = np.random.default_rng(5)
    gains = random.normal(size=400)
    gains = np.repeat(gains - gains.mean() + 1.6 * gains.std() / 20, 10)
    zeros, each, own = np.zeros(4000), np.arange(4000), np.repeat(np.arange(400) * 3, 10)
    assert is_significantly_lower(-gains, zeros, None, each)
    assert not is_significantly_lower(-gains, zeros, None, own)
    assert is_significantly_lower(-gains, zeros, None, own, 0.0)
    assert is_significantly_lower(-2 * gains - 1, zeros, np.full(4000, 0.1), own)
    assert not is_significantly_lower(-gains - 1, zeros, None, np.zeros(4000, int)), "one user says nothing"


def test_ids_are_taken_sooner_where_no_later_rows_wait(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(stacking, "is_significantly_lower", lambda *given: asked.append(given[-1]))
    columns = small.settings.columns.model_copy(update={"time": NO_TIME})
    for settings in (small.settings, small.settings.model_copy(update={"columns": columns})):
        stacking.grow_trees(settings, small.prepared, small.model_layout, small.model)
    of_ids = [
        item for item in asked if item != stacking.BLEND_MIN_Z
    ]  # trees with ids, and the mean of both, of each task
    assert of_ids == [3.0, 0.0] * (len(of_ids) // 4) + [0.0, 0.0] * (len(of_ids) // 4) != []


def test_sets_of_trees_are_joined_to_their_mean() -> None:
    """Of a log where both numbers and ids decide."""
    random, texts, sums = np.random.default_rng(0), [], []
    x = np.column_stack([random.normal(size=(2000, 3)), random.integers(0, 40, (2000, 2))]).astype(np.float32)
    labels = x[:, 0] + x[:, 3] % 3 + random.normal(size=2000) > 1
    for width, number in ((3, 9), (5, 12)):
        own = {"objective": "binary", "num_leaves": 7, "use_missing": False, "verbosity": -1, "num_threads": 1}
        data = lightgbm.Dataset(x[:, :width], labels, categorical_feature=[4] if width > 4 else [])
        texts.append(lightgbm.train(own, data, number).model_to_string())
        sums.append(lightgbm.Booster(model_str=texts[-1]).predict(x[:, :width], raw_score=True))
    joined, mean = "\n".join(texts), np.mean(sums, axis=0)
    assert len(read_ensemble(joined).trees) == 21
    np.testing.assert_allclose(Forest([read_ensemble(joined)]).sums(x)[:, 0], mean, atol=1e-12)


def test_damage_is_reported(small: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small.write(folder)
    file = folder / "trees" / "click.txt"
    file.write_text(file.read_text().replace("leaf_value=", "leaf_value=1", 1))
    with pytest.raises(UserError, match=r"'trees/click\.txt' is missing or has changed"):
        Ranker.load(folder)
    file.write_text("no trees")
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match=r"the trees of the model in '.*' can't be read: "):
        Ranker.load(folder)
    with pytest.raises(UserError, match="expect other inputs than its layout has"):
        Trees.read(small.folder, 3, 1)
    blends = folder / "trees" / "blends.json"
    blends.write_text(json.dumps({"click": {"network": 1}}))
    with pytest.raises(UserError, match=r"can't be read: .*click\.trees"):
        Trees.read(folder, 3, 1)
