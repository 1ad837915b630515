"""The feature kind `relative`: numbers of a candidate in relation to the other candidates of its request."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmoe_rec.errors import suggest
from mmoe_rec.features.encoder import Encoder, EncoderContext, FeatureKind, Inputs, InputSpec, State
from mmoe_rec.features.kinds.counter import CounterFeature
from mmoe_rec.features.numeric_statistics import DenseNumber, Standardizer
from mmoe_rec.log.rows import LogRows
from mmoe_rec.settings.log_columns import ColumnUse, Role
from mmoe_rec.settings.schema import Feature, InputSemantics, Schema, Unique

_ROUNDING = 8 * np.finfo(np.float64).eps
Output = Literal["rank", "fraction", "z_score", "below_max", "above_min", "length"]


class RelativeFeature(Feature):
    """Numbers of a candidate in relation to the other candidates of its request, such as the rank of its price.

    Training needs all candidates of each request. Otherwise the lists in serving are longer than the lists in training.
    """

    fixed_role: ClassVar[Role | None] = "candidate"

    kind: Literal["relative"]
    columns: Annotated[tuple[str, ...], Unique] = Field((), description="numeric columns of the candidate to compare")
    counters: Annotated[tuple[str, ...], Unique] = Field(
        (), description="outputs of counters to compare, such as brand_clicked_rate"
    )
    outputs: Annotated[tuple[Output, ...], Unique] = Field(
        ("rank", "fraction", "length"),
        min_length=1,
        description="rank: fraction of the other candidates with a smaller number, where an equal one counts half; "
        "fraction: number / sum, missing if a number is negative; z_score: (x - mean) / standard deviation; "
        "below_max: maximum - x; above_min: x - minimum; length: log of the number of candidates",
    )
    sampled_lists: bool = Field(False, description="allow a log that has only a sample of each request's candidates")

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
        """Raise ValueError if the log has no whole lists, or if a number is equal for all candidates of a request."""
        columns, counters = schema.columns, _counters(schema)
        if columns.request is None and not columns.has_user:
            raise ValueError(f"feature '{name}' compares the rows of a request, so it needs columns.request")
        if columns.sampling_rate is not None and not self.sampled_lists:
            raise ValueError(
                f"feature '{name}' needs all candidates of each request, but the log has a sample of its rows "
                "(columns.sampling_rate). Remove the feature. Set its `sampled_lists` to true only if requests in "
                "serving have as few candidates."
            )
        for counter in self.counters:
            if counter not in counters:
                hint = suggest(counter, counters)
                raise ValueError(f"feature '{name}' compares '{counter}', which no counter outputs; {hint}")
        numbers = {column: schema.column_roles.get(column) for column in self.columns}
        numbers |= {counter: schema.role_of(counters[counter]) for counter in self.counters}
        for number, role in numbers.items():
            if role != "candidate":
                reason = "has no role" if role is None else f"has the role {role}"
                raise ValueError(
                    f"feature '{name}' compares '{number}', which {reason}. Compare numbers of the role candidate."
                )


def _counters(schema: Schema) -> dict[str, str]:
    """Return the name of a counter's output -> name of the counter."""
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


class RelativeEncoder(Encoder):
    """Encoder of numbers in relation to the other candidates of the request."""

    feature: RelativeFeature

    def __init__(self, name: str, feature: RelativeFeature, context: EncoderContext) -> None:
        super().__init__(name, feature, context)
        self.compared = (*feature.columns, *feature.counters)
        outputs = [output for output in feature.outputs if output != "length"]
        names = [f"{name}_{number}_{output}" for number in self.compared for output in outputs]
        names += [f"{name}_length"] * ("length" in feature.outputs)
        self.numbers = {result: DenseNumber(result) for result in names}

    def input_spec(self) -> InputSpec:
        return InputSpec(dense=tuple(dense for number in self.numbers.values() for dense in number.inputs()))

    def numbers_to_compare(self, rows: LogRows) -> dict[str, np.ndarray]:
        """Return column or counter -> its numbers in N rows, (N,) float64. Counters are read from `rows.results`."""
        numbers = {name: rows.numbers(name) for name in self.feature.columns}
        return numbers | {name: np.asarray(rows.results[name], np.float64) for name in self.feature.counters}

    def compare(self, numbers: Mapping[str, np.ndarray], requests: np.ndarray) -> dict[str, np.ndarray]:
        """Return the results of N rows by name, (N,) float32, NaN where the number is missing.

        Args:
            numbers: Numbers that `numbers_to_compare` returned, for all rows of each request in any order.
            requests: (N,) int64 code of each row's request. Codes start at 0.
        """
        results: dict[str, np.ndarray] = {}
        if "length" in self.feature.outputs:
            results[f"{self.name}_length"] = np.log(np.bincount(requests))[requests].astype(np.float32)
        for name in self.compared:
            for output, values in _compare(numbers[name], requests).items():
                results[f"{self.name}_{name}_{output}"] = values
        return {name: results[name] for name in self.numbers}

    def encode(self, rows: LogRows) -> Inputs:
        """Return the results as `Inputs.numbers`. Without `rows.results`, the rows must have all rows of a request."""
        results: Mapping[str, Any] = rows.results
        if not results.keys() >= self.numbers.keys():
            results = self.compare(self.numbers_to_compare(rows), rows.request_codes())
        return Inputs(numbers=[(results[name], number) for name, number in self.numbers.items()])

    def state(self) -> State:
        return State({name: asdict(number.standardizer) for name, number in self.numbers.items()})

    def restore(self, state: State) -> None:
        for name, values in state.values.items():
            self.numbers[name].standardizer = Standardizer(**values)


def _compare(numbers: np.ndarray, requests: np.ndarray) -> dict[str, np.ndarray]:
    """Return all outputs except `length`, (N,) float32 each. Sums are of sorted numbers, so row order has no effect."""
    present = np.flatnonzero(np.isfinite(numbers))
    present = present[np.lexsort((numbers[present], requests[present]))]
    x, request = numbers[present], requests[present]
    is_first = np.append(True, request[1:] != request[:-1])[: len(x)]
    starts, group = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    count = np.diff(np.append(starts, len(x)))
    size = count[group]
    lowest, highest = x[starts][group], x[starts + count - 1][group]
    total = np.add.reduceat(x, starts) if len(x) else x
    distance = x - (total / count)[group]
    std = np.sqrt((np.add.reduceat(np.square(distance), starts) if len(x) else x) / count)[group]
    is_equal = std <= _ROUNDING * np.maximum(np.abs(lowest), np.abs(highest))
    # Equal numbers have neighboring positions, so the mean position gives all of them the same rank.
    is_new = is_first | np.append(True, x[1:] != x[:-1])[: len(x)]
    first, run = np.flatnonzero(is_new), np.cumsum(is_new) - 1
    position = (first + (np.diff(np.append(first, len(x))) - 1) / 2)[run] - starts[group]
    total = total[group]
    values = {
        "rank": np.where(size > 1, position / np.maximum(size - 1, 1), 0.5),
        "fraction": np.where(lowest < 0, np.nan, np.where(total > 0, x / np.where(total > 0, total, 1), 1 / size)),
        "z_score": np.where(is_equal, 0.0, distance / np.where(is_equal, 1, std)),
        "below_max": highest - x,
        "above_min": x - lowest,
    }
    results = {}
    for name, output in values.items():
        results[name] = np.full(len(numbers), np.nan, np.float32)
        results[name][present] = output
    return results


KIND = FeatureKind(RelativeFeature, RelativeEncoder)
