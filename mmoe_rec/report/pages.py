"""Reports as pages. A page stands alone: its style sheet is inside, and it has no script, font or picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmoe_rec.report.parts import Report

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report) -> str:
    """Return the page of a report."""
    return render("report.html.j2", {"title": report.title, "report": report})


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the page of a template. It escapes all values, and a missing value is an error."""
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
    environment.filters["sentence"] = lambda words: words[:1].upper() + words[1:].rstrip(".")
    # Two reports on one page may hold figures of one name.
    environment.filters["prefixed"] = lambda svg, name: re.sub(r'( id="| href="#|url\(#)(?=\w)', rf"\g<1>{name}", svg)
    return environment
