"""One page of what the jobs of a `data.work` have found: what is there, what is missing, and what no longer holds."""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from mmoe_rec.inference.artifact import version_of, write_manifest
from mmoe_rec.jobs.overview import JOBS, Part, page, read_parts
from mmoe_rec.report.evaluation import write_results
from mmoe_rec.report.health import write
from mmoe_rec.report.pages import embed
from mmoe_rec.settings.load import load_settings
from mmoe_rec.training.origin import fixed_settings
from tests.pipelines.learnable_log import write_files
from tests.profiling.encoded_data import changed, drifting, health_of_frames
from tests.report.evaluations import evaluation
from tests.report.parsed import Page
from tests.report.test_pages import FROM_ELSEWHERE
from tests.server.browser import browser


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.work` with an inspection, an evaluation, a comparison without a page, and nothing else."""
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    work = folder / "work"
    write(health_of_frames(folder / "rows", changed(14, drifting), fingerprint="new"), work / "inspection")
    write_results(evaluation(), work / "evaluation")
    (work / "features").mkdir(parents=True)
    (work / "features" / "manifest.json").write_text(json.dumps({"fingerprint": "new"}))
    (work / "comparison").mkdir()
    told = {"sentences": ["leave out `price`: nothing is lost", "<b>'x' & y</b>"], "facts": {}}
    (work / "comparison" / "comparison.json").write_text(json.dumps(told))
    return folder


def parts_of(world: Path) -> dict[str, Part]:
    settings = load_settings(world / "settings.yaml")
    commands = {job.words[0] for job in JOBS if job.words}
    return {part.name: part for part in read_parts(settings, lambda *words: " ".join(words), commands)}


def touch(file: Path, seconds: float) -> None:
    os.utime(file, (seconds, seconds))


def test_what_is_there_is_told_and_what_is_missing_has_its_command(world: Path) -> None:
    parts = parts_of(world)
    missing = {name: part.command for name, part in parts.items() if part.command is not None}
    assert missing == {
        "model": "train",
        "baselines": "baselines --model models:/learnable@champion",
        "tuning": "tune --minutes 30",
    }
    assert " warnings found; above all: 60." in parts["inspection"].sentences[0]
    assert parts["evaluation"].sentences[0].startswith("'new' is ")
    assert parts["comparison"].sentences[0] == "leave out `price`: nothing is lost"
    settings = load_settings(world / "settings.yaml")
    assert [part.name for part in read_parts(settings, lambda *words: "", {"train"}) if part.command is not None] == [
        "model"
    ]


def test_what_no_longer_holds_is_marked(world: Path) -> None:
    """By the fingerprint where a job has noted it, else by its age."""
    manifest, compared = (world / "work" / name for name in ("features/manifest.json", "comparison/comparison.json"))
    made = compared.stat().st_mtime
    touch(manifest, made - 60)
    before = parts_of(world)
    assert before["inspection"].stale == before["evaluation"].stale == ()
    assert before["comparison"].stale == ("its page is missing: it is being written, or was stopped",)
    manifest.write_text(json.dumps({"fingerprint": "newer"}))
    touch(manifest, made + 60)
    after = parts_of(world)
    features = f"'{manifest.parent}'"
    assert after["inspection"].stale == (f"it is of other features than those in {features}",)
    assert after["comparison"].stale[0] == f"it is older than the features in {features}"
    manifest.write_text(json.dumps({"fingerprint": "new"}))
    touch(manifest, made - 60)
    damaged = world / "work" / "tuning"
    damaged.mkdir()
    (damaged / "comparison.json").write_text("{")
    assert parts_of(world)["tuning"].command == "tune --minutes 30"
    (damaged / "report.html").write_text("<main></main>")
    assert "without sentences" in parts_of(world)["tuning"].stale[0]
    settings = fixed_settings(load_settings(world / "settings.yaml"))
    for epochs, stale in ((2, ()), (7, ("it was made with training.epochs 7, and now it is 2",))):
        tree = {"sentences": ["none helps"], "fingerprint": "new", "settings": settings}
        tree["settings"]["training"]["epochs"] = epochs
        (damaged / "comparison.json").write_text(json.dumps(tree))
        assert parts_of(world)["tuning"].stale == stale
    shutil.rmtree(damaged)


def test_what_is_of_another_model_is_marked(world: Path) -> None:
    model, metrics = world / "work" / "model", world / "work" / "evaluation" / "metrics.json"
    model.mkdir()
    (model / "weights").write_text("1")
    write_manifest(model)
    made, tree = metrics.stat().st_mtime, json.loads(metrics.read_text())
    touch(model / "manifest.json", made + 60)
    assert parts_of(world)["evaluation"].stale == (f"it is older than the model in '{model}'",)
    for version, stale in ((version_of(model), ()), ("0" * 16, (f"it is of another model than that in '{model}'",))):
        metrics.write_text(json.dumps({**tree, "facts": {"artifact": version}}))
        assert parts_of(world)["evaluation"].stale == stale
    metrics.write_text(json.dumps(tree))
    shutil.rmtree(model)


def test_the_last_training_is_told(world: Path) -> None:
    work = world / "work"
    (work / "checkpoints").mkdir()
    (work / "model").mkdir()
    ended = {"best": {"auc": {"click": 0.71234, "liked": None}}, "best_step": 1200, "compared": ["it is 'champion'"]}
    (work / "checkpoints" / "finished.json").write_text(json.dumps(ended))
    (work / "model" / "model.json").write_text(json.dumps({"fingerprint": "old", "early_end": "ended early"}))
    part = parts_of(world)["model"]
    assert part.sentences == (
        "validation AUC, at step 1,200: click 0.7123",
        "it is 'champion'",
        "the model ended early",
    )
    assert part.stale == (f"it is of other features than those in '{work / 'features'}'",)
    (work / "checkpoints" / "finished.json").write_text("{}")
    assert "without sentences" in parts_of(world)["model"].stale[0]
    shutil.rmtree(work / "checkpoints")
    shutil.rmtree(work / "model")


def test_a_page_stands_inside_of_another_with_names_of_its_own() -> None:
    inner = (
        '<main>\n<h1>A</h1><p id="x">id="y" of</p><a href="#x">x</a><h2 id="z">Z</h2><h3>z</h3>'
        '<svg><g clip-path="url(#p1)"/><use href="#m"/></svg></main>'
    )
    assert embed(inner, "one") == (
        '\n<p id="one-x">id="y" of</p><a href="#one-x">x</a><h3 id="one-z">Z</h3><h4>z</h4>'
        '<svg><g clip-path="url(#one-p1)"/><use href="#one-m"/></svg>'
    )
    assert embed("<main><script>1</script></main>", "one") is None
    assert embed("plain", "one") is None


def test_the_page_stands_alone_with_headings_in_order(world: Path) -> None:
    text = page("Report: x", "about", ["caution'"], list(parts_of(world).values()))
    whole = Page(text)
    assert whole.tags.isdisjoint(FROM_ELSEWHERE)
    assert len(whole.ids) == len(set(whole.ids))
    assert {target.removeprefix("#") for target in whole.targets} <= set(whole.ids)
    assert not re.search(r"https?:|@import|//[a-z]+\.", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    levels = [int(level) for level in re.findall(r"<h([1-6])\b", text)]
    assert levels[0] == levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    words = " ".join(whole.words.split())
    first = words.index("leave out price: nothing is lost")
    assert words.index("What is known") < first < words.index("Search for settings") < words.index("All of it")
    assert "<b>'x' & y</b>" in words


def test_it_opens_in_a_browser_and_nothing_is_too_wide(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page("Report: x", "about " + "long" * 60, [], list(parts_of(world).values())), encoding="utf-8")
    with browser(tmp_path) as opened:
        for width, dark in ((1280, False), (390, True)):
            opened.size(width, 900, dark=dark)
            for address in (file.as_uri(), (world / "work" / "inspection" / "health.html").as_uri()):
                opened.open(address)
                opened.run("document.querySelectorAll('details').forEach(e => e.open = true)")
                assert len(opened.texts("tbody tr")) > 15
                assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth"), "it is too wide"
                assert opened.complaints() == []


def test_nothing_found_is_said() -> None:
    assert "Nothing is known yet" in page("Report", "about", [], [Part("model", "The model", command="train")])
