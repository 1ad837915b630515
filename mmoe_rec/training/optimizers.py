"""The optimizer of all parameters: row-wise Adagrad of the tables, which works within the backward pass, and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmoe_rec.settings.sections import Training
from mmoe_rec.training.losses import LOG_VARIANCES
from mmoe_rec.training.sharding import Sharded


class Optimizers:
    """Steps tables and dense parameters together. Its state goes by the names of parameters, on any number of ranks.

    dense: AdamW of all that is not a table.
    """

    def __init__(self, sharded: Sharded, settings: Training) -> None:
        self._tables = sharded.table_optimizer
        self._named = sharded.dense_parameters()
        groups: list[dict[str, Any]] = [
            {"params": [each for name, each in self._named.items() if name != LOG_VARIANCES]}
        ]
        if LOG_VARIANCES in self._named:
            # Decay would pull the weights of tasks toward 1.
            groups.append({"params": [self._named[LOG_VARIANCES]], "weight_decay": 0.0})
        self.dense = torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the tables, then of the dense part; each with the learning rate `lr` of its next step."""
        return [*self._tables.param_groups, *self.dense.param_groups]

    def zero_grad(self) -> None:
        """Before a forward pass."""
        self._tables.zero_grad()
        self.dense.zero_grad(set_to_none=True)

    def step(self) -> None:
        """After a backward pass."""
        self._tables.step()
        self.dense.step()

    def init_state(self) -> None:
        """Makes the state that AdamW would make at its first step, as only what is there can be filled.

        Weights may change: they are to be filled afterwards.
        """
        for parameter in self._named.values():
            parameter.grad = torch.zeros_like(parameter)
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """`state`: name of a parameter -> its state; the tensors are those that are stepped."""
        state = {name: dict(self.dense.state[each]) for name, each in self._named.items() if each in self.dense.state}
        return {"state": {**self._tables.state_dict()["state"], **state}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies what `state_dict` gave, after `init_state`."""
        found = state["state"]
        self._tables.load_state_dict({"state": {name: each for name, each in found.items() if name not in self._named}})
        for name, parameter in self._named.items():
            for part, tensor in self.dense.state[parameter].items():
                tensor.copy_(found[name][part])
