"""The token that callers may have to show."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from mmoe_rec.errors import UserError

TOKEN_VARIABLE = "MMOE_REC_TOKEN"
OPEN_PATHS = ("/health", "/ping")
PAGE = "/"  # which asks a person for the token


def read_token(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token in a file, else in the environment; None where there is neither.

    It is no argument of the command, as any user of the machine can list those. Raises UserError for a file that can't
    be read, and for an empty token.
    """
    if file is None:
        token, where = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        where = f"'{file}'"
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the token file '{file}' can't be read: {error}") from None
    if token is not None and not token.strip():
        raise UserError(f"the token in {where} is empty; give one, or leave it out to let everybody in")
    return None if token is None else token.strip()


def is_allowed(path: str, authorization: bytes, token: str | None) -> bool:
    """Whether a request for a path may be answered. authorization: the header, empty where there is none."""
    if token is None or path in (*OPEN_PATHS, PAGE):
        return True
    scheme, _, given = authorization.partition(b" ")
    # Takes the same time whatever is given, so that the token can't be found letter by letter.
    return hmac.compare_digest(given.strip(), token.encode()) and scheme.lower() == b"bearer"
