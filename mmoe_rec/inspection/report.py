"""Inspects prepared features and writes what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmoe_rec.atomic import atomic_file
from mmoe_rec.build.prepare import Prepared
from mmoe_rec.inspection.collect import collect
from mmoe_rec.inspection.health import health_of
from mmoe_rec.inspection.page import page
from mmoe_rec.schema import Schema


def inspect(name: str, prepared: Prepared, schema: Schema, dims: Mapping[str, int]) -> dict[str, Any]:
    """The health of the data set of that name, as `mmoe_rec.inspection.health` describes it.

    dims: table -> width that a model gives it. Raises UserError for encoded rows that are missing or can't be read.
    """
    return health_of(name, prepared, schema, collect(prepared, schema), dims)


def write(health: dict[str, Any], folder: Path) -> None:
    """Writes `health.json` and `health.html`. Raises UserError where the folder can't be made."""
    texts = {"health.json": json.dumps(health, indent=1, allow_nan=False), "health.html": page(health)}
    for name, text in texts.items():
        with atomic_file(folder / name) as file:
            file.write_text(text, encoding="utf-8")
