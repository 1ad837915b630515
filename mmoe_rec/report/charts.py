"""Figures of pages, drawn with Matplotlib.

The colors are those of the style sheet's light form (`templates/style.css`). In a page they are variables of the style
sheet, such as `var(--train)`, so that figures follow it from light to dark.
"""

import io
import re
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = {
    "card": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#646c79",
    "line": "#e3e6eb",
    "soft": "#f0f2f5",
    "train": "#7c93b8",
    "validation": "#b98a2f",
    "test": "#1f6fd1",
}
SERIES_COLORS = (COLORS["test"], "#c2571a", "#2f855a", "#7c3aed", "#b83280")
"""Colors of lines side by side, such as one for each task."""
_NAMES = {color: f"var(--{name})" for name, color in COLORS.items()}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, whose parts make room for each other."""
    made = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=COLORS["card"])
    FigureCanvasAgg(made)
    return made


def style_axes(axes: Axes) -> Axes:
    """Gives axes a light grid, no ticks, and no frame except left and bottom."""
    axes.grid(color=COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLORS["muted"], which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(COLORS["line"])
    axes.xaxis.label.set_color(COLORS["ink"])
    axes.yaxis.label.set_color(COLORS["ink"])
    return axes


def to_svg(drawn: Figure, label: str) -> str:
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
