"""What the figures of a data set's health draw is what was measured, in the colors of the page."""

import re
from xml.etree import ElementTree

import pytest

from mmoe_rec.profiling.health_report import weeks_figure
from mmoe_rec.report.charts import COLORS
from mmoe_rec.report.report_files import TEMPLATES

RATES = {"train": [0.2, 0.3, None], "validation": [0.25], "test": [0.5, 0.1]}
ROWS = {"train": [10, 40, 5], "validation": [20], "test": [30, 40]}
PLACES = {"train": [0, 1, 2], "validation": [2], "test": [3, 4]}


def weeks(task: str = "like") -> list[dict]:
    """Five weeks, the third of which two splits share."""
    found: list[dict] = [{"week": f"2024-01-{1 + 7 * place:02}", "splits": {}} for place in range(5)]
    for split, places in PLACES.items():
        for place, rate, rows in zip(places, RATES[split], ROWS[split], strict=True):
            found[place]["splits"][split] = {"tasks": {task: {"kind": "binary", "rate": rate, "observed": rows}}}
    return found


def texts_of(figure: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(figure).iter("text")]


def heights(figure: str, split: str) -> list[float]:
    """Of the bars of a split, boxes of its color that let others shine through."""
    style = re.compile(rf"fill: var\(--{split}\); opacity: 0.45")
    paths = [each for each in ElementTree.fromstring(figure).iter("path") if style.match(each.get("style", ""))]
    ys = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", each.attrib["d"])] for each in paths]
    return [max(each) - min(each) for each in ys]


def test_bars_are_as_high_as_rows_are_many_and_the_figure_names_weeks_and_splits() -> None:
    figure = weeks_figure(weeks(), "like")
    found = [height for split in ROWS for height in heights(figure, split)]
    expected = [rows / 40 for own in ROWS.values() for rows in own]
    assert [each / found[1] for each in found] == pytest.approx(expected, abs=2e-3)
    assert {"train", "test", "40", "rows", "1 Jan 24", "29 Jan 24", "40%"} <= set(texts_of(figure))


def test_the_same_figure_is_the_same_text_and_holds_nothing_but_itself() -> None:
    drawn = weeks_figure(weeks(), "like")
    assert drawn == weeks_figure(weeks(), "like")
    assert not re.search(r"metadata|<style|xmlns|DejaVu|\d{4}-\d\d-\d\dT", drawn)
    assert not re.search(r"#[0-9a-f]{6}\b(?![\"0-9a-f])", drawn), "a color that the page cannot turn dark"
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert len(ids) == len(set(ids))
    assert set(ids) == set(re.findall(r"(?:href=\"|url\()#([^\")]+)", drawn))
    assert ids
    assert set(ids).isdisjoint(re.findall(r' id="([^"]+)"', weeks_figure(weeks("x"), "x")))


def test_figures_have_the_colors_of_the_style_sheet() -> None:
    light = re.match(r":root \{(.*?)\}", (TEMPLATES / "style.css").read_text(), re.DOTALL)
    assert light
    assert COLORS.items() <= dict(re.findall(r"--([\w-]+): (#\w+);", light[1])).items()
    assert len(set(COLORS.values())) == len(COLORS), "a color in a figure has one name"
