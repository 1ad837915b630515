"""Reports as files: `report.json`, and `report.html`, a page without scripts that needs no other file."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter, ValidationError

from mmoe_rec.atomic import write_text
from mmoe_rec.report.parts import Report

JSON, PAGE = "report.json", "report.html"
_ADAPTER = TypeAdapter(Report)
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


def to_json(report: Report) -> str:
    """Return the report as JSON."""
    return _ADAPTER.dump_json(report, indent=1).decode()


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json` and `report.html`, the page last. Raises UserError if the folder can't be made."""
    text = to_html(report)
    write_text(folder / JSON, to_json(report))
    write_text(folder / PAGE, text)


def read_report(folder: Path) -> Report | None:
    """Read the report of a folder. Returns None if there is none that can be read."""
    try:
        return _ADAPTER.validate_json((folder / JSON).read_bytes())
    except (OSError, ValidationError):
        return None
