"""Pages from the templates. Each stands alone: the style sheet is inside, and there is no script, font or picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmoe_rec.report.formatting import count, day, fixed, percent, rate, size, thousands

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page of that template. Whatever comes from `values` is escaped; a value that is missing is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for each in (count, day, fixed, percent, rate, size, thousands):
        environment.filters[each.__name__] = each
    return environment
