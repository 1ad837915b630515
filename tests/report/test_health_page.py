"""The page and the terminal say what was found; the numbers are JSON by the letter."""

import io
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from mmoe_rec.profiling.health_report import draw_label_rates, make_report, write_health
from mmoe_rec.report.charts import COLORS
from mmoe_rec.report.parts import to_terminal
from mmoe_rec.report.report_files import TEMPLATES, to_html
from tests.profiling.encoded_data import changed, drifting, health_of_frames, random_frames, spoiling
from tests.report.parsed import Page


@pytest.fixture(scope="module")
def health(tmp_path_factory) -> dict:
    skipped = [{"file": "logs/7.parquet", "reason": "is truncated"}]
    return health_of_frames(tmp_path_factory.mktemp("rows"), changed(1, spoiling), skipped=skipped)


def page(health: dict) -> str:
    return to_html(make_report(health))


def printed_text(health: dict, width: int = 200) -> str:
    """What a terminal shows."""
    console = Console(width=width, record=True, file=io.StringIO())
    for part in to_terminal(make_report(health)):
        console.print(part)
    return console.export_text()


def test_the_page_says_what_is_wrong_or_that_nothing_is(health, tmp_path):
    text = page(health)
    for words in (
        "2 problems and 1 warning found",
        "drift</span>",
        "Skipped: logs/7.parquet: is truncated",
        "labels</span>",
    ):
        assert words in text
    assert "Nothing suspicious found" not in text
    assert "fractions of training and test rows in the bins of " in text
    assert "Nothing suspicious found" in page(health_of_frames(tmp_path, random_frames(5)))


def test_the_terminal_shows_the_costliest_warnings(tmp_path):
    health = health_of_frames(tmp_path, changed(14, drifting))
    text, more = page(health), len(health["findings"]) - 5
    Page(text)
    assert text.count("drift</span>") > 1
    assert printed_text(health).count("warning: ") == 5
    assert f"{more} less harmful warnings are in the report" in printed_text(health)


def test_files_are_json_without_nan_and_the_page(health, tmp_path):
    def forbidden(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write_health(health, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["health.json", "report.html", "report.json"]
    read = json.loads((tmp_path / "out" / "health.json").read_text(), parse_constant=forbidden)
    assert read == health
    assert read["overview"]["splits"]["test"]["tasks"]["stars"]["rate"] is None
    assert (tmp_path / "out" / "report.html").read_text() == page(health)


def test_the_terminal_shows_every_feature_in_80_columns(health):
    text = printed_text(health, 80)
    assert max(map(len, text.splitlines())) <= 80
    for feature in health["features"]:
        assert re.search(rf"^ {feature['name']} ", text, re.MULTILINE), feature["name"]
    assert "problem: " in text
    for files, words in ((None, ": 0 files, "), (1, ": 1 file, "), (1234, ": 1,234 files, ")):
        assert words in make_report({**health, "overview": {**health["overview"], "files": files}}).about


def test_requests_of_several_times_and_labels_that_had_not_matured_are_reported(tmp_path):
    requests = {"count": 1234, "conflicting_times": 56, "longest_microseconds": 5_400_000_000}
    splits = {"train": {"rows": 9, "label_cutoff": 1_714_521_600_000_000, "pending_labels": {"like": 1, "click": 0}}}
    health = health_of_frames(tmp_path, random_frames(22), requests=requests, splits=splits)
    sentences = [
        "56 of 1,234 requests have rows with several times, up to 90.0 minutes apart. All rows of a request take its "
        "first time",
        "train: 1 label of like was not final by 2024-05-01 00:00 UTC and does not count",
    ]
    for sentence in sentences:
        assert sentence in printed_text(health)
        assert sentence[1:] in page(health)
    plain = health_of_frames(tmp_path / "plain", random_frames(22))
    assert "several times" not in page(plain)
    assert "not final" not in page(plain)


# The figures draw the numbers that were measured, in the colors of the page.


RATES = {"train": [0.2, 0.3, None], "validation": [0.25], "test": [0.5, 0.1]}
ROWS = {"train": [10, 40, 5], "validation": [20], "test": [30, 40]}
PLACES = {"train": [0, 1, 2], "validation": [2], "test": [3, 4]}


def weeks(task: str = "like") -> list[dict]:
    """Five weeks, the third of which two splits share."""
    actual: list[dict] = [{"week": f"2024-01-{1 + 7 * place:02}", "splits": {}} for place in range(5)]
    for split, places in PLACES.items():
        for place, rate, rows in zip(places, RATES[split], ROWS[split], strict=True):
            actual[place]["splits"][split] = {"tasks": {task: {"kind": "binary", "rate": rate, "observed": rows}}}
    return actual


def texts_of(figure: str) -> list[str]:
    return [item.text or "" for item in ElementTree.fromstring(figure).iter("text")]


def heights(figure: str, split: str) -> list[float]:
    """Of the bars of a split, boxes of its color that let others shine through."""
    style = re.compile(rf"fill: var\(--{split}\); opacity: 0.45")
    paths = [item for item in ElementTree.fromstring(figure).iter("path") if style.match(item.get("style", ""))]
    ys = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.attrib["d"])] for path in paths]
    return [max(item) - min(item) for item in ys]


def test_bars_are_as_high_as_rows_are_many_and_the_figure_names_weeks_and_splits() -> None:
    figure = draw_label_rates(weeks(), "like")
    actual = [height for split in ROWS for height in heights(figure, split)]
    expected = [rows / 40 for own in ROWS.values() for rows in own]
    assert [item / actual[1] for item in actual] == pytest.approx(expected, abs=2e-3)
    assert {"train", "test", "40", "rows", "1 Jan 24", "29 Jan 24", "40%"} <= set(texts_of(figure))


def test_the_same_figure_is_the_same_text_and_holds_nothing_but_itself() -> None:
    drawn = draw_label_rates(weeks(), "like")
    assert drawn == draw_label_rates(weeks(), "like")
    assert not re.search(r"metadata|<style|xmlns|DejaVu|\d{4}-\d\d-\d\dT", drawn)
    assert not re.search(r"#[0-9a-f]{6}\b(?![\"0-9a-f])", drawn), "a color that the page cannot turn dark"
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert len(ids) == len(set(ids))
    assert set(ids) == set(re.findall(r"(?:href=\"|url\()#([^\")]+)", drawn))
    assert ids
    assert set(ids).isdisjoint(re.findall(r' id="([^"]+)"', draw_label_rates(weeks("x"), "x")))


def test_figures_have_the_colors_of_the_style_sheet() -> None:
    light = re.match(r":root \{(.*?)\}", (TEMPLATES / "style.css").read_text(), re.DOTALL)
    assert light
    assert COLORS.items() <= dict(re.findall(r"--([\w-]+): (#\w+);", light[1])).items()
    assert len(set(COLORS.values())) == len(COLORS), "a color in a figure has one name"
