"""Routing rules: their names, what each must say of itself, and what none may do."""

from __future__ import annotations

import pytest
import torch

from mmoe_rec.model.routing import RULES, Gated, RoutingRule, rule_named
from mmoe_rec.settings.help import describe


def test_names_are_unique_and_in_the_help() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    text = describe()
    for rule in RULES:
        assert rule_named(rule.name) is rule
        assert f"{rule.summary} ({rule.name})" in text


PARTS = {"name": "toy", "summary": "any experts", "select": lambda self, gated: None}


@pytest.mark.parametrize("missing", PARTS)
def test_a_rule_that_leaves_out_a_part_is_refused_by_name(missing: str) -> None:
    toy = type("Toy", (RoutingRule,), {name: part for name, part in PARTS.items() if name != missing})
    with pytest.raises(TypeError, match=rf"abstract class Toy .*\b{missing}\b"):
        toy()
    assert type("Toy", (RoutingRule,), PARTS)().name == "toy"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_gives_no_weight_to_what_may_not_be_used(rule: RoutingRule) -> None:
    """Whatever rule is in the list: weights are finite, and 0 for experts that are not allowed or not selected."""
    logits = torch.randn(30, 1 if rule.one_router else 2, 5, generator=torch.Generator().manual_seed(3))
    gates = logits if not rule.one_router else torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(4))
    allowed = torch.ones(logits.shape[1], 5, dtype=torch.bool)
    allowed[:, 2] = False
    probabilities = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    gated = Gated(gates, logits, probabilities, allowed, torch.zeros(5), 2 if rule.takes_k else None)
    selected = rule.select(gated)
    weights = rule.weigh(gated, selected, renormalise=True)
    assert weights.shape == (30, 2, 5)
    assert weights.isfinite().all()
    assert not weights[:, :, 2].any()
    assert (selected is None) == rule.mixes_all
    if selected is not None:
        assert not weights[~selected.expand_as(weights)].any()
        torch.testing.assert_close(weights.sum(-1), selected.any(-1).float().expand(-1, 2))
