"""One page of the reports in a `data.work`: what is there, what is missing, and what no longer holds."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from mmoe_rec.evaluation.results_report import write_results
from mmoe_rec.inference.artifact import version_of, write_manifest
from mmoe_rec.profiling.health_report import write
from mmoe_rec.report.parts import Report, Sentence
from mmoe_rec.report.report_files import write_report
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training.origin import fixed_settings
from mmoe_rec.training.overview import JOBS, Part, read_parts, to_page
from tests.pipelines.learnable_log import write_files
from tests.profiling.encoded_data import changed, drifting, health_of_frames
from tests.report.evaluations import evaluation
from tests.report.parsed import Page
from tests.report.test_pages import FROM_ELSEWHERE
from tests.server.browser import browser


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.work` with an inspection, an evaluation, a comparison and a model."""
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    work = folder / "work"
    write(health_of_frames(folder / "rows", changed(14, drifting), fingerprint="new"), work / "inspection")
    write_results(evaluation(), work / "evaluation")
    (work / "features").mkdir(parents=True)
    (work / "features" / "manifest.json").write_text(json.dumps({"fingerprint": "new"}))
    write_report(compared(), work / "comparison")
    (work / "model").mkdir()
    (work / "model" / "weights").write_text("1")
    write_manifest(work / "model")
    return folder


def compared(**identity: object) -> Report:
    headline = "leave out `price`: nothing is lost"
    return Report("Comparison", headline, sentences=[Sentence("<b>'x' & y</b>")], identity=identity)


def parts_of(world: Path) -> dict[str, Part]:
    settings = load_settings(world / "settings.yaml")
    commands = {job.words[0] for job in JOBS if job.words}
    return {part.name: part for part in read_parts(settings, lambda *words: " ".join(words), commands)}


def test_what_is_there_is_told_and_what_is_missing_has_its_command(world: Path) -> None:
    parts = parts_of(world)
    missing = {name: part.command for name, part in parts.items() if part.report is None}
    assert missing == {
        "training": "train",
        "baselines": "baselines --model models:/learnable@champion",
        "tuning": "tune --minutes 30",
    }
    assert " warnings found; above all: 60." in parts["inspection"].report.headline
    assert parts["evaluation"].report.headline.startswith("'new' is ")
    settings = load_settings(world / "settings.yaml")
    found = read_parts(settings, lambda *words: "", {"train"})
    assert [part.name for part in found if part.report is None] == ["training"]


def test_what_no_longer_holds_is_marked(world: Path) -> None:
    work, settings = world / "work", fixed_settings(load_settings(world / "settings.yaml"))
    version = version_of(work / "model")
    other = json.loads(json.dumps(settings))
    other["training"]["epochs"] = 7
    for identity, stale in (
        ({}, ()),
        ({"features": "new", "model": version, "settings": settings}, ()),
        ({"features": "old"}, (f"it is of other features than those in '{work / 'features'}'",)),
        ({"model": "0" * 16}, (f"it is of another model than that in '{work / 'model'}'",)),
        ({"settings": other}, ("it was made with training.epochs 7, and now it is 2",)),
    ):
        write_report(compared(**identity), work / "comparison")
        assert parts_of(world)["comparison"].stale == stale
    write_report(compared(), work / "comparison")


def test_the_page_stands_alone_with_headings_in_order(world: Path) -> None:
    text = to_page("Report: x", "about", ["caution'"], list(parts_of(world).values()))
    whole = Page(text)
    assert whole.tags.isdisjoint(FROM_ELSEWHERE)
    assert len(whole.ids) == len(set(whole.ids))
    assert {target.removeprefix("#") for target in whole.targets} <= set(whole.ids)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", text)]
    assert levels[0] == levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    words = " ".join(whole.words.split())
    first = words.index("Leave out price: nothing is lost")
    assert words.index("What is known") < first < words.index("Search for settings") < words.index("All of it")
    assert "<b>'x' & y</b>" in words


def test_it_opens_in_a_browser_and_nothing_is_too_wide(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_page("Report: x", "about " + "long" * 60, [], list(parts_of(world).values())), encoding="utf-8")
    with browser(tmp_path) as opened:
        for width, dark in ((1280, False), (390, True)):
            opened.size(width, 900, dark=dark)
            for address in (file.as_uri(), (world / "work" / "inspection" / "report.html").as_uri()):
                opened.open(address)
                opened.run("document.querySelectorAll('details').forEach(e => e.open = true)")
                assert len(opened.texts("tbody tr")) > 15
                assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth"), "it is too wide"
                assert opened.complaints() == []


def test_nothing_found_is_said() -> None:
    assert "Nothing is known yet" in to_page("Report", "about", [], [Part("training", "The model", command="train")])
