"""Ids of requests, and which of them are logged."""

from __future__ import annotations

import hashlib
import secrets
import uuid

_JAVASCRIPT_BITS = 53
"""Integers beyond lose digits in JavaScript, and events with such ids would belong to no request."""


def new_id(integer: bool) -> int | str:
    """An id for a request that has none: a random integer from 1 to 2^53, or 32 hexadecimal digits."""
    return secrets.randbelow(2**_JAVASCRIPT_BITS) + 1 if integer else uuid.uuid4().hex


def is_logged(request: int | str, share: float) -> bool:
    """Whether a request is one of the share that is logged.

    It depends on the id alone, so all servers, and all calls with one id, agree.
    """
    if share >= 1:
        return True
    digest = hashlib.blake2b(str(request).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
