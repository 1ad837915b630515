"""Where neither torchrec nor fbgemm is installed, the same commands work, in one process."""

import importlib.abc
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.pipelines.learnable_log import learnable_log, settings_tree

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parents[2]
RANK = """
import json, sys
from tests.training.test_without_torchrec import Blocked
sys.meta_path.insert(0, Blocked())
import mmoe_rec
ranked = mmoe_rec.Ranker.load(sys.argv[1]).rank({"user": 3}, {}, {"item": [1, 2, 3, 4], "price": [0.0] * 4})
print(json.dumps(ranked.candidates))
print({"torchrec", "fbgemm_gpu"} & set(sys.modules))
"""


class Blocked(importlib.abc.MetaPathFinder):
    """Finds nothing of these packages, and lets nobody else find it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """As a package that is not there."""
        if fullname.partition(".")[0] in ("torchrec", "fbgemm_gpu"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@dataclass(frozen=True)
class World:
    """A log, its settings, and what the command that trains has said."""

    folder: Path
    said: str

    @property
    def config(self) -> str:
        return str(self.folder / "settings.yaml")


def command(*words: str, ends_with: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in a process that finds neither package."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_without_torchrec", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends_with, done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "log").mkdir()
    pq.write_table(learnable_log(rows=6_000), folder / "log" / "all.parquet")
    tree = settings_tree(folder)
    tree["training"]["tables"] = "auto"
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = str(folder / "settings.yaml")
    command("mmoe_rec", "features", "--config", config)
    return World(folder, command("mmoe_rec", "train", "--config", config).stderr)


def test_a_training_says_so_once(world: World) -> None:
    (line,) = (line for line in world.said.splitlines() if "plain PyTorch" in line)
    assert line.startswith(
        "tables are trained by plain PyTorch in one process, since torchrec (fbgemm) is not installed"
    )
    assert "Traceback" not in world.said


def test_the_model_has_learnt_and_is_evaluated(world: World) -> None:
    command("mmoe_rec", "evaluate", "--config", world.config, "--model", "models:/learnable@champion")
    found = json.loads((world.folder / "work/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert found["tasks"]["click"]["auc"]["value"] > 0.6


def test_candidates_are_ranked(world: World) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RANK, str(world.folder / "work" / "model")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    candidates, modules = done.stdout.splitlines()
    assert sorted(json.loads(candidates)) == [1, 2, 3, 4]
    assert modules == "set()"


def test_a_plan_says_so_in_one_sentence(world: World) -> None:
    words = ("--config", world.config, "--world-size", "2", "--local-world-size", "2")
    said = command("mmoe_rec", "plan", *words, ends_with=2).stderr
    assert "a plan needs torchrec and fbgemm, which" in said
    assert "Traceback" not in said


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
