"""A page stands alone, is well-formed, and escapes text of the data. JSON holds the report. Numbers have their unit."""

import re
from html import unescape
from pathlib import Path

import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.report.charts import new_figure, to_svg
from mmoe_rec.report.formatting import format_rate
from mmoe_rec.report.parts import Cell, Figure, Report, Sentence, Table
from mmoe_rec.report.report_files import read_report, to_html, write_report
from mmoe_rec.task_kinds import KINDS
from tests.report.parsed import Page

EVIL = "</title></style><script>alert('x')</script>\"'&amp; {{ 7 * 7 }} $x$ "
FROM_ELSEWHERE = {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}


def drawn(name: str) -> Figure:
    figure = new_figure(4, 2)
    figure.subplots().plot([0, 1], label="line")
    return Figure(name, to_svg(figure, name), f"{name} note")


def report() -> Report:
    """A report with every part, in which each text is hostile."""
    rows = [("heading",), (f"{EVIL}row", Cell(f"{EVIL}cell", f"{EVIL}small", "problem"))]
    return Report(
        title=f"{EVIL}title",
        headline=f"{EVIL}headline",
        figures=[drawn(f"{EVIL}figure"), drawn("another")],
        tables=[Table(f"{EVIL}table", ("", f"{EVIL}head"), rows, f"{EVIL}note", folded=[("one", "more")])],
        sentences=[Sentence(f"{EVIL}told", "warning", f"{EVIL}label")],
        mark="warning",
        about=f"{EVIL}about",
        facts={f"{EVIL}fact": f"{EVIL}value"},
        measures={f"{EVIL}measure": f"{EVIL}meaning"},
        identity={"features": "1", "settings": {"a": {"b": [1, None]}}},
    )


def test_a_page_stands_alone_and_escapes_text_from_the_data() -> None:
    text = to_html(report())
    page = Page(text)
    assert text.startswith('<!doctype html>\n<html lang="en">\n')
    assert text.endswith("</html>\n")
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]+\.", text)
    assert page.tags.isdisjoint(FROM_ELSEWHERE)
    assert {target.removeprefix("#") for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "figures of a page share an id"
    assert all(re.fullmatch("(?!on)[a-z-]+", name) for name in page.attributes), page.attributes
    names = "headline row cell small table head note told label figure title fact value measure meaning about"
    for name in names.split():
        assert f"{EVIL}{name}" in page.words, f"{name} stands on the page as it is"
    assert "<script" not in text
    assert f"{EVIL}figure" in [unescape(item) for item in re.findall(r'aria-label="([^"]*)"', text)]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    read = read_report(tmp_path)
    assert read is not None
    assert to_html(read) == (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "report.json").write_text('{"title": "of another version"}')
    assert read_report(tmp_path) is None
    assert read_report(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="can't be created"):
        write_report(report(), tmp_path / "report.html" / "in a file")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0.0059, "binary", "0.59%"),
        (3.14159, "regression", "3.142"),
        (-0.00012345, "regression", "-0.0001234"),
        (1_699_999_997.9, "regression", "1,699,999,998"),
        (-12_345.6, "regression", "-12,346"),
        (1e300, "regression", "1e+300"),
        (None, "regression", "-"),
    ],
)
def test_a_mean_is_reported_to_the_unit(value: float | None, kind: str, message: str) -> None:
    """Means of times lie close together beside their size."""
    assert format_rate(value, kind) == message


def test_a_regression_has_a_mean_and_no_positives() -> None:
    binary, regression = KINDS["binary"], KINDS["regression"]
    assert binary.describe_labels(1103.0, 2218) == "1,103 positive of 2,218 observed"
    assert binary.describe_labels(0.0, 0) == "0 positive of 0 observed"
    assert regression.describe_labels(3_770_599_999_065.0, 2218) == "2,218 observed, mean 1,700,000,000"
    assert regression.describe_labels(0.0, 0) == "0 observed"
