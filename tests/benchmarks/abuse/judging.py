"""Whether a reply is one that the server may give."""

from __future__ import annotations

import json
from typing import Any

from tests.benchmarks.abuse.wire import Reply, Sent

LONGEST_SENTENCE = 500
LONGEST_QUOTE = 80
CLOSE = 1e-6


def outcome(sent: Sent, reply: Reply, marker: str) -> str:
    """One word for a reply: its status, or `bad: ` and what is wrong with it.

    marker: letters that stand in the body and nowhere else.
    """
    wrong = _wrong_status(reply) or ("" if sent.method == "HEAD" else _wrong_body(sent, reply, marker))
    return f"bad: {wrong}" if wrong else str(reply.status)


def same(first: Reply, later: Reply) -> bool:
    """Whether two replies to one request are equal up to the last bits of their numbers: calls that share a pass are
    multiplied in other groups of rows.
    """
    return first.status == later.status == 200 and _close(json.loads(first.body), json.loads(later.body))


def _wrong_status(reply: Reply) -> str:
    if reply.status == 503:
        return "" if "retry-after" in reply.headers else "503 without Retry-After"
    return "" if reply.status == 200 or 400 <= reply.status < 500 else f"status {reply.status}"


def _wrong_body(sent: Sent, reply: Reply, marker: str) -> str:
    wrong, tree = "", None
    if reply.headers.get("content-type") == "application/json":
        try:
            tree = json.loads(reply.body, parse_constant=_no_constant)
        except ValueError:
            wrong = "no JSON"
        else:
            wrong = _wrong_refusal(tree) if reply.status != 200 else ""
    elif reply.status != 200 or sent.target not in ("/", "/metrics", "/docs"):
        wrong = "no JSON"
    told = [reply.body.decode("utf-8", "replace")]
    if reply.status == 200 and not wrong and sent.target.startswith("/invocations"):
        told = _sentences(tree["predictions"])  # each of which may quote
    echo = any(_echoes(each, sent.body, marker) for each in told)
    return wrong or (f"an echo at {reply.status}" if echo else "")


def _sentences(predictions: list[dict[str, Any]]) -> list[str]:
    """All sentences of rankings and of errors in their place, and what else they hold but ids, as one text."""
    told, rest = [], []
    for each in predictions:
        told += [*each.get("warnings", ()), *([each["error"]] if "error" in each else [])]
        rest.append({key: value for key, value in each.items() if key not in ("warnings", "error", "candidates")})
    return [*told, json.dumps(rest)]


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _wrong_refusal(tree: Any) -> str:
    if not isinstance(tree, dict) or tree.keys() != {"error_code", "message"}:
        return "a refusal of another form"
    if not 0 < len(tree["message"]) <= LONGEST_SENTENCE:
        return "no sentence, or a long one"
    return "several lines" if "\n" in tree["message"] else ""


def _echoes(text: str, body: bytes, marker: str) -> bool:
    """Whether more of the body stands in the reply than a sentence needs."""
    if not marker or marker not in text:
        return False
    if text.count(marker) * len(marker) > LONGEST_QUOTE:
        return True
    sent = body.decode("utf-8", "replace")
    start = max(text.index(marker) - LONGEST_QUOTE, 0)
    end = text.rindex(marker) + len(marker) + LONGEST_QUOTE
    return any(text[at : at + LONGEST_QUOTE + 1] in sent for at in range(start, min(end, len(text)) - LONGEST_QUOTE))


def _close(first: Any, later: Any) -> bool:
    if isinstance(first, float) and isinstance(later, float):
        return abs(first - later) <= CLOSE
    if isinstance(first, dict) and isinstance(later, dict):
        if "order" in first and "order" in later:  # candidates whose scores are as good as equal may change places
            first, later = _by_position(first), _by_position(later)
        return first.keys() == later.keys() and all(_close(first[key], later[key]) for key in first)
    if isinstance(first, list) and isinstance(later, list):
        return len(first) == len(later) and all(map(_close, first, later))
    return bool(first == later)


def _by_position(ranking: dict[str, Any]) -> dict[str, Any]:
    """A ranking of all candidates in the request's own order."""
    places = sorted(range(len(ranking["order"])), key=ranking["order"].__getitem__)
    columns = {"candidates": ranking["candidates"], "scores": ranking["scores"], **ranking["predictions"]}
    others = {key: value for key, value in ranking.items() if key not in ("order", "candidates", "scores")}
    return {**others, "predictions": {}, **{key: [column[at] for at in places] for key, column in columns.items()}}
