"""Drawn worlds for logs of firms, and what is right to say of such a log."""

import hashlib
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

DAY = 86_400_000_000  # microseconds
YEAR_2024 = 1_704_067_200_000_000
CATEGORIES = 8


@dataclass(frozen=True)
class Label:
    """What a task is: its kind, by which column its rows are observed (any of these; None: all that have a label), and
    the least and most days until the label is final."""

    kind: str = "binary"
    observed: tuple[str | None, ...] = (None,)
    days: tuple[float, float] = (0, 1)


@dataclass(frozen=True)
class Answers:
    """What is right. `|` stands between answers that are all right.

    columns: user, candidate, request, time and so on -> column, "-" for none; roles: role -> columns that have it, ""
    for those that no feature may read without a mark; leaks, outcomes: what no feature may read whatever is marked, the
    latter may be tasks; kinds: column -> kinds of feature that may read it, "" for none without a mark; settings: path
    -> value; refused: a word of the sentence that refuses, where no settings can be right.
    """

    columns: dict[str, str]
    roles: dict[str, str]
    tasks: dict[str, Label]
    leaks: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class HeldOut:
    """A log, with its further logs of events, by the path of each file."""

    files: dict[str, pa.Table]
    answers: Answers
    events: dict[str, pa.Table] = field(default_factory=dict)
    best: float | None = None

    def write(self, folder: Path, rows_in_group: int = 1000) -> list[str]:
        """Writes `folder`/log and `folder`/events; the words that `init` takes besides its options."""
        for name, files in {"log": self.files, "events": self.events}.items():
            for path, table in files.items():
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, folder / name / path, row_group_size=rows_in_group)
        events = ["--events", str(folder / "events")] if self.events else []
        return [str(folder / "log"), *events]


@dataclass(frozen=True)
class World:
    """(N,) arrays of a drawn log's rows in the order of time, which is in microseconds; the others are numbers."""

    random: np.random.Generator
    user: np.ndarray
    item: np.ndarray
    request: np.ndarray
    category: np.ndarray
    position: np.ndarray
    time: np.ndarray
    probability: np.ndarray
    clicked: np.ndarray

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.user)

    def of(self, which: np.ndarray, values: Any) -> np.ndarray:
        """(N,) values, one of a list drawn for each user, item or request."""
        return self.random.choice(np.asarray(values), which.max() + 1)[which]

    def some(self, given: np.ndarray, share: float, strength: float = 1.0) -> np.ndarray:
        """(N,) 0 or 1 where `conditional_on`, else 0: likelier where a click was."""
        pull = strength * (np.log(self.probability / (1 - self.probability)) + 1)
        return (given & (self.random.random(self.rows) < 1 / (1 + np.exp(-np.log(share / (1 - share)) - pull)))) * 1

    def best(self, labels: np.ndarray) -> float:
        """AUC of the true probabilities on the last fifth of the time."""
        late = self.time >= self.time.min() + 0.8 * (self.time.max() - self.time.min())
        return float(roc_auc_score(labels[late], self.probability[late]))


def draw_world(
    seed: int,
    rows: int,
    users: int,
    items: int,
    days: float,
    shown: int = 5,
    start: int = YEAR_2024,
    bias: float = -1.6,
) -> World:
    """Requests of `shown` different items each, by users and items of unequal frequency."""
    random, requests = np.random.default_rng(seed), rows // shown
    popular = np.log(random.pareto(1.5, items) + 0.1)
    user = random.choice(users, requests, p=(weights := random.pareto(2, users) + 0.1) / weights.sum())
    time = start + np.sort(random.random(requests) * days * DAY).astype(np.int64)
    item = np.argsort(-(popular + random.gumbel(size=(requests, items))), axis=1)[:, :shown]
    category = random.integers(0, CATEGORIES, items)
    taste, quality = random.normal(0, 1.2, (users, CATEGORIES)), random.normal(0, 0.6, items)
    turn, moment = random.random(items), (time - start)[:, None] / (days * DAY)
    logit = bias + taste[user[:, None], category[item]] + quality[item]
    logit = logit + 0.8 * np.sin(2 * np.pi * (moment * 1.5 + turn[item])) - 0.2 * np.arange(shown)
    probability = 1 / (1 + np.exp(-logit.ravel()))
    flat = item.ravel()
    return World(
        random,
        np.repeat(user, shown),
        flat,
        np.repeat(np.arange(requests), shown),
        category[flat],
        np.tile(np.arange(shown), requests),
        np.repeat(time, shown),
        probability,
        (random.random(len(flat)) < probability) * 1,
    )


