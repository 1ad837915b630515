"""Levels of experts and gates.

One level is MMoE, or CGC if tasks have experts of their own. Stacked levels are PLE (Tang et al., RecSys 2020).

Experts shared by all tasks come first, then the experts of the first task, and so on. A task's gate sees the shared
experts and the task's own experts. All levels except the last have one more gate, the shared gate, which sees all
experts. A gate's mix is the weighted sum of its experts' outputs. In the next level, the mix of the shared gate is the
input of the shared experts and the shared gate. The mix of a task's gate is the input of the task's own experts and
gate.

Shapes: B rows, T tasks, G gates (T, and the shared gate), E experts, R routers (G or one), H width of an input, U width
of an expert's output.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmoe_rec.batches.batch import draw_integer, draw_uniform
from mmoe_rec.devices import fp32_matmul_precision
from mmoe_rec.model.matmul import GROUPED_MM_ALIGNMENT, Dispatch, StackedLinear, cast_for_matmul, supports_grouped_mm
from mmoe_rec.model.routing import GateOutput, Routing, get_rule, masked_softmax, select_top_k
from mmoe_rec.settings import model as section

# On a CPU, each expert runs only on its own rows (`grouped`) if rows use at most this fraction of the experts, or if an
# expert has at least this many weights. This is then faster than to run all experts on all rows (measured, see
# tests/benchmarks/LOG.md).
GROUPED_MAX_FRACTION = 0.75
GROUPED_MIN_WEIGHTS = 100_000
# On a GPU, each expert runs only on its own rows if a row uses at most this fraction of the experts. The value follows
# from the number of operations and isn't measured, see tests/benchmarks/gpu.py.
GROUPED_MAX_FRACTION_GPU = 0.5
# Routers lower the logits of an added expert by this number times `Gates.ramp`, which falls to 0 in training.
RAMP_LOGIT_OFFSET = 10.0

ComputeMode = Literal["auto", "dense", "grouped"]


class Level(nn.Module):
    """Level of experts and gates."""

    def __init__(self, inputs: int, expert_inputs: int, tasks: int, index: int, model: section.Model) -> None:
        """Create the experts and gates.

        Args:
            inputs: Width of the gates' inputs.
            expert_inputs: Width of the experts' inputs.
            tasks: Number of tasks.
            index: Index of the level. In level 0, all gates and experts read the same input.
            model: Section `model` of the settings.
        """
        super().__init__()
        self.tasks, self.first, self.per_task = tasks, index == 0, model.gates.per_task
        shared, own, last = model.experts.count, model.experts.task_count, index == model.experts.levels - 1
        # Compute the experts that read the same input together. A group is (index of the input, number of experts).
        groups = [(tasks, shared), *((task, own) for task in range(tasks))]
        if self.first:
            groups = [(0, shared + tasks * own)]
        self.sources = [source for source, size in groups if size]
        self.experts = nn.ModuleList(Experts(size, expert_inputs, model.experts) for _, size in groups if size)
        if self.per_task:
            visible = _visible_experts(tasks, shared, own, shared_gate=not last)
        else:
            visible = torch.ones(1, shared, dtype=torch.bool)
        self.gates = Gates(inputs, visible, model.gates)
        # Number of routers that see a group of experts. A task's gate and the shared gate see the task's own experts.
        routers = len(visible) if self.gates.route is None else 1
        self.readers = [routers if self.first or task == tasks else 2 - last for task, size in groups if size]

    def forward(
        self,
        gate_inputs: list[Tensor],
        expert_inputs: list[Tensor],
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Mix the experts for each gate.

        Args:
            gate_inputs: One tensor (B, H) for all gates, or one for each task and then one for the shared gate.
            expert_inputs: As `gate_inputs`, for the experts.
            top_k: As in `Gates.forward`.
            usable: As in `Gates.forward`.

        Returns:
            Mixes (B, G, U) and their routing. One gate for all tasks gives the same mix to each task, (B, T, U).
        """
        # The last level has no shared gate, so the shared input is unused.
        inputs = gate_inputs[0] if self.first else gate_inputs[: len(self.gates.visible)]
        routing: Routing = self.gates(inputs, top_k, usable)  # Weights are (B, G, E).
        # Excluded experts must not run at all, because they may be broken. Run each expert only on its own rows.
        force_grouped = usable is not None
        used = (routing.weights > 0).any(1) if force_grouped else routing.used()  # (B, E), None for all experts.
        mixed: list[Tensor] = []
        start = 0
        for source, experts, readers in zip(self.sources, self.expert_groups(), self.readers, strict=True):
            part = slice(start, start + experts.count)
            part_used = None if used is None else used[:, part]
            max_per_row = None if routing.max_selected is None else routing.max_selected * readers
            weights = routing.weights[:, :, part]
            mixed.append(experts.mix(expert_inputs[source], weights, part_used, force_grouped, max_per_row))
            start = part.stop
        total = sum(mixed[1:], start=mixed[0])  # (B, G, U)
        if not self.per_task:
            total = total.expand(-1, self.tasks, -1)
            routing = routing._replace(weights=routing.weights.expand(-1, self.tasks, -1))
        return total, routing

    def expert_groups(self) -> "list[Experts]":
        """Return the groups of experts that read the same input, in the order of the experts."""
        return [module for module in self.experts if isinstance(module, Experts)]


