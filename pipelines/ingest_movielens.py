"""python -m pipelines.ingest_movielens --source ml-1m --out data/movielens

Turn a folder in the format of MovieLens-1M (ratings.dat, users.dat, movies.dat) into an interaction log,
`OUT/log/YYYY-MM.parquet`, one file for each month of requests.

MovieLens records ratings, not what was shown. A request is therefore one session: consecutive ratings of one user, each
less than 30 minutes after the one before; its time is that of the first. All movies rated in the session are kept, with
a few sampled others for each. The labels:

rated  the user rated the movie in this session (engagement).
liked  the rating was 4 or 5 (satisfaction); null where the movie was not rated.

The sampled others are drawn from the movies that somebody had rated by the end of the session, less those that the user
had rated by then. Both conditions look at the past only: a movie that is first rated later, by anyone, cannot be drawn,
and a movie that this user rates later can be. `sampling_rate` is the number drawn over the number they were drawn from.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.progress import bar
from pipelines.data_sets.ingest_common import (
    REQUEST_TIME,
    IntArray,
    command_parser,
    non_negative,
    run_ingest,
    sample_negatives,
    write_log_file,
)

SESSION_GAP_S = 30 * 60
MIN_LIKED_RATING = 4

LOG = pa.schema(
    [
        pa.field("request_id", pa.int64()),
        pa.field("request_time", REQUEST_TIME),
        pa.field("user_id", pa.int64()),
        pa.field("movie_id", pa.int64()),
        pa.field("gender", pa.string()),
        pa.field("age", pa.int64()),
        pa.field("occupation", pa.int64()),
        pa.field("zip_code", pa.string()),
        pa.field("title_year", pa.int64()),
        pa.field("genres", pa.list_(pa.string())),
        pa.field("rated", pa.int8()),
        pa.field("liked", pa.int8()),
        pa.field("sampling_rate", pa.float64()),
    ]
)
"""The columns of the log, in order; data/README.md describes them."""


@dataclass(frozen=True)
class Ratings:
    """All ratings, sorted by user, time and movie; four arrays of length N.

    Attributes:
        user, movie: ids as published.
        rating: 1 to 5.
        moment: seconds since 1970 in UTC.
    """

    user: IntArray
    movie: IntArray
    rating: IntArray
    moment: IntArray


@dataclass(frozen=True)
class Sessions:
    """The requests by time of the first rating, then user; three arrays of length S that point into `Ratings`.

    Attributes:
        start, end: the session's ratings are rows start .. end - 1.
        user_start: the first rating of the session's user.
    """

    start: IntArray
    end: IntArray
    user_start: IntArray


# Reading


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _stars(text: str) -> int:
    if text not in ("1", "2", "3", "4", "5"):
        raise ValueError(text)
    return int(text)


LineFormat = Mapping[str, Callable[[str], Any]]
RATINGS: LineFormat = {"UserID": _whole, "MovieID": _whole, "Rating": _stars, "Timestamp": _whole}
USERS: LineFormat = {"UserID": _whole, "Gender": str, "Age": _whole, "Occupation": _whole, "Zip-code": str}
MOVIES: LineFormat = {"MovieID": _whole, "Title": str, "Genres": str}


def read_lines(path: Path, line_format: LineFormat) -> Iterator[tuple[Any, ...]]:
    """Yield the fields of each line, converted.

    Raises:
        UserError: the file is missing, or a line does not follow the layout; names the file and the line number.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: the source folder must hold ratings.dat, users.dat and movies.dat")
    with path.open(encoding="latin-1") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.rstrip("\n")
            try:
                yield tuple(read(text) for read, text in zip(line_format.values(), line.split("::"), strict=True))
            except ValueError:
                raise UserError(f"{path}, line {number}: expected {'::'.join(line_format)}, found {line!r}") from None


def read_ratings(path: Path) -> Ratings:
    """Read ratings.dat.

    Raises:
        UserError: as `read_lines`, or there is no rating.
    """
    table = np.array(list(read_lines(path, RATINGS)), dtype=np.int64).reshape(-1, len(RATINGS))
    if len(table) == 0:
        raise UserError(f"{path} is empty, expected lines of {'::'.join(RATINGS)}")
    user, movie, rating, moment = table[np.lexsort((table[:, 1], table[:, 3], table[:, 0]))].T
    return Ratings(user, movie, rating, moment)


def read_users(path: Path) -> pa.Table:
    """Read users.dat: user_id, gender, age and occupation (codes, as published), zip_code."""
    names = ["user_id", "gender", "age", "occupation", "zip_code"]
    return _table(names, read_lines(path, USERS))


def read_movies(path: Path) -> pa.Table:
    """Read movies.dat: movie_id, title_year (null where the title does not end in a year), genres."""
    rows = ((movie, _title_year(title), genres.split("|")) for movie, title, genres in read_lines(path, MOVIES))
    return _table(["movie_id", "title_year", "genres"], rows)


def _table(names: list[str], rows: Iterable[tuple[Any, ...]]) -> pa.Table:
    schema = pa.schema([LOG.field(name) for name in names])
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=schema)


def _title_year(title: str) -> int | None:
    found = re.search(r"\((\d{4})\)\s*$", title)
    return int(found.group(1)) if found else None


