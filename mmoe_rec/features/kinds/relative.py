"""The feature kind `relative`: how a number of a candidate compares with the other candidates of its request."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmoe_rec.errors import suggest
from mmoe_rec.features.encoder import EncoderContext, FeatureKind, Inputs, StatisticsEncoder
from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.features.numeric_statistics import DenseNumber
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse, Role
from mmoe_rec.settings.schema import Feature, InputSemantics, Schema, Unique

_ROWS_AT_ONCE = 100_000
_ROUNDING = 8 * np.finfo(np.float64).eps
Output = Literal["rank", "fraction", "z_score", "below_max", "above_min", "length"]


class RelativeFeature(Feature):
    """Comparisons of a candidate with the other candidates of its request, such as the rank of its price.

    The log must have all candidates of each request. Otherwise a request has more candidates in serving than in
    training, so a rank means something else.
    """

    fixed_role: ClassVar[Role | None] = "candidate"

    kind: Literal["relative"]
    columns: Annotated[tuple[str, ...], Unique] = Field((), description="numeric columns of the candidate to compare")
    counters: Annotated[tuple[str, ...], Unique] = Field(
        (), description="outputs of counters of the candidate to compare, such as brand_clicked_rate"
    )
    outputs: Annotated[tuple[Output, ...], Unique] = Field(
        ("rank", "fraction", "length"),
        min_length=1,
        description="rank: fraction of the other candidates with a smaller number, where an equal one counts half; "
        "fraction: number / sum of the request, missing if the request has a negative number; z_score: (number - mean) "
        "/ standard deviation; below_max: maximum - number; above_min: number - minimum; length: log of the number of "
        "candidates",
    )
    sampled_lists: bool = Field(False, description="whether to allow a log with columns.sampling_rate")

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.columns and not self.counters:
            raise ValueError("needs `columns` or `counters` to compare")
        return self

    def reads(self) -> Mapping[str, ColumnUse]:
        return dict.fromkeys(self.columns, "number")

    def semantics(self, schema: Schema) -> InputSemantics:
        counters = _counters(schema)
        keys = [schema.features[counters[output]].reads() for output in self.counters]
        return InputSemantics(tuple(dict.fromkeys(chain(self.columns, *keys))))

    def check(self, name: str, schema: Schema) -> None:
        """Raise ValueError if the log lacks requests or candidates, or if a number doesn't describe the candidate."""
        columns, counters = schema.columns, _counters(schema)
        if columns.request is None and not columns.has_user:
            problem = f"feature '{name}' needs columns.request, because it compares the rows of a request"
            raise ValueError(f"{problem}. Set columns.request.")
        if columns.sampling_rate is not None and not self.sampled_lists:
            raise ValueError(
                f"feature '{name}' compares all candidates of a request, but columns.sampling_rate says that rows are "
                "missing. Remove the feature. If the log samples whole requests, or if requests in serving have as few "
                "candidates as in the log, set its `sampled_lists` to true instead."
            )
        for counter in self.counters:
            if counter not in counters:
                hint = suggest(counter, counters)
                raise ValueError(f"feature '{name}' compares '{counter}', which no counter outputs; {hint}")
        numbers = {column: schema.column_roles.get(column) for column in self.columns}
        numbers |= {counter: schema.role_of(counters[counter]) for counter in self.counters}
        for number, role in numbers.items():
            if role != "candidate":
                found = "no role" if role is None else f"the role {role}"
                problem = f"feature '{name}' compares '{number}', which has {found}"
                raise ValueError(f"{problem}. Compare only numbers with the role candidate.")


def _counters(schema: Schema) -> dict[str, str]:
    """Return each output of a counter -> the name of the counter."""
    counters = {name: feature for name, feature in schema.features.items() if isinstance(feature, CounterFeature)}
    return {output: name for name, feature in counters.items() for output in feature.output_names(name)}


def find_comparing(schema: Schema) -> dict[str, list[str]]:
    """Return each counter whose outputs are compared -> the relative features that compare them."""
    owners, comparing = _counters(schema), dict[str, list[str]]()
    for name, feature in schema.features.items():
        if isinstance(feature, RelativeFeature):
            for counter in dict.fromkeys(owners[output] for output in feature.counters):
                comparing.setdefault(counter, []).append(name)
    return comparing


