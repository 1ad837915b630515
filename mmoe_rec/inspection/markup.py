"""HTML and SVG as strings in which everything that is not markup is escaped."""

from __future__ import annotations

import html

_VOID = frozenset({"meta", "br", "wbr"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element. Children that are no `Markup` are escaped, as are attributes; `class_`, `stroke_width` and the like
    lose or change their underscore, and an attribute that is None is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{words}>" + ("" if name in _VOID else f"{joined(*children)}</{name}>"))


def joined(*children: str) -> Markup:
    """Children one after the other, escaped unless they are `Markup`."""
    return Markup("".join(each if isinstance(each, Markup) else html.escape(each) for each in children))


def breakable(name: str) -> Markup:
    """A name that may go on in a new line after each underscore."""
    return Markup(html.escape(name).replace("_", "_<wbr>"))


def prose(words: str) -> Markup:
    """Text in which `code` is set as such."""
    return joined(*(tag("code", part) if place % 2 else part for place, part in enumerate(words.split("`"))))
