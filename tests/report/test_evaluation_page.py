"""The page of an evaluation: what it says first, what it draws, and how it looks in a browser."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.report.evaluation import page, write_results
from mmoe_rec.report.sentences import describe_verdict
from tests.report.evaluations import evaluation
from tests.report.parsed import Page
from tests.server.browser import browser


@pytest.fixture(scope="module")
def results() -> Results:
    return evaluation()


def said(results: Results) -> str:
    return " ".join(Page(page(results)).words.split())


def test_the_verdict_comes_first_and_values_stand_with_intervals(results: Results) -> None:
    words, compared = said(results), results.comparison
    assert compared is not None
    verdict = describe_verdict(compared, "old", results.first.summary)
    assert words.index(verdict[0].upper() + verdict[1:]) < words.index("metric ")
    assert words.index("The model was trained on rows of 'old'.") < words.index("metric ")
    for summary in results.summaries.values():
        auc = summary.tasks["bought"].get("auc")
        assert f"{auc.value:.4f}{auc.low:.4f} to {auc.high:.4f}" in words
    assert f"{compared.against['old'].groups['bought']['auc'].value:+.4f}" in words
    for each in ("0.75", "log of bought", "odds of bought", "added of spent"):
        assert each in words
    assert words.index("kind: few & far") < words.index("kind: many"), "a slice that is worse stands first"


def test_one_model_alone_has_no_verdict(results: Results) -> None:
    model = replace(results.first, slices={}, gates=None)
    words = said(replace(results, models={"new": model}))
    for each in (
        "--against says which one is better",
        "No slices were measured.",
        "Predictions in files tell nothing of gates.",
    ):
        assert each in words
    assert "minus old" not in words


def test_its_figures_are_in_files_too(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    table = pq.read_table(tmp_path / "metrics.parquet")
    rows = {(each["model"], each["less"], each["group"], each["metric"]): each for each in table.to_pylist()}
    auc = asdict(results.summaries["old"].tasks["bought"].get("auc"))
    assert {name: rows["old", None, "bought", "auc"][name] for name in auc} == auc
    compared = results.comparison
    assert compared is not None
    apart = compared.against["old"]
    assert rows["new", "old", "score", "mrr"]["p"] == apart.groups["score"]["mrr"].p
    assert rows["new", "old", "objective", "objective"]["value"] == apart.objective.value
    assert rows["old", None, "catalogue", "gini_at_5"]["low"] is None
    assert pq.read_table(tmp_path / "slices.parquet").num_rows == len(results.slices)
    assert json.loads((tmp_path / "against/1/metrics.json").read_text())["tasks"]["bought"]["auc"] == auc
    alone = replace(results, models={"new": replace(results.first, slices={})})
    (tmp_path / "calibration_bought.png").touch()
    write_results(alone, tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"metrics.json", "metrics.parquet", "report.html"}


def test_it_opens_in_a_browser_and_fits(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    with browser(tmp_path) as opened:
        for width, dark in ((1200, False), (390, True)):
            opened.size(width, 900, dark=dark)
            opened.open((tmp_path / "report.html").as_uri())
            (title,) = opened.texts("h1")
            assert title == "Evaluation of bought"
            assert len(opened.texts("tbody tr")) > 20
            labels = "return [...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))"
            assert opened.run(labels) == [
                "predicted against observed probabilities of bought by new",
                "predicted against observed probabilities of bought by old",
            ]
            assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth"), "it is too wide"
            wide = "return [...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().width > 200)"
            assert opened.run(wide)
