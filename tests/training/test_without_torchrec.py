"""Where neither torchrec nor fbgemm is installed, the same commands work, in one process."""

import importlib.abc
import json
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
SCRIPT = """
import json, sys
from tests.training.test_without_torchrec import Blocked
sys.meta_path.insert(0, Blocked())
import mmoe_rec
from mmoe_rec.cli.main import main
config, model = ["--config", sys.argv[1]], sys.argv[2]
main(["train", *config])
print("trained", file=sys.stderr)
main(["evaluate", *config, "--model", "models:/learnable@champion"])
ranked = mmoe_rec.Ranker.load(model).rank({"user": 3}, {}, {"item": [1, 2, 3, 4], "price": [0.0] * 4})
print(json.dumps(ranked.candidates))
print({"torchrec", "fbgemm_gpu"} & set(sys.modules))
main(["plan", *config, "--world-size", "2", "--local-world-size", "2"])
"""


class Blocked(importlib.abc.MetaPathFinder):
    """Finds nothing of these packages, and lets nobody else find it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """As a package that is not there."""
        if fullname.partition(".")[0] in ("torchrec", "fbgemm_gpu"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@dataclass(frozen=True)
class World:
    """A log, its settings, and what the commands have said in a process that finds neither package."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "log").mkdir()
    pq.write_table(learnable_log(rows=6_000), folder / "log" / "all.parquet")
    tree = settings_tree(folder)
    tree["training"]["tables"] = "auto"
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    words = [sys.executable, "-c", SCRIPT, str(folder / "settings.yaml"), str(folder / "work" / "model")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    return World(folder, done.stdout, done.stderr)


def test_a_training_says_so_once(world: World) -> None:
    training, _, _ = world.err.partition("trained\n")
    (line,) = (line for line in training.splitlines() if line.startswith("computing in "))
    assert "tables by torch" in line


def test_the_model_has_learnt_and_is_evaluated(world: World) -> None:
    found = json.loads((world.folder / "work/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert found["tasks"]["click"]["auc"]["value"] > 0.6


def test_candidates_are_ranked(world: World) -> None:
    candidates, modules = world.out.splitlines()[-2:]
    assert sorted(json.loads(candidates)) == [1, 2, 3, 4]
    assert modules == "set()"


def test_a_plan_says_so_in_one_sentence(world: World) -> None:
    assert "a plan needs torchrec and fbgemm, which" in world.err
    assert "Traceback" not in world.err
