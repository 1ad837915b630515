"""Levels of experts and gates: one is MMoE or CGC, several on top of each other are PLE (Tang et al., RecSys 2020).

Experts come in this order: those that all tasks share, then those of the first task alone, and so on. The gate of a
task sees the shared ones and its own. In all levels but the last there is one more gate, the shared one, which sees all
experts; its mix is the input of the next level's shared experts, and the mix of a task's gate that of the task's own
experts and gate.

Shapes: B rows, T tasks, G gates (T, and the shared one), E experts, R routers (G, or one), H width of an input, U width
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

# Grouped products are worth it while rows are sent to at most this share of the experts, and always if an expert has
# this many weights (measured, see tests/benchmarks/LOG.md).
GROUPED_MAX_FRACTION = 0.75
GROUPED_MIN_WEIGHTS = 100_000
# On a GPU, one product for the rows of all experts is taken where a row uses at most this share of them. A guess from
# the numbers of operations, not measured: see tests/benchmarks/gpu.py.
GROUPED_MAX_FRACTION_GPU = 0.5
# An added expert's logits begin this far below their own value, then rise to it.
RAMP_LOGIT_OFFSET = 10.0


ComputeMode = Literal["auto", "dense", "grouped"]


class Level(nn.Module):
    """Experts and gates. inputs, expert_inputs: widths of what gates and experts read; index: of the level: in the
    first one, 0, all read the same; the last one has no shared gate.
    """

    def __init__(self, inputs: int, expert_inputs: int, tasks: int, index: int, model: section.Model) -> None:
        super().__init__()
        self.tasks, self.first, self.per_task = tasks, index == 0, model.gates.per_task
        shared, own, last = model.experts.count, model.experts.task_count, index == model.experts.levels - 1
        # Experts that read the same input are computed together: number of the input, and how many read it.
        groups = [(tasks, shared), *((task, own) for task in range(tasks))]
        if self.first:
            groups = [(0, shared + tasks * own)]
        self.sources = [source for source, size in groups if size]
        self.experts = nn.ModuleList(Experts(size, expert_inputs, model.experts) for _, size in groups if size)
        if self.per_task:
            visible = visible_experts(tasks, shared, own, shared_gate=not last)
        else:
            visible = torch.ones(1, shared, dtype=torch.bool)
        self.gates = Gates(inputs, visible, model.gates)
        # How many routers may choose experts of each group: those of one task are seen by its gate and the shared one.
        routers = len(visible) if self.gates.route is None else 1
        self.readers = [routers if self.first or task == tasks else 2 - last for task, size in groups if size]

    def forward(
        self,
        gate_inputs: list[Tensor],
        expert_inputs: list[Tensor],
        top_k: int | None = None,
        usable: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Mixes (B, G, U), and how they were mixed; one gate for all tasks gives each task the same mix.

        gate_inputs, expert_inputs: one (B, H) that all read, or one for each task and then the shared one; top_k,
        usable: as in `Gates`.
        """
        # The last level has no shared gate, so nobody reads the shared input.
        inputs = gate_inputs[0] if self.first else gate_inputs[: len(self.gates.visible)]
        routing: Routing = self.gates(inputs, top_k, usable)  # weights (B, G, E)
        # Where some experts may not be run at all, none is run on rows that do not use it.
        force_grouped = usable is not None
        used = (routing.weights > 0).any(1) if force_grouped else routing.used()  # (B, E), or None: all of them
        mixed: list[Tensor] = []
        start = 0
        for source, experts, readers in zip(self.sources, self.expert_groups(), self.readers, strict=True):
            part = slice(start, start + experts.count)
            of_part = None if used is None else used[:, part]
            max_per_row = None if routing.max_selected is None else routing.max_selected * readers
            mixed.append(
                experts.mix(expert_inputs[source], routing.weights[:, :, part], of_part, force_grouped, max_per_row)
            )
            start = part.stop
        total = sum(mixed[1:], start=mixed[0])  # (B, G, U)
        if not self.per_task:
            total = total.expand(-1, self.tasks, -1)
            routing = routing._replace(weights=routing.weights.expand(-1, self.tasks, -1))
        return total, routing

    def expert_groups(self) -> "list[Experts]":
        """The experts that read the same input, group by group."""
        return [module for module in self.experts if isinstance(module, Experts)]


def visible_experts(tasks: int, shared: int, own: int, shared_gate: bool) -> Tensor:
    """(gates, E) bool: which experts each task's gate sees, and then the shared gate."""
    visible = torch.zeros(tasks + shared_gate, shared + tasks * own, dtype=torch.bool)
    visible[:, :shared] = True
    for task in range(tasks):
        visible[task, shared + task * own : shared + (task + 1) * own] = True
    if shared_gate:
        visible[-1] = True
    return visible