class RelativeEncoder(StatisticsEncoder):
    """Encoder of comparisons with the other candidates of the request."""

    feature: RelativeFeature

    def __init__(self, name: str, feature: RelativeFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.compared = (*feature.columns, *feature.counters)
        self._outputs = [output for output in feature.outputs if output != "length"]
        names = [f"{name}_{number}_{output}" for number in self.compared for output in self._outputs]
        names += [f"{name}_length"] * ("length" in feature.outputs)
        self.numbers = {result: DenseNumber(result) for result in names}

    def numbers_to_compare(self, rows: LogRows) -> dict[str, np.ndarray]:
        """Return column or output of a counter -> its numbers in N rows, (N,) float64.

        `rows.results` must have the outputs of counters.
        """
        numbers = {name: rows.numbers(name) for name in self.feature.columns}
        return numbers | {name: np.asarray(rows.results[name], np.float64) for name in self.feature.counters}

    def compare(self, numbers: Mapping[str, np.ndarray], requests: np.ndarray) -> dict[str, np.ndarray]:
        """Return the results of N rows by name, (N,) float32, NaN if the compared number is missing.

        Args:
            numbers: Numbers that `numbers_to_compare` returned. They must have all rows of each request, in any order.
            requests: (N,) int64 code of each row's request. Codes start at 0.
        """
        results = {f"{self.name}_length": np.log(np.bincount(requests)[requests]).astype(np.float32)}
        # One call for several numbers is faster. To limit memory, a call with many rows compares fewer numbers.
        step = max(1, _ROWS_AT_ONCE // max(1, len(requests)))
        for start in range(0, len(self.compared), step):
            names = self.compared[start : start + step]
            compared = _compare(np.stack([numbers[name] for name in names]), requests, self._outputs)
            for output, values in compared.items():
                results |= {f"{self.name}_{name}_{output}": row for name, row in zip(names, values, strict=True)}
        return {name: results[name] for name in self.numbers}

    def encode(self, rows: LogRows) -> Inputs:
        """Return the results as `Inputs.numbers`, from `rows.results` if they are there.

        Otherwise compute the results. `rows` must then have all rows of each request.
        """
        results: Mapping[str, Any] = rows.results
        if not results.keys() >= self.numbers.keys():
            results = self.compare(self.numbers_to_compare(rows), rows.request_codes())
        return Inputs(numbers=[(results[name], number) for name, number in self.numbers.items()])


def _compare(numbers: np.ndarray, requests: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Return `outputs` (without `length`) by name, each (K, N) float32, for K numbers of N rows, (K, N).

    Numbers are sorted before they are added, so results don't depend on the order of the rows.
    """
    flat, lists = numbers.ravel(), requests.max(initial=0) + 1
    groups = (np.arange(len(numbers))[:, None] * lists + requests).ravel()
    present = np.flatnonzero(np.isfinite(flat))
    present = present[np.argsort(flat[present])]
    # NumPy's stable sort of 16-bit integers is a radix sort, which is faster than a comparison sort.
    small = groups[present].astype(np.uint16 if len(numbers) * lists < 2**16 else np.int64)
    present = present[np.argsort(small, kind="stable")]
    x, group = flat[present], groups[present]
    starts = _starts(group[1:] != group[:-1], len(x))
    count = np.diff(starts, append=len(x))
    lowest, highest = x[starts], x[starts + count - 1]
    total = np.add.reduceat(x, starts)
    spread = partial(np.repeat, repeats=count)  # Values of groups -> values of rows.

    def compute(output: str) -> np.ndarray:
        match output:
            case "rank":
                # Equal numbers have neighboring positions. All of them get the mean position.
                runs = _starts((x[1:] != x[:-1]) | (group[1:] != group[:-1]), len(x))
                length = np.diff(runs, append=len(x))
                position = np.repeat(runs + (length - 1) / 2, length) - spread(starts)
                return np.where(spread(count) > 1, position / spread(np.maximum(count - 1, 1)), 0.5)
            case "fraction":
                is_zero = total == 0
                fraction = np.where(spread(is_zero), spread(1 / count), x / spread(np.where(is_zero, 1, total)))
                return np.where(spread(lowest < 0), np.nan, fraction)
            case "z_score":
                distance = x - spread(total / count)
                std = np.sqrt(np.add.reduceat(np.square(distance), starts) / count)
                is_equal = std <= _ROUNDING * np.maximum(np.abs(lowest), np.abs(highest))
                return np.where(spread(is_equal), 0.0, distance / spread(np.where(is_equal, 1, std)))
            case "below_max":
                return spread(highest) - x
            case _:
                return x - spread(lowest)

    results = {}
    for output in outputs:
        values = np.full(flat.shape, np.nan, np.float32)
        values[present] = compute(output)
        results[output] = values.reshape(numbers.shape)
    return results


def _starts(changes: np.ndarray, count: int) -> np.ndarray:
    """Return the index at which each run of equal values starts. `changes`: whether the next value differs."""
    return np.flatnonzero(np.append(True, changes)[:count])


KIND = FeatureKind(RelativeFeature, RelativeEncoder)
