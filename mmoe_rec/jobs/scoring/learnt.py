"""Which of the scored rows the model has learnt from: metrics of these flatter it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from mmoe_rec.log.rows import LogRows
from mmoe_rec.point_in_time.join import in_window
from mmoe_rec.settings.columns import Scalar
from mmoe_rec.settings.sections import Split


def text_of(value: Scalar) -> str:
    """A value of a column of splits, so that numbers equal the same as text."""
    return value if isinstance(value, str) else str(int(value))


@dataclass(frozen=True)
class Learnt:
    """How rows are told that a model was trained, or its best state chosen, on.

    split: that it was trained with; lacks_column: whether the rows lack the column that splits them.
    """

    split: Split
    lacks_column: bool

    @staticmethod
    def of(split: Split, there: Collection[str]) -> Learnt:
        """Of rows that have these columns."""
        return Learnt(split, split.column is not None and split.column not in there)

    @property
    def column(self) -> str | None:
        """The column that has to be read, None where none is needed or it is not there."""
        return None if self.lacks_column else self.split.column

    @property
    def values(self) -> list[str]:
        """Those of the column, as text, by which rows were trained on or chose the best state."""
        return [text_of(each) for each in (*self.split.train, *self.split.validation)]

    def count(self, rows: LogRows) -> int:
        """How many rows it has learnt from, as far as that can be told."""
        if self.lacks_column:
            return 0
        if self.column is None:
            windows = self.split.windows()
            return int(in_window(rows.times(), (windows["train"][0], windows["validation"][1])).sum())
        # As text: a column may hold numbers in one log, and the same as strings in another.
        values = rows.coded(self.column)
        values = (values.cast(pa.int8()) if pt.is_boolean(values.type) else values).cast(pa.string())
        return int(np.sum(pc.is_in(values, value_set=pa.array(self.values)).to_numpy(zero_copy_only=False)))

    def told(self, learnt: int, rows: int) -> str | None:
        """What is to be said of them, after the model's name; None where there are none.

        learnt: how many of that many rows it has learnt from.
        """
        if self.lacks_column:
            return (
                f"was trained on some of the rows that column '{self.split.column}' splits, which the input lacks: "
                "metrics of such rows flatter it, and it can't be told whether there are any"
            )
        if not learnt:
            return None
        if self.column is not None:
            return (
                f"was trained, or its best state chosen, on rows with {', '.join(self.values)} in column "
                f"'{self.column}', as {learnt:,} of the {rows:,} rows are that were scored: metrics of them flatter "
                "it; score a file without them"
            )
        start, end = self.split.train_start, self.split.validation_end
        assert end is not None, "times split the rows"
        period = f"before {end.isoformat()}" if start is None else f"from {start.isoformat()} to {end.isoformat()}"
        return (
            f"was trained, or its best state chosen, on requests {period}, when {learnt:,} of the {rows:,} rows were "
            f"requested that were scored: metrics of them flatter it; score with --start {end.isoformat()}"
        )
