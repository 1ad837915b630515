"""The `model` section of a settings file: the structure of the multi-gate mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from mmoe_rec.model.routing import RULES, RoutingRule, get_rule
from mmoe_rec.settings.log_columns import Section

if TYPE_CHECKING:
    RoutingName = str
else:  # what the list of rules holds, which a type checker can't know
    RoutingName = Literal[tuple(rule.name for rule in RULES)]
_RULES = [f"{rule.summary} ({rule.name})" for rule in RULES]
Width = Annotated[int, Field(ge=1, le=65_536)]


class Bottom(Section):
    """The shared hidden layer under the experts and gates."""

    units: tuple[Width, ...] = Field((256,), description="widths of the shared bottom's layers; [] leaves it out")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each layer of the bottom")
    piecewise: bool = Field(True, description="encode each number piecewise-linearly between quantiles")
    cross_layers: int = Field(2, ge=0, le=8, description="DCN-v2 feature crosses on the inputs; 0 leaves them out")
    cross_rank: int = Field(32, ge=1, description="rank of a cross layer's weights")


class Experts(Section):
    """The experts: shared ones, and those of single tasks."""

    count: int = Field(8, ge=0, le=1024, description="experts that all tasks share; 1 alone is a shared bottom")
    task_count: int = Field(0, ge=0, le=1024, description="further experts for each task alone (CGC)")
    levels: int = Field(1, ge=1, le=4, description="levels of experts on top of each other; more than one is PLE")
    units: tuple[Width, ...] = Field((128, 64), min_length=1, description="widths of an expert's layers")
    activation: Literal["silu", "relu"] = Field("silu", description="activation after each layer")
    normalize: bool = Field(False, description="bring each expert's output to mean 0 and variance 1")
    raw_inputs: bool = Field(False, description="experts read the inputs besides the bottom's output")
    compute: Literal["auto", "dense", "grouped"] = Field(
        "auto", description="all experts on all rows (dense), each on the rows sent to it (grouped), or the faster one"
    )

    @model_validator(mode="after")
    def _check_some(self) -> Experts:
        if self.count + self.task_count == 0:
            raise ValueError("count and task_count are both 0: a mixture needs at least one expert")
        return self


class Gates(Section):
    """The gates, and how they choose experts."""

    routing: RoutingName = Field("soft", description=f"mix {', '.join(_RULES[:-1])}, or {_RULES[-1]}")
    per_task: bool = Field(True, description="a gate for each task; false is one for all (OMoE)")
    top_k: int = Field(2, ge=1, le=1024, description="experts per row and gate in training, unless routing is soft")
    random_top_k: bool = Field(False, description="draw 1 to top_k at each step, so that fewer can serve")
    serving_top_k: int | None = Field(None, ge=1, le=1024, description="top_k outside training; null: as in training")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of leaving an expert out of a gate in training")
    noise: float = Field(0.0, ge=0, description="standard deviation of noise on the gates' logits in training")
    balance: Literal["none", "loss", "bias"] = Field(
        "none", description="keep loads even by a loss, or by a bias on what is chosen (without a loss)"
    )
    balance_weight: float = Field(0.1, ge=0, description="weight of the balance loss")
    bias_rate: float = Field(0.03, gt=0, description="change of an expert's bias a step, at the peak learning rate")
    z_loss: float = Field(0.0, ge=0, description="weight of the router z-loss, on large gate logits")
    ramp_steps: int = Field(1000, ge=1, description="training steps that phase in an expert added under top-k")

    @property
    def rule(self) -> RoutingRule:
        """What `routing` names."""
        return get_rule(self.routing)

    @model_validator(mode="after")
    def _check_routing(self) -> Gates:
        if self.rule.depends_on_batch and self.serving_top_k is None:
            raise ValueError(
                f"routing {self.routing} depends on which rows are scored together, so it can't serve: set "
                "serving_top_k to the number of experts that a row gets outside training"
            )
        for asked, name, fits in (
            (self.random_top_k, "random_top_k", [rule for rule in RULES if rule.takes_k and not rule.depends_on_batch]),
            (self.balance == "bias", "balance bias", [rule for rule in RULES if rule.uses_selection_bias]),
        ):
            if asked and self.rule not in fits:
                instead = " or ".join(rule.name for rule in fits)
                raise ValueError(f"{name} has no meaning with routing {self.routing}: use {instead}")
        return self


class Towers(Section):
    """One tower per task, on the gated sum of the experts."""

    units: tuple[Width, ...] = Field((32,), description="widths of a tower's hidden layers")


class Placement(Section):
    """The shallow tower that absorbs placement bias in training and is absent in serving."""

    units: tuple[Width, ...] = Field((16,), description="widths of the placement tower's hidden layers")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of training rows whose placement is hidden")


class Trees(Section):
    """Boosted trees beside the mixture (LightGBM's), on its numbers: each task's logit is a weighted sum of both."""

    max_trees: int = Field(1000, ge=1, description="most trees of a task; validation rows say how many count")
    leaves: int = Field(31, ge=2, le=1024, description="most leaves of a tree")
    learning_rate: float = Field(0.05, gt=0, le=1, description="what a tree adds, as a share of what it has learnt")


class Model(Section):
    """Structure of the multi-gate mixture of experts."""

    bottom: Bottom = Bottom()
    experts: Experts = Experts()
    gates: Gates = Gates()
    towers: Towers = Towers()
    placement: Placement = Placement()
    trees: Trees | None = Field(None, description="boosted trees beside the mixture; {} takes the defaults")

    @model_validator(mode="after")
    def _check_together(self) -> Model:
        experts, gates = self.experts, self.gates
        one_for_all = not gates.per_task or gates.rule.shared_router
        if one_for_all and (experts.task_count or experts.levels > 1):
            name = f"gates.routing {gates.routing}" if gates.per_task else "gates.per_task false"
            raise ValueError(f"{name} needs experts that all tasks see, in one level: set task_count 0 and levels 1")
        if not gates.per_task and gates.rule.shared_router:
            raise ValueError(f"gates.routing {gates.routing} has a gate for each task: leave gates.per_task true")
        seen = experts.count + experts.task_count
        for name in ("top_k", "serving_top_k"):
            k = getattr(gates, name)
            if k is not None and k > seen and (name == "serving_top_k" or gates.rule.takes_k):
                raise ValueError(f"gates.{name} is {k}, and a gate sees {seen} experts")
        return self
