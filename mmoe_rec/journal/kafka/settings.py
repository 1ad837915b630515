"""How a topic is reached: a file as Kafka's own tools take it (`client.properties`), and the topic's name."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe_rec.errors import UserError, quoted

_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}", re.ASCII)
_PRODUCER = {"acks": "all", "enable.idempotence": True, "linger.ms": 0}
_CONSUMER = {
    "enable.auto.commit": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "enable.partition.eof": False,
}
_FIXED: dict[str, Any] = {**_PRODUCER, **_CONSUMER, "transactional.id": None}
_FIXED.pop("linger.ms")
_ALIASES = {"request.required.acks": "acks"}
_PROPERTY = re.compile(r"((?:\\.|[^\\=:\s])+)\s*([=:]?)\s*(.*)")
_ESCAPED = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_QUIET_SECONDS = 30.0


@dataclass(frozen=True)
class KafkaTopic:
    """A topic. file: of properties, such as `bootstrap.servers=...`, with any key of librdkafka's; name: its own; says:
    whether to log what no broker tells of it, which one process of several does."""

    file: Path
    name: str
    says: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in (".", ".."):
            raise UserError(f"{quoted(self.name)} is no name of a Kafka topic: letters, digits, '.', '_' and '-'")


def read_properties(path: Path) -> dict[str, str]:
    """Key -> value of a file of properties, as Java reads those: `key=value`, `key: value` or `key value`.

    Raises UserError for what can't be read; no sentence holds a value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"the file of Kafka's settings '{path}' can't be read: {why}") from None
    found: dict[str, str] = {}
    for number, line in _lines(text):
        words = _PROPERTY.fullmatch(line)
        if words is None or not (words[2] or words[3]) or (key := _plain(words[1])) in found:
            what = (
                "is not KEY=VALUE" if words is None or not (words[2] or words[3]) else "gives a key for the second time"
            )
            raise UserError(f"'{path}', line {number}, {what}")
        found[key] = _plain(words[3])
    if not found.get("bootstrap.servers", "").strip(", "):
        raise UserError(f"'{path}' does not say where Kafka is: add bootstrap.servers=HOST:PORT")
    for key, value in found.items():
        fixed = _FIXED.get(name := _ALIASES.get(key, key), value)
        allowed = {str(fixed).lower()} | ({"-1"} if name == "acks" else set())
        if value.lower() not in {each.lower() for each in allowed}:
            raise UserError(f"'{path}' sets '{key}', which a journal needs otherwise: leave it out")
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number of its first line, and the text, of each property; one that ends with a backslash goes on in the next."""
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        words = line.strip()
        if not words or words[0] in "#!":
            continue
        while (len(words) - len(words.rstrip("\\"))) % 2:
            words = words[:-1] + next(lines, (0, ""))[1].strip()
        yield number, words


def _plain(text: str) -> str:
    """A key or value without its backslashes, as Java reads them."""

    def one(found: re.Match[str]) -> str:
        return chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2])

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", one, text)


def producer_settings(given: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Those of a producer whose messages are delivered within so many seconds, or not at all."""
    within = {} if {"message.timeout.ms", "delivery.timeout.ms"} & set(given) else {"message.timeout.ms": seconds * 1e3}
    within = {key: round(value) for key, value in within.items()}
    return {**_common(given), **_PRODUCER, **within}


def consumer_settings(given: Mapping[str, str]) -> dict[str, Any]:
    """Those of a consumer of one partition."""
    # A consumer must name a group, though this one joins none.
    return {"group.id": "mmoe-rec", **_common(given), **_CONSUMER}


def admin_settings(given: Mapping[str, str]) -> dict[str, Any]:
    """Those of a client that asks how a topic is set up."""
    return _common(given)


def _common(given: Mapping[str, str]) -> dict[str, Any]:
    return {"log.connection.close": False, **given, "logger": logger()}


class _Quiet(logging.Filter):
    """Lets one line pass in half a minute: clients say many times a second that a broker is away."""

    last = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if "CONFWARN" in record.getMessage():  # that a key of a producer's is none of a consumer's
            return False
        if now - self.last < _QUIET_SECONDS:
            return False
        self.last = now
        return True


def logger() -> logging.Logger:
    """What librdkafka says goes there."""
    found = logging.getLogger("mmoe_rec.kafka")
    if not found.filters:
        found.addFilter(_Quiet())
    return found


def refused(path: Path, error: Exception) -> UserError:
    """The error of settings that librdkafka does not take, without their values."""
    java = re.search(r"Java [A-Za-z]+ [a-z ]*not supported, (use|see) [A-Za-z0-9:/._ -]*[a-z]", str(error))
    if java is not None:
        return UserError(f"'{path}' has a key of Java's clients: {java[0]}")
    key = re.search(r'configuration property:? "?([a-z0-9._]+)', str(error))
    if key is None:
        return UserError(f"the Kafka settings in '{path}' do not go together, or can't be used on this machine")
    return UserError(
        f"'{path}' sets '{key[1]}', a key or value that librdkafka does not know; see its CONFIGURATION.md"
    )
