"""The reference pages are up to date and complete, and links between pages resolve."""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from starlette.routing import Route

from docs.generate import render_pages
from mmoe_rec.evaluation.metrics import CATALOG_METRICS, METRICS
from mmoe_rec.server.app import Application
from mmoe_rec.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("*/README.md")]
GUIDES += [*(ROOT / "mmoe_rec").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]
GENERATED = render_pages()


def prose(path: Path) -> str:
    """Return the text of a page without code."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """Return the targets of a page's links to files and anchors."""
    targets = re.findall(r"\]\(([^()\s]+)\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    actual = set[str]()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        repeated = next(f"{slug}-{number}" for number in range(1, 99) if f"{slug}-{number}" not in actual)
        actual.add(repeated if slug in actual else slug)
    return actual


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == GENERATED[path], "run python docs/generate.py"


@pytest.mark.parametrize("path", sorted({*PAGES, *GUIDES}), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_the_index_links_every_page() -> None:
    index = DOCS / "index.md"
    assert {index.parent / link for link in links(index)} >= {*PAGES} - {index}


def test_every_metric_has_a_formula() -> None:
    by_hand = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8").partition("## All metrics")[0]
    for metric in (*METRICS, *CATALOG_METRICS):
        assert f"| `{re.sub(r'_at_[0-9]+', '_at_k', metric.name)}` |" in by_hand


def test_every_route_is_described() -> None:
    async def reload() -> None: ...

    models: Any = SimpleNamespace(options=ServerOptions(), current=MagicMock())
    routes = [route for route in Application(models, reload=reload)._app.routes if isinstance(route, Route)]
    assert routes
    page = (DOCS / "reference" / "http-api.md").read_text(encoding="utf-8")
    for route in routes:
        (method,) = (route.methods or set()) - {"HEAD"}
        assert f"`{method} {route.path}`" in page
