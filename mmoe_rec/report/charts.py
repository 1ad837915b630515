"""Figures for HTML reports, drawn with Matplotlib.

`COLORS` repeats the light theme in `templates/style.css`. In a page, these colors become CSS variables such as
`var(--train)`, so that figures follow the switch between light and dark.
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
"""Colors of several lines in one figure, such as a line for each task."""
_CSS_VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with automatic layout.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=COLORS["card"])
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> Axes:
    """Give `axes` a light grid, no ticks, and a frame only at the left and bottom, and return them."""
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
    """Return a figure as an `svg` element for a page, without a background. Equal figures give equal elements.

    Args:
        drawn: The figure. One point becomes one unit of the `viewBox`.
        label: Description for readers who can't see the figure, unique within the page.
    """
    drawn.patch.set_visible(False)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    document = stream.getvalue()
    box = document.partition('viewBox="')[2].partition('"')[0]
    text = document.partition("<svg")[2].partition(">")[2].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Matplotlib's default IDs, such as `figure_1`, would occur in every figure of a page. Keep only referenced IDs.
    used = set(re.findall(r'(?:href="|url\()#(\w+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    # Cut coordinates after the hundredths of a point.
    coordinates = re.compile(r'(?<= )(?:d|x|y|transform)="[^"]*"')
    text = coordinates.sub(lambda match: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(match[0].split())), text)
    text = re.sub(r"#[0-9a-f]{6}", lambda match: _CSS_VARIABLES.get(match[0], match[0]), text)
    text = re.sub(r">\s+<", "><", re.sub(r" ?font-family: [^;\"]+;?", "", text))
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{text.strip()}'
