"""The style of all figures, and figures as SVG inside a page.

The colours are those of the style sheet's light form (`templates/style.css`). Within a page they are named instead, as
`var(--train)`, and so follow it from light to dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
"""For lines side by side, such as one for each task."""

_NAMES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_ROUNDED = {"d", "x", "y", "transform"}  # attributes of places, where a hundredth of a point is enough


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many inches, whose parts make room for each other."""
    made = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=COLOURS["card"])
    FigureCanvasAgg(made)
    return made


def plain(axes: Axes) -> None:
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


def svg(drawn: Figure, label: str, hints: Mapping[str, Sequence[str]]) -> str:
    """The figure as an `svg` element for the middle of a page, without a background; the same for the same figure.

    Args:
        drawn: a figure whose texts and sizes are in points, which become the units of the element.
        label: what it shows, for readers who cannot see it; no other figure of the page has the same.
        hints: gid of a collection -> one text for each of its shapes, shown where one points at it. The gid becomes
            the class of the group.
    """
    drawn.patch.set_visible(False)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    used = set(re.findall(r'(?:href="|url\()#(\w+)', stream.getvalue()))
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in each.attrib.items()}
        each.attrib.clear()
        each.attrib.update({name: _short(name, value) for name, value in attributes.items()})
        each.text, each.tail = (each.text or "").strip(), None
        name = each.get("id", "")
        if name not in used:  # matplotlib's own names are the same in every figure
            each.attrib.pop("id", None)
        if name in hints:
            each.set("class", name)
            shapes = [shape for shape in each.iter() if shape.tag.endswith(("}path", "}use")) and not shape.get("id")]
            for shape, hint in zip(shapes, hints[name], strict=True):
                ElementTree.SubElement(shape, "title").text = hint
    for each in [*root.findall("metadata"), *(part for part in root.findall("defs") if part.find("style") is not None)]:
        root.remove(each)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _short(name: str, value: str) -> str:
    """An attribute with named colours, the page's font, and places to a hundredth."""
    if name in _ROUNDED:
        return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))
    if name == "style":
        value = re.sub(r" ?font-family: [^;]+;", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: _NAMES.get(found[0], found[0]), value)
    return value
