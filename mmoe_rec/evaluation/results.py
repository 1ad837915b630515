"""What is measured of one or several models on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from mmoe_rec.evaluation.comparison import Comparison, Rule, compare
from mmoe_rec.evaluation.slices import SlicedModel, SliceRecord, compare_slices
from mmoe_rec.evaluation.summary import Summary, Sums
from mmoe_rec.evaluation.sums import ClosedSums, as_closed
from mmoe_rec.settings.sections import Evaluation

if TYPE_CHECKING:
    from mmoe_rec.evaluation.tradeoffs import WeightsRecord

RESAMPLES_OF_SLICES = 200  # standard errors are good to 5%


@dataclass(frozen=True)
class PlacementRecord:
    """What a model has learnt of a value of placement. effects: task -> how many times the odds of a binary task are
    those of the mean row, or what is added to a regression."""

    feature: str
    value: str
    rows: int
    effects: dict[str, float]


@dataclass(frozen=True)
class MeasuredModel:
    """A model's sums, and the summary of its metrics.

    address: where it, or its predictions, come from; gates: task -> mean weight of each expert, None where they are
    unknown; seen: sentences on how it has seen these rows before; users: on how it has seen their users; slices: its
    sums in each; tradeoffs: what other weights would give; placement: what it has learnt of that.
    """

    sums: Sums
    summary: Summary
    address: str
    gates: dict[str, list[float]] | None = None
    seen: Sequence[str] = ()
    users: Sequence[str] = ()
    slices: Mapping[tuple[str, str], ClosedSums] = field(default_factory=dict)
    tradeoffs: Sequence[WeightsRecord] = ()
    placement: Sequence[PlacementRecord] = ()

    @cached_property
    def closed(self) -> ClosedSums:
        """The sums, ready to be compared."""
        return as_closed(self.sums)


@dataclass(frozen=True)
class Results:
    """What was measured. models: by name, the one in question first; tasks: those that may decide; rules: by which;
    title, facts: what a report says of the rows."""

    models: dict[str, MeasuredModel]
    tasks: tuple[str, ...]
    rules: Evaluation
    title: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """Of the model in question."""
        return next(iter(self.models))

    @property
    def first(self) -> MeasuredModel:
        """The model in question."""
        return self.models[self.name]

    @property
    def summaries(self) -> dict[str, Summary]:
        """By name."""
        return {name: each.summary for name, each in self.models.items()}

    @property
    def each_row_is_a_user(self) -> bool:
        """True if each row has a user of its own, for all models."""
        return all(each.each_row_is_a_user for each in self.summaries.values())

    @cached_property
    def comparison(self) -> Comparison | None:
        """The first model beside the others; None where it is alone.

        Raises UserError where the rows are not the same.
        """
        if len(self.models) == 1:
            return None
        sums = {name: each.closed for name, each in self.models.items()}
        rule, resamples = Rule(self.rules.margin, self.rules.calibration), self.first.summary.resamples
        return compare(sums, self.name, self.summaries, self.tasks, self.rules.decide_by, rule, resamples)

    @cached_property
    def slices(self) -> list[SliceRecord]:
        """All slices of the first model, beside all rows and other models."""
        return compare_slices(self.sliced, self.name, min(self.first.summary.resamples, RESAMPLES_OF_SLICES))

    @property
    def sliced(self) -> dict[str, SlicedModel]:
        """The sums of all models, whole and by slice."""
        return {name: SlicedModel(each.closed, each.slices) for name, each in self.models.items()}
