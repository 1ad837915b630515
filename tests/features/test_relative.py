"""The kind `relative` against loops over the candidates of each request."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.features.kinds.relative import find_comparing
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.log.rows import LogRows, RequestRows, ServingRows
from tests.log.small_logs import BASE, assert_same, fit, log_rows, random_log, schema_of, with_requests

OUTPUTS = ["rank", "fraction", "z_score", "below_max", "above_min", "length"]
WITH_REQUESTS: dict[str, Any] = {**BASE, "columns": {**BASE["columns"], "request": "request"}}


def relative(**settings: Any) -> dict[str, Any]:
    return {"f": {"kind": "relative", "columns": ["price"], "outputs": OUTPUTS, **settings}}


def naive(numbers: list[float], request: list[int]) -> dict[str, list[float]]:
    """All outputs of each row, by definition."""
    results: dict[str, list[float]] = {name: [] for name in OUTPUTS}
    for x, own in zip(numbers, request, strict=True):
        every = [y for y, other in zip(numbers, request, strict=True) if other == own]
        others = sorted(y for y in every if math.isfinite(y))
        results["length"].append(math.log(len(every)))
        if not math.isfinite(x):
            for name in OUTPUTS[:-1]:
                results[name].append(math.nan)
            continue
        below = sum(y < x for y in others) + (sum(y == x for y in others) - 1) / 2
        results["rank"].append(below / (len(others) - 1) if len(others) > 1 else 0.5)
        total = math.fsum(others)
        fraction = x / total if total > 0 else 1 / len(others)
        results["fraction"].append(fraction if others[0] >= 0 else math.nan)
        mean = total / len(others)
        std = math.sqrt(math.fsum((y - mean) ** 2 for y in others) / len(others))
        results["z_score"].append((x - mean) / std if others[0] < others[-1] else 0.0)
        results["below_max"].append(others[-1] - x)
        results["above_min"].append(x - others[0])
    return results


def drawn_numbers(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Numbers with ties, missing ones, negative ones in some draws, and equal ones in others."""
    numbers = rng.choice(
        [rng.normal(size=rows), rng.integers(-2 * rng.integers(0, 2), 4, rows) * 0.1, np.full(rows, 0.1)]
    )
    return np.where(rng.random(rows) < 0.1, np.nan, numbers)


@pytest.mark.parametrize("seed", range(100))
def test_a_log_is_compared_as_by_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 1000 if seed == 0 else int(rng.integers(1, 60))
    request = np.zeros(rows, int) if seed == 0 else rng.integers(0, rng.integers(1, rows + 1), rows)
    numbers = drawn_numbers(rng, rows)
    (encoder,) = FeaturePipeline(schema_of(relative())).relative_encoders
    codes = np.unique(request, return_inverse=True)[1]
    actual = encoder.compare({"price": numbers}, codes)
    expected = naive(numbers.tolist(), request.tolist())
    for name in OUTPUTS:
        values = actual["f_length" if name == "length" else f"f_price_{name}"]
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    order = rng.permutation(rows)
    shuffled = encoder.compare({"price": numbers[order]}, codes[order])
    for name, values in shuffled.items():
        np.testing.assert_array_equal(values, actual[name][order])


def served_rows(rows: LogRows) -> tuple[RequestRows, np.ndarray]:
    """The rows as requests that a server got, and their indices in the log."""
    codes = rows.request_codes()
    order = np.argsort(codes, kind="stable")
    columns = {name: rows.column(name).take(pa.array(order)) for name in rows.table.column_names}
    shared = {
        name: columns[name].take(pa.array(np.unique(codes[order], return_index=True)[1]))
        for name in ("user", "time", "request")
    }
    of_candidates = {name: values for name, values in columns.items() if name not in shared}
    return RequestRows(ServingRows(shared, len(shared["user"]), rows.schema), of_candidates, codes[order]), order


@pytest.mark.parametrize("seed", range(10))
def test_served_lists_equal_the_log(seed: int) -> None:
    """Also with a counter, and with candidates that a request repeats."""
    counters = {"brand_click": {"kind": "counter", "task": "click", "by": ["brand"], "window_days": [None, 1]}}
    features = relative(counters=["brand_click_rate_1d", "brand_click_recency"]) | counters
    schema = schema_of(features, **{name: WITH_REQUESTS[name] for name in ("columns",)})
    table = with_requests(random_log(seed), seed)
    table = pa.concat_tables([table, table.slice(0, 40)])
    rows = log_rows(table, schema)
    times = rows.times()
    first = {code: times[rows.request_codes() == code].min() for code in rows.request_codes()}
    rows = rows.with_times(np.array([first[code] for code in rows.request_codes()]))
    pipeline = fit(table, schema, int(np.median(times)))
    served, order = served_rows(rows)
    assert_same(pipeline.encode(served), pipeline.encode(LogRows(rows.table.take(pa.array(order)), schema)))
    rows = pipeline.compare_candidates(rows)
    whole, parts = rows.results, [part.results for part in rows.iter_batches(7)]
    assert whole.keys() >= {"f_length", "f_brand_click_rate_1d_rank", "f_price_z_score"}
    np.testing.assert_array_equal(np.concatenate([part["f_length"] for part in parts]), whole["f_length"])


@pytest.mark.parametrize(
    ("message", "settings", "sections"),
    [
        ("needs `columns` or `counters`", {"columns": []}, {}),
        ("compares 'prise', which has no role", {"columns": ["prise"]}, {}),
        ("compares 'age', which has the role user", {"columns": ["age"]}, {}),
        ("compares 'user_click_rate', which has the role user", {"counters": ["user_click_rate"]}, {}),
        (
            "compares 'brand_rate', which no counter outputs; did you mean 'brand_click_rate'",
            {"counters": ["brand_rate"]},
            {},
        ),
        (
            "columns.sampling_rate says that rows are missing. Remove the feature",
            {},
            {"columns": {**BASE["columns"], "sampling_rate": "rate"}},
        ),
        (
            "needs columns.request",
            {},
            {"columns": {"candidate": "item", "time": "time"}, "roles": {"candidate": ["price"]}},
        ),
    ],
)
def test_numbers_that_cannot_be_compared_are_refused(message: str, settings: dict, sections: dict) -> None:
    counters = {"user_click": {"kind": "counter", "task": "click", "by": ["user"]}} if "columns" not in sections else {}
    counters |= {"brand_click": {"kind": "counter", "task": "click", "by": ["brand"]}} if counters else {}
    with pytest.raises(ValueError, match=message):
        schema_of(relative(**settings) | counters, **sections)


def test_sampled_lists_are_compared_if_the_settings_allow_it() -> None:
    columns = {**BASE["columns"], "sampling_rate": "rate"}
    assert schema_of(relative(sampled_lists=True), columns=columns).features


def test_a_counter_names_the_features_that_compare_it() -> None:
    counters = {name: {"kind": "counter", "task": "click", "by": [name]} for name in ("brand", "item", "user")}
    schema = schema_of(counters | relative(counters=["brand_rate", "brand_recency", "item_rate"]))
    assert find_comparing(schema) == {"brand": ["f"], "item": ["f"]}
