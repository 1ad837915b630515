"""HTTP that is wrong or rare. Each case says which statuses its replies must have; none may hang."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.abuse.wire import everything, replies_in, served

HANGS_AFTER = 30.0  # seconds: the server closes what stays idle within ten


@dataclass(frozen=True)
class Case:
    """What to send, and the statuses that must come."""

    name: str
    data: bytes
    statuses: tuple[int, ...]


def _post(body: bytes, *headers: str, first: str = "POST /invocations HTTP/1.1", own_length: bool = False) -> bytes:
    length = [] if own_length else [f"Content-Length: {len(body)}"]
    kind = (
        [] if any(each.lower().startswith("content-type") for each in headers) else ["Content-Type: application/json"]
    )
    return "\r\n".join([first, "Host: localhost", *kind, *length, *headers, "\r\n"]).encode("latin-1") + body


def cases(body: bytes) -> list[Case]:
    """All cases; body: of a valid call."""
    length, close = f"Content-Length: {len(body)}", "Connection: close"
    chunked = b"%x;a=b\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(body), body)
    coded = "Transfer-Encoding: chunked"
    zipped = gzip.compress(body)
    columns = json.loads(body)
    columns["inputs"][0]["candidates"] = {f"column{number}": [1] for number in range(9_000)}
    lengths = ["-5", "+5", "0x10", "9" * 40, "5, 5", "", "1_0"]
    return [
        Case("a call", _post(body, close), (200,)),
        Case("two calls", _post(body) + _post(body, close), (200, 200)),
        Case("two lengths", _post(body, "Content-Length: 3"), (400,)),
        Case("the same length twice", _post(body, length), (400,)),
        Case("a length and chunks", _post(chunked, coded), (400,)),
        Case("chunks and a length", _post(chunked, coded, length, own_length=True), (400,)),
        Case("chunks alone", _post(chunked, coded, close, own_length=True), (200,)),
        Case("gzip in chunks", _post(chunked, "Transfer-Encoding: gzip, chunked", own_length=True), (415,)),
        Case("chunks in gzip", _post(chunked, "Transfer-Encoding: chunked, gzip", own_length=True), (400,)),
        Case("unknown coding", _post(chunked, "Transfer-Encoding: xchunked", own_length=True), (400,)),
        Case("space before a colon", _post(chunked, "Transfer-Encoding : chunked", own_length=True), (400,)),
        Case("a huge chunk", _post(b"f" * 20 + b"\r\n" + body, coded, own_length=True), (400,)),
        *(
            Case(f"length {each[:9]!r}", _post(body, f"Content-Length: {each}", own_length=True), (400,))
            for each in lengths
        ),
        Case("Expect: 100-continue", _post(body, "Expect: 100-continue", close), (200,)),
        Case(
            "Expect and too large",
            _post(b"", "Expect: 100-continue", "Content-Length: 99999999", own_length=True),
            (413,),
        ),
        Case("HTTP/1.0", _post(body, first="POST /invocations HTTP/1.0"), (200,)),
        Case("HTTP/9.9", _post(body, first="POST /invocations HTTP/9.9"), (400,)),
        Case("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
        Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 50, (400,)),
        Case("HEAD", _post(b"", close, first="HEAD /health HTTP/1.1"), (200,)),
        Case("HEAD of a call", _post(b"", close, first="HEAD /invocations HTTP/1.1"), (405,)),
        Case("CONNECT", _post(b"", close, first="CONNECT /invocations HTTP/1.1"), (405,)),
        Case("no method", _post(b"", close, first="BREW / HTTP/1.1"), (400,)),
        Case("a page's name and a slash", _post(body, close, first="POST /invocations/ HTTP/1.1"), (404,)),
        Case("bytes in the path", b"GET /\xff\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", (400,)),
        Case("2,000 headers", _post(body, close, *(f"X-{number}: y" for number in range(2_000))), (200,)),
        Case("10,000 headers", _post(b"", *(f"X-{number}: yyyy" for number in range(10_000))), (431,)),
        Case("odd case", _post(body, "cOnTeNt-TyPe: APPLICATION/JSON", "CONNECTION: Close"), (200,)),
        Case("a folded header", _post(body, "X: a\r\n b"), (400,)),
        Case("NUL in a header", _post(body, "X: a\0b"), (400,)),
        Case("bare line ends", _post(body).replace(b"\r\n", b"\n"), (400,)),
        Case("gzip", _post(zipped, "Content-Encoding: gzip", close), (415,)),
        Case("gzip that is not named", _post(zipped, close), (400,)),
        Case("8 MiB of [", _post(b"[" * 2**23, close), (400,)),
        Case("9,000 columns", _post(json.dumps(columns).encode(), close), (400,)),
        Case("Upgrade: h2c", _post(body, "Connection: Upgrade", "Upgrade: h2c"), (400,)),
        Case(
            "Upgrade: websocket",
            _post(b"", "Connection: Upgrade", "Upgrade: websocket", first="GET /health HTTP/1.1"),
            (200,),
        ),
        Case("a call, then no HTTP", _post(body) + b"garbage\r\n\r\n", (200,)),
        Case("empty lines first", b"\r\n\r\n" + _post(body, close), (200,)),
    ]


def odd(model: Path, folder: Path) -> dict[str, Any]:
    """The part's counts."""
    example = json.loads((model / "example_request.json").read_text(encoding="utf-8"))["inputs"][0]
    wrong = []
    todo = cases(json.dumps({"inputs": [example]}).encode())
    with served(model, folder) as running:
        for case in todo:
            with running.wire().socket as connection:
                connection.sendall(case.data)
                came, how = everything(connection, HANGS_AFTER)
            if how == "open" or not _is_right(case, came):
                wrong.append(case.name)
                print(f"{case.name}: {how}, {came[:300]!r}")
        tracebacks = running.log.read_text().count("Traceback")
    return {"cases": len(todo), "wrong": wrong, "tracebacks": tracebacks}


def _is_right(case: Case, came: bytes) -> bool:
    if case.data.startswith(b"HEAD"):
        return came.startswith(b"HTTP/1.1 %d " % case.statuses) and came.endswith(b"\r\n\r\n")
    replies = replies_in(came)
    return tuple(status for status, _ in replies) == case.statuses and all(_is_json(body) for _, body in replies)


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
