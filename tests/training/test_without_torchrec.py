"""Where neither torchrec nor fbgemm is installed, the same commands work, in one process."""

import importlib.abc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pipelines.learnable_log import settings_tree, write_files

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


def test_commands_work_in_a_process_that_finds_neither_package(tmp_path: Path) -> None:
    write_files(tmp_path, training=settings_tree(tmp_path)["training"] | {"table_backend": "auto"})
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "settings.yaml"), str(tmp_path / "work" / "model")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    training, _, plan = done.stderr.partition("trained\n")
    (line,) = (line for line in training.splitlines() if line.startswith("computing in "))
    assert "table backend torch" in line
    metrics = json.loads((tmp_path / "work/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert metrics["tasks"]["click"]["auc"]["value"] > 0.6
    candidates, modules = done.stdout.splitlines()[-2:]
    assert sorted(json.loads(candidates)) == [1, 2, 3, 4]
    assert modules == "set()"
    assert "a plan needs torchrec and fbgemm, which" in plan
    assert "Traceback" not in done.stderr
