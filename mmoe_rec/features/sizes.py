"""How large the tables of a schema may become, before there is a log to fit it to."""

from __future__ import annotations

from dataclasses import replace

from mmoe_rec.errors import UserError
from mmoe_rec.features.layout import Layout, Table
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.schema import IdFeature, IdsFeature, NumericFeature, Schema


def largest_layout(schema: Schema) -> Layout:
    """The layout with every vocabulary at its `max_size`.

    Raises UserError naming the features whose vocabulary has no such bound.
    """
    layout = FeaturePipeline(schema).layout
    unbounded = [
        name
        for name, feature in schema.features.items()
        if isinstance(feature, IdFeature | IdsFeature) and feature.table is None and feature.max_size is None
    ]
    if unbounded:
        raise UserError(
            f"features are not built yet, and nothing bounds the number of ids of {', '.join(unbounded)}: give each a "
            "`max_size`, or run python -m pipelines.features first"
        )
    return replace(layout, tables=tuple(_largest(table, schema) for table in layout.tables))


def _largest(table: Table, schema: Schema) -> Table:
    match schema.features.get(table.name):
        case IdFeature(max_size=int(size)) | IdsFeature(max_size=int(size)):
            return replace(table, rows=table.rows + size)
        case NumericFeature(buckets=int(buckets)):
            return replace(table, rows=buckets + 1)
        case _:
            return table
