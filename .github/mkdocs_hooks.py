"""Adapt pages, which are written for GitHub, to the site."""

import html
import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Unlink files outside docs/, which the site doesn't have, and mark diagrams for mermaid.js."""

    def unlink(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[2]))
        return link[1] if target.startswith("../") else link[0]

    def diagram(block: re.Match[str]) -> str:
        return f'<pre class="mermaid">\n{html.escape(block[1])}</pre>'

    markdown = re.sub(r"^```mermaid\n(.*?)^```$", diagram, markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", unlink, markdown)
