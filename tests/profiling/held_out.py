"""Logs as different firms would have them, each with the list of what is right to say of it, for `mmoe-rec init`.

They were written by someone who had not read `mmoe_rec.profiling`, but for `rows_one_by_one`. In each,
clicks follow from what a user likes among categories and from how well an item does at the time, so counters matter;
`best` is the AUC of the true probabilities over the last fifth of the time, which no model passes by more than chance.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from tests.profiling.worlds import DAY, YEAR_2024, Answers, HeldOut, Label, at, draw_world, hashed, uuids, where


def terse_news(seed: int) -> HeldOut:
    """A news feed whose columns have one letter: epoch seconds, sessions, embeddings, lists of tags; three days."""
    w = draw_world(seed, 9_000, 900, 120, 3, shown=6)
    random, hit = w.random, w.clicked.astype(bool)
    vectors = random.normal(size=(120, 16)).astype(np.float32)[w.item]
    tags = [[f"t{n}" for n in np.unique(random.integers(0, 30, 3))] for _ in range(120)]
    log = pa.table(
        {
            "t": w.time // 10**6,
            "u": [f"u{n:05d}" for n in w.user],
            "i": pa.array(w.item + 1, pa.int32()),
            "s": w.request + 50_000,
            "p": pa.array(w.position, pa.int8()),
            "a": pa.array(w.of(w.item, np.arange(60)) * 13 + 1001, pa.int32()),
            "ag": pa.array((w.time - YEAR_2024) / DAY * 24 + w.of(w.item, np.arange(100)), pa.float32()),
            "e": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16),
            "g": pa.array([tags[n] for n in w.item], pa.list_(pa.string())),
            "c": pa.array(w.clicked, pa.int8()),
            "d": where(hit, random.gamma(2, 30, w.rows), pa.float32()),
        }
    )
    answers = Answers(
        {"user": "u", "candidate": "i", "request": "s", "time": "t", "time_unit": "s"},
        {"placement": "p", "candidate": "a ag e g"},
        {"c": Label()},
        leaks=("d",),
        outcomes=("c", "d"),
        kinds={"a": "id", "e": "vector", "g": "ids", "ag": "numeric"},
    )
    order = random.permutation(w.rows)
    return HeldOut(
        {"a.parquet": log.take(order[:4000]), "b.parquet": log.take(order[4000:])}, answers, best=w.best(w.clicked)
    )


def video_days(seed: int) -> HeldOut:
    """Videos, a folder a day with an empty file among them, UUIDs, and a log of events of several types."""
    w = draw_world(seed, 10_000, 500, 200, 30, shown=8)
    random, played = w.random, w.clicked.astype(bool)
    viewer, page, day = uuids(random, 500)[w.user], uuids(random, w.request.max() + 1)[w.request], w.time // DAY
    log = pa.table(
        {
            "viewer": viewer,
            "video": [f"v_{n * 7919 % 10007}" for n in w.item],
            "page_view": page,
            "ts": at(w.time, "ns"),
            "slot": pa.array(w.position, pa.int32()),
            "channel": [f"ch{n % 23}" for n in w.item],
            "length_s": pa.array(w.of(w.item, np.arange(30, 3600)), pa.int32()),
            "published_at": at(w.of(w.item, YEAR_2024 - random.integers(0, 300 * DAY, 200)), "us", "UTC"),
            "app_version": w.of(w.request, ["4.1.0", "4.1.1", "5.0.0"]),
            "network": pa.array(w.of(w.request, ["wifi", "4g", None])),
            "country": w.of(w.user, ["us", "de", "br", "in"]),
            "played": pa.array(w.clicked, pa.int64()),
            "watched_s": np.where(played, random.gamma(2, 60, w.rows), 0.0),
            "thumbs_up": where(played, w.some(played, 0.1), pa.float64()),
        }
    )
    files = {
        f"day={np.datetime64(n, 'D')}/part.parquet": log.filter(pa.array(day == n)) for n in np.unique(day).tolist()
    }
    files["day=2024-02-15/part.parquet"] = log.slice(0, 0)
    seen = random.random(w.rows) < 0.4
    events = pa.table(
        {
            "occurred": at(w.time - random.integers(1, DAY, w.rows), "us"),
            "viewer": viewer,
            "video": log["video"],
            "channel": log["channel"],
            "type": random.choice(["search", "play", "share", "subscribe"], w.rows, p=[0.5, 0.4, 0.07, 0.03]),
        }
    ).filter(pa.array(seen))
    answers = Answers(
        {"user": "viewer", "candidate": "video", "request": "page_view", "time": "ts"},
        {
            "placement": "slot",
            "candidate": "channel length_s published_at",
            "context": "app_version network",
            "user": "country",
            "": "day",
        },
        {"played": Label(), "thumbs_up": Label(observed=("played", None))},
        leaks=("watched_s",),
        outcomes=("played", "watched_s", "thumbs_up"),
        kinds={"length_s": "numeric", "published_at": "time", "channel": "id"},
        settings={"data.events.*.time": "occurred"},
    )
    return HeldOut(files, answers, {"e.parquet": events}, best=w.best(w.clicked))


def tienda(seed: int) -> HeldOut:
    """A Spanish shop over three years: a sampled log, users who move, late labels, uint64, decimals, no request."""
    w = draw_world(seed, 10_000, 300, 250, 1095, start=YEAR_2024 - 1095 * DAY)
    random, bought = w.random, w.clicked.astype(bool)
    kept = bought | (w.of(w.request, [True, False]) & (random.random(w.rows) < 0.8))
    moved = w.time > YEAR_2024 - w.of(w.user, np.arange(0, 3000)) * DAY
    content = w.some(bought, 0.5)
    known = w.time + 28 * DAY + random.integers(0, DAY, w.rows)
    log = pa.table(
        {
            "usuario": [f"ES-{n:06d}" for n in w.user],
            "producto": w.item + 500_000,
            "fecha": at(w.time, "us"),
            "posicion": w.position + 1,
            "provincia": np.where(moved, w.of(w.user, ["M", "B", "V"]), w.of(w.user, ["SE", "Z", "MA"])),
            "categoria": pa.array(w.category, pa.int32()).cast(pa.string()).dictionary_encode(),
            "proveedor": pa.array(w.of(w.item, np.arange(30)) * 91 + 4001, pa.uint64()),
            "huella": pa.array(random.integers(2**63, 2**64 - 1, w.rows, dtype=np.uint64)),
            "precio": pa.array(
                np.round(w.of(w.item, np.arange(5, 200)) * (1 + (w.time - w.time.min()) / DAY / 3000), 2)
            ).cast(pa.decimal128(10, 2)),
            "descuento": pa.array(random.choice([0.0, 0.1, np.nan], w.rows), pa.float32()),
            "muestreo": np.where(bought, 1.0, 0.4),
            "compra": bought * 1,
            "satisfecho": where(bought & (known < w.time.max()), content, pa.int32()),
            "satisfecho_en": at(known, "us", None, bought & (known < w.time.max())),
        }
    ).filter(pa.array(kept))
    answers = Answers(
        {"user": "usuario", "candidate": "producto", "time": "fecha", "request": "-", "sampling_rate": "muestreo"},
        {
            "placement": "posicion",
            "user": "provincia",
            "candidate": "categoria proveedor precio",
            "": "huella",
            "candidate|context": "descuento",
        },
        {"compra": Label(), "satisfecho": Label(observed=("compra", None), days=(27, 40))},
        leaks=("satisfecho_en", "muestreo", "huella"),
        outcomes=("compra", "satisfecho"),
        kinds={"proveedor": "id", "precio": "numeric", "categoria": "id"},
    )
    return HeldOut(
        {"2021.parquet": log.slice(0, 3000), "2022.parquet": log.slice(3000)}, answers, best=w.best(w.clicked)
    )


def telco(seed: int) -> HeldOut:
    """Offers of a telephone company: five outcomes, copies and hashes of labels, nested columns, dates as text."""
    w = draw_world(seed, 12_000, 1500, 60, 90, shown=4, bias=-0.8)
    random, opened = w.random, w.clicked.astype(bool)
    clicked = w.some(opened, 0.4).astype(bool)
    ordered = w.some(clicked, 0.4).astype(bool)
    late = w.time > w.time.max() - 14 * DAY
    joined = YEAR_2024 - w.of(w.user, np.arange(1, 2000)) * DAY
    log = pa.table(
        {
            "msisdn_hash": hashed(w.user),
            "offer_code": [f"OF{n:04d}" for n in w.item],
            "campaign_run": w.request + 1,
            "sent_at": at(w.time, "us", "UTC"),
            "tariff": w.of(w.user, ["S", "M", "L", "XL"]),
            "is_business": w.of(w.user, [True, False, False]),
            "signup_date": np.datetime_as_string(joined.astype("datetime64[us]"), unit="D"),
            "last_top_up": (joined // 1000 + 10**9).astype(np.int64),
            "churn_score": pa.array(np.round(w.of(w.user, np.linspace(0, 1, 999)), 3), pa.float32()),
            "offer_price": w.of(w.item, [0.0, 4.99, 9.99, 14.99, 19.99]),
            "offer_family": w.category,
            "channel": w.of(w.request, ["sms", "mail", "app"]),
            "device": pa.array([{"os": "a", "v": int(n % 5)} for n in w.user]),
            "extras": pa.array([[("k", "v")] for _ in range(w.rows)], pa.map_(pa.string(), pa.string())),
            "batch_uuid": uuids(random, w.rows),
            "reserved": pa.nulls(w.rows),
            "reserved2": pa.nulls(w.rows, pa.float64()),
            "source": ["crm"] * w.rows,
            "opened": opened,
            "clicked": clicked * 1,
            "clicked_flag": np.where(clicked, "Y", "N"),
            "click_digest": hashed(clicked),
            "ordered": ordered,
            "complained": pa.array(w.some(opened, 0.03, 0.0), pa.int8()),
            "still_active_14d": where(~late, w.some(opened | ~opened, 0.8, 0.3), pa.int8()),
            "model_rank_v2": np.round(opened * 0.3 + clicked * 0.3 + random.random(w.rows) * 0.2, 4),
        }
    )
    answers = Answers(
        {"user": "msisdn_hash", "candidate": "offer_code", "request": "campaign_run", "time": "sent_at"},
        {
            "user": "tariff is_business churn_score",
            "user|": "signup_date last_top_up",
            "candidate": "offer_price offer_family",
            "context": "channel",
            "": "device extras batch_uuid reserved reserved2 source",
        },
        {
            "opened": Label(),
            "clicked": Label(observed=(None, "opened")),
            "ordered": Label(observed=(None, "opened", "clicked")),
            "complained": Label(observed=(None, "opened")),
            "still_active_14d": Label(days=(13, 20)),
        },
        leaks=("clicked_flag", "click_digest", "model_rank_v2", "batch_uuid"),
        outcomes=("opened", "clicked", "ordered", "complained", "still_active_14d"),
        kinds={
            "churn_score": "numeric",
            "offer_family": "id",
            "is_business": "id|numeric",
            "last_top_up": "time|numeric",
        },
    )
    return HeldOut({"x.parquet": log}, answers, best=w.best(w.clicked))


def own_numbers(seed: int) -> HeldOut:
    """An app whose lists are numbered by each user anew; rows in any order."""
    w = draw_world(seed, 9_000, 300, 150, 60, shown=6)
    first = np.unique(w.request, return_index=True)[1]
    of_user = np.zeros(len(first), np.int64)
    for user in range(300):
        mine = np.flatnonzero(w.user[first] == user)
        of_user[mine] = np.arange(1, len(mine) + 1)
    log = pa.table(
        {
            "member_no": w.user + 1,
            "recipe_no": w.item + 1,
            "list_no": of_user[w.request],
            "shown_on": at(w.time, "s"),
            "rank": w.position,
            "cuisine": [["thai", "greek", "swiss", None][n % 4] for n in w.category],
            "course": w.category,
            "minutes": w.of(w.item, np.arange(5, 180)),
            "vegan": w.of(w.item, [True, False]),
            "nutrition": pa.array([[0.5] * (n % 4) for n in w.item], pa.list_(pa.float64())),
            "similar": pa.array([[int(n) % 150 + 1, int(n) * 7 % 150 + 1] for n in w.item]),
            "diet": w.of(w.user, ["all", "vegan", "keto"]),
            "cooked": w.clicked.astype(bool),
        }
    ).take(w.random.permutation(w.rows))
    answers = Answers(
        {"user": "member_no", "candidate": "recipe_no", "request": "list_no|-", "time": "shown_on"},
        {"placement": "rank", "candidate": "cuisine course minutes vegan similar", "": "nutrition", "user": "diet"},
        {"cooked": Label()},
        outcomes=("cooked",),
        kinds={"minutes": "numeric", "course": "id", "similar": "ids"},
    )
    return HeldOut({"p.parquet": log}, answers, best=w.best(w.clicked))


def people(seed: int, split: bool = True) -> HeldOut:
    """A plain table of one row a person, with a weight, with or without a column that says the split."""
    random, rows = np.random.default_rng(seed), 5_000
    age, income = random.integers(18, 90, rows), random.gamma(2, 20_000, rows).round(-2)
    job = random.integers(0, 50, rows)
    probability = 1 / (1 + np.exp(-(random.normal(0, 1, 50)[job] + (age - 50) / 20 - 0.5)))
    voted = random.random(rows) < probability
    parts = random.choice(["train", "validation", "test"], rows, p=[0.7, 0.15, 0.15])
    columns = {
        "person": random.permutation(rows) + 1,
        "age": age,
        "income": income,
        "occupation": pa.array(job * 10 + 110, pa.int32()),
        "sex": random.choice(["f", "m"], rows),
        "region": random.choice([f"R{n}" for n in range(12)], rows),
        "weight": random.gamma(4, 0.25, rows) + 0.01,
        "votes": voted * 1,
        "turnout_years": np.round(random.gamma(2, 2, rows) + 3 * probability, 1),
        "job_code": random.integers(0, 40, rows),
        "district": random.choice([f"D{n}" for n in range(200)], rows),
        "queued": np.where(voted & (random.random(rows) < 0.6), random.integers(1, 90, rows), 0),
    }
    answers = Answers(
        {"user": "-|person", "candidate": "-|job_code", "request": "-|person", "time": "-", "weight": "weight"},
        {"candidate": "age income occupation sex region turnout_years district", "": "person"},
        {"votes": Label()},
        leaks=("person", "weight", "queued"),
        outcomes=("votes",),
        kinds={"age": "numeric", "income": "numeric", "occupation": "id", "sex": "id"},
        settings={"split.column": "split"},
        refused="" if split else "split",
    )
    return HeldOut({"t.parquet": pa.table(columns | ({"split": parts} if split else {}))}, answers)


def odd_names(seed: int) -> HeldOut:
    """Names that YAML reads as something else, and files whose types and columns differ."""
    w = draw_world(seed, 6_000, 300, 100, 40)
    log = pa.table(
        {
            "null": w.user + 100,
            "Artikel-Nr.": w.item + 1,
            "on": w.request,
            "Zeit (UTC)": at(w.time),
            "y": w.position,
            "größe: cm": w.of(w.item, np.round(np.linspace(20, 190, 300), 1)),
            "it's": w.of(w.item, ["a # check", "b: c", "yes", "null", "1e3"]),
            "a.b": w.of(w.user, ["~", "true", "0x1", "{x}"]),
            "a_b": w.of(w.item, ["p", "q", "r"]),
            "A_B": w.of(w.user, ["s", "t"]),
            "vector": pa.array([[0.5, None if n == 7 else 1.0] for n in w.item]),
            "wait": pa.array(w.item, pa.duration("us")),
            "none": pa.array([[]] * w.rows, pa.list_(pa.string())),
            "user": w.of(w.request, ["web", "app"]),
            "1": w.clicked.astype(np.float64),
        }
    )
    older = log.slice(0, 2000).drop_columns(["größe: cm"])
    older = older.set_column(0, "null", older["null"].cast(pa.int32()))
    answers = Answers(
        {"user": "null", "candidate": "Artikel-Nr.", "request": "on", "time": "Zeit (UTC)"},
        {
            "placement": "y",
            "candidate": "it's a_b",
            "candidate|": "größe: cm",
            "user": "a.b A_B",
            "context": "user",
            "": "vector wait none",
        },
        {"1": Label()},
        outcomes=("1",),
        kinds={"größe: cm": "numeric", "it's": "id", "a.b": "id", "user": "id"},
    )
    files = {"a.parquet": older, "b.parquet": log.slice(2000)}
    return HeldOut(files, answers, best=w.best(w.clicked))


def rows_one_by_one(seed: int) -> HeldOut:
    """Lists whose rows were logged as they were seen, each at its own moment; what was known before."""
    w = draw_world(seed, 10_000, 500, 200, 45, shown=5)
    random, seen = w.random, w.clicked.astype(bool)
    _, session = np.unique(w.user * 1000 + (w.time - YEAR_2024) // (7 * DAY), return_inverse=True)
    started = np.full(session.max() + 1, w.time.max())
    np.minimum.at(started, session, w.time)
    log = pa.table(
        {
            "session_id": session + 7000,
            "session_started": at(started[session] - 60_000_000, "ms"),
            "search_id": uuids(random, w.request.max() + 1)[w.request],
            "member": w.user + 10_000,
            "song": w.item + 1,
            "ts": at(w.time + w.position * 2_000_000 + random.integers(0, 10**6, w.rows), "ms"),
            "artist": w.item % 60 + 1,
            "pos": w.position,
            "plays_total": np.bincount(w.item, w.clicked)[w.item],
            "plays_7d": random.poisson(w.of(w.item, np.arange(1, 40))),
            "liked_before": (random.random(w.rows) < 0.1) * 1,
            "is_paid_member": w.of(w.user, [0, 1]),
            "played": seen * 1,
            "played_s": where(seen, random.gamma(2, 80, w.rows), pa.float32()),
        }
    )
    answers = Answers(
        {"user": "member", "candidate": "song", "request": "search_id", "time": "ts"},
        {
            "candidate": "artist plays_7d",
            "context|": "session_id session_started",
            "": "plays_total",
            "placement": "pos",
            "user": "is_paid_member",
            "candidate|context": "liked_before",
        },
        {"played": Label()},
        leaks=("played_s",),
        outcomes=("played", "played_s"),
        kinds={"plays_7d": "numeric"},
    )
    return HeldOut({"r.parquet": log}, answers, best=w.best(w.clicked))


def feed(seed: int) -> HeldOut:
    """Videos with ids as large as seconds since 1970, eight labels, and what a person did after a click."""
    w = draw_world(seed, 8_000, 400, 200, 30, shown=5)
    random, clicked = w.random, w.clicked.astype(bool)
    more = {f"is_{name}": w.some(clicked, 0.3) for name in ("like", "follow", "comment", "share", "forward", "save")}
    log = pa.table(
        {
            "user_id": w.user * 99_991 + 1_300_000_000,
            "video_id": w.item * 7919 + 1_600_000_000,
            "request_id": w.request * 3 + 1_700_000_000,
            "shown_at": at(w.time),
            "hour": pa.array(((w.time - YEAR_2024) // DAY) + 24_010_100),
            "seller_id": w.of(w.item, np.arange(50)) * 1_000_003 + 1_400_000_000,
            "campaign": w.of(w.item, np.arange(50)) * 1_000_003 + 1_400_000_000,
            "relevance": np.log(w.probability) + random.normal(size=w.rows),
            "free\nspace": w.of(w.item, random.gamma(2, 20, 200)),
            "row\nnumber: {": random.permutation(w.rows),
            "is_click": w.clicked,
            **more,
            "is_hate": (random.random(w.rows) < 0.01) * 1,
            "profile_ms": np.where(w.some(clicked, 0.05), random.integers(100, 9000, w.rows), 0),
            "note_no": np.where(w.some(clicked, 0.05), random.integers(100, 9000, w.rows), -1),
        }
    )
    outcomes = ("is_click", *more, "is_hate", "profile_ms", "note_no")
    answers = Answers(
        {"user": "user_id", "candidate": "video_id", "request": "request_id", "time": "shown_at"},
        {"candidate": "seller_id relevance campaign", "": "hour"},
        {"is_click": Label()},
        leaks=("profile_ms", "note_no"),
        outcomes=outcomes,
        kinds={"seller_id": "id", "campaign": "", "relevance": "numeric"},
    )
    return HeldOut({"f.parquet": log}, answers)


def returns(seed: int) -> HeldOut:
    """Ten days of dates: what is bought of what is clicked, and sent back of what is bought, known after two days."""
    w = draw_world(seed, 12_000, 500, 300, 10)
    clicked = w.clicked.astype(bool)
    bought = w.some(clicked, 0.5).astype(bool)
    old = w.time // DAY < (w.time // DAY).max() - 1
    log = pa.table(
        {
            "member": w.user,
            "sku": w.item,
            "search_id": w.request,
            "day": pa.array((w.time // DAY).astype(np.int32)).cast(pa.date32()),
            "coupon_id": where(w.random.random(w.rows) < 0.1, w.random.integers(1, 30, w.rows), pa.float64()),
            "was_cheap": w.of(w.item, [0, 1]),
            "weight": w.of(w.item, np.arange(1, 300)),
            "is_clicked": clicked,
            "is_bought": bought,
            "not_returned": where(bought & old, 1 - w.some(bought, 0.3, -1)),
        }
    )
    answers = Answers(
        {"user": "member", "candidate": "sku", "request": "search_id", "time": "day"},
        {"candidate": "was_cheap coupon_id weight"},
        {
            "is_clicked": Label(),
            "is_bought": Label(observed=("is_clicked",)),
            "not_returned": Label(observed=("is_bought",), days=(1, 3)),
        },
        kinds={"coupon_id": "id"},
        settings={
            "split.validation_end": "2024-01-07T00:00:00Z",
            "tasks.not_returned.score_weight": 0.5,
            "tasks.not_returned.observed_when.column": "is_bought",
        },
    )
    return HeldOut({"r.parquet": log}, answers)


def guests(seed: int) -> HeldOut:
    """Reservations, one a row: a label that is unwanted, and a column that looks like one."""
    w = draw_world(seed, 5_000, 300, 300, 10, shown=1)
    log = pa.table(
        {
            "fold": w.random.choice(["train", "dev", "test"], w.rows, p=[0.7, 0.1, 0.2]),
            "job": w.random.choice(["nurse", "clerk", "cook"], w.rows),
            "lead_days": w.category + w.random.integers(0, 5, w.rows),
            "duration": w.random.gamma(2, 100, w.rows),
            "is_canceled": w.clicked,
        }
    )
    answers = Answers(
        {"candidate": "-"},
        {"candidate": "job lead_days", "": "duration"},
        {"is_canceled": Label()},
        settings={"split.validation": ["dev"]},
    )
    return HeldOut({"g.parquet": log}, answers)


SPOILT = (
    *("times as numbers", "times from zero", "times of users", "tasks of one name"),
    *("clicks alone", "labels as text", "labels of -1 and 1", "times as text"),
    *("users that are missing", "users as floats", "users as bytes"),
)


def spoilt(seed: int, how: str) -> HeldOut:
    """A log that no settings can be right for, for one reason."""
    w = draw_world(seed, 5_000, 300, 100, 30)
    columns: dict[str, Any] = {
        "user_id": w.user,
        "item_id": w.item,
        "shown_at": at(w.time),
        "category": w.category,
        "clicked": w.clicked,
    }
    columns |= {
        "clicks alone": {"clicked": np.ones(w.rows, np.int64)},
        "labels as text": {"clicked": np.where(w.clicked, "yes", "no")},
        "times as numbers": {"shown_at": w.time // DAY, "hour": w.time // DAY * 100 + 2_014_000_000},
        "times from zero": {"shown_at": w.time // DAY, "timestamp": (w.time - YEAR_2024) / 10**6},
        "tasks of one name": {"clicked?": w.clicked, "clicked!": w.some(w.clicked, 0.5)},
        "times of users": {"user_id": w.request},
        "times as text": {"shown_at": columns["shown_at"].cast(pa.string())},
        "users that are missing": {"user_id": where(w.random.random(w.rows) < 0.9, w.user)},
        "users as floats": {"user_id": w.user.astype(np.float64)},
        "users as bytes": {"user_id": pa.array([str(item).encode() for item in w.user], pa.binary())},
        "labels of -1 and 1": {"clicked": 2 * w.clicked - 1},
    }[how]
    others = {"times as numbers": "hour", "times from zero": "timestamp", "tasks of one name": "same name"}
    named = others.get(how) or (
        "shown_at" if how.startswith("times") else "user_id" if how.startswith("users") else "clicked"
    )
    return HeldOut({"c.parquet": pa.table(columns)}, Answers({}, {}, {}, refused=named))


_MAKERS = (
    *(terse_news, video_days, tienda, telco, own_numbers, people),
    *(odd_names, rows_one_by_one, feed, returns, guests),
)
LOGS: dict[str, Callable[[int], HeldOut]] = {
    **{make.__name__: make for make in _MAKERS},
    "people_without_split": partial(people, split=False),
    **{how: partial(spoilt, how=how) for how in SPOILT},
}