def _visible_experts(tasks: int, shared: int, own: int, shared_gate: bool) -> Tensor:
    """Return whether each gate sees each expert, (G, E) bool, with `shared` experts and `own` experts per task."""
    visible = torch.zeros(tasks + shared_gate, shared + tasks * own, dtype=torch.bool)
    visible[:, :shared] = True
    for task in range(tasks):
        visible[task, shared + task * own : shared + (task + 1) * own] = True
    if shared_gate:
        visible[-1] = True
    return visible


class Gates(nn.Module):
    """G gates over E experts, computed in one matrix product. `settings.routing` names the rule that chooses experts.

    Logits are always computed in fp32 without TF32, even if experts use bf16 (Fedus et al., section 2.4). Serving uses
    fp32 too. With bf16 logits in training, one row in a hundred would train other experts than serving chooses.

    Attributes:
        linear: Layer from inputs to the logits of all gates, with weights (G, E, H).
        route: Layer from inputs to the logits of the one router, with weights (1, E, H). None if each gate is a router.
        visible: (G, E) bool, the experts that a gate may ever use.
        masked: (E,) bool, the experts that `mmoe_rec.model.warm_start.mask_expert` took out of use.
        ramp: (E,) float32, from 1 for an added expert that isn't used yet to 0 for full use.
        selection_bias: (E,) float32. It changes which experts are chosen, but not their weights (loss-free balancing,
            Wang et al., 2024).
    """

    def __init__(self, inputs: int, visible: Tensor, settings: section.Gates) -> None:
        """Create the gates.

        Args:
            inputs: Width H of the inputs.
            visible: (G, E) bool.
            settings: Section `model.gates`.
        """
        super().__init__()
        gates, experts = visible.shape
        self.settings, self.rule = settings, get_rule(settings.routing)
        self.linear = StackedLinear(gates, inputs, experts)
        self.route = StackedLinear(1, inputs, experts) if self.rule.shared_router else None
        self.visible = nn.Buffer(visible.clone(), persistent=False)
        self._sees_all = not visible.is_meta and bool(visible.all())
        self.masked = nn.Buffer(torch.zeros(experts, dtype=torch.bool))
        self.ramp = nn.Buffer(torch.zeros(experts))
        self.selection_bias = nn.Buffer(torch.zeros(experts))

    def forward(self, inputs: Tensor | list[Tensor], top_k: int | None = None, usable: Tensor | None = None) -> Routing:
        """Route rows to experts.

        Args:
            inputs: One input (B, H) for all gates, or one for each gate.
            top_k: Experts per row and router outside training, None for the number in the settings.
            usable: (E,) bool, the experts that may be used, None for all.

        Raises:
            ValueError: Outside training, a rule that depends on the batch gets no k from `top_k` or the settings.
        """
        allowed = self.visible & self.in_use if usable is None else self.visible & self.in_use & usable  # (G, E)
        device = self.visible.device
        with torch.autocast(device.type, enabled=False), fp32_matmul_precision("ieee", device):
            gates = logits = self._logits(inputs)  # (B, G, E)
            offset = RAMP_LOGIT_OFFSET * self.ramp
            if self.route is None:
                routers = logits - offset
            else:
                assert isinstance(inputs, Tensor), "one router has one input"
                allowed = allowed[:1]
                routers = logits = self.route.shared(inputs.float()).unsqueeze(1) - offset  # (B, 1, E)
            probabilities = self._probabilities(routers, allowed)  # (B, R, E)
            k = self._experts_per_row(top_k)
            gated = GateOutput(gates, routers, probabilities, allowed, self.selection_bias, k)
            fewer = not self.training and k is not None
            selected = select_top_k(gated) if fewer else self.rule.select(gated)  # (B, R, E), None for all experts.
            weights = self.rule.weigh(gated, selected, self._renormalizes(k))  # (B, G, E)
            max_selected = k if fewer or self.rule.selects_at_most_k else None
            return Routing(weights, probabilities, selected, logits, max_selected)

    def _logits(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """Return logits (B, G, E) float32, minus infinity for experts that a gate doesn't see."""
        if isinstance(inputs, Tensor):
            logits = self.linear.shared(inputs.to(self.linear.weight.dtype)).unflatten(1, self.visible.shape)
        else:
            logits = self.linear(torch.stack([gate_input.float() for gate_input in inputs], dim=1))
        return logits if self._sees_all else logits.masked_fill(~self.visible, float("-inf"))

    @property
    def in_use(self) -> Tensor:
        """Whether each expert is neither masked nor an added expert that isn't used yet (`ramp` is 1), (E,) bool."""
        return ~(self.masked | (self.ramp >= 1))

    def _probabilities(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Return the softmax (B, R, E) over allowed experts. Training adds noise and hides random experts (dropout)."""
        if self.training and self.settings.noise > 0:
            uniform = draw_uniform(logits.shape, logits.device)
            normal = torch.erfinv(2 * uniform - 1) * math.sqrt(2)
            logits = logits + self.settings.noise * normal
        if self.training and self.settings.dropout > 0:
            allowed = restrict_unless_empty(draw_uniform(logits.shape, logits.device) >= self.settings.dropout, allowed)
        return masked_softmax(logits, allowed)

    def _experts_per_row(self, requested: int | None) -> int | None:
        """Return the number of experts per row and router, or None if nothing sets a number."""
        if not self.training:
            k = self.settings.serving_top_k if requested is None else requested
            if k is not None:
                return k
            if self.rule.depends_on_batch:
                raise ValueError(f"{self.rule.name} depends on the other rows of a batch, so scoring needs a k")
        if not self.rule.takes_k:
            return None
        if self.training and self.settings.random_top_k:
            return draw_integer(1, self.settings.top_k)
        return self.settings.top_k

    def _renormalizes(self, k: int | None) -> bool:
        """Return whether the weights of k chosen experts are divided by their sum, see `mmoe_rec.model.routing`."""
        return not self.rule.takes_k or (self.settings.top_k > 1 and (k != 1 or not self.settings.random_top_k))

    @torch.no_grad()
    def update_selection_bias(self, loads: Tensor, rate: float) -> None:
        """Raise the selection bias of experts with a low load, and lower the bias of experts with a high load.

        Masked and ramping experts keep their bias, because their load is low on purpose.

        Args:
            loads: (E,) result of `expert_loads` for a step, over all ranks.
            rate: Amount by which a bias changes.
        """
        settled = ~self.masked & (self.ramp <= 0)
        mean = torch.where(settled, loads, 0).sum() / settled.sum()
        moved = self.selection_bias + rate * (mean - loads).sign()
        self.selection_bias.copy_(torch.where(settled, moved, self.selection_bias))

    @torch.no_grad()
    def advance_ramp(self, steps: int) -> None:
        """Advance the ramp of added experts, which are in full use after `steps` calls."""
        self.ramp.sub_(1 / steps).clamp_(min=0)


def restrict_unless_empty(keep: Tensor, allowed: Tensor) -> Tensor:
    """Return `keep & allowed`, or `allowed` where no expert of the last dimension would remain.

    Args:
        keep: (..., E) bool.
        allowed: (..., E) bool.
    """
    kept = keep & allowed
    return torch.where(kept.any(-1, keepdim=True), kept, allowed)


class Experts(nn.Module):
    """E small networks of equal shape that read the same input (Ma et al., KDD 2018).

    Each linear layer is followed by the activation.

    Attributes:
        count: Number of experts E.
        activate: Activation.
        normalize: Whether an expert's output for a row is scaled to mean 0 and variance 1, so that all experts have
            outputs of equal scale (HoME, Kuaishou, 2024).
        compute: `dense` runs all experts on all rows, in few large products. `grouped` runs each expert only on the
            rows that use it. `auto` takes the faster mode for the fraction of experts that a row uses.
        weights_per_expert: Number of weights of an expert, without biases.
    """

    def __init__(self, count: int, inputs: int, settings: section.Experts) -> None:
        """Create the experts.

        Args:
            count: Number of experts E.
            inputs: Width H of the input.
            settings: Section `model.experts`.
        """
        super().__init__()
        self.count = count
        # Settings use torch's names of activations.
        self.activate: Callable[[Tensor], Tensor] = getattr(functional, settings.activation)
        self.normalize, self.compute = settings.normalize, settings.compute
        widths = [inputs, *settings.units]
        self.weights_per_expert = sum(width * below for below, width in pairwise(widths))
        self.layers = nn.ModuleList(StackedLinear(count, width, below) for width, below in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        """Run every expert on every row, (B, H) -> (B, E, U)."""
        first, *rest = self.layers
        assert isinstance(first, StackedLinear)
        outputs = self.activate(first.shared(hidden)).unflatten(1, (self.count, -1))
        for layer in rest:
            outputs = self.activate(layer(outputs))
        return self._normalized(outputs)

    def run(self, hidden: Tensor, dispatch: Dispatch) -> Tensor:
        """Run experts on the rows that `dispatch` assigns to them, and return the outputs (S, U) of the slots.

        Args:
            hidden: (B, H).
            dispatch: Rows of each expert, in S slots.
        """
        x = functional.embedding(dispatch.rows, hidden)
        for layer in self.layers:
            assert isinstance(layer, StackedLinear)
            x = self.activate(dispatch.multiply(x, layer.weight, layer.bias))
        return self._normalized(x)

    def mix(
        self,
        hidden: Tensor,
        weights: Tensor,
        used: Tensor | None,
        force_grouped: bool = False,
        max_per_row: int | None = None,
    ) -> Tensor:
        """Return the weighted sum of the experts for each gate, (B, G, U).

        Args:
            hidden: (B, H).
            weights: (B, G, E) float32.
            used: (B, E) bool, the experts that some gate uses for a row, None for all experts.
            force_grouped: Whether to run an expert only on its own rows, regardless of `compute`.
            max_per_row: Maximum number of experts per row, None if the routing rule sets no maximum.
        """
        if used is None or not (force_grouped or self.uses_grouped(cast_for_matmul(hidden), used, max_per_row)):
            experts = self(hidden)
            return torch.bmm(weights.to(experts.dtype), experts)
        hidden = cast_for_matmul(hidden)
        # In half precision, oneDNN prepares a product for each new number of rows, which takes as long as a product
        # of several hundred rows. Rounding numbers of rows up to whole blocks makes new numbers rare.
        block = GROUPED_MM_ALIGNMENT if used.is_cuda else 2 * GROUPED_MM_ALIGNMENT if hidden.dtype.itemsize == 2 else 1
        # With `max_per_row`, every expert runs on at least one row. An excluded expert must run on none.
        dispatch = Dispatch.of(used, block, max_per_row if used.is_cuda and not force_grouped else None)
        return dispatch.combine(self.run(hidden, dispatch), weights)

    def uses_grouped(self, hidden: Tensor, used: Tensor, max_per_row: int | None) -> bool:
        """Return whether `mix` runs experts only on their own rows.

        Args:
            hidden: (B, H).
            used: As in `mix`, but not None.
            max_per_row: As in `mix`.
        """
        if self.compute == "dense" or (used.is_cuda and not (max_per_row is not None and supports_grouped_mm(hidden))):
            return False
        if self.compute == "grouped":
            return True
        if used.is_cuda:  # Counting used experts would make the host wait.
            return max_per_row is not None and max_per_row <= GROUPED_MAX_FRACTION_GPU * self.count
        return self.weights_per_expert >= GROUPED_MIN_WEIGHTS or int(used.sum()) <= GROUPED_MAX_FRACTION * used.numel()

    def _normalized(self, outputs: Tensor) -> Tensor:
        return functional.layer_norm(outputs, outputs.shape[-1:]) if self.normalize else outputs


def set_compute(model: nn.Module, compute: ComputeMode) -> None:
    """Set the compute mode of all experts in a model.

    Args:
        model: Model to change.
        compute: Mode as in `Experts`.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = compute
