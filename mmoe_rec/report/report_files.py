"""Reports as files: `report.json`, and `report.html`, a page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mmoe_rec.atomic import write_text
from mmoe_rec.report.pages import to_html
from mmoe_rec.report.parts import Report

JSON, PAGE = "report.json", "report.html"
_ADAPTER = TypeAdapter(Report)


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
