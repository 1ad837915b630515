"""Rows of the synthetic log, as described in `pipelines.make_synthetic_log`."""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import expit, ndtri

from mmoe_rec.errors import UserError
from mmoe_rec.log.columns import splitmix64
from pipelines.data_sets.ingest_common import REQUEST_TIME, IntArray

FloatArray = npt.NDArray[np.float32]

START = np.datetime64("2024-01-01", "us")
DAYS = 60
LABEL_DELAY_DAYS = 3
SLOTS = 12
MIN_SLOTS = 8
REQUESTS_PER_ROUND = 5
"""Five consecutive requests are a round. They have 8, 9, 10, 11 and 12 rows, in random order."""
ROWS_PER_ROUND = sum(range(MIN_SLOTS, SLOTS + 1))

CATEGORIES, BRANDS_PER_CATEGORY, TASTES = 40, 25, 4
COUNTRIES = ("BR", "DE", "ES", "FR", "GB", "ID", "IN", "IT", "JP", "MX", "PL", "US")
DEVICES = ("phone", "desktop", "tablet", "tv")
DEVICE_EFFECT = np.array([0.0, -0.2, 0.1, -0.6], np.float32)
HOURLY = np.array([4, 3, 2, 2, 2, 3, 5, 7, 8, 8, 8, 8, 9, 9, 8, 8, 9, 10, 12, 14, 15, 14, 11, 7], np.float64)
"""Relative number of requests in each hour of a day."""

LOG = pa.schema(
    [
        pa.field("request_id", pa.int64()),
        pa.field("request_time", REQUEST_TIME),
        pa.field("user_id", pa.int64()),
        pa.field("country", pa.string()),
        pa.field("device", pa.string()),
        pa.field("candidate_id", pa.int64()),
        pa.field("category", pa.string()),
        pa.field("brand_id", pa.int64()),
        pa.field("price", pa.float64()),
        pa.field("position", pa.int64()),
        pa.field("clicked", pa.int8()),
        pa.field("liked", pa.int8()),
        pa.field("true_click", pa.float64()),
        pa.field("true_like", pa.float64()),
    ]
)
"""Columns of the log, in order."""


def position_bias(position: npt.ArrayLike) -> FloatArray:
    """Return the effect of positions in the list (1 is the top) on the logit of a click."""
    return np.float32(-0.6) * np.log(np.asarray(position, np.float32))


