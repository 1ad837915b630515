"""The page at `/`, on which a person tries the model: one file that asks for nothing but this server's own pages."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from fastapi.responses import Response


@lru_cache(maxsize=1)
def _loaded() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs nothing but the script and style in the file, which it knows by their
    checksums, and lets them ask nobody but this server."""
    text = files("mmoe_rec.server.page").joinpath("page.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_checksum(text, 'script')}",
        f"style-src {_checksum(text, 'style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def _checksum(text: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def page() -> Response:
    """The page. It holds nothing of the model, so that everybody may see it."""
    content, headers = _loaded()
    return Response(content, headers=headers, media_type="text/html")
