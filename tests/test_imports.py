"""Imports run one way: schema -> log -> features -> settings -> build -> batches -> model -> training."""

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path("mmoe_rec")
LEAVES = {"errors", "auc", "program", "allocation", "atomic", "progress", "devices", "settings", "schema", "locks"}
LOG = {"log", "point_in_time"}
MAY_IMPORT = {
    "program": set(),
    "errors": {"program"},
    "atomic": {"errors"},
    "auc": set(),
    "progress": set(),
    "locks": {"errors", "progress"},
    "allocation": set(),
    "devices": {"errors", "settings"},
    "schema": {"errors"},
    "routing": set(),
    "settings": {"errors", "program", "schema", "features", "routing"},
    "point_in_time": set(),
    "log": {"errors", "schema", "point_in_time"},
    "features": {"errors", "atomic", "schema", *LOG},
    "journal": {"errors", "atomic", "progress", "schema", "features", *LOG},
    "build": LEAVES | LOG | {"features"},
    "batches": LEAVES | LOG | {"features"},
    "inspection": LEAVES | LOG | {"features", "build", "batches"},
    "model": LEAVES | {"features", "batches", "point_in_time", "routing"},
    "tables": LEAVES | {"features", "batches", "model"},
    "choices": {"allocation", "devices", "settings", "batches", "features", "model", "tables"},
    "training": LEAVES | {"features", "build", "batches", "model", "routing", "tables", "choices", "tracking"},
    "request_log": {"errors", "atomic", "features", *LOG},
    "serving": LEAVES | LOG | {"features", "build", "batches", "model", "journal", "request_log"},
    "server": {"errors", "settings", "schema", "journal", "serving", "request_log", *LOG},
    "outcomes": LEAVES | LOG | {"build", "request_log"},
    "evaluation": LEAVES | LOG | {"features", "batches", "model"},
    "report": {"errors", "atomic", "inspection", "evaluation"},
}
"""Stage -> other stages. A stage that is not listed, such as `tracking`, is held to the absence of cycles only."""

FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            found |= {f"{node.module}.{each.name}" for each in node.names}
    return found


def _stage(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else None


def _stage_of(path: Path) -> str:
    return _stage(".".join(path.with_suffix("").parts)) or ""


def _graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        stages = {stage for stage in map(_stage, _imports(path)) if stage is not None}
        graph.setdefault(_stage_of(path), set()).update(stages - {_stage_of(path)})
    return graph


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_earlier_stages_only(path):
    stage = _stage_of(path)
    for module in _imports(path):
        other = _stage(module)
        if other not in (None, stage) and stage in MAY_IMPORT:
            assert other in MAY_IMPORT[stage], f"{path} imports {module}, but {stage} comes before {other}"
        assert not module.startswith(("pipelines", "tests")), f"{path} imports {module}"
        if other == "tracking":
            assert stage in ("training", "jobs"), f"{path} imports {module}; only jobs and training track"
        if module.split(".")[0] == "mlflow":
            allowed = stage in ("tracking", "registry", "mlflow_client", "serving")
            assert allowed or path.name == "mlflow_metrics.py", f"{path} imports {module}; see mmoe_rec/tracking.py"
        if module.split(".")[0] in ("jinja2", "matplotlib"):
            assert stage == "report", f"{path} imports {module}; see mmoe_rec/report"
        if module.split(".")[0] in ("fastapi", "starlette", "uvicorn", "orjson", "prometheus_client"):
            assert stage == "server", f"{path} imports {module}; see mmoe_rec/server"
        if module.split(".")[0] == "torchrec":
            assert stage != "serving", f"{path} imports {module}; serving runs without torchrec"


def test_stages_have_no_cycle():
    graph = _graph()
    assert graph["features"] >= {"schema", "errors"}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {stage for stage in graph if stage not in done and graph[stage] & set(graph) <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_test_sees_imports_within_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from mmoe_rec.training import losses\n    import mmoe_rec.model.mmoe\n")
    assert {_stage(module) for module in _imports(file)} == {"training", "model"}


# A folder can be taken in: few files, and few of them on top of each other.

MOST_FILES, MOST_FLOORS = 16, 9


def _floors(paths: list[Path]) -> int:
    """The longest chain of files that import each other, within a folder."""
    modules = {".".join(path.with_suffix("").parts): path for path in paths if path.stem != "__init__"}
    imports = {
        name: {other for other in modules if any(f"{each}.".startswith(f"{other}.") for each in _imports(path))}
        for name, path in modules.items()
    }
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"files import each other in a circle: {' -> '.join((*above, name))}"
        if name not in heights:
            heights[name] = 1 + max((height(each, (*above, name)) for each in imports[name] - {name}), default=0)
        return heights[name]

    return max(map(height, modules), default=0)


FOLDERS = sorted({path.parent for path in (*FILES, *Path("pipelines").rglob("*.py"))})


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_is_small(folder):
    files = sorted(folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files"
    assert _floors(files) <= MOST_FLOORS, f"{folder} has {_floors(files)} floors of imports"
    assert (folder / "__init__.py").is_file(), f"{folder} is no package"


def test_the_test_counts_floors_and_sees_circles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = Path("room")
    room.mkdir()
    names = [f"f{number}" for number in range(4)]
    for name, above in itertools.pairwise(names):
        (room / f"{name}.py").write_text(f"from room.{above} import x\n")
    (room / "f3.py").write_text("x = 1\n")
    files = sorted(room.glob("*.py"))
    assert _floors(files) == 4
    (room / "f3.py").write_text("def later():\n    import room.f1\n")
    with pytest.raises(AssertionError, match=r"circle: room\.f1 -> room\.f2 -> room\.f3 -> room\.f1"):
        _floors(files[1:])


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these alone: of two in one process, the second one would be the first."""
    names = Counter(path.name for path in Path("tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