# Requests


def find_sessions(ratings: Ratings) -> Sessions:
    """Cut each user's ratings where 30 minutes or more pass between two of them."""
    new_user = np.append(True, ratings.user[1:] != ratings.user[:-1])
    pause = np.append(True, np.diff(ratings.moment) >= SESSION_GAP_S)
    start = np.flatnonzero(new_user | pause)
    user_starts = np.flatnonzero(new_user)
    user_start = user_starts[np.searchsorted(user_starts, start, side="right") - 1]
    order = np.lexsort((ratings.user[start], ratings.moment[start]))
    return Sessions(start[order], np.append(start[1:], len(ratings.user))[order], user_start[order])


def draw_rows(ratings: Ratings, negatives_per_rated: int, seed: int) -> pa.Table:
    """Put sampled others beside the rated movies of every session.

    Returns:
        request_id, request_time, user_id, movie_id, rated, liked, sampling_rate, sorted by request and movie.
    """
    sessions = find_sessions(ratings)
    # Movies by the moment of their first rating, then id.
    by_moment = np.lexsort((ratings.movie, ratings.moment))
    _, first = np.unique(ratings.movie[by_moment], return_index=True)
    catalog, first_seen = (each[by_moment][np.sort(first)] for each in (ratings.movie, ratings.moment))
    order = np.argsort(catalog)
    place = order[np.searchsorted(catalog, ratings.movie, sorter=order)]
    session_at, movies, stars, rates = [], [], [], []
    with bar() as progress:
        for index in progress.track(range(len(sessions.start)), description="drawing candidates"):
            start, end = sessions.start[index], sessions.end[index]
            known = int(np.searchsorted(first_seen, ratings.moment[end - 1], side="right"))
            taken = np.sort(place[sessions.user_start[index] : end])
            rated = end - start
            entropy = (seed, int(ratings.user[start]), int(ratings.moment[start]))
            sampled = sample_negatives(known, taken, negatives_per_rated * int(rated), entropy)
            rate = len(sampled) / max(known - len(taken), 1)
            session_at.append(np.full(rated + len(sampled), index))
            movies.append(np.append(ratings.movie[start:end], catalog[sampled]))
            stars.append(np.append(ratings.rating[start:end], np.zeros(len(sampled), dtype=np.int64)))
            rates.append(np.append(np.ones(rated), np.full(len(sampled), rate)))
    session, rating = np.concatenate(session_at), np.concatenate(stars)
    first_rating = sessions.start[session]
    return pa.table(
        {
            "request_id": session,
            "request_time": pa.array(ratings.moment[first_rating] * 1_000_000).cast(REQUEST_TIME),
            "user_id": ratings.user[first_rating],
            "movie_id": np.concatenate(movies),
            "rated": (rating > 0).astype(np.int8),
            "liked": pa.array((rating >= MIN_LIKED_RATING).astype(np.int8), mask=rating == 0),
            "sampling_rate": np.concatenate(rates),
        }
    ).sort_by([("request_id", "ascending"), ("movie_id", "ascending")])


# The job


def ingest(source: Path, out: Path, negatives_per_rated: int, seed: int) -> dict[str, int]:
    """Write the log to `out`/log, replacing one that is there.

    Args:
        source: folder of ratings.dat, users.dat and movies.dat.
        negatives_per_rated: sampled movies for each rated one.
        seed: with the user and the time of the session, decides which movies are sampled.

    Returns:
        What the log holds, by name.

    Raises:
        UserError: a source file is missing or wrong.
    """
    users, movies = read_users(source / "users.dat"), read_movies(source / "movies.dat")
    ratings = read_ratings(source / "ratings.dat")
    with atomic_folder(out / "log") as folder:
        rows = draw_rows(ratings, negatives_per_rated, seed)
        user = users.take(pc.index_in(rows["user_id"], value_set=users["user_id"]))
        movie = movies.take(pc.index_in(rows["movie_id"], value_set=movies["movie_id"]))
        columns = {name: table[name] for table in (user, movie, rows) for name in table.column_names}
        log = pa.table([columns[field.name] for field in LOG], schema=LOG)
        months = log["request_time"].to_numpy().astype("datetime64[M]")
        for month in np.unique(months):
            write_log_file(log.filter(pa.array(months == month)), folder / f"{month}.parquet")
    return {
        "rows": len(log),
        "requests": pc.count_distinct(log["request_id"]).as_py(),
        "rated": len(ratings.movie),
        "liked": int((ratings.rating >= MIN_LIKED_RATING).sum()),
    }


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line."""
    parser = command_parser("python -m pipelines.ingest_movielens", __doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder that holds ratings.dat, users.dat and movies.dat")
    add("--out", type=Path, required=True, help="folder to write log/ into; a log that is there is replaced")
    add("--negatives-per-rated", type=non_negative, default=4, metavar="N", help="(default: %(default)s)")
    add("--seed", type=non_negative, default=17, help="seed of the sampled movies (default: %(default)s)")

    def ingest_options(given: argparse.Namespace) -> dict[str, int]:
        return ingest(given.source, given.out, given.negatives_per_rated, given.seed)

    run_ingest("MovieLens", parser, arguments, ingest_options)


if __name__ == "__main__":
    main()
