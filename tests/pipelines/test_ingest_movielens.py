"""A small folder in the format of MovieLens-1M, with sessions and candidates computed by hand."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from pipelines.ingest_movielens import LOG, ingest, main

START = 978_300_000
"""31 December 2000, 22:00 UTC."""
MINUTE = 60
DAY = 24 * 3600
MONTH = 31 * DAY
FILES = ("ratings.dat", "users.dat", "movies.dat")
USERS = ["1::F::1::10::48067", "2::M::56::16::70072", "3::M::25::15::98107-2117"]
MOVIES = [
    "1::Toy Story (1995)::Animation|Children's|Comedy",
    "2::Misérables, Les (1998)::Drama",
    "3::City of Lost Children, The (Cité des enfants perdus, La) (1995)::Adventure|Sci-Fi",
    "4::A title without a year::Drama",
    "5::Never Rated (2000)::Drama",
    "6::Rated Last (1999)::Drama",
]
RATINGS = [
    # User 1: one session of movies 1 and 2 (29:59 apart), then, exactly 30 minutes later, one of movie 3.
    f"1::2::3::{START + 30 * MINUTE - 1}",
    f"1::1::5::{START}",
    f"1::3::4::{START + 60 * MINUTE - 1}",
    # User 2, a day later: movies 4 and 1.
    f"2::4::2::{START + DAY}",
    f"2::1::4::{START + DAY + MINUTE}",
    # User 3, a month later, movie 6; a day after that movie 2.
    f"3::6::1::{START + MONTH}",
    f"3::2::5::{START + MONTH + DAY}",
]


def write_source(folder: Path, ratings=RATINGS, users=USERS, movies=MOVIES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(FILES, (ratings, users, movies), strict=True):
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="latin-1")
    return folder


def ingested(source: Path, negatives_per_rated: int = 4, seed: int = 17) -> pa.Table:
    ingest(source, source / "out", negatives_per_rated, seed)
    return pq.read_table(source / "out" / "log")


def test_sessions_candidates_labels_and_columns(tmp_path, capsys):
    main(["--source", str(write_source(tmp_path)), "--out", str(tmp_path / "out")])
    assert f"log:  {tmp_path / 'out' / 'log'}" in capsys.readouterr().out
    log = pq.read_table(tmp_path / "out" / "log")
    assert log.schema.equals(LOG)
    rows = [(r["request_id"], r["user_id"], r["movie_id"], r["rated"], r["liked"]) for r in log.to_pylist()]
    assert rows == [
        # Nobody had rated anything else yet.
        (0, 1, 1, 1, 1),
        (0, 1, 2, 1, 0),
        (1, 1, 3, 1, 1),
        # Movies 2 and 3 had been rated; 5 never is, 6 only later.
        (2, 2, 1, 1, 1),
        (2, 2, 2, 0, None),
        (2, 2, 3, 0, None),
        (2, 2, 4, 1, 0),
        # User 3 rates movie 2 a day later: it is a candidate today.
        (3, 3, 1, 0, None),
        (3, 3, 2, 0, None),
        (3, 3, 3, 0, None),
        (3, 3, 4, 0, None),
        (3, 3, 6, 1, 0),
        # Movie 6 is no candidate any more.
        (4, 3, 1, 0, None),
        (4, 3, 2, 1, 1),
        (4, 3, 3, 0, None),
        (4, 3, 4, 0, None),
    ]
    assert set(log["sampling_rate"].to_pylist()) == {1.0}
    moments = dict(zip(log["request_id"].to_pylist(), log["request_time"].to_pylist(), strict=True))
    seconds = [START, START + 60 * MINUTE - 1, START + DAY, START + MONTH, START + MONTH + DAY]
    assert moments == {i: datetime.fromtimestamp(moment, UTC) for i, moment in enumerate(seconds)}
    assert [path.name for path in sorted((tmp_path / "out" / "log").iterdir())] == [
        "2000-12.parquet",
        "2001-01.parquet",
        "2001-02.parquet",
    ]
    by_key = {(row["request_id"], row["movie_id"]): row for row in log.to_pylist()}
    toy_story = by_key[0, 1]
    assert (toy_story["gender"], toy_story["age"], toy_story["occupation"]) == ("F", 1, 10)
    assert (toy_story["title_year"], toy_story["genres"]) == (1995, ["Animation", "Children's", "Comedy"])
    assert [by_key[key]["title_year"] for key in ((1, 3), (2, 4))] == [1995, None]
    assert by_key[4, 2]["zip_code"] == "98107-2117"


def many_ratings(seed: int = 0) -> list[tuple[int, int, int, int]]:
    """20 users, each rating 30 of 100 movies in several sessions: (user, movie, rating, seconds)."""
    random = np.random.default_rng(seed)
    ratings = []
    for user in range(1, 21):
        moment = START + int(random.integers(0, 10 * DAY))
        for movie in random.choice(100, 30, replace=False) + 1:
            ratings.append((user, int(movie), int(random.integers(1, 6)), moment))
            moment += int(random.choice([30, 3 * DAY], p=[0.8, 0.2]))
    return ratings


def write_many(folder: Path, ratings: list[tuple[int, int, int, int]]) -> Path:
    users = [f"{user}::F::25::1::00000" for user in range(1, 21)]
    movies = [f"{movie}::Film {movie} (1990)::Drama" for movie in range(1, 101)]
    return write_source(folder, ["::".join(map(str, rating)) for rating in ratings], users, movies)


def test_candidates_agree_with_a_plain_loop(tmp_path):
    ratings = many_ratings()
    rows = ingested(write_many(tmp_path, ratings)).to_pylist()
    moments = {(user, movie): moment for user, movie, _, moment in ratings}
    first = {}
    for _, movie, _, moment in ratings:
        first[movie] = min(moment, first.get(movie, moment))
    for request in {row["request_id"] for row in rows}:
        of_request = [row for row in rows if row["request_id"] == request]
        user = of_request[0]["user_id"]
        rated = {row["movie_id"] for row in of_request if row["rated"]}
        end = max(moments[user, movie] for movie in rated)
        before = {movie for (left, movie), moment in moments.items() if left == user and moment <= end}
        pool = {movie for movie, moment in first.items() if moment <= end} - before
        others = [row for row in of_request if not row["rated"]]
        assert {row["movie_id"] for row in others} <= pool
        assert len(others) == min(4 * len(rated), len(pool))
        assert {row["sampling_rate"] for row in others} <= {len(others) / max(len(pool), 1)}
        assert {row["sampling_rate"] for row in of_request if row["rated"]} == {1.0}
        assert len({row["movie_id"] for row in of_request}) == len(of_request)
    assert sum(row["rated"] for row in rows) == len(ratings)


def test_the_future_changes_no_earlier_row(tmp_path):
    ratings = many_ratings()
    cut = START + 8 * DAY
    whole = ingested(write_many(tmp_path, ratings)).drop_columns("request_id").to_pylist()
    past = ingested(write_many(tmp_path, [r for r in ratings if r[3] < cut])).drop_columns("request_id").to_pylist()
    # Sessions last at most 30 x 30 seconds: those that began so long before the cut had ended.
    safe = datetime.fromtimestamp(cut - 900, UTC)
    expected = [row for row in whole if row["request_time"] < safe]
    assert expected
    assert [row for row in past if row["request_time"] < safe] == expected


def test_rows_depend_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    ratings = many_ratings()
    log = ingested(write_many(tmp_path, ratings))
    assert ingested(write_many(tmp_path, ratings[::-1])).equals(log)
    assert not ingested(tmp_path, seed=18).equals(log)
    order = [(name, "ascending") for name in ("request_time", "request_id", "movie_id")]
    assert log.equals(log.sort_by(order))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ratings.dat", "1::6::9::978300000"),
        ("users.dat", "4,M,25,15,55117"),
        ("movies.dat", "7::Two::Titles (1990)::Drama"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, capsys, file, line):
    source = write_source(tmp_path)
    lines = (source / file).read_text(encoding="latin-1").splitlines()
    (source / file).write_text("\n".join([*lines[:2], line, *lines[2:]]), encoding="latin-1")
    with pytest.raises(SystemExit) as exit_info:
        main(["--source", str(source), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith(f"error: {source / file}, line 3: expected ")
    assert repr(line) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(tmp_path, file):
    source = write_source(tmp_path)
    (source / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        ingested(source)
