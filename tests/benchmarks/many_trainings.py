"""Trainings of one model from many seeds at once: every weight is stacked over the seeds, every product batched.

That is as much arithmetic as one training after the other, but for thirty seeds a thirtieth of the operations to start,
which is what takes the time of small models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class ManyTrainings:
    """S models of one structure, each trained with Adam on the mean squared error of rows of its own.

    build: gives a model (N, D) -> (N, T), of operations that `torch.func.vmap` knows, with weights from torch's global
    generator. Adam works element by element, so on stacked weights it takes the very steps that S optimizers would.
    """

    def __init__(self, build: Callable[[], nn.Module], seeds: Sequence[int], learning_rate: float) -> None:
        models = [_seeded(build, seed) for seed in seeds]
        self.parameters, self.buffers = stack_module_state(models)
        self.structure = copy.deepcopy(models[0]).to("meta")
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=learning_rate, fused=True)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """A step for each batch of inputs (S, N, D) and labels (S, N, T)."""
        for inputs, labels in batches:
            self.optimizer.zero_grad()
            # No model's loss depends on another's weights, so the sum's gradient is each one's own.
            self._losses(inputs, labels).sum().backward()
            self.optimizer.step()

    @torch.no_grad()
    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Each model's mean squared error over rows and tasks: inputs (S, N, D) and labels (S, N, T) -> (S,)."""
        return self._losses(inputs, labels)

    def _losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return vmap(self._loss)(self.parameters, self.buffers, inputs, labels)

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, labels: Tensor
    ) -> Tensor:
        outputs: Tensor = functional_call(self.structure, (parameters, buffers), (inputs,))
        return (outputs - labels).square().mean()


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
