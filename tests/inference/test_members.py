"""A model of several members against each of them served alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmoe_rec.errors import RequestError
from mmoe_rec.inference.export import answers_of, draw_requests, encode, load_onnx, write_int8, write_onnx
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.inference.writing import seal, write_artifact
from mmoe_rec.model.utilisation import Utilisation
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel
from tests.log.small_logs import ALL_KINDS

MEMBERS, EXPERTS = 3, 2
STRUCTURE = {
    "bottom": {"units": [16], "cross_rank": 3},
    "experts": {"count": 1, "task_count": 1, "levels": 2, "units": [8]},
    "towers": {"units": [4]},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    sections = {"model": {"members": MEMBERS, **STRUCTURE}, "features": ALL_KINDS}
    return SmallModel(tmp_path_factory.mktemp("members"), **sections)


@pytest.fixture(scope="module")
def ranker(small: SmallModel) -> Ranker:
    return Ranker.load(small.folder)


@pytest.fixture(scope="module")
def alone(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> list[Ranker]:
    """Each member as a model of its own, whose weights are cut out of the whole one's."""
    weights, rankers = load_file(small.folder / "weights.safetensors"), []
    for member in range(MEMBERS):
        state = {}
        for name, weight in weights.items():
            if name.startswith("tables."):
                width = weight.shape[1] // MEMBERS
                state[name] = weight[:, member * width : (member + 1) * width].contiguous()
            elif f".members.{member}." in name:
                state[name.replace(f".members.{member}.", ".")] = weight
        folder = tmp_path_factory.mktemp("alone") / "model"
        write_artifact(folder, settings=small.settings.of_member(0), prepared=small.prepared, state_dict=state)
        rankers.append(Ranker.load(folder))
    return rankers


def rank(ranker: Ranker, **options: Any) -> Ranking:
    return ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}, **options)


def logits(ranking: Ranking) -> dict[str, np.ndarray]:
    """Task -> (N,) in the request's order; a regression's values are their own."""
    order = np.argsort(ranking.order)
    found = {name: np.array(values)[order] for name, values in ranking.predictions.items() if "_and_" not in name}
    return {name: each if name == "spent" else np.log(each / (1 - each)) for name, each in found.items()}


def assert_mean(ranking: Ranking, parts: list[Ranking]) -> None:
    for name, found in logits(ranking).items():
        each = [logits(part)[name] for part in parts]
        assert np.ptp(np.stack(each), axis=0).min() > 1e-4, "members differ"
        np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-4, atol=1e-4)


def test_the_mean_logit_of_all_members_is_served(ranker: Ranker, alone: list[Ranker]) -> None:
    assert_mean(rank(ranker), [rank(each) for each in alone])


def test_experts_are_numbered_one_member_after_the_other(ranker: Ranker, alone: list[Ranker]) -> None:
    each, own = ranker.scorer.experts // MEMBERS, 1
    assert each == len(alone[0].model.visible_experts[0])
    masked = rank(ranker, mask_experts=[each + own])
    assert_mean(masked, [rank(one, mask_experts=[own] if number == 1 else None) for number, one in enumerate(alone)])
    assert rank(ranker, gate_top_k=1).predictions != rank(ranker).predictions
    assert_mean(rank(ranker, gate_top_k=1), [rank(one, gate_top_k=1) for one in alone])
    with pytest.raises(RequestError, match=f"gate_top_k is {each + 1}, and the model has {each} experts"):
        rank(ranker, gate_top_k=each + 1)
    with pytest.raises(RequestError, match=f"the model has 0 to {MEMBERS * each - 1}"):
        rank(ranker, mask_experts=[MEMBERS * each])


def test_explanations_show_the_gates_of_all(ranker: Ranker, alone: list[Ranker]) -> None:
    def gates(one: Ranker, task: str) -> np.ndarray:
        ranking = rank(one, explain=True)
        assert ranking.explanations is not None
        return np.array([each.gates[task] for each in ranking.explanations])[np.argsort(ranking.order)]

    for task in ranker.names:
        expected = np.concatenate([gates(each, task) for each in alone], axis=1) / MEMBERS
        np.testing.assert_allclose(gates(ranker, task), expected, atol=1e-5)


def test_a_broken_expert_of_one_member_leaves_the_others_alone(
    small: SmallModel, ranker: Ranker, tmp_path: Path
) -> None:
    small.write(tmp_path / "model")
    file = tmp_path / "model" / "weights.safetensors"
    state = load_file(file)
    state["mixture.members.2.levels.1.experts.0.layers.0.weight"][0, 0, 0] = torch.nan
    save_file(state, file)
    seal(tmp_path / "model")
    broken, number = rank(Ranker.load(tmp_path / "model")), 2 * ranker.scorer.experts // MEMBERS
    assert any(f"expert {number} has weights that are not finite numbers" in each for each in broken.warnings)
    for name, found in logits(broken).items():
        np.testing.assert_allclose(found, logits(rank(ranker, mask_experts=[number]))[name], atol=1e-5)


def test_a_gate_that_settles_is_told_of_its_own_member() -> None:
    weights = torch.tensor([[0.05, 0.45, 0.25, 0.25]], dtype=torch.float64)
    found = Utilisation(weights, weights, members=2)
    assert found.polarised == [True]
    assert "settles on expert 1 with 90% of its weight" in found.findings(["bought"])[0]
    assert Utilisation(weights, weights).polarised == [False]
    assert replace(found, weights=torch.tensor([[0.5, 0.5]])).polarised == [False], "one expert each"


@pytest.mark.thorough
def test_other_forms_of_a_model_hold_all_members(small: SmallModel, ranker: Ranker, tmp_path: Path) -> None:
    for name in ("int8", "onnx"):
        (tmp_path / name).mkdir()
    write_int8(small.folder, tmp_path / "int8", "float32")
    whole = logits(rank(ranker))
    for name, found in logits(rank(Ranker.load(tmp_path / "int8"))).items():
        np.testing.assert_allclose(found, whole[name], atol=0.1 * max(1.0, np.abs(whole[name]).max()))
    write_onnx(small.folder, ranker, tmp_path / "onnx")
    answer = load_onnx(tmp_path / "onnx")
    for request in draw_requests(small.folder, ranker, 4):
        one, other = answers_of(ranker.rank(**request)), answer(encode(ranker, request))
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-5, atol=1e-5)
