"""What is told of gates, by hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmoe_rec.model.mmoe import Outputs
from mmoe_rec.model.routing import Routing, rule_named
from mmoe_rec.model.utilisation import Utilisation, UtilisationSums


def outputs(weights: Tensor, selected: Tensor | None = None) -> Outputs:
    return Outputs(torch.zeros(weights.shape[:2]), (Routing(weights, weights, selected, torch.zeros(())),))


def used(*weights: list[float]) -> Utilisation:
    return Utilisation(torch.tensor(weights, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def test_means_are_over_the_counted_rows_of_all_batches() -> None:
    torch.manual_seed(0)
    weights = torch.rand(10, 2, 3).softmax(-1)
    sums = UtilisationSums(torch.ones(2, 3, dtype=torch.bool))
    counted = torch.arange(10) % 3 > 0
    sums.add(outputs(weights[:4]), counted[:4])
    sums.add(outputs(weights[4:]), counted[4:])
    found = sums.result()
    torch.testing.assert_close(found.weights, weights[counted].double().mean(0))
    torch.testing.assert_close(found.loads, found.weights)
    assert Utilisation.from_dict(found.to_dict()).weights.tolist() == found.weights.tolist()


def test_loads_of_chosen_experts_are_shares_of_choices() -> None:
    """Two of three experts a row, one router for both tasks, of which the first row has only one."""
    selected = torch.tensor([[[True, False, False]], [[True, True, False]]])
    sums = UtilisationSums(torch.ones(2, 3, dtype=torch.bool))
    sums.add(outputs(torch.full((2, 2, 3), 1 / 3), selected))
    assert sums.result().loads.tolist() == [[0.75, 0.25, 0.0]] * 2


def test_experts_that_a_task_does_not_see_are_left_out() -> None:
    visible = torch.tensor([[True, True, False], [True, False, True]])
    sums = UtilisationSums(visible)
    sums.add(outputs(torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]])))
    found = sums.result()
    assert torch.equal(found.weights.isnan(), ~visible)
    assert found.task_entropies == pytest.approx([1.0, 1.0])
    assert found.total_loads.tolist() == [0.5, 0.25, 0.25]
    assert found.max_over_mean == pytest.approx(1.5)
    assert found.entropy == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert "gates/b/expert_1.weight" not in found.flat(["a", "b"])


def test_what_gates_do_is_told_in_words() -> None:
    found = used([0.9, 0.1, 0.0, 0.0], [0.3, 0.3, 0.4, 0.0])
    assert found.polarised == [True, False]
    assert found.hardly_used == [3]
    dead, settled = found.findings(["bought", "liked"])
    assert dead.startswith("expert 3 is hardly used: it gets 0.00% of the load, where an even share is 25.0%")
    assert settled.startswith("the gate of 'bought' settles on expert 0 with 90% of its weight")
    assert found.flat(["bought", "liked"])["gates/polarised_share"] == 0.5


def test_only_gates_that_choose_are_noted_and_in_one_line() -> None:
    found = used([0.9, 0.1, 0.0, 0.0], [0.3, 0.7, 0.0, 0.0])
    assert found.note(rule_named("soft")) is None
    for routing in ("top_k", "shared_route", "expert_choice"):
        note = found.note(rule_named(routing))
        assert note is not None
        assert note.startswith("gates choose 2 of 4 experts, and hardly ever 2, 3:")
    assert used([0.9, 0.1], [0.3, 0.7]).note(rule_named("top_k")) is None


def test_nothing_is_said_of_experts_that_are_out_of_use() -> None:
    sums = UtilisationSums(torch.tensor([[True, False], [True, False]]))
    sums.add(outputs(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])))
    found = sums.result()
    assert found.findings(["a", "b"]) == []
    assert (found.max_over_mean, found.entropy) == (1.0, 1.0)
    nothing = UtilisationSums(torch.zeros(2, 2, dtype=torch.bool))
    nothing.add(outputs(torch.zeros(1, 2, 2)))
    assert nothing.result().max_over_mean == 1.0
    assert nothing.result().findings(["a", "b"]) == []


def test_an_even_or_single_expert_is_fine() -> None:
    assert used([0.25] * 4, [0.25] * 4).findings(["a", "b"]) == []
    assert used([1.0], [1.0]).findings(["a", "b"]) == []
    assert used([1.0], [1.0]).entropy == 1.0
