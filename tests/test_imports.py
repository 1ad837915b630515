"""Imports run one way, along a row's way from settings to commands, and never in a circle."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path("mmoe_rec")
ORDER = [
    {"errors", "auc", "atomic", "progress", "devices", "locks"},
    {"task_kinds"},
    {"settings"},
    {"point_in_time"},
    {"log"},
    {"features"},
    {"preprocessing"},
    {"batches"},
    {"model"},
    {"report"},
    {
        *(f"live.{name}" for name in ("__init__", "journal", "journal_rows")),
    },
    {"inference", "profiling"},
    {f"live.{name}" for name in ("request_log", "label_join")},
    {"server"},
    {"tracking"},
    {"inference.batch_scoring"},
    {"evaluation"},
    {"training"},
    {"experiments", *(f"live.{name}" for name in ("refresh", "skew"))},
    {"cli"},
    {"__init__", "__main__"},
]
"""Rooms, and files with a place of their own. Each may import from earlier lines, and files of the first each other."""
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
OWN_SECTIONS = {"mmoe_rec.features.kinds", "mmoe_rec.model.routing"}
"""They hold the sections of their own settings, which `settings` puts together, and import nothing heavy."""
ONLY_IN = {
    "mlflow": {"mmoe_rec/tracking", "mmoe_rec/inference"},
    "jinja2": {"mmoe_rec/report"},
    "matplotlib": {"mmoe_rec/report", "mmoe_rec/evaluation/results_report.py", "mmoe_rec/profiling/health_report.py"},
    "torchrec": {"mmoe_rec/batches", "mmoe_rec/model", "mmoe_rec/training"},
    **{name: {"mmoe_rec/server"} for name in ("starlette", "uvicorn", "orjson", "prometheus_client")},
}
FILES = {".".join(path.with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def read_imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return names


def room_of(module: str) -> str | None:
    """The room of a module, or of a name within one; with the file, if the file has a place of its own."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name or len(parts) == 1:
        return None
    file = ".".join(parts[1:3])
    return file if file in RANK else parts[1]


def test_imports_run_one_way() -> None:
    for module, path in FILES.items():
        room = room_of(module) or ""
        assert room in RANK, f"{path} is in no line of ORDER"
        for name in read_imports(path):
            assert not name.startswith(("pipelines", "tests")), f"{path} imports {name}"
            second = room_of(name)
            if second in (None, room, "__version__") or (
                room == "settings" and name.rpartition(".")[0] in OWN_SECTIONS
            ):
                continue
            same = RANK[second] == RANK[room] and (RANK[room] == 0 or "." in room)
            assert RANK[second] < RANK[room] or same, f"{path} imports {name}"


def test_what_belongs_to_one_place_is_imported_there_alone() -> None:
    for path in FILES.values():
        for name in read_imports(path):
            places = ONLY_IN.get(name.partition(".")[0])
            assert places is None or any(path.is_relative_to(place) for place in places), f"{path} imports {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports within functions count, too."""
    modules = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
    graph = {}
    for module, path in modules.items():
        names = read_imports(path)
        others = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (others & modules.keys()) - {module}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("benchmark", sorted(Path("tests/benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_benchmark_can_be_imported(benchmark: Path) -> None:
    """They are run seldom."""
    importlib.import_module(f"tests.benchmarks.{benchmark.stem}")
