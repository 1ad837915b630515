"""Every page stands alone, is well-formed, and escapes what comes from the data."""

import re
from html import unescape
from typing import Any

import pytest
from jinja2 import UndefinedError

from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.trainings import TrainingsMean
from mmoe_rec.jobs import overview
from mmoe_rec.report import evaluation, experiment, health
from mmoe_rec.report.pages import TEMPLATES, render
from tests.profiling.encoded_data import LAYOUT, SCHEMA, changed, health_of_frames, spoiling
from tests.report import evaluations
from tests.report.parsed import Page

EVIL = "</title></style><script>alert('x')</script>\"'&amp; {{ 7 * 7 }} $x$ `y` "
FROM_ELSEWHERE = {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}


def hostile(value: Any, names: set[str]) -> Any:
    """The same with something evil before all names that come from a user."""
    if isinstance(value, dict):
        return {hostile(key, names): hostile(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, names) for each in value]
    return EVIL + value if isinstance(value, str) and value in names else value


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Template -> a page with all of its parts, in which all names are hostile."""

    left_out = [{"file": f"logs/{EVIL}.parquet", "reason": EVIL}]
    splits = {"train": {"rows": 9, "known_by": 1_714_521_600_000_000, "unmatured": {"click": 1}}}
    folder = tmp_path_factory.mktemp("rows")
    found = health_of_frames(folder, changed(1, spoiling), left_out=left_out, log=EVIL, splits=splits)
    names = {*SCHEMA.features, *SCHEMA.tasks, "made up", "item_id", "user_id", "tags", "look", "item 3"}
    names |= {each.name for each in (*LAYOUT.tables, *LAYOUT.ids, *LAYOUT.dense)}
    names |= {part["bin"] for feature in found["features"] for each in feature["inputs"] for part in each["bins"]}
    names |= {each["message"] for each in found["findings"]}
    part = overview.Part("a", f"{EVIL}part", [EVIL] * 4, EVIL, [EVIL], "<main><h1>x</h1><p>y</p></main>")
    judged = evaluation.page(evaluations.evaluation(f"{EVIL}new", f"{EVIL}old"))
    return {
        "health.html.j2": health.page(hostile(found, names - {"missing", "unknown", "all others"})),
        "evaluation.html.j2": judged,
        "experiment.html.j2": experiment.page(of_experiment()),
        "overview.html.j2": overview.page(f"{EVIL}x", EVIL, [EVIL], [part, overview.Part("b", EVIL, command=EVIL)]),
    }


def of_experiment() -> experiment.ExperimentReport:
    """A variant beside the settings, a task that isn't judged, and a further table."""
    apart, task = Difference(0.1, 0.05, 0.15, 0.02, None, 0.001, 0.002, 0.1), f"{EVIL}click"
    label = f"auc of {task}"
    base = experiment.VariantResult(f"{EVIL}base", "", False, {label: experiment.Cell("higher", 0.7)}, (), 100, 1.5)
    cells = {label: experiment.Cell("higher", 0.8, apart)}
    other = experiment.VariantResult(f"{EVIL}other", f"--{EVIL}x=1", True, cells, (label,), None, 1.5)
    means = {task: {"auc": TrainingsMean(0.7, 0.6, 0.8, 0.01, 0.02, (0.69, 0.71))}}
    told = {"few": {f"{EVIL}liked": 3}, "warnings": [EVIL], "facts": {f"{EVIL}log": EVIL}, "notes": [EVIL]}
    told["listings"] = [experiment.Listing(EVIL, (EVIL, "x"), [(f"{EVIL}row", "+0.1")])]
    return experiment.ExperimentReport(f"{EVIL}new", (17, 18), 1_000, "users", means, [base, other], 0.005, **told)


def test_no_page_is_forgotten(pages: dict[str, str]) -> None:
    extending = {path.name for path in TEMPLATES.glob("*.j2") if "{% extends" in path.read_text(encoding="utf-8")}
    assert extending == set(pages)


def test_pages_stand_alone_and_are_well_formed(pages: dict[str, str]) -> None:
    for text in pages.values():
        page = Page(text)
        assert text.startswith('<!doctype html>\n<html lang="en">\n')
        assert text.endswith("</html>\n")
        assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]+\.", text)
        assert page.tags.isdisjoint(FROM_ELSEWHERE)
        assert page.targets
        assert {target.removeprefix("#") for target in page.targets} <= set(page.ids)
        assert len(page.ids) == len(set(page.ids)), "figures of a page share an id"


def test_differences_of_variants_are_shown(pages: dict[str, str]) -> None:
    assert "+0.1000+0.0500 to +0.1500" in " ".join(Page(pages["experiment.html.j2"]).words.split())


def test_names_from_the_data_are_escaped(pages: dict[str, str]) -> None:
    names = {
        "health.html.j2": ("item", "click", "stars", "tags", "item_id", "made up"),
        "evaluation.html.j2": ("new", "old"),
        "experiment.html.j2": ("new", "base", "other", "click", "row", "log"),
        "overview.html.j2": ("x", "part"),
    }
    for template, text in pages.items():
        page = Page(text)
        assert all(re.fullmatch("(?!on)[a-z-]+", name) for name in page.attributes), page.attributes
        for name in names[template]:
            assert EVIL + name in page.words, f"{name} stands on the page as it is"
        assert "<script" not in text
        assert "&lt;script&gt;" in text
    health = pages["health.html.j2"]
    assert health.count("<title>Data set health: &lt;/title&gt;") == 1
    assert f"rate of {EVIL}click by week" in _labels(health)
    assert f"predicted against observed probabilities of bought by {EVIL}new" in _labels(pages["evaluation.html.j2"])


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("base.html.j2", {})


def _labels(text: str) -> list[str]:
    """What figures are called."""
    return [unescape(each) for each in re.findall(r'aria-label="([^"]*)"', text)]
