"""The section `split`: which rows are trained on, which choose the best state of the model, which test it."""

from __future__ import annotations

import itertools
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from mmoe_rec.settings.columns import SPLITS, Columns, Scalar, Section, SplitColumn


def _as_time(value: Any) -> datetime | None:
    """A date or time of YAML, or text in ISO 8601; UTC unless it has an offset."""
    if isinstance(value, str) and not value.isdigit():
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise ValueError("must be a time such as 2024-01-31 or 2024-01-31T18:00:00")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Time = Annotated[datetime, BeforeValidator(_as_time)]
_TIMES = ("train_start", "train_end", "validation_end", "test_end")
_Values = tuple[Scalar, ...]


class Split(Section):
    """Training rows lie before `train_end`, validation rows before `validation_end`, test rows before `test_end`; of a
    plain table without times, a column says it."""

    train_start: Time | None = Field(None, description="first request time to train on; null is the log's start")
    train_end: Time | None = Field(None, description="end of training (exclusive), UTC unless an offset is given")
    validation_end: Time | None = Field(None, description="end of validation (exclusive)")
    test_end: Time | None = Field(None, description="end of test (exclusive); null is the log's end")
    column: str | None = Field(
        None, description="without columns.time, in place of the times above: column that says each row's split"
    )
    train: _Values = Field(("train",), min_length=1, description="values of `column` in training rows")
    validation: _Values = Field(("validation",), min_length=1, description="values of `column` in validation rows")
    test: _Values = Field(("test",), min_length=1, description="values of `column` in test rows")

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if self.column is None:
            lacking = [name for name in ("train_end", "validation_end") if getattr(self, name) is None]
            if lacking:
                raise ValueError(f"needs {lacking[0]}: give the times of the split, or `column` in a plain table")
            values = [name for name in SPLITS if getattr(self, name) != (name,)]
            if values:
                raise ValueError(f"has {values[0]}, values of a column, but no column")
            times = [t for name in _TIMES if (t := getattr(self, name)) is not None]
            if any(a >= b for a, b in itertools.pairwise(times)):
                raise ValueError("train_start, train_end, validation_end and test_end must follow each other in time")
            return self
        if given := [name for name in _TIMES if getattr(self, name) is not None]:
            raise ValueError(
                f"has both {given[0]} and column, but rows are split by times or by a column: leave one out"
            )
        seen: dict[Scalar, str] = {}
        for name in SPLITS:
            for value in getattr(self, name):
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    raise ValueError(f"{name} lists {value}, which no column of whole numbers can hold")
                if isinstance(value, float):
                    raise ValueError(
                        f"{name} lists {value}, but values of a column of splits are text or whole numbers"
                    )
                if (other := seen.setdefault(value, name)) != name:
                    raise ValueError(f"value {value!r} is both in {other} and in {name}")
        return self

    def check(self, columns: Columns) -> None:
        """Raises ValueError where the log has times and is split by a column, or the other way round."""
        if self.column is None and not columns.has_time:
            raise ValueError(
                "columns.time is left out, so the rows can't be split by time: set split.column to a column that says "
                "which rows are train, validation and test, or give columns.time"
            )
        if self.column is not None and columns.has_time:
            raise ValueError(
                f"split.column is '{self.column}', but columns.time is '{columns.time}': a log with times is split by "
                "split.train_end and split.validation_end, so that training sees nothing of what came later; leave "
                "out columns.time to split by the column"
            )

    @property
    def by_column(self) -> SplitColumn | None:
        """The column that splits the rows, None where times do."""
        if self.column is None:
            return None
        return SplitColumn(column=self.column, **{name: getattr(self, name) for name in SPLITS})

    def windows(self) -> dict[str, tuple[int | None, int | None]]:
        """Request times [start, end) of each split in microseconds since 1970 UTC; by a column, the times that
        `mmoe_rec.log.stand_ins` gives to the rows of each."""
        if self.column is not None:
            return {name: (place, place + 1) for place, name in enumerate(SPLITS)}
        start, train, validation, test = (
            None if (time := getattr(self, name)) is None else round(time.timestamp() * 1e6) for name in _TIMES
        )
        return {"train": (start, train), "validation": (train, validation), "test": (validation, test)}