@dataclass(frozen=True)
class Plan:
    """Size and seed of the log.

    Attributes:
        rows: Number of rows.
        users: Number of users. Their IDs are 0 to users - 1.
        candidates: Number of candidates. Their IDs are 0 to candidates - 1.
        days: Number of days.
        seed: Seed of all random numbers.
    """

    rows: int
    users: int = 100_000
    candidates: int = 20_000
    days: int = DAYS
    seed: int = 17

    def __post_init__(self) -> None:
        """Raise UserError if a number is out of range."""
        limits = {"rows": (1, 10**12), "users": (1, 10**12), "candidates": (SLOTS, 10**6), "days": (10, 3_650)}
        for name, (least, most) in limits.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"--{name} must be from {least:,} to {most:,}, found {value:,}")

    @property
    def requests(self) -> int:
        """Number of requests, including all requests of the last round."""
        return -(-self.rows // ROWS_PER_ROUND) * REQUESTS_PER_ROUND

    def first_requests(self) -> IntArray:
        """Return the first request of each day and then the number of requests, shape (days + 1,).

        Weekends have more requests.
        """
        weight = np.where(np.arange(self.days) % 7 >= 5, 1.3, 1.0)
        fraction = np.append(0.0, np.cumsum(weight)) / weight.sum()
        return np.round(fraction * self.requests).astype(np.int64)

    def split_days(self) -> tuple[int, int, int]:
        """Return the end days of training, validation and test: about 80%, 10% and 10% of the days with labels."""
        usable = self.days - LABEL_DELAY_DAYS
        return round(0.8 * usable), round(0.9 * usable), usable

    def uniform(self, stream: str, index: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Return uniform numbers in (0, 1) that depend only on the seed, stream and index (splitmix64 of a counter).

        Args:
            stream: Name of the sequence of numbers.
            index: Indices in the sequence.
        """
        key = splitmix64(splitmix64(np.array([self.seed], np.uint64)) ^ np.uint64(zlib.crc32(stream.encode())))
        with np.errstate(over="ignore"):
            state = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        return ((splitmix64(state) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, stream: str, index: npt.NDArray[np.integer]) -> FloatArray:
        """Return standard normal numbers that depend only on the seed, stream and index.

        Args:
            stream: Name of the sequence of numbers.
            index: Indices in the sequence.
        """
        return ndtri(self.uniform(stream, index)).astype(np.float32)


@dataclass(frozen=True)
class Catalog:
    """Properties of the C candidates, which determine the true probabilities. Each array has shape (C,).

    Attributes:
        category: Categories.
        brand: Brands.
        price: Prices without discount.
        quality: Effects on the logit of a click.
        craft: Effects on the logit of a like.
        arrival: Time from which a candidate can be shown, as a fraction of the log.
    """

    category: IntArray
    brand: IntArray
    price: FloatArray
    quality: FloatArray
    craft: FloatArray
    arrival: FloatArray

    @staticmethod
    def of(plan: Plan) -> "Catalog":
        """Draw the candidates of a plan."""
        index = np.arange(plan.candidates)
        category = (CATEGORIES * plan.uniform("category", index) ** 1.5).astype(np.int64)
        within = BRANDS_PER_CATEGORY * plan.uniform("brand", index) ** 2
        brand = category * BRANDS_PER_CATEGORY + within.astype(np.int64)
        price = np.round(20 * np.exp(0.8 * plan.normal("price", index)), 2).astype(np.float32)
        quality = 0.3 * plan.normal("brand quality", brand) + 0.5 * plan.normal("quality", index)
        craft = 0.5 * plan.normal("brand craft", brand) + 0.6 * plan.normal("craft", index) + 0.4 * quality
        # Candidates form `SLOTS` groups, and a request draws one candidate from each group (see `_draw_candidates`).
        # `index // SLOTS` is the popularity rank in the group. Every fifth one can be shown only from a later time on.
        late = index // SLOTS % 5 == 4
        arrival = np.where(late, plan.uniform("candidate arrives", index), 0).astype(np.float32)
        return Catalog(category, brand, price, quality, craft.astype(np.float32), arrival)


def _request_times(plan: Plan, day: int, request: IntArray, first: int, end: int) -> npt.NDArray[np.int64]:
    """Return the rising times of requests in microseconds since 1970. The day's requests are first to end - 1."""
    fraction = (request - first + plan.uniform("time", request)) / (end - first)
    hours = np.interp(fraction, np.append(0.0, np.cumsum(HOURLY)) / HOURLY.sum(), np.arange(25.0))
    return START.astype(np.int64) + ((24 * day + hours) * 3_600_000_000).astype(np.int64)


def _draw_users(plan: Plan, request: IntArray, elapsed: npt.NDArray[np.float64]) -> IntArray:
    """Draw the user of each request, shape (Q,). `elapsed` is the fraction of the log before each request."""
    # A user's number of requests falls with the square root of the user's rank. The offset limits the number to fifty
    # times the mean.
    root = 0.01 + plan.uniform("user", request) * (np.sqrt(1.0001) - 0.01)
    user = np.minimum((plan.users * (root * root - 0.0001)).astype(np.int64), plan.users - 1)
    late = (user % 5 == 4) & (plan.uniform("user arrives", user) > elapsed)
    return user - late


def _draw_candidates(plan: Plan, catalog: Catalog, request: IntArray, elapsed: npt.NDArray[np.float64]) -> IntArray:
    """Draw 12 distinct candidates for each of Q requests, shape (Q, 12), sorted by quality plus noise, best first.

    Popular candidates are drawn more often. Each of 12 slots draws one candidate. Slot s draws from the
    candidates s, s + 12, s + 24 and so on, so a request has no candidate twice.
    """
    index = request[:, None] * SLOTS + np.arange(SLOTS)
    ranks = (plan.candidates - np.arange(SLOTS) + SLOTS - 1) // SLOTS
    draw = plan.uniform("candidate", index)
    candidate = (ranks * (draw * draw * draw)).astype(np.int64) * SLOTS + np.arange(SLOTS)
    candidate -= SLOTS * (catalog.arrival[candidate] > elapsed[:, None])
    rating = catalog.quality[candidate] + 0.5 * plan.normal("place", index)
    return np.take_along_axis(candidate, np.argsort(-rating, axis=1), axis=1)


def _affinities(plan: Plan, user: IntArray, country: IntArray) -> FloatArray:
    """Return the affinity of each request's user for each category, shape (Q, 40)."""
    style = plan.normal("style", np.arange(CATEGORIES * TASTES)).reshape(CATEGORIES, TASTES)
    parts = np.arange(TASTES)
    own = plan.normal("taste", user[:, None] * TASTES + parts)
    shared = plan.normal("country taste", country[:, None] * TASTES + parts)
    return (0.3 * own + 0.4 * shared) @ style.T


def make_rows(plan: Plan, catalog: Catalog, day: int, begin: int, stop: int) -> pa.Table:
    """Make the rows of the requests from begin to stop - 1 of one day.

    Args:
        plan: Size and seed of the log.
        catalog: Candidates of the plan.
        day: Number of the day.
        begin: First request.
        stop: Request after the last request.
    """
    first, end = (int(edge) for edge in plan.first_requests()[day : day + 2])
    request = np.arange(begin, stop)
    moment = _request_times(plan, day, request, first, end)
    elapsed = (moment - START.astype(np.int64)) / (plan.days * 86_400e6)
    user = _draw_users(plan, request, elapsed)
    country = (len(COUNTRIES) * plan.uniform("country", user) ** 1.5).astype(np.int64)
    draws = plan.uniform("device", request), plan.uniform("own device", user)
    # Four in five requests come from the device that the user prefers.
    device = (len(DEVICES) * np.where(draws[0] < 0.8, draws[1], draws[0] * 5 - 4) ** 2).astype(np.int64)
    hour = moment % 86_400_000_000 / 3.6e9
    circumstances = DEVICE_EFFECT[device] + 0.3 * np.cos(2 * np.pi * (hour - 20) / 24).astype(np.float32)

    shift = (REQUESTS_PER_ROUND * plan.uniform("size", request // REQUESTS_PER_ROUND)).astype(np.int64)
    size = MIN_SLOTS + (2 * request + shift) % REQUESTS_PER_ROUND
    at, slot = np.nonzero(np.arange(SLOTS) < size[:, None])
    candidate = _draw_candidates(plan, catalog, request, elapsed)[at, slot]
    row = request[at] * SLOTS + slot
    category = catalog.category[candidate]
    affinity = _affinities(plan, user, country)[at, category]
    hidden = plan.uniform("hidden price", row) < 0.03
    price, has_discount = catalog.price[candidate], plan.uniform("offer", candidate + day * plan.candidates) < 0.2
    price = np.where(has_discount, np.round(0.8 * price, 2), price)
    price_effect = np.where(hidden, np.float32(0), -0.4 * np.log(price / np.float32(20)))
    click_logit = -1.6 + affinity + catalog.quality[candidate] + price_effect + circumstances[at]
    click = plan.uniform("click", row) < expit(click_logit + position_bias(slot + 1))
    true_like = expit(0.2 + 0.7 * affinity + catalog.craft[candidate])
    has_label = moment < START.astype(np.int64) + (plan.days - LABEL_DELAY_DAYS) * 86_400_000_000
    columns = [
        pa.array(request[at]),
        pa.array(moment[at]).cast(REQUEST_TIME),
        pa.array(user[at]),
        _words(country[at], COUNTRIES),
        _words(device[at], DEVICES),
        pa.array(candidate),
        _words(category, [f"category {number:02d}" for number in range(CATEGORIES)]),
        pa.array(catalog.brand[candidate]),
        pa.array(price.astype(np.float64).round(2), mask=hidden),
        pa.array(slot + 1),
        pa.array(click.astype(np.int8)),
        pa.array((plan.uniform("like", row) < true_like).astype(np.int8), mask=~(click & has_label[at])),
        pa.array(expit(click_logit).astype(np.float64)),
        pa.array(true_like.astype(np.float64)),
    ]
    return pa.table(columns, schema=LOG)


def _words(codes: IntArray, words: tuple[str, ...] | list[str]) -> pa.Array:
    return pa.array(words, pa.string()).take(pa.array(codes))
