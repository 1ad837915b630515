"""The `tuning` section of a settings file: which values of which settings a search tries."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from mmoe_rec.settings.columns import CHOICES, Section


class Search(Section):
    """Values that tuning tries for one setting: `choices`, or all between `low` and `high`."""

    choices: tuple[Any, ...] | None = Field(None, min_length=1, description="the values to choose from")
    low: int | float | None = Field(None, description="lowest number; whole numbers only where both ends are whole")
    high: int | float | None = Field(None, description="highest number")
    log: bool = Field(False, description="try numbers evenly by their logarithm, as suits learning rates")

    @model_validator(mode="after")
    def _check_one_kind(self) -> Search:
        ends = self.low is not None and self.high is not None
        if ends == (self.choices is not None) or ((self.low is None) != (self.high is None)):
            raise ValueError("give either `choices`, or both `low` and `high`")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low ({self.low}) must be below high ({self.high})")
            if self.log and self.low <= 0:
                raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self


# Keys of tasks and features that can be tried without building features anew.
_SEARCHED = {section: keys - {"objective"} for section, keys in CHOICES.items()}


class Tuning(Section):
    """The search for better settings by `python -m pipelines.tune`."""

    search: dict[str, Search] = Field(
        {}, description="name of a setting that features do not depend on, such as model.experts.count -> values to try"
    )
    startup_trials: int = Field(5, ge=1, description="trials with random values, none of which is cut short")

    @field_validator("search")
    @classmethod
    def _check_names(cls, search: dict[str, Search]) -> dict[str, Search]:
        for name in search:
            section, _, rest = name.partition(".")
            if section not in ("model", "training") and rest.rpartition(".")[2] not in _SEARCHED.get(section, ()):
                raise ValueError(
                    f"'{name}' can't be tried; only settings of model and training can, such as "
                    "training.learning_rate, and tasks.NAME.loss_weight, tasks.NAME.score_weight and features.NAME.dim"
                )
        return search