class Gates(nn.Module):
    """G gates over E experts, all computed by one product; `settings.routing` names the rule by which they choose.

    Logits are computed in fp32 whatever the precision of experts (Fedus et al., section 2.4), on a GPU without TF32, as
    in serving: in bf16 one row in a hundred would train other experts than those that serve it.

    State: linear (G, E, H); route (1, E, H) of a rule with one router; masked (E,) bool, experts that are out of use;
    ramp (E,) float32, 1 for an added expert that is not used yet and 0 for one that is used in full; selection_bias
    (E,) float32, added to the logits that experts are chosen by but not to those of their weights (loss-free balancing,
    Wang et al., 2024). visible: (G, E) bool, the experts that a gate may use at all.
    """

    def __init__(self, inputs: int, visible: Tensor, settings: section.Gates) -> None:
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
        """One input (B, H) for all gates, or one for each -> where the rows go.

        top_k: experts per row and router, outside training instead of the settings' number; usable: (E,) bool, the only
        experts that may be used. Raises ValueError outside training where rows compete for experts and there is no k.
        """
        allowed = self.visible & self.in_use if usable is None else self.visible & self.in_use & usable  # (G, E)
        device = self.visible.device
        with torch.autocast(device.type, enabled=False), fp32_matmul_precision("ieee", device):
            gates = logits = self._logits(inputs)  # (B, G, E)
            if self.route is None:
                routers = logits - RAMP_LOGIT_OFFSET * self.ramp
            else:
                assert isinstance(inputs, Tensor), "one router has one input"
                allowed = allowed[:1]
                routers = logits = (
                    self.route.shared(inputs.float()).unsqueeze(1) - RAMP_LOGIT_OFFSET * self.ramp
                )  # (B, 1, E)
            probabilities = self._probabilities(routers, allowed)  # (B, R, E)
            k = self.experts_per_row(top_k)
            gated = GateOutput(gates, routers, probabilities, allowed, self.selection_bias, k)
            fewer = not self.training and k is not None
            selected = select_top_k(gated) if fewer else self.rule.select(gated)  # (B, R, E), or None: all of them
            weights = self.rule.weigh(gated, selected, self._renormalises(k))  # (B, G, E)
            return Routing(
                weights, probabilities, selected, logits, k if fewer or self.rule.selects_at_most_k else None
            )

    def _logits(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """(B, G, E) float32, minus infinity for what a gate does not see."""
        if isinstance(inputs, Tensor):
            logits = self.linear.shared(inputs.to(self.linear.weight.dtype)).unflatten(1, self.visible.shape)
        else:
            logits = self.linear(torch.stack([each.float() for each in inputs], dim=1))
        return logits if self._sees_all else logits.masked_fill(~self.visible, float("-inf"))

    @property
    def in_use(self) -> Tensor:
        """(E,) bool: experts that are neither masked nor still waiting to be let in."""
        return ~(self.masked | (self.ramp >= 1))

    def _probabilities(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Softmax (B, R, E) over what may be used; gate dropout leaves experts out of a gate in training (Zhao et al.,
        RecSys 2019).
        """
        if self.training and self.settings.noise > 0:
            noise = torch.erfinv(2 * draw_uniform(logits.shape, logits.device) - 1) * math.sqrt(2)  # normal
            logits = logits + self.settings.noise * noise
        if self.training and self.settings.dropout > 0:
            allowed = restrict_unless_empty(draw_uniform(logits.shape, logits.device) >= self.settings.dropout, allowed)
        return masked_softmax(logits, allowed)

    def experts_per_row(self, asked: int | None = None) -> int | None:
        """Experts per row and router, None where the rule takes no k; outside training `asked` overrides settings."""
        if not self.training:
            k = self.settings.serving_top_k if asked is None else asked
            if k is not None:
                return k
            if self.rule.depends_on_batch:
                raise ValueError(
                    f"{self.rule.name} depends on which rows are scored together: it needs a k to score with"
                )
        if not self.rule.takes_k:
            return None
        if self.training and self.settings.random_top_k:
            return draw_integer(1, self.settings.top_k)
        return self.settings.top_k

    def _renormalises(self, k: int | None) -> bool:
        """Whether the weights of k chosen experts are divided by their sum."""
        return not self.rule.takes_k or (self.settings.top_k > 1 and (k != 1 or not self.settings.random_top_k))

    @torch.no_grad()
    def update_selection_bias(self, loads: Tensor, rate: float) -> None:
        """Moves each expert's selection bias by `rate` towards the mean of the loads (E,) of a step, over all ranks;
        not those of experts that are masked or being let in, which would make up for what keeps them out.
        """
        settled = ~self.masked & (self.ramp <= 0)
        mean = torch.where(settled, loads, 0).sum() / settled.sum()
        moved = self.selection_bias + rate * (mean - loads).sign()
        self.selection_bias.copy_(torch.where(settled, moved, self.selection_bias))

    @torch.no_grad()
    def advance_ramp(self, steps: int) -> None:
        """Lets added experts in a little more: `steps` calls let them in fully."""
        self.ramp.sub_(1 / steps).clamp_(min=0)


def restrict_unless_empty(keep: Tensor, allowed: Tensor) -> Tensor:
    """(..., E) bool: what is kept of what is allowed, or all of it where nothing would be kept."""
    kept_here = keep & allowed
    return torch.where(kept_here.any(-1, keepdim=True), kept_here, allowed)


class Experts(nn.Module):
    """E small networks of one shape on one hidden vector (Ma et al., KDD 2018): linear layers, each followed by the
    activation; normalize: then each output to mean 0, variance 1, as HoME (Kuaishou, 2024) found experts of different
    scales.

    compute: `dense` runs all experts on all rows in few large products, `grouped` each on the rows sent to it, `auto`
    whichever is faster for the share of experts in use.
    """

    def __init__(self, count: int, inputs: int, settings: section.Experts) -> None:
        super().__init__()
        self.count = count
        # Activations are named as torch names them.
        self.activate: Callable[[Tensor], Tensor] = getattr(functional, settings.activation)
        self.normalize, self.compute = settings.normalize, settings.compute
        widths = [inputs, *settings.units]
        self.weights_per_expert = sum(width * below for below, width in pairwise(widths))
        self.layers = nn.ModuleList(StackedLinear(count, width, below) for width, below in pairwise(widths))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, E, U): every expert on every row."""
        first, *others = self.layers
        assert isinstance(first, StackedLinear)
        outputs = self.activate(first.shared(hidden)).unflatten(1, (self.count, -1))
        for layer in others:
            outputs = self.activate(layer(outputs))
        return self._normalised(outputs)

    def run(self, hidden: Tensor, dispatch: Dispatch) -> Tensor:
        """(B, H) -> (S, U): the outputs of a dispatch's places, each expert on the rows sent to it."""
        x = functional.embedding(dispatch.rows, hidden)
        for layer in self.layers:
            assert isinstance(layer, StackedLinear)
            x = self.activate(dispatch.multiply(x, layer.weight, layer.bias))
        return self._normalised(x)

    def mix(
        self,
        hidden: Tensor,
        weights: Tensor,
        used: Tensor | None,
        force_grouped: bool = False,
        max_per_row: int | None = None,
    ) -> Tensor:
        """(B, H), weights (B, G, E) float32 -> (B, G, U), the experts' weighted sum for each gate.

        used: (B, E) bool, the experts that some gate uses for a row; None is all of them. alone: run an expert only on
        rows that use it, whatever `compute` says. most: experts that a row uses, at most; None if not known.
        """
        if used is None or not (force_grouped or self.uses_grouped(cast_for_matmul(hidden), used, max_per_row)):
            experts = self(hidden)
            return torch.bmm(weights.to(experts.dtype), experts)
        hidden = cast_for_matmul(hidden)
        # In half precision oneDNN prepares products anew for each new number of rows, which takes as long as the
        # product of some hundred rows: whole blocks of rows keep these numbers few.
        block = GROUPED_MM_ALIGNMENT if used.is_cuda else 2 * GROUPED_MM_ALIGNMENT if hidden.dtype.itemsize == 2 else 1
        # With `max_per_row`, every expert has a row at least: of one that may be broken, none must be read.
        dispatch = Dispatch.of(used, block, max_per_row if used.is_cuda and not force_grouped else None)
        return dispatch.combine(self.run(hidden, dispatch), weights)

    def uses_grouped(self, hidden: Tensor, used: Tensor, max_per_row: int | None) -> bool:
        """Whether `mix` runs experts on their own rows only, where (B, E) of them are in use."""
        if self.compute == "dense" or (used.is_cuda and not (max_per_row is not None and supports_grouped_mm(hidden))):
            return False
        if self.compute == "grouped":
            return True
        if used.is_cuda:  # counting them would make the host wait
            return max_per_row is not None and max_per_row <= GROUPED_MAX_FRACTION_GPU * self.count
        return self.weights_per_expert >= GROUPED_MIN_WEIGHTS or int(used.sum()) <= GROUPED_MAX_FRACTION * used.numel()

    def _normalised(self, outputs: Tensor) -> Tensor:
        return functional.layer_norm(outputs, outputs.shape[-1:]) if self.normalize else outputs


def set_compute(model: nn.Module, compute: ComputeMode) -> None:
    """Makes all levels compute their experts in this way."""
    for each in model.modules():
        if isinstance(each, Experts):
            each.compute = compute
