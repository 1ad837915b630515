"""The page and the terminal say what was found; the numbers are JSON by the letter."""

import io
import json
import re

import pytest
from rich.console import Console

from mmoe_rec.profiling.health_report import make_report, write
from mmoe_rec.report.parts import to_terminal
from mmoe_rec.report.report_files import to_html
from tests.profiling.encoded_data import changed, drifting, health_of_frames, random_frames, spoiling
from tests.report.parsed import Page


@pytest.fixture(scope="module")
def health(tmp_path_factory) -> dict:
    left_out = [{"file": "logs/7.parquet", "reason": "is truncated"}]
    return health_of_frames(tmp_path_factory.mktemp("rows"), changed(1, spoiling), left_out=left_out)


def page(health: dict) -> str:
    return to_html(make_report(health))


def told(health: dict, width: int = 200) -> str:
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
        "Left out: logs/7.parquet: is truncated",
        "labels</span>",
    ):
        assert words in text
    assert "Nothing suspicious found" not in text
    assert "shares of training and test rows in the bins of " in text
    assert "Nothing suspicious found" in page(health_of_frames(tmp_path, random_frames(5)))


def test_the_terminal_shows_the_costliest_warnings(tmp_path):
    health = health_of_frames(tmp_path, changed(14, drifting))
    text, more = page(health), len(health["findings"]) - 5
    Page(text)
    assert text.count("drift</span>") > 1
    assert told(health).count("warning: ") == 5
    assert f"{more} more warnings, which cost less, are in the report" in told(health)


def test_files_are_json_without_nan_and_the_page(health, tmp_path):
    def forbidden(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write(health, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["health.json", "report.html", "report.json"]
    read = json.loads((tmp_path / "out" / "health.json").read_text(), parse_constant=forbidden)
    assert read == health
    assert read["overview"]["splits"]["test"]["tasks"]["stars"]["rate"] is None
    assert (tmp_path / "out" / "report.html").read_text() == page(health)


def test_the_terminal_shows_every_feature_in_80_columns(health):
    text = told(health, 80)
    assert max(map(len, text.splitlines())) <= 80
    for feature in health["features"]:
        assert re.search(rf"^ {feature['name']} ", text, re.MULTILINE), feature["name"]
    assert "problem: " in text
    for files, words in ((None, ": 0 files, "), (1, ": 1 file, "), (1234, ": 1,234 files, ")):
        assert words in make_report({**health, "overview": {**health["overview"], "files": files}}).about


def test_requests_of_several_times_and_labels_that_had_not_matured_are_told(tmp_path):
    requests = {"count": 1234, "several_times": 56, "longest_microseconds": 5_400_000_000}
    splits = {"train": {"rows": 9, "known_by": 1_714_521_600_000_000, "unmatured": {"like": 1, "click": 0}}}
    health = health_of_frames(tmp_path, random_frames(22), requests=requests, splits=splits)
    sentences = [
        "56 of 1,234 requests have rows of several times, up to 90.0 minutes apart: all rows of a request take its "
        "first time",
        "train: 1 label of like had not matured by 2024-05-01 00:00 UTC and does not count",
    ]
    for sentence in sentences:
        assert sentence in told(health)
        assert sentence[1:] in page(health)
    plain = health_of_frames(tmp_path / "plain", random_frames(22))
    assert "several times" not in page(plain)
    assert "had not matured" not in page(plain)
