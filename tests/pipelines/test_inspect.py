"""The command as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.commands import run
from tests.fork_server import ROOT
from tests.pipelines.learnable_log import ROWS, learnable_log, settings_tree, write_files


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    return write_files(folder)


def test_it_writes_the_report_and_says_what_to_type_next(config, capsys):
    left = config.parent / "work" / "inspection" / ".inspection_scratch"  # of a process that was killed
    left.mkdir(parents=True)
    (left / "duckdb_temp_storage_DEFAULT-0.tmp").write_text("x")
    run("inspect", "--config", str(config), "--training.epochs", "3")
    out = config.parent / "work" / "inspection"
    printed = capsys.readouterr().out
    assert f"report: {out / 'report.html'}\n" in printed
    assert f"numbers: {out / 'health.json'}\n" in printed
    assert printed.endswith(f"next: mmoe-rec train --config {config} --training.epochs 3\n")
    health = json.loads((out / "health.json").read_text())
    assert health["name"] == "learnable"
    assert health["overview"]["rows_in_splits"] == ROWS
    features = {feature["name"]: feature for feature in health["features"]}
    assert set(features) == {"user", "item", "price", "slot", "clicked", "item_click"}
    assert all(feature["inputs"] for feature in features.values())
    assert 0.6 < features["item"]["auc"]["click"] < 0.98
    bins = [item["bin"] for item in features["item"]["inputs"][0]["bins"]]
    assert set(bins[:40]) == set(map(str, range(40))), "bins of ids have the ids' names"
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in out.iterdir()) == ["health.json", "report.html", "report.json"]
    assert health["headline"] in " ".join(printed.split()), "whatever the terminal's width"


def test_out_says_where_and_features_at_hand_are_taken_without_torch(config, tmp_path):
    run("features", "--config", config)
    manifest = config.parent / "work" / "features" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    code = (
        "import sys; from mmoe_rec.cli.main import main; "
        f"main(['inspect', '--config', {str(config)!r}, '--out', {str(tmp_path / 'there')!r}]); "
        "assert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert manifest.stat().st_mtime_ns == written
    assert str(tmp_path / "there" / "report.html") in done.stdout
    assert (tmp_path / "there" / "report.html").is_file()


def test_two_buckets_that_are_the_label_are_found(tmp_path):
    log = learnable_log(rows=6_000)
    code = pa.array(np.where(log["click"].to_numpy() == 1, 30_003.0, 20_001.0))
    tree = settings_tree(tmp_path)
    tree["features"]["code"] = {"kind": "numeric", "column": "code", "transform": "buckets"}
    tree["roles"]["candidate"].append("code")
    (tmp_path / "log").mkdir()
    pq.write_table(log.append_column("code", code), tmp_path / "log" / "a.parquet")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    run("inspect", "--config", str(tmp_path / "settings.yaml"))
    health = json.loads((tmp_path / "work" / "inspection" / "health.json").read_text())
    actual = {(finding["check"], finding["subject"]) for finding in health["findings"]}
    assert ("leak", "code") in actual
    assert ("constant", "code") not in actual
