"""python -m pipelines.ingest_movielens --source ml-1m --out data/movielens

Convert a folder in the format of MovieLens-1M (ratings.dat, users.dat, movies.dat) into an interaction log,
`OUT/log/YYYY-MM.parquet`, one file for each month of requests.

MovieLens records ratings, but no shown candidates. A request is therefore one session: consecutive ratings of one user
with pauses of less than 30 minutes. The time of the request is the time of the first rating. The log has all movies
rated in the session and a few sampled movies for each. The labels:

rated  the user rated the movie in this session (engagement).
liked  the rating was 4 or 5 (satisfaction). Null if the movie was not rated.

Sampled movies were rated by somebody, but not by the user, before the end of the session. Both conditions look only at
the past: a movie first rated later can't be sampled, but a movie that the user rates later can. `sampling_rate` is the
number of sampled movies divided by the number of movies to choose from.
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
"""Columns of the log, in order, as described in data/README.md."""


@dataclass(frozen=True)
class Ratings:
    """All ratings, sorted by user, time and movie. Each array has shape (N,).

    Attributes:
        user: User IDs, as published.
        movie: Movie IDs, as published.
        rating: Ratings from 1 to 5.
        moment: Times in seconds since 1970 in UTC.
    """

    user: IntArray
    movie: IntArray
    rating: IntArray
    moment: IntArray


@dataclass(frozen=True)
class Sessions:
    """The S sessions, which are the requests, sorted by time of the first rating, then user.

    All arrays have shape (S,) and hold indices into `Ratings`.

    Attributes:
        start: Index of the first rating of the session.
        end: Index after the last rating of the session.
        user_start: Index of the user's first rating.
    """

    start: IntArray
    end: IntArray
    user_start: IntArray


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


def _read_lines(path: Path, line_format: LineFormat) -> Iterator[tuple[Any, ...]]:
    """Yield the fields of every line, which `::` separates, converted by the functions in the format."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Put ratings.dat, users.dat and movies.dat into the source folder.")
    with path.open(encoding="latin-1") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.rstrip("\n")
            try:
                yield tuple(read(text) for read, text in zip(line_format.values(), line.split("::"), strict=True))
            except ValueError:
                raise UserError(f"{path}, line {number}: expected {'::'.join(line_format)}, found {line!r}") from None


def _read_ratings(path: Path) -> Ratings:
    """Read ratings.dat."""
    table = np.array(list(_read_lines(path, RATINGS)), dtype=np.int64).reshape(-1, len(RATINGS))
    if len(table) == 0:
        raise UserError(f"{path} is empty, expected lines of {'::'.join(RATINGS)}")
    user, movie, rating, moment = table[np.lexsort((table[:, 1], table[:, 3], table[:, 0]))].T
    return Ratings(user, movie, rating, moment)


def read_users(path: Path) -> pa.Table:
    """Read users.dat as a table: user_id, gender, age and occupation (published codes), zip_code."""
    return _table(["user_id", "gender", "age", "occupation", "zip_code"], _read_lines(path, USERS))


def read_movies(path: Path) -> pa.Table:
    """Read movies.dat as a table: movie_id, title_year (null if the title doesn't end in a year), genres."""
    rows = ((movie, _title_year(title), genres.split("|")) for movie, title, genres in _read_lines(path, MOVIES))
    return _table(["movie_id", "title_year", "genres"], rows)


def _table(names: list[str], rows: Iterable[tuple[Any, ...]]) -> pa.Table:
    schema = pa.schema([LOG.field(name) for name in names])
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=schema)


def _title_year(title: str) -> int | None:
    match = re.search(r"\((\d{4})\)\s*$", title)
    return int(match.group(1)) if match else None


def find_sessions(ratings: Ratings) -> Sessions:
    """Divide every user's ratings into sessions, at pauses of 30 minutes or more."""
    new_user = np.append(True, ratings.user[1:] != ratings.user[:-1])
    pause = np.append(True, np.diff(ratings.moment) >= SESSION_GAP_S)
    start = np.flatnonzero(new_user | pause)
    user_starts = np.flatnonzero(new_user)
    user_start = user_starts[np.searchsorted(user_starts, start, side="right") - 1]
    order = np.lexsort((ratings.user[start], ratings.moment[start]))
    return Sessions(start[order], np.append(start[1:], len(ratings.user))[order], user_start[order])


def _draw_rows(ratings: Ratings, negatives_per_rated: int, seed: int) -> pa.Table:
    """Build the rows of all sessions, rated and sampled movies, sorted by request and movie."""
    sessions = find_sessions(ratings)
    # The catalog is sorted by the time of the first rating, then movie ID.
    by_moment = np.lexsort((ratings.movie, ratings.moment))
    _, first = np.unique(ratings.movie[by_moment], return_index=True)
    catalog, first_seen = (values[by_moment][np.sort(first)] for values in (ratings.movie, ratings.moment))
    order = np.argsort(catalog)
    catalog_index = order[np.searchsorted(catalog, ratings.movie, sorter=order)]
    session_at, movies, stars, rates = [], [], [], []
    with bar() as progress:
        for index in progress.track(range(len(sessions.start)), description="drawing candidates"):
            start, end = sessions.start[index], sessions.end[index]
            available = int(np.searchsorted(first_seen, ratings.moment[end - 1], side="right"))
            excluded = np.sort(catalog_index[sessions.user_start[index] : end])
            rated = end - start
            entropy = (seed, int(ratings.user[start]), int(ratings.moment[start]))
            sampled = sample_negatives(available, excluded, negatives_per_rated * int(rated), entropy)
            rate = len(sampled) / max(available - len(excluded), 1)
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


def ingest(source: Path, out: Path, negatives_per_rated: int, seed: int) -> dict[str, int]:
    """Write the log to `out`/log, replacing an existing log. Return counts of rows, requests and labels.

    Args:
        source: Folder of ratings.dat, users.dat and movies.dat.
        out: Folder for the log.
        negatives_per_rated: Number of sampled movies for each rated movie.
        seed: Seed of the sampled movies, together with the user and the time of the session.

    Raises:
        UserError: A source file is missing or invalid.
    """
    users, movies = read_users(source / "users.dat"), read_movies(source / "movies.dat")
    ratings = _read_ratings(source / "ratings.dat")
    with atomic_folder(out / "log") as folder:
        rows = _draw_rows(ratings, negatives_per_rated, seed)
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
    """Run the command with `arguments`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.ingest_movielens", __doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with ratings.dat, users.dat and movies.dat")
    add("--out", type=Path, required=True, help="folder in which log/ is written or replaced")
    negatives_help = "sampled movies for each rated movie (default: %(default)s)"
    add("--negatives-per-rated", type=non_negative, default=4, metavar="N", help=negatives_help)
    add("--seed", type=non_negative, default=17, help="seed of the sampled movies (default: %(default)s)")

    def ingest_options(options: argparse.Namespace) -> dict[str, int]:
        return ingest(options.source, options.out, options.negatives_per_rated, options.seed)

    run_ingest("MovieLens", parser, arguments, ingest_options)


if __name__ == "__main__":
    main()
