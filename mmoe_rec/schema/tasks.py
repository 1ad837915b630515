"""Tasks: what their labels mean, and what a model makes of them.

The latter are objectives and the weights of losses and of the score; for features, the width of embeddings. They stand
beside the meaning in a settings file, but no encoded row depends on them: to change one takes a new training, not new
features.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmoe_rec.schema.section import Section

Scalar = bool | int | float | str

# Keys of tasks and features that say what a model makes of them; no encoded row depends on these.
CHOICES = {"tasks": frozenset({"objective", "loss_weight", "score_weight"}), "features": frozenset({"dim"})}


def without_choices(section: str, tree: Any) -> Any:
    """The section `tasks` or `features` of a settings file, name -> keys, without what a model makes of each."""
    if not isinstance(tree, dict):
        return tree
    choices = CHOICES[section]
    return {
        name: {key: value for key, value in each.items() if key not in choices} if isinstance(each, dict) else each
        for name, each in tree.items()
    }


class ObservedWhen(Section):
    """A row's label counts only where another column has a given value."""

    column: str = Field(description="column to look at")
    equals: Scalar = Field(description="value at which the label is known")


class Task(Section):
    """One predicted behaviour. A null label is always unobserved."""

    label: str = Field(description="column with the label; null means unobserved")
    kind: Literal["binary", "regression"] = Field("binary", description="binary (labels 0 and 1) or regression")
    observed_when: ObservedWhen | None = Field(None, description="condition for the label to be known")
    given: str | None = Field(
        None, description="binary task without which this one cannot happen; both are learnt from all rows (ESMM 2018)"
    )
    matures_after_days: float = Field(
        0.0, ge=0, le=36_500, description="days after the request until the label is final; until then it is unobserved"
    )


# A row of an event log, as a task: its label is always 1 and known at once. No log has a column of that name.
EVENT = Task(label="\0event", kind="binary")


class TaskSettings(Task):
    """One predicted behaviour. A null label is always unobserved."""

    objective: Literal["engagement", "satisfaction"] = Field(description="the objective that the task serves")
    loss_weight: float = Field(1.0, ge=0, description="weight of the task's loss in training")
    score_weight: float = Field(
        1.0, ge=0, description="weight in the score exp(sum of weight x log probability); 0 leaves the task out"
    )


def outcome_name(given: str, task: str) -> str:
    """Name of the outcome that a task and the one it is `given` both happened; it stands beside names of tasks."""
    return f"{given}_and_{task}"
