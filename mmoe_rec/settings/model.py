"""Section `model` of a settings file, the architecture of the multi-gate mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from mmoe_rec.model.routing import RULES, RoutingRule, get_rule
from mmoe_rec.settings.log_columns import Section

if TYPE_CHECKING:
    RoutingName = str
else:  # Type checkers can't evaluate a Literal of computed names.
    RoutingName = Literal[tuple(rule.name for rule in RULES)]
_RULES = [f"{rule.summary} ({rule.name})" for rule in RULES]
Width = Annotated[int, Field(ge=1, le=65_536)]


class Bottom(Section):
    """Layers below the experts and gates, which all tasks share, and encodings of the inputs."""

    units: tuple[Width, ...] = Field((256,), description="widths of the shared bottom's layers; [] for no bottom")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate after each layer of the bottom")
    piecewise: bool = Field(True, description="piecewise-linear encoding of numbers between quantiles")
    cross_layers: int = Field(2, ge=0, le=8, description="number of DCN-v2 cross layers on the inputs")
    cross_rank: int = Field(32, ge=1, description="rank of a cross layer's weight matrix")


class Experts(Section):
    """Shared and task-specific experts."""

    count: int = Field(8, ge=0, le=1024, description="experts shared by all tasks; 1 makes a shared bottom")
    task_count: int = Field(0, ge=0, le=1024, description="additional experts for each task (CGC)")
    levels: int = Field(1, ge=1, le=4, description="stacked levels of experts; two or more make PLE")
    units: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of an expert's layers")
    activation: Literal["silu", "relu"] = Field("silu", description="activation after each layer")
    normalize: bool = Field(False, description="normalization of each expert's output to mean 0, variance 1")
    raw_inputs: bool = Field(False, description="whether experts also read the raw inputs")
    compute: Literal["auto", "dense", "grouped"] = Field(
        "auto",
        description="experts run on all rows (dense) or only on routed rows (grouped); auto takes the faster one",
    )

    @model_validator(mode="after")
    def _check_some(self) -> Experts:
        if self.count + self.task_count == 0:
            raise ValueError("count and task_count are both 0: a mixture needs at least one expert")
        return self


class Gates(Section):
    """Gates, which choose or weight the experts of a row."""

    routing: RoutingName = Field("soft", description=f"experts to mix: {', '.join(_RULES[:-1])}, or {_RULES[-1]}")
    per_task: bool = Field(True, description="whether each task has a gate; false: one gate (OMoE)")
    top_k: int = Field(2, ge=1, le=1024, description="experts per row and gate in training, unless routing is soft")
    random_top_k: bool = Field(False, description="random number of experts, 1 to top_k, at each step")
    serving_top_k: int | None = Field(None, ge=1, le=1024, description="top_k after training; null: top_k")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an expert of a gate in training")
    noise: float = Field(0.0, ge=0, description="standard deviation of noise on the gates' logits in training")
    balance: Literal["none", "loss", "bias"] = Field(
        "none", description="method that keeps expert loads even: a loss, or a bias on the selection"
    )
    balance_weight: float = Field(0.1, ge=0, description="weight of the balance loss")
    bias_rate: float = Field(0.03, gt=0, description="change of an expert's bias per step at the peak learning rate")
    z_loss: float = Field(0.0, ge=0, description="weight of the router z-loss, which limits gate logits")
    ramp_steps: int = Field(1000, ge=1, description="training steps that phase in an added expert under top-k")

    @property
    def rule(self) -> RoutingRule:
        """Routing rule with the name `routing`."""
        return get_rule(self.routing)

    @model_validator(mode="after")
    def _check_routing(self) -> Gates:
        if self.rule.depends_on_batch and self.serving_top_k is None:
            raise ValueError(
                f"routing {self.routing} depends on the other rows of a batch, so a server can't use it. Set "
                "serving_top_k. Outside training, each gate then uses this number of experts for a row."
            )
        for is_set, name, allowed in (
            (self.random_top_k, "random_top_k", [rule for rule in RULES if rule.takes_k and not rule.depends_on_batch]),
            (self.balance == "bias", "balance bias", [rule for rule in RULES if rule.uses_selection_bias]),
        ):
            if is_set and self.rule not in allowed:
                alternatives = " or ".join(rule.name for rule in allowed)
                raise ValueError(f"{name} has no effect with routing {self.routing}: use {alternatives}")
        return self


class Towers(Section):
    """One tower per task, on the gated sum of the experts."""

    units: tuple[Width, ...] = Field((32,), description="widths of a tower's hidden layers")


class Placement(Section):
    """Shallow tower that absorbs placement bias in training and is absent in serving."""

    units: tuple[Width, ...] = Field((16,), description="widths of the placement tower's hidden layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="fraction of training rows whose placement is hidden")


class Trees(Section):
    """Boosted trees (LightGBM) on numbers and IDs. A task's logit is a weighted sum of network and trees."""

    max_trees: int = Field(1000, ge=1, description="maximum number of trees per task; validation selects the number")
    leaves: int = Field(31, ge=2, le=1024, description="maximum number of leaves of a tree")
    learning_rate: float = Field(0.05, gt=0, le=1, description="shrinkage of each tree's contribution")


class Model(Section):
    """Architecture of the multi-gate mixture of experts."""

    bottom: Bottom = Bottom()
    experts: Experts = Experts()
    gates: Gates = Gates()
    towers: Towers = Towers()
    placement: Placement = Placement()
    trees: Trees | None = Field(None, description="boosted trees next to the network; {} for the defaults")

    @model_validator(mode="after")
    def _check_together(self) -> Model:
        experts, gates = self.experts, self.gates
        shared_gate = not gates.per_task or gates.rule.shared_router
        if shared_gate and (experts.task_count or experts.levels > 1):
            name = f"gates.routing {gates.routing}" if gates.per_task else "gates.per_task false"
            raise ValueError(f"{name} needs one level of shared experts: set task_count to 0 and levels to 1")
        if not gates.per_task and gates.rule.shared_router:
            raise ValueError(f"gates.routing {gates.routing} needs a gate for each task: set gates.per_task to true")
        available = experts.count + experts.task_count
        for name in ("top_k", "serving_top_k"):
            k = getattr(gates, name)
            if k is not None and k > available and (name == "serving_top_k" or gates.rule.takes_k):
                raise ValueError(f"gates.{name} is {k}, but a gate has only {available} experts")
        return self