def draw_job_board(seed: int, rows: int, users: int, jobs: int, skills: int = 60) -> pa.Table:
    """Requests of six jobs each, where users apply if they have a job's skills and the place and the salary fit."""
    random, requests = np.random.default_rng(seed), rows // 6
    user = np.repeat(random.integers(0, users, requests), 6)
    job = np.argsort(random.random((requests, jobs)), axis=1)[:, :6].ravel()

    def some_skills(number: int, fewest: int, most: int) -> np.ndarray:
        """(number, skills) bool."""
        ranks = np.argsort(np.argsort(random.random((number, skills)), axis=1), axis=1)
        return ranks < random.integers(fewest, most + 1, (number, 1))

    of_user, of_job = some_skills(users, 4, 20), some_skills(jobs, 2, 6)
    city_of_user, city_of_job = random.integers(0, 12, users)[user], random.integers(0, 12, jobs)[job]
    wish, salary = (np.round(40_000 * np.exp(random.normal(0, 0.25, number)), -2) for number in (users, jobs))
    covered = (of_user[user] & of_job[job]).sum(axis=1) / of_job[job].sum(axis=1)
    quality, gap = random.normal(0, 0.5, jobs)[job], np.log(salary[job] / wish[user])
    logit = -3.4 + 5 * covered + 1.2 * (city_of_user == city_of_job) + 1.5 * gap + quality
    names = np.array([f"skill {number}" for number in range(skills)])
    cities = np.array([f"city {number}" for number in range(12)])
    time = YEAR_2024 + np.sort(random.random(requests) * 60 * DAY).astype(np.int64)
    return pa.table(
        {
            "request_id": np.repeat(np.arange(requests), 6),
            "user_id": [f"U{number}" for number in user],
            "job_id": [f"J{number}" for number in job],
            "shown_at": at(np.repeat(time, 6)),
            "user_skills": pa.array([names[row].tolist() for row in of_user]).take(pa.array(user)),
            "user_city": cities[city_of_user],
            "user_salary": wish[user],
            "experience": random.integers(0, 30, users)[user],
            "job_skills": pa.array([names[row].tolist() for row in of_job]).take(pa.array(job)),
            "job_main_skill": names[of_job.argmax(axis=1)][job],
            "job_city": cities[city_of_job],
            "job_salary": salary[job],
            "company": [f"company {number // 4}" for number in job],
            "applied": (random.random(len(user)) < 1 / (1 + np.exp(-logit))) * 1,
        }
    )


def at(times: np.ndarray, unit: str = "us", zone: str | None = None, known: np.ndarray | None = None) -> pa.Array:
    """Timestamps; null where `known` is not true."""
    mask = None if known is None else ~known.astype(bool)
    return pa.array(times, pa.int64(), mask=mask).cast(pa.timestamp("us")).cast(pa.timestamp(unit), safe=False).cast(
        pa.timestamp(unit, zone)
    )  # fmt: skip


def where(known: np.ndarray, values: Any, kind: pa.DataType | None = None) -> pa.Array:
    """Values; null where `known` is not true."""
    return pa.array(values, kind, mask=~known.astype(bool))


def uuids(random: np.random.Generator, number: int) -> np.ndarray:
    """(N,) UUIDs as text."""
    return np.array([str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(number)])


def hashed(values: np.ndarray) -> list[str]:
    """A digest of each value."""
    return [hashlib.md5(f"salt {value}".encode()).hexdigest()[:12] for value in values.tolist()]
