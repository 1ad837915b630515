"""python -m tests.benchmarks.exchange

What does exchange alone take from two ranks of one thread? Each rank multiplies matrices for about as long as a step of
`tests/benchmarks/training.py` computes (25 ms), once with nothing else and once around the fewest collectives that a
sharded training can do with: its ids, embeddings, gradients of embeddings and of the dense part, in that benchmark's
sizes, sent by bare `torch.distributed` over gloo. `overlapped` lets the last two travel beside a third of the products.

`bound_N_over_one`: the most that two ranks could gain over one if a step had nothing but these products and this
exchange, and if one rank alone had no exchange and twice the products. A training cannot gain more than that over gloo.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.benchmarks.training_rows import BATCH, DIM, ID_NAMES

STEPS = 200
PRODUCTS = 4
DENSE_PARAMETERS = 400_000
WAYS = ("alone", "exchanged", "overlapped")


def milliseconds_a_step(way: str) -> float:
    """One rank's part; all ranks run this together."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = BATCH // 2
    left, right = torch.randn(rows, 512, dtype=torch.bfloat16), torch.randn(512, 640, dtype=torch.bfloat16)
    ids, embeddings = torch.zeros(rows * len(ID_NAMES), dtype=torch.int64), torch.randn(rows, len(ID_NAMES) * DIM)
    received_ids, received, dense = torch.empty_like(ids), torch.empty_like(embeddings), torch.randn(DENSE_PARAMETERS)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(left, right)

    def step() -> None:
        if way == "alone":
            return products(PRODUCTS)
        next_ids = dist.all_to_all_single(received_ids, ids, async_op=True)
        products(1)
        dist.all_to_all_single(received, embeddings)
        products(PRODUCTS - 2)
        gradients = [
            dist.all_to_all_single(received, embeddings, async_op=True),
            dist.all_reduce(dense, async_op=True),
        ]
        if way == "overlapped":
            products(1)
        for each in [*gradients, next_ids]:
            each.wait()
        return None if way == "overlapped" else products(1)

    for _ in range(STEPS // 10):
        step()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    took = (time.perf_counter() - started) / STEPS * 1000
    dist.barrier()
    time.sleep(0.05)
    dist.destroy_process_group()
    time.sleep(0.05)
    return took


def measure(way: str) -> float:
    """Milliseconds a step of two ranks under torchrun, the slower one's."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*start, "tests.benchmarks.exchange", way]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return max(map(float, finished.stdout.split()))


def main() -> None:
    """Measures all ways in turns, or one of them as a rank."""
    if len(sys.argv) > 1:
        # One write, so that the ranks' lines do not run into each other.
        sys.stdout.write(f"{milliseconds_a_step(sys.argv[1])}\n")
        return
    shortest = dict.fromkeys(WAYS, float("inf"))
    for _ in range(5):
        for way in WAYS:
            shortest[way] = min(shortest[way], measure(way))
    bounds = {f"bound_{way}_over_one": round(2 * shortest["alone"] / shortest[way], 3) for way in WAYS[1:]}
    print(json.dumps({"ms_a_step": {way: round(took, 2) for way, took in shortest.items()}} | bounds))


if __name__ == "__main__":
    main()
