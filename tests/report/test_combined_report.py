"""One page of the reports in a `data.work_dir`: what is there, what is missing, and what no longer holds."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmoe_rec.evaluation.results_report import write_results
from mmoe_rec.inference.artifact import artifact_version, write_manifest
from mmoe_rec.profiling.health_report import write_health
from mmoe_rec.report.parts import Report, Sentence
from mmoe_rec.report.report_files import to_html, write_report
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training.combined_report import combine_reports
from mmoe_rec.training.provenance import fixed_settings
from tests.pipelines.learnable_log import write_files
from tests.profiling.encoded_data import changed, drifting, health_of_frames
from tests.report.evaluations import evaluation
from tests.report.parsed import Page
from tests.server.browser import browser


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.work_dir` with an inspection, an evaluation, a comparison and a model."""
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    work = folder / "work"
    write_health(health_of_frames(folder / "rows", changed(14, drifting), fingerprint="new"), work / "inspection")
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


def joined(world: Path) -> Report:
    return combine_reports(load_settings(world / "settings.yaml"), lambda *words: " ".join(words))


def test_what_is_there_is_reported_and_what_is_missing_has_its_command(world: Path) -> None:
    message = [sentence.text for sentence in joined(world).sentences]
    missing = [text.partition("missing. Run ")[2] for text in message if "missing. Run" in text]
    assert missing == ["`train`", "`baselines --model models:/learnable@champion`", "`tune --minutes 30`"]
    (data,) = (text for text in message if text.startswith("The data, "))
    assert " warnings found, first: 60." in data
    assert any(re.match("The model on test rows, .* UTC: 'new' is ", text) for text in message)


def test_what_no_longer_holds_is_marked(world: Path) -> None:
    work, settings = world / "work", fixed_settings(load_settings(world / "settings.yaml"))
    version = artifact_version(work / "model")
    second = json.loads(json.dumps(settings))
    second["training"]["epochs"] = 7
    for identity, stale in (
        ({}, []),
        ({"features": "new", "model": version, "settings": settings}, []),
        ({"features": "old"}, [f"it was made with other features than the features in '{work / 'features'}'"]),
        ({"model": "0" * 16}, [f"it was made with another model than '{work / 'model'}'"]),
        ({"settings": second}, ["it was made with training.epochs 7, and now it is 2"]),
    ):
        write_report(compared(**identity), work / "comparison")
        message = [sentence.text for sentence in joined(world).sentences if sentence.mark == "warning"]
        title = "Comparison of variants: "
        assert [text.removeprefix(title) for text in message if text.startswith(title)] == stale
    write_report(compared(), work / "comparison")


def test_the_page_holds_all_parts_and_opens_in_a_browser(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    report = joined(world)
    file.write_text(to_html(replace(report, about="long" * 60)), encoding="utf-8")
    whole = Page(file.read_text(encoding="utf-8"))
    assert len(whole.ids) == len(set(whole.ids))
    assert {target.removeprefix("#") for target in whole.targets} <= set(whole.ids)
    assert "leave out price: nothing is lost" in " ".join(whole.words.split())
    assert {figure.title.partition(":")[0] for figure in report.figures} == {"The data", "The model on test rows"}
    with browser(tmp_path) as opened:
        for width, dark in ((1280, False), (390, True)):
            opened.size(width, 900, dark=dark)
            opened.open(file.as_uri())
            opened.run("document.querySelectorAll('details').forEach(e => e.open = true)")
            assert opened.texts("h1") == [report.title]
            assert len(opened.texts("tbody tr")) > 15
            wide = "return [...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().width > 200)"
            assert opened.run(wide)
            assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth"), "it is too wide"
            assert opened.complaints() == []


def test_nothing_found_is_said(world: Path, tmp_path: Path) -> None:
    settings = load_settings(world / "settings.yaml", ["--data.work_dir", str(tmp_path)])
    assert combine_reports(settings, lambda *words: " ".join(words)).headline == "no reports yet"
