"""The page of an evaluation: what it says first, what it draws, and how it looks in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.report.evaluation import Made, metrics_table, page
from tests.report.evaluations import evaluation
from tests.report.parsed import Page
from tests.server.browser import CHROMIUM, DRIVER, browser


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluation()


def said(report: dict[str, Any]) -> str:
    return " ".join(Page(page(report)).words.split())


def test_the_verdict_comes_first(report: dict[str, Any]) -> None:
    words = said(report)
    verdict = report["comparison"]["against"]["old"]["verdict"]["sentence"]
    shown = verdict[0].upper() + verdict[1:]
    assert words.index(shown) < words.index("metric ")
    assert "'old' was trained on these rows." in words
    assert words.index("'old' was trained") < words.index("metric ")


def test_values_stand_with_intervals_and_differences(report: dict[str, Any]) -> None:
    words = said(report)
    for summary in (each["summary"] for each in report["models"].values()):
        auc = summary["tasks"]["bought"]["auc"]
        assert f"{auc['value']:.4f}{auc['low']:.4f} to {auc['high']:.4f}" in words
    apart = report["comparison"]["against"]["old"]["groups"]["bought"]["auc"]
    assert f"{apart['value']:+.4f}" in words
    assert "kind: few & far" in words
    assert "0.75" in words
    assert "log of bought" in words
    assert "of 22 that were tried" in words or "of 21 that were tried" in words
    assert "this model" in words


def test_a_slice_that_is_worse_stands_first(report: dict[str, Any]) -> None:
    words = said(report)
    assert words.index("kind: few & far") < words.index("kind: many")


def test_one_model_alone_has_no_verdict(report: dict[str, Any]) -> None:
    alone = {**report, "models": {"new": report["models"]["new"]}, "comparison": None, "findings": [], "slices": []}
    words = said({**alone, "tradeoffs": []})
    assert "Weights of tasks are tried for models with several tasks" in words
    words = said(alone)
    assert "Nothing suspicious found" in words
    assert "--against says which one is better" in words
    assert "No slices were measured." in words
    assert "minus old" not in words
    without = {**alone, "models": {"new": {**alone["models"]["new"], "gates": None}}}
    assert "Predictions in files tell nothing of gates." in said(without)


def test_its_figures_are_in_files_too(report: dict[str, Any], tmp_path: Path) -> None:
    Made.of(report).write(tmp_path)
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.equals(metrics_table(report))
    rows = {(each["model"], each["less"], each["group"], each["metric"]): each for each in table.to_pylist()}
    auc = report["models"]["old"]["summary"]["tasks"]["bought"]["auc"]
    found = rows["old", None, "bought", "auc"]
    assert {name: found[name] for name in auc} == auc
    apart = report["comparison"]["against"]["old"]
    assert rows["new", "old", "score", "mrr"]["p"] == apart["groups"]["score"]["mrr"]["p"]
    assert rows["new", "old", "objective", "objective"]["value"] == apart["objective"]["value"]
    assert rows["old", None, "catalogue", "gini_at_5"]["low"] is None
    assert pq.read_table(tmp_path / "slices.parquet").num_rows == len(report["slices"])
    Made.of({**report, "slices": []}).write(tmp_path)
    assert not (tmp_path / "slices.parquet").exists()


@pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="needs Chromium and chromedriver")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_it_opens_in_a_browser_and_fits(report: dict[str, Any], width: int, dark: bool, tmp_path: Path) -> None:
    Made.of(report).write(tmp_path)
    with browser(tmp_path) as opened:
        opened.size(width, 900, dark=dark)
        opened.open((tmp_path / "report.html").as_uri())
        (title,) = opened.texts("h1")
        assert title == "Evaluation of bought"
        assert len(opened.texts("tbody tr")) > 20
        assert opened.run("return [...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))") == [
            "predicted against observed probabilities of bought by new",
            "predicted against observed probabilities of bought by old",
            "NDCG@10 of bought and spent by weights in the score",
            "what values of position do to each task",
        ]
        assert opened.run("return document.documentElement.scrollWidth <= window.innerWidth"), "the page is too wide"
        assert opened.run(
            "return [...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().width > 200)"
        )
