"""Reports as files: `report.json`, and `report.html`, a self-contained page without scripts."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter, ValidationError

from mmoe_rec.atomic import write_text
from mmoe_rec.report.parts import Report

REPORT_JSON, REPORT_PAGE = "report.json", "report.html"
TEMPLATES = Path(__file__).parent / "templates"
_ADAPTER = TypeAdapter(Report)
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["sentence"] = lambda text: text[:1].upper() + text[1:].rstrip(".")


def to_html(report: Report) -> str:
    """Return the HTML page of a report. All texts are escaped."""
    return _ENVIRONMENT.get_template("report.html.j2").render(report=report)


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, then `report.html`.

    Args:
        report: The report.
        folder: Folder to write to.

    Raises:
        UserError: The folder can't be created.
    """
    text = to_html(report)
    write_text(folder / REPORT_JSON, _ADAPTER.dump_json(report, indent=1).decode())
    write_text(folder / REPORT_PAGE, text)


def read_report(folder: Path) -> Report | None:
    """Read the `report.json` of a folder. Returns None if there is no readable report."""
    try:
        return _ADAPTER.validate_json((folder / REPORT_JSON).read_bytes())
    except (OSError, ValidationError):
        return None
