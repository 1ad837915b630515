"""Pages from the templates, and the style of the figures in them.

Each page stands alone: the style sheet is inside, and there is no script, font or picture. The colours are those of the
style sheet's light form (`templates/style.css`). Within a page they are named instead, as `var(--train)`, and so follow
it from light to dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmoe_rec.report.formatting import day, fixed, percent, rate, signed, size, thousands
from mmoe_rec.task_kinds import KINDS

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = {
    "card": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#646c79",
    "line": "#e3e6eb",
    "soft": "#f0f2f5",
    "train": "#7c93b8",
    "validation": "#b98a2f",
    "test": "#1f6fd1",
}
SERIES = (COLOURS["test"], "#c2571a", "#2f855a", "#7c3aed", "#b83280")
"""Colours of lines side by side, such as one for each task."""
_NAMES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_MAIN = re.compile(r"<main>(.*)</main>", re.DOTALL)
_TITLE = re.compile(r"<h1>.*?</h1>", re.DOTALL)


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page of that template. Whatever comes from `values` is escaped; a value that is missing is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for each in (day, fixed, percent, rate, size, thousands):
        environment.filters[each.__name__] = each
    environment.filters["mean_name"] = lambda kind: KINDS[kind].mean_name
    environment.filters["signed"] = lambda values: signed(*values)
    environment.filters["sentence"] = lambda words: words[:1].upper() + words[1:]
    return environment


def embed(page: str, name: str) -> str | None:
    """The inside of one of this package's pages, to stand below a heading of the second level of another one; its ids
    begin with a name. None for a page of another kind, such as one with a script."""
    found = _MAIN.search(page)
    if found is None or "<script" in page:
        return None
    body = _TITLE.sub("", found[1], count=1)
    for level in (3, 2):
        body = re.sub(rf"<(/?)h{level}\b", rf"<\1h{level + 1}", body)
    return re.sub(r'( id="| href="#|url\(#)(?=\w)', rf"\g<1>{name}-", body)


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many inches, whose parts make room for each other."""
    made = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=COLOURS["card"])
    FigureCanvasAgg(made)
    return made


def plain(axes: Axes) -> Axes:
    """Gives axes a light grid, no ticks, and no frame except left and bottom."""
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLOURS["muted"], which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(COLOURS["line"])
    axes.xaxis.label.set_color(COLOURS["ink"])
    axes.yaxis.label.set_color(COLOURS["ink"])
    return axes


def svg(drawn: Figure, label: str) -> str:
    """The figure as an `svg` element for the middle of a page, without a background; the same for the same figure.

    drawn: with texts and sizes in points, which become the units of the element; label: what it shows, for readers who
    cannot see it; no other figure of the page has the same.
    """
    drawn.patch.set_visible(False)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    whole = stream.getvalue()
    box = whole.partition('viewBox="')[2].partition('"')[0]
    text = whole.partition("<svg")[2].partition(">")[2].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#(\w+)', text))  # matplotlib's own names are the same in every figure
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    places = re.compile(r'(?<= )(?:d|x|y|transform)="[^"]*"')  # for which a hundredth of a point is enough
    text = places.sub(lambda found: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(found[0].split())), text)
    text = re.sub(r"#[0-9a-f]{6}", lambda found: _NAMES.get(found[0], found[0]), text)
    text = re.sub(r">\s+<", "><", re.sub(r" ?font-family: [^;\"]+;?", "", text))
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{text.strip()}'
