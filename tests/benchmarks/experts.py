"""python -m tests.benchmarks.experts

What do many experts cost when each row is sent to few of them? A step of the mixture's level (gates, experts, mixing;
forward and backward pass, and AdamW on its weights) on 4096 rows of width 256, two tasks, one gate each:

dense    all experts on all rows, in few large products, whatever the gates chose;
grouped  each expert on the rows that some gate sent to it.

For 8, 16, 32 and 64 experts of units [128, 64] and [512, 256], 1, 2 and 4 experts per row and gate, fp32 and bf16.
Cases that differ in the number of experts alone take turns, on new rows each time and with freed memory kept, as in
training; the fastest step of each counts. `executions` are rows that experts ran on, counted where their results are
mixed; `union` is what the gates chose, counted from their choice; `multiplied` are the rows of the products, with those
that make up whole blocks in half precision.

growth_k2_8_to_64: time of a grouped step, 64 over 8 experts of [512, 256], two per row and gate, the larger one of both
precisions; sparse_over_dense_E64_k2: grouped over dense with 64 of them, likewise. `_without_optimizer`: the same
without AdamW, whose work grows with the number of weights, and not with that of rows. `auto_never_slower`: the largest
time of what `compute: auto` takes over the faster of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import torch
from torch import Tensor

from mmoe_rec.allocation import freed_memory_kept
from mmoe_rec.model import levels as levels_module
from mmoe_rec.model.levels import Experts, Level
from mmoe_rec.model.products import Dispatch
from mmoe_rec.settings.model import Model

ROWS, WIDTH, TASKS = 4096, 256, 2
WAYS = ("grouped", "dense")
COUNTS, KS, UNITS = (8, 16, 32, 64), (1, 2, 4), ((128, 64), (512, 256))


class Case:
    """One size, in both ways of computing, with the same weights."""

    def __init__(self, count: int, k: int, units: tuple[int, int], bf16: bool) -> None:
        self.count, self.k, self.units, self.bf16 = count, k, units, bf16
        self.levels, self.optimizers = {}, {}
        for way in WAYS:
            torch.manual_seed(0)
            gates = {"routing": "top_k", "top_k": k}
            model = Model.model_validate({"experts": {"count": count, "units": units, "compute": way}, "gates": gates})
            level = Level(WIDTH, WIDTH, TASKS, 0, model)
            self.levels[way] = level
            self.optimizers[way] = torch.optim.AdamW(level.parameters(), lr=1e-4, fused=True)
        self.seconds: dict[str, dict[str, float]] = {way: {} for way in self.levels}
        self.executions = self.multiplied = self.union = 0
        self.auto = ""
        self.auto_experts = Experts(count, WIDTH, model.experts.model_copy(update={"compute": "auto"}))

    def step(self, way: str, hidden: Tensor) -> None:
        """One step; the shortest times stay."""
        level, optimizer = self.levels[way], self.optimizers[way]
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            mixed, routing = level([hidden], [hidden])
        mixed.float().square().mean().backward()
        computed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        ended = time.perf_counter()
        used = routing.used()
        assert used is not None
        self.union = int(used.sum())
        self.auto = "grouped" if self.auto_experts.takes_grouped(used) else "dense"
        for name, took in (("step", ended - started), ("pass", computed - started)):
            self.seconds[way][name] = min(took, self.seconds[way].get(name, float("inf")))

    def count_executions(self, hidden: Tensor) -> None:
        """Rows of one more step in the grouped way."""
        multiplied: list[int] = []
        products, combine = levels_module.grouped_linear, levels_module.combine

        def counting_products(x: Tensor, *rest: Any) -> Tensor:
            multiplied.append(len(x))
            return products(x, *rest)

        def counting_results(values: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
            self.executions = len(dispatch.places[dispatch.filled].unique())
            return combine(values, weights, dispatch)

        levels_module.grouped_linear, levels_module.combine = counting_products, counting_results
        try:
            self.step("grouped", hidden)
        finally:
            levels_module.grouped_linear, levels_module.combine = products, combine
        assert len(set(multiplied)) == 1, "all layers see the same rows"
        self.multiplied = multiplied[0]

    def row(self) -> dict[str, Any]:
        """The case for the final line; times in ms."""
        times = {
            f"{way}_{name}_ms": round(took * 1000, 1)
            for way in self.seconds
            for name, took in self.seconds[way].items()
        }
        return {
            "experts": self.count,
            "k": self.k,
            "units": list(self.units),
            "precision": "bf16" if self.bf16 else "fp32",
            "executions": self.executions,
            "multiplied": self.multiplied,
            "union": self.union,
            "dense_executions": ROWS * self.count,
            "auto": self.auto,
            **times,
        }


def measure(repeats: int) -> list[dict[str, Any]]:
    """All cases."""
    rows = []
    for units, bf16, k in itertools.product(UNITS, (False, True), KS):
        cases = [Case(count, k, units, bf16) for count in COUNTS]
        for way, _ in itertools.product(WAYS, range(repeats + 1)):
            hidden = torch.randn(ROWS, WIDTH)
            for case in cases:
                case.step(way, hidden)
        for case in cases:
            case.count_executions(torch.randn(ROWS, WIDTH))
            rows.append(case.row())
            print(json.dumps(rows[-1]), flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the final line says of all cases."""
    found: dict[str, float] = {}
    for suffix, time_of in (("", "step"), ("_without_optimizer", "pass")):
        growth, sparse = [], []
        for precision in ("fp32", "bf16"):
            of = {
                row["experts"]: row
                for row in rows
                if row["units"] == list(UNITS[1]) and row["k"] == 2 and row["precision"] == precision
            }
            growth.append(of[64][f"grouped_{time_of}_ms"] / of[8][f"grouped_{time_of}_ms"])
            sparse.append(of[64][f"grouped_{time_of}_ms"] / of[64][f"dense_{time_of}_ms"])
        found[f"growth_k2_8_to_64{suffix}"] = round(max(growth), 3)
        found[f"sparse_over_dense_E64_k2{suffix}"] = round(max(sparse), 3)
    auto = [row[f"{row['auto']}_step_ms"] / min(row["dense_step_ms"], row["grouped_step_ms"]) for row in rows]
    return found | {"auto_never_slower": round(max(auto), 3)}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="steps of each case (default: %(default)s)")
    options = parser.parse_args()
    with freed_memory_kept():
        rows = measure(options.repeats)
    print(json.dumps({"cases": rows} | ratios(rows)))


if __name__ == "__main__":
    main()
