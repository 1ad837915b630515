"""Rows on their way into a journal, and out of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mmoe_rec.errors import UserError, first_line
from mmoe_rec.live.journal import Batch
from mmoe_rec.live.row_keys import EVENT_ID, find_keys
from mmoe_rec.log.columns import column_uses, event_uses
from mmoe_rec.log.reader import event_rows
from mmoe_rec.log.rows import LogRows, maturity
from mmoe_rec.point_in_time.join import known_at
from mmoe_rec.settings.log_columns import Use
from mmoe_rec.settings.schema import Schema

_FOREVER = np.iinfo(np.int64).max


def find_uses(schema: Schema) -> dict[str | None, dict[str, Use]]:
    """Return the columns of each log, and the use that each column is read as. None is the interaction log."""
    uses: dict[str | None, dict[str, Use]] = {None: column_uses(schema)}
    return uses | {name: event_uses(schema, name) for name in schema.events}


def make_batch(source: str | None, table: pa.Table, schema: Schema, accepted_at: int | None = None) -> Batch:
    """Make a batch whose duplicate rows the journal leaves out.

    Args:
        source: Name of the log of events, None for the interaction log.
        table: Canonical rows.
        schema: Schema of the model whose server has accepted them.
        accepted_at: Microseconds since 1970 UTC. By default the clock's.
    """
    columns = find_uses(schema)[source]
    rows = LogRows(_completed(table, columns), schema)
    moment = time.time_ns() // 1_000 if accepted_at is None else accepted_at
    return Batch(source, moment, table, keys=find_keys(rows, source, columns))


@dataclass(frozen=True)
class JournalRows:
    """Rows of one log that count, in the journal's order.

    Attributes:
        source: Name of the log of events, None for the interaction log.
        table: Columns that the log must have, null where not given, and columns that other models read.
        counts: Rows by outcome, see `mmoe_rec.live.row_keys.Judged`.
    """

    source: str | None
    table: pa.Table
    counts: Counter[str]

    @staticmethod
    def join(batches: Sequence[Batch], schema: Schema) -> JournalRows:
        """Join batches of one log. Raises UserError where their columns do not fit together."""
        try:
            tables = [batch.table for batch in batches]
            table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(f"rows of the journal do not fit together: {first_line(error)}") from None
        counts, source = Counter[str](), batches[0].source
        for batch in batches:
            counts.update(batch.counts)
        uses = find_uses(schema)[source]
        others = [name for name in table.column_names if name not in uses and name != EVENT_ID]
        return JournalRows(source, _completed(table, uses).select([*uses, *others]), counts)

    def rows(self, schema: Schema) -> LogRows:
        """Return the rows as features read them."""
        return LogRows(self.table, schema) if self.source is None else event_rows(self.table, schema, self.source)

    def count_late(self, schema: Schema, as_of: int) -> int:
        """Count the rows of which at least one label was available at `as_of` (microseconds) already."""
        rows = self.rows(schema)
        if self.source is not None:
            return int((known_at(rows.times(), 0) <= as_of).sum())
        late = np.zeros(len(rows), bool)
        for task in schema.tasks.values():
            late |= ~np.isnan(rows.labels(task, _FOREVER)) & (known_at(rows.times(), maturity(task, schema)) <= as_of)
        return int(late.sum())


def group_by_log(batches: Iterable[Batch]) -> dict[str | None, list[Batch]]:
    """Group batches by their log, None for the interaction log."""
    logs: dict[str | None, list[Batch]] = {}
    for batch in batches:
        logs.setdefault(batch.source, []).append(batch)
    return logs


def join_by_log(batches: Iterable[Batch], schema: Schema) -> dict[str | None, JournalRows]:
    """Join the batches of each log that the schema has."""
    logs = group_by_log(batches).items()
    return {source: JournalRows.join(some, schema) for source, some in logs if source in (None, *schema.events)}


def _completed(table: pa.Table, columns: dict[str, Use]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table)))
    return table
