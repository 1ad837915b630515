"""One page of all that the jobs of a `data.work` have found: the verdicts first, then each job's page, folded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmoe_rec.report.pages import render

_MAIN = re.compile(r"<main>(.*)</main>", re.DOTALL)
_TITLE = re.compile(r"<h1>.*?</h1>", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """What a job has found. name: tells it from others on the page; sentences: its verdicts; made: when; stale: why it
    may no longer hold; page: its page as it stands, None without one; command: finds it out, where it is missing."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    made: str = ""
    stale: Sequence[str] = ()
    page: str | None = None
    command: str | None = None

    @property
    def body(self) -> str | None:
        """The inside of its page, for the middle of another one."""
        return None if self.page is None else embed(self.page, self.name)


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


def page(title: str, about: str, cautions: Sequence[str], parts: Sequence[Part]) -> str:
    """The whole page. about: a sentence on where it is from; cautions: what is to be known of all parts."""
    return render("overview.html.j2", {"title": title, "about": about, "cautions": cautions, "parts": parts})
