"""Requests of any kind over connections that are kept, with valid ones between them."""

import json
import queue
import random
import string
import threading
import time
from collections import Counter
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.benchmarks.abuse.strategies import MARKER, Requests, largest, valid
from tests.benchmarks.abuse.wire import WORKERS, Reply, Running, Sent, Wire, served
from tests.benchmarks.memory import tree_bytes

CLIENTS = 4
VALID_EVERY = 20
AT_ONCE = 500  # Hypothesis keeps what it has drawn within a run, and gets slower
TENTHS = 10
MOST_GROWTH = 0.05
MOST_SHOWN = 12
LONGEST_SENTENCE = 500
LONGEST_QUOTE = 80
CLOSE = 1e-6


class Fuzzing:
    """Clients that send what is drawn, and what came of it."""

    def __init__(self, running: Running, model: Path, seed: int) -> None:
        self._running, self._random = running, random.Random(seed)
        self._todo: queue.Queue[Sent | None] = queue.Queue(maxsize=50)
        self.outcomes: Counter[str] = Counter()
        self.shown: list[str] = []
        self.slowest = 0.0
        self._lock = threading.Lock()
        self.valid = [Sent(body) for body in valid(model)]
        self.first = [running.ask(each) for each in self.valid]
        self.checked = self.asked_again = 0

    def run(self, requests: Any, count: int, seed: int) -> None:
        """Sends so many drawn requests, and waits for the last reply."""
        clients = [threading.Thread(target=self._send, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for start in range(0, count, AT_ONCE):
                self._draw(requests, min(AT_ONCE, count - start), seed + start)
        finally:
            for _ in clients:
                self._todo.put(None)
            for client in clients:
                client.join()

    def _draw(self, requests: Any, count: int, seed: int) -> None:
        left = count
        while left > 0:  # a run may end early, where Hypothesis has drawn all that there is

            @hypothesis.seed(seed + left)
            @hypothesis.settings(
                max_examples=left,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(requests)
            def put(sent: Sent) -> None:
                nonlocal left
                if left > 0:
                    left -= 1
                    self._todo.put(sent)

            put()

    def _send(self, number: int) -> None:
        wire = self._running.wire()
        letters, sent_count = random.Random(number), 0
        while (sent := self._todo.get()) is not None:
            marker = "".join(letters.choices(string.ascii_lowercase, k=len(MARKER)))
            own = replace(sent, body=sent.body.replace(MARKER.encode(), marker.encode()))
            start = time.perf_counter()
            try:
                found = self._judged(own, marker, wire)
            except (OSError, HTTPException, ValueError) as error:
                found = f"bad: {type(error).__name__}"
            self.slowest = max(self.slowest, time.perf_counter() - start)
            with self._lock:
                self.outcomes[found] += 1
                if found.startswith("bad") and len(self.shown) < MOST_SHOWN:
                    self.shown.append(
                        f"{found}: {own.method} {own.target} {dict(own.headers)} {len(own.body)}: {own.body[:400]!r}"
                    )
            sent_count += 1
            if sent_count % VALID_EVERY == 0:
                self._check(wire, letters.randrange(len(self.valid)))
        wire.close()

    def _judged(self, sent: Sent, marker: str, wire: Wire) -> str:
        return outcome(sent, self._reply(wire, sent), marker)

    def _reply(self, wire: Wire, sent: Sent) -> Reply:
        was_kept = wire.is_open
        try:
            return wire.ask(sent)
        except (ConnectionError, HTTPException):
            if not was_kept:
                raise
            # The server ends connections that were idle for five seconds; a client then asks on another one.
            with self._lock:
                self.asked_again += 1
            return wire.ask(sent)

    def _check(self, wire: Wire, at: int) -> None:
        try:
            reply: Reply | None = self._reply(wire, self.valid[at])
        except (OSError, HTTPException):
            reply = None
        with self._lock:
            self.checked += 1
            if reply is None or not same(self.first[at], reply):
                self.outcomes["bad: another reply to a valid request"] += 1
                self.shown.append(f"valid {at}: {reply}"[:700])


def fuzz(model: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The part's counts."""
    requests = Requests(model).requests
    with served(model, folder) as running:
        fuzzing = Fuzzing(running, model, seed)
        start = time.perf_counter()
        for body in 2 * WORKERS * largest(model):  # on new connections, so that each worker gets some
            fuzzing.outcomes[f"largest: {running.ask(Sent(body)).status}"] += 1
        memory = []
        for tenth in range(TENTHS):
            fuzzing.run(requests, count // TENTHS, seed + tenth * 10**6)
            memory.append(tree_bytes(running.process.pid))
        seconds = time.perf_counter() - start
        # Each alone in a pass now, so that no bit may differ.
        alone = sum(
            running.ask(each).body == first.body for each, first in zip(fuzzing.valid, fuzzing.first, strict=True)
        )
        workers = len(running.workers())
        log = running.log.read_text(errors="replace")
    for line in fuzzing.shown:
        print(line)
    return {
        "requests": sum(fuzzing.outcomes.values()),
        "outcomes": dict(sorted(fuzzing.outcomes.items())),
        "valid_within_1e-6": fuzzing.checked,
        "valid_bit_for_bit": f"{alone} of {len(fuzzing.valid)}",
        "memory_mib_by_tenth": [round(each / 2**20) for each in memory],
        "memory_grown": round(memory[-1] / memory[0] - 1, 4),
        "is_flat": memory[-1] / memory[0] - 1 < MOST_GROWTH,
        "asked_again": fuzzing.asked_again,
        "slowest_seconds": round(fuzzing.slowest, 2),
        "workers_at_the_end": workers,
        "lines_logged": len(log.splitlines()),
        "tracebacks": log.count("Traceback"),
        "seconds": round(seconds),
    }


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
