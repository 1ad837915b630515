"""Every page stands alone, is well-formed, and escapes what comes from the data."""

import re
from html import unescape
from typing import Any

import pytest
from jinja2 import UndefinedError

from mmoe_rec.evaluation.ablation import GROUP, Part, Worth
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.summary import Objective
from mmoe_rec.evaluation.trainings import SettingsDifference, TrainingsMean
from mmoe_rec.inference.costs import Cost
from mmoe_rec.jobs import overview
from mmoe_rec.report import ablation, evaluation, health, structures, trainings, tuning
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
        "trainings.html.j2": trainings.page(of_trainings()),
        "structures.html.j2": structures.page(of_structures()),
        "ablation.html.j2": ablation.page(of_ablation()),
        "tuning.html.j2": tuning.page(of_tuning()),
        "overview.html.j2": overview.page(f"{EVIL}x", EVIL, [EVIL], [part, overview.Part("b", EVIL, command=EVIL)]),
    }


def of_trainings() -> trainings.TrainingsReport:
    """Two trainings, beside those of another setting."""
    apart = Difference(0.1, 0.05, 0.15, 0.02, None, 0.001, 0.002, 0.1)
    task = f"{EVIL}click"
    summary = {task: {"auc": TrainingsMean(0.7, 0.6, 0.8, 0.01, 0.02, (0.69, 0.71))}}
    old = SettingsDifference(apart, {task: {"auc": apart}}, "auc", "higher")
    told = {"against": {f"{EVIL}old": old}, "warnings": [EVIL], "facts": {f"{EVIL}log": EVIL}}
    return trainings.TrainingsReport(f"{EVIL}new", (17, 18), 1_000, "users", summary, **told)


def of_structures() -> structures.StructuresReport:
    """A structure beside another one, and a task alone; another task has too few labels."""
    apart, task = Difference(0.1, 0.05, 0.15, 0.02, None, 0.001, 0.002, 0.1), f"{EVIL}click"
    change, alone = f"{EVIL}model: {{}}", f"only {task}"
    rows = [
        structures.StructureRow("MMoE", {task: structures.Cell(0.7)}, 100, 1.5),
        structures.StructureRow(alone, {task: structures.Cell(0.6, apart)}, None, 1.5),
    ]
    answers = [
        structures.Answer("structure", "PLE", None, (), "auc", "lower", change, apart),
        structures.Answer("alone", alone, task, (f"{EVIL}liked",), "auc", "lower", change, apart),
    ]
    named = (f"{EVIL}new", "MMoE", (17, 18), 1_000, "users", f"auc of {task}")
    few, facts = {f"{EVIL}liked": 3}, {f"{EVIL}log": EVIL}
    return structures.StructuresReport(*named, rows, answers, {task: "auc"}, few, 0.005, False, [EVIL], facts)


def of_ablation() -> ablation.AblationReport:
    """A feature and a group, both with costs; another feature reads the first one's table."""
    apart, feature = Difference(0.1, 0.05, 0.15, 0.02, None, 0.001, 0.002, 0.1), f"{EVIL}item"
    objective = Objective("auc", (f"{EVIL}click",), "higher")
    parts = Part(feature, (feature,)), Part(f"{EVIL}group", (feature, f"{EVIL}user"), GROUP)
    worths = [Worth(each, apart, {f"{EVIL}click": apart}) for each in parts]
    costs, readers = {each.name: Cost(1.0, 0.1, 100) for each in parts}, {feature: [f"{EVIL}bought"]}
    told = {
        "placement": [f"{EVIL}slot"],
        "facts": {f"{EVIL}log": EVIL, "rows": "3 rows"},
        "retrained": worths,
        "seeds": 2,
    }
    return ablation.AblationReport(
        f"{EVIL}new", objective, 0.7, 0.01, worths, worths[0], costs, readers, fingerprint=EVIL, **told
    )


def of_tuning() -> tuning.TuningReport:
    """One alternative that was taken, one that failed, and one that takes other features."""
    apart, name = Difference(0.1, 0.05, 0.15, 0.02, None, 0.001, 0.002, 0.1), f"{EVIL}alternative"
    tried = [tuning.TriedAlternative(name, apart, 3, taken=True)]
    named = (f"{EVIL}new", f"{EVIL}file", f"{EVIL}best", f"auc of {EVIL}click")
    told = {"not_tried": [EVIL], "facts": {f"{EVIL}log": EVIL}}
    return tuning.TuningReport(
        *named, (20.0, 10.0), 5, {f"{EVIL}failed": EVIL}, tried, [name], apart, (3, 3), [name], (1.0, 1.0), **told
    )


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


def test_differences_from_other_trainings_are_shown(pages: dict[str, str]) -> None:
    assert "+0.1000+0.0500 to +0.1500" in " ".join(Page(pages["trainings.html.j2"]).words.split())


def test_means_of_trainings_are_told() -> None:
    assert of_trainings().means == [f"{EVIL}click: auc 0.7000 (0.6000 to 0.8000) on average of 2 trainings"]


def test_names_from_the_data_are_escaped(pages: dict[str, str]) -> None:
    names = {
        "health.html.j2": ("item", "click", "stars", "tags", "item_id", "made up"),
        "evaluation.html.j2": ("new", "old"),
        "trainings.html.j2": ("new", "old", "click", "log"),
        "structures.html.j2": ("new", "click", "log"),
        "ablation.html.j2": ("new", "item", "log"),
        "tuning.html.j2": ("new", "alternative", "log"),
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
