"""What is measured of one or several models on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mmoe_rec.evaluation.comparison import Comparison, compare
from mmoe_rec.evaluation.slices import SliceRecord, compare_slices
from mmoe_rec.evaluation.summary import MeasuredModel, Summary
from mmoe_rec.settings.sections import Evaluation

RESAMPLES_OF_SLICES = 200  # standard errors are good to 5%


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
        """The name of the model in question."""
        return next(iter(self.models))

    @property
    def first(self) -> MeasuredModel:
        """The model in question."""
        return self.models[self.name]

    @property
    def summaries(self) -> dict[str, Summary]:
        """The summaries of all models, by name."""
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
        return compare(self.models, self.name, self.tasks, self.rules, self.first.summary.resamples)

    @cached_property
    def slices(self) -> list[SliceRecord]:
        """All slices of the first model, beside all rows and other models."""
        return compare_slices(self.models, self.name, min(self.first.summary.resamples, RESAMPLES_OF_SLICES))
