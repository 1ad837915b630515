"""The columns that a request may give: in which part, read as what, of which type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from mmoe_rec.features.latest import LatestValues
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.inference.errors import RequestError, quoted
from mmoe_rec.log.columns import UTC_MICROSECONDS, column_uses
from mmoe_rec.settings.columns import Role, Use

PARTS: dict[Role, str] = {"user": "user", "candidate": "candidates", "context": "context"}


@dataclass(frozen=True)
class RequestColumn:
    """A column of a request. expected: its type in the log, None where any that `use` allows will do."""

    name: str
    role: Role
    use: Use
    expected: pa.DataType | None


class RequestColumns:
    """Every column that a request may give.

    Besides the log's columns these are the request's id, where the log has one, and precomputed values, which win over
    what the model's tables say: counters under the names of their outputs (such as `user_product_positives`), histories
    under the feature's name, oldest first.
    """

    def __init__(self, pipeline: FeaturePipeline, users: LatestValues, candidates: LatestValues) -> None:
        schema = pipeline.schema
        self.schema = schema
        types = dict(_known_types(pipeline, users, candidates))
        uses = column_uses(schema)
        log = {
            name: RequestColumn(name, role, uses[name], types.get(name))
            for name, role in schema.input_columns().items()
            if role != "placement"
        }
        self.log_columns = list(log)
        # A log's own column comes first: that is what a feature would read.
        self._columns = log | {each.name: each for each in _precomputed(pipeline) if each.name not in log}
        if (request := schema.columns.request) is not None:  # features may not read it, and the server logs it
            own = RequestColumn(request, "context", "key", types.get(request))
            self._columns.setdefault(request, own)
        unread = {name: role for name, role in schema.column_roles.items() if name not in schema.input_columns()}
        self._unread = {n: role for n, role in unread.items() if role != "placement" and n not in self._columns}
        self._placement = {name for name, role in schema.column_roles.items() if role == "placement"}

    def of_part(self, role: Role, names: Iterable[str]) -> list[RequestColumn]:
        """The columns of these names. Columns that the settings list under the role but no feature reads are left out.

        Raises RequestError for an unknown name, a placement, or a column that belongs to another part.
        """
        return [self._columns[name] for name in names if not self._is_unread(role, name)]

    def _is_unread(self, role: Role, name: str) -> bool:
        if name in self._placement:
            raise RequestError(
                f"column '{name}' describes placement, which is absent in serving: leave it out of '{PARTS[role]}'"
            )
        actual = self._columns[name].role if name in self._columns else self._unread.get(name)
        if actual is None:
            valid = [*(each.name for each in self._columns.values() if each.role == role)]
            near = difflib.get_close_matches(name, [*self._columns, *self._unread], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f" ({', '.join(valid) or 'it has none'})"
            raise RequestError(f"'{PARTS[role]}' has an unknown column {quoted(name)}{hint}")
        if actual != role:
            raise RequestError(
                f"column '{name}' describes the {actual}: give it in '{PARTS[actual]}', not in '{PARTS[role]}'"
            )
        return name in self._unread


def _precomputed(pipeline: FeaturePipeline) -> Iterator[RequestColumn]:
    for name, encoder in pipeline.memory_encoders.items():
        for column, (use, kind) in encoder.precomputed().items():
            yield RequestColumn(column, pipeline.schema.role_of(name), use, kind)


def _known_types(
    pipeline: FeaturePipeline, users: LatestValues, candidates: LatestValues
) -> Iterator[tuple[str, pa.DataType]]:
    # Later ones win: the log's own columns tell more than a vocabulary.
    for name, kind in pipeline.key_types.items():
        yield name, pa.type_for_alias(kind)
    for encoder in pipeline.encoders.values():
        yield from encoder.column_types().items()
    for latest in (users, candidates):
        for field in latest.table.schema:
            if not pt.is_null(field.type) and field.type != UTC_MICROSECONDS:
                yield field.name, field.type
