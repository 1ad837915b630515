"""What the figures of a data set's health draw is what was measured, in the colours of the page."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from mmoe_rec.report.health_figures import shares_figure, shown_bins, weeks_figure
from mmoe_rec.report.pages import TEMPLATES
from mmoe_rec.report.style import COLOURS

RATES = {"train": [0.2, 0.3, None], "validation": [0.25], "test": [0.5, 0.1]}
ROWS = {"train": [10, 40, 5], "validation": [20], "test": [30, 40]}
PLACES = {"train": [0, 1, 2], "validation": [2], "test": [3, 4]}
BINS = [{"bin": f"b{place}", "train": 0.01 * place, "test": 0.1 / (1 + place)} for place in range(60)]


def weeks(kind: str = "binary") -> list[dict]:
    """Five weeks, the third of which two splits share."""
    found: list[dict] = [{"week": f"2024-01-{1 + 7 * place:02}", "splits": {}} for place in range(5)]
    for split, places in PLACES.items():
        for place, rate, rows in zip(places, RATES[split], ROWS[split], strict=True):
            found[place]["splits"][split] = {"tasks": {"like": {"kind": kind, "rate": rate, "observed": rows}}}
    return found


def shapes(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """The shapes of a group, in order."""
    (group,) = [each for each in root.iter("g") if each.get("class") == name]
    return [each for each in group.iter() if each.find("title") is not None]


def boxes(outline: str) -> np.ndarray:
    """(N, 4) left, top, width and height of the boxes of a path."""
    corners = [np.array(re.findall(r"[-\d.]+", box), float).reshape(-1, 2) for box in re.findall("M[^Mz]+", outline)]
    return np.array([[*each.min(0), *np.ptp(each, axis=0)] for each in corners])


def test_bars_are_as_high_as_rows_are_many_and_stand_on_each_other() -> None:
    root = ElementTree.fromstring(weeks_figure(weeks(), "like"))
    bars = {
        split: np.concatenate([boxes(each.attrib["d"]) for each in shapes(root, f"bars-{split}")]) for split in ROWS
    }
    heights = np.concatenate([bars[split][:, 3] for split in ROWS])
    np.testing.assert_allclose(heights / heights[1], np.concatenate(list(ROWS.values())) / 40, atol=2e-3)
    shared, below = bars["validation"][0], bars["train"][2]
    assert shared[0] == below[0]
    assert shared[1] + shared[3] == pytest.approx(below[1], abs=0.02)
    lefts = np.concatenate([bars["train"][:, 0], bars["test"][:, 0]])
    assert all(np.diff(lefts) > 100)


def test_dots_are_where_the_rates_are_and_say_them() -> None:
    root = ElementTree.fromstring(weeks_figure(weeks(), "like"))
    y, told = [], []
    for split in RATES:
        for each in shapes(root, f"dots-{split}"):
            y.append(float(each.attrib["y"]))
            told.append(each.findtext("title"))
    rates = np.array([rate for split in RATES.values() for rate in split if rate is not None])
    slope, base = np.polyfit(rates, y, 1)
    assert slope < 0
    np.testing.assert_allclose(slope * rates + base, y, atol=0.05)
    assert told[0] == "week of 2024-01-01, train: 20.00% of 10 rows"
    assert told[2] == "week of 2024-01-15, validation: 25.00% of 20 rows"
    texts = [each.text for each in root.iter("text")]
    assert {"train", "test", "40", "rows", "1 Jan 24", "29 Jan 24", "40%"} <= set(texts)


@pytest.mark.parametrize("rates", [[0.2, 0.2004], [0.0, 0.0], [None, None], [-3.0, 1e6]])
def test_rates_that_hardly_differ_look_so(rates: list[float | None]) -> None:
    found = [
        {"week": week, "splits": {"train": {"tasks": {"like": {"kind": "regression", "rate": rate, "observed": 0}}}}}
        for week, rate in zip(("2024-01-01", "2024-01-08"), rates, strict=True)
    ]
    root = ElementTree.fromstring(weeks_figure(found, "like"))
    texts = [each.text or "" for each in root.iter("text")]
    texts = texts[: texts.index("1 Jan 24")]  # those of the rates
    ticks = sorted(float(each) for each in texts if re.fullmatch(r"[-+\d.e]+", each))
    known = [rate for rate in rates if rate is not None]
    assert len(ticks) >= 3
    assert all(low < high for low, high in pairwise(ticks))
    if known:
        assert ticks[-1] - ticks[0] >= 0.2 * abs(sum(known)) / 2


def test_shares_are_drawn_side_by_side() -> None:
    bins = BINS[:10]
    root = ElementTree.fromstring(shares_figure(bins, "shares of x"))
    assert root.get("aria-label") == "shares of x"
    outlines = {
        split: each.attrib["d"]
        for each in root.iter("path")
        for split in ("train", "test")
        if f"fill: var(--{split})" in each.get("style", "")
    }
    for split, outline in outlines.items():
        shares = np.array([each[split] for each in bins])
        np.testing.assert_allclose(boxes(outline)[:, 3] / 100 * 0.1, shares, atol=2e-5)
    assert (boxes(outlines["train"])[:, 0] < boxes(outlines["test"])[:, 0]).all()
    told = [each.findtext("title") for each in shapes(root, "hover")]
    assert len(told) == 10
    assert told[1] == "b1: 1.0% in training, 5.0% in test"


def test_of_many_ids_the_first_and_the_named_ones_are_shown() -> None:
    ends = [{"bin": name, "train": 0.1, "test": 0.2} for name in ("all others", "unknown", "missing")]
    shown = shown_bins([*BINS, *ends], ordered=False)
    assert [each["bin"] for each in shown] == [
        *(f"b{place}" for place in range(21)),
        "all others",
        "unknown",
        "missing",
    ]
    for split in ("train", "test"):
        assert sum(each[split] for each in shown) == pytest.approx(sum(each[split] for each in [*BINS, *ends]))
    assert shown_bins([*BINS, *ends], ordered=True) == [*BINS, *ends]


def test_the_same_figure_is_the_same_text_and_holds_nothing_but_itself() -> None:
    drawn = weeks_figure(weeks(), "like")
    assert drawn == weeks_figure(weeks(), "like")
    assert not re.search(r"metadata|<style|xmlns|DejaVu|clip-path|url\(|\d{4}-\d\d-\d\dT", drawn)
    assert not re.search(r"#[0-9a-f]{6}\b(?![\"0-9a-f])", drawn), "a colour that the page cannot turn dark"
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert len(ids) == len(set(ids))
    assert set(ids) == set(re.findall(r'href="#([^"]+)"', drawn))
    other = [
        each | {"splits": {n: {"tasks": {"x": s["tasks"]["like"]}} for n, s in each["splits"].items()}}
        for each in weeks()
    ]
    assert ids
    assert set(ids).isdisjoint(re.findall(r' id="([^"]+)"', weeks_figure(other, "x")))


def test_figures_have_the_colours_of_the_style_sheet() -> None:
    light = re.match(r":root \{(.*?)\}", (TEMPLATES / "style.css").read_text(), re.DOTALL)
    assert light
    assert COLOURS.items() <= dict(re.findall(r"--([\w-]+): (#\w+);", light[1])).items()
    assert len(set(COLOURS.values())) == len(COLOURS), "a colour in a figure has one name"
