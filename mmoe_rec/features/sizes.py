"""How large the tables of a schema may become, before there is a log to fit it to."""

from __future__ import annotations

from dataclasses import replace

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.settings.schema import Schema


def largest_layout(schema: Schema) -> Layout:
    """The layout with every vocabulary at its `max_size`.

    Raises UserError naming the features whose vocabulary has no such bound.
    """
    pipeline = FeaturePipeline(schema)
    largest = {name: encoder.largest_tables() for name, encoder in pipeline.encoders.items()}
    if unbounded := [name for name, tables in largest.items() if tables is None]:
        raise UserError(
            f"features are not built yet, and nothing bounds the number of ids of {', '.join(unbounded)}: give each a "
            "`max_size`, or run python -m pipelines.features first"
        )
    return replace(pipeline.layout, tables=tuple(table for tables in largest.values() for table in tables or ()))
