"""python -m tests.benchmarks.serving

What scoring costs over HTTP, on MLflow's server and on ours, beside a no-op model with the same request and reply on
the same server.

It takes the model of the quickstart (`python -m pipelines.quickstart` comes first), or another one's folder
(`--model`). Servers are asked in turns, each scoring in one thread; clients share the cores with them. Requests name
candidates by their ids; `given` also gives their attributes.

rechub_mlflow torch-rechub's MMOE in a small pyfunc (`tests/benchmarks/rechub_model.py`) on MLflow's server, with ids of
              the same columns and random weights; its package comes from an environment of its own (`--peers`);
growth        the median of a request to a model that remembers ten times as many events, over the same model's;
dense         what each engine takes for the dense part (`tests/benchmarks/dense.py`).

`ours_over_floor`: a request on our server over the sum of the no-op there and of the fastest of these engines.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.http_load import Client, latencies, processor_seconds, requests_a_second
from tests.benchmarks.serving_models import Bodies, save_pyfunc, save_rechub
from tests.inference.running_server import free_port, running_program

MODEL = Path("data/complete_journey/work/model")
COUNTS = (5, 500, 5_000)
TURNS, LONG_TURNS = 10, 3
RECHUB = "rechub_mlflow"


@dataclass(frozen=True)
class Running:
    """A server: its port and process."""

    port: int
    pid: int

    def client(self, page: str = "/invocations") -> Client:
        """A new connection."""
        return Client(self.port, page)


@contextmanager
def serving(words: list[str], port: int, folder: Path, cwd: Path | None = None) -> Iterator[Running]:
    """A server's program, until the block ends. folder: gets what it prints."""
    programs = Path(sys.executable).parent
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    env = {**own, "PATH": f"{programs}{os.pathsep}{own['PATH']}", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    page, log = f"http://127.0.0.1:{port}/ping", folder / f"server_{port}.log"
    with running_program(words, page, log, cwd=cwd or Path.cwd(), env=env) as process:
        yield Running(port, process.pid)


@contextmanager
def by_mlflow(address: str | Path, folder: Path, cwd: Path | None = None) -> Iterator[Running]:
    """MLflow's server with one worker."""
    port = free_port()
    program = str(Path(sys.executable).parent / "mlflow")
    words = [program, "models", "serve", "-m", str(address), "--env-manager", "local", "--port", str(port)]
    with serving(words, port, folder, cwd) as running:
        yield running


@contextmanager
def by_ours(model: Path, folder: Path, workers: int = 1) -> Iterator[Running]:
    """Our server."""
    port = free_port()
    words = [sys.executable, "-m", "mmoe_rec", "serve", "--model", str(model), "--port", str(port)]
    with serving([*words, "--workers", str(workers)], port, folder) as running:
        yield running


@contextmanager
def noop_by_ours(model: Path, folder: Path) -> Iterator[Running]:
    """Our server with a ranker that does nothing."""
    port = free_port()
    words = [sys.executable, "-m", "tests.benchmarks.noop_ranker", str(port), str(model)]
    with serving(words, port, folder) as running:
        yield running


class Benchmark:
    """Figures of servers that run at the same time and are asked in turns, by their names."""

    def __init__(self, bodies: Bodies, servers: Mapping[str, Running], seconds: float) -> None:
        self.bodies, self.servers, self.seconds = bodies, servers, seconds
        self.figures: dict[str, dict[str, float]] = {"p50_ms": {}, "p99_ms": {}, "rps_8_clients": {}, "cpu_ms": {}}

    def measure(self) -> None:
        """All requests, and what 500 candidates by id cost; `rechub` ranks candidates with all their columns alone."""
        by_ids = {name: server for name, server in self.servers.items() if name != RECHUB}
        models = {name: server for name, server in self.servers.items() if "noop" not in name}
        asked = {str(count): self.bodies.ids(count) for count in COUNTS}
        self._ask("health", by_ids, None, "/ping")
        for what, body in {**asked, "100x5": self.bodies.ids(5, elements=100)}.items():
            self._ask(what, by_ids, body)
        self._ask("given_500", models, self.bodies.given(500))
        costs: dict[str, list[float]] = {name: [] for name in by_ids}
        rates: dict[str, list[float]] = {name: [] for name in by_ids}
        for _ in range(LONG_TURNS):
            for name, server in by_ids.items():
                costs[name].append(1e3 * processor_seconds(server.pid, server.client(), asked["500"], 40))
                rates[name].append(requests_a_second(server.client, asked["500"], 8, 2 * self.seconds / LONG_TURNS))
        for name in by_ids:
            self._note("cpu_ms", name, float(np.median(costs[name])))
            self._note("rps_8_clients", name, float(np.median(rates[name])))

    def _ask(self, what: str, servers: Mapping[str, Running], body: bytes | None, page: str = "/invocations") -> None:
        clients = {name: server.client(page) for name, server in servers.items()}
        for name, found in latencies(clients, body, self.seconds, TURNS).items():
            self._note("p50_ms", f"{name}_{what}", found.ms(50))
            self._note("p99_ms", f"{name}_{what}", found.ms(99))

    def _note(self, figure: str, name: str, value: float) -> None:
        self.figures[figure][name] = round(value, 3)
        print(f"{figure} {name}: {value:.3f}", file=sys.stderr)


def grown(model: Path, times: int) -> float:
    """Median time of a request, in one thread and without HTTP, to a model that remembers `times` as many events, over
    that of the model as it is."""
    words = [sys.executable, "-m", "tests.benchmarks.growth", str(model), str(times)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def dense_parts(model: Path, *counts: int) -> dict[str, Any]:
    """What engines take for the dense part, and how far they are apart."""
    words = [sys.executable, "-m", "tests.benchmarks.dense", str(model), *map(str, counts)]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return found


def benchmark(model: Path, peers: Path | None, seconds: float) -> dict[str, Any]:
    """All figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for noop in (False, True):
            save_pyfunc(model, folder / f"pyfunc_{noop}", noop)
        found = {
            "noop_mlflow": by_mlflow(folder / "pyfunc_True", folder),
            "mlflow": by_mlflow(folder / "pyfunc_False", folder),
            "noop": noop_by_ours(model, folder),
            "ours": by_ours(model, folder),
            "ours_2_workers": by_ours(model, folder, workers=2),
        }
        if peers is not None:
            save_rechub(model, folder / RECHUB, peers)
            found[RECHUB] = by_mlflow(folder / RECHUB, folder)
        servers = {name: stack.enter_context(server) for name, server in found.items()}
        run = Benchmark(Bodies(model), servers, seconds)
        run.measure()
    p50, dense = run.figures["p50_ms"], dense_parts(model, 5, 500)
    floors = {count: p50[f"noop_{count}"] + min(each.values()) for count, each in dense["milliseconds"].items()}
    ratios = {
        "ours_over_noop_p50": p50["ours_500"] / p50["noop_500"],
        "ours_over_noop_100x5": p50["ours_100x5"] / p50["noop_100x5"],
        "growth_memory_10x": grown(model, 10),
        **{f"ours_over_floor_{count}": p50[f"ours_{count}"] / floor for count, floor in floors.items()},
        **{f"mlflow_ours_over_noop_{count}": p50[f"mlflow_{count}"] / p50[f"noop_mlflow_{count}"] for count in floors},
    }
    return {**run.figures, "dense": dense, **{name: round(value, 3) for name, value in ratios.items()}}


def main() -> None:
    """Runs all; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="an artifact folder (default: %(default)s)")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir(), "mmoe_rec_peers"))
    parser.add_argument("--no-peers", action="store_true", help="without torch-rechub")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each kind of request (default: %(default)s)")
    options = parser.parse_args()
    if not (options.model / "model.json").is_file():
        parser.error(f"'{options.model}' holds no model; run python -m pipelines.quickstart first")
    peers = None if options.no_peers else options.peers
    print(json.dumps(benchmark(options.model, peers, options.seconds)))


if __name__ == "__main__":
    main()
