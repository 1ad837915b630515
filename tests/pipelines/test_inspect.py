"""The command as a user runs it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.settings.load import load_settings
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
    features = {each["name"]: each for each in health["features"]}
    assert set(features) == {"user", "item", "price", "slot", "clicked", "item_click"}
    assert all(each["inputs"] for each in features.values())
    assert 0.6 < features["item"]["auc"]["click"] < 0.98
    bins = [each["bin"] for each in features["item"]["inputs"][0]["bins"]]
    assert set(bins[:40]) == set(map(str, range(40))), "bins of ids have the ids' names"
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in out.iterdir()) == ["health.json", "report.html", "report.json"]
    assert health["headline"] in " ".join(printed.split()), "whatever the terminal's width"
    run("report", "--config", str(config))
    printed = capsys.readouterr().out
    assert printed.startswith(f"The data: {health['headline']}\n")
    assert f"\nThe last training: mmoe-rec train --config {config}\n" in printed
    assert printed.endswith(f"report: {config.parent / 'work' / 'report' / 'report.html'}\n")
    run("report", "--config", str(config), "--features.price.transform", "log")
    features = config.parent / "work" / "features"
    assert capsys.readouterr().out.startswith(f"warning: the features in '{features}' are of other settings, or files")


def test_what_is_advised_is_a_setting_that_is_taken(tmp_path, capsys):
    """Half of the candidates are new in test, ids of users are too rare, counts grow, and so on."""
    log = learnable_log(rows=6_000)
    late = np.arange(6_000) > 4_900
    log = log.set_column(2, "item", pa.array(log["item"].to_numpy() + 1000 * (late & (log["item"].to_numpy() % 2 > 0))))
    log = log.set_column(1, "user", pa.array(log["user"].to_numpy() + 80 * (np.arange(6_000) // 4)))
    tree = settings_tree(tmp_path)
    tree["features"]["user"] |= {"min_count": 1, "oov_buckets": 20_000}
    tree["features"]["item_click"] |= {"by": ["user"]}
    tree["features"]["all"] = {"kind": "counter", "task": "click", "by": ["slot"], "outputs": ["positives", "rows"]}
    tree["roles"]["placement"] = []
    tree["roles"]["context"] = ["slot"]
    (tmp_path / "log").mkdir()
    pq.write_table(log, tmp_path / "log" / "a.parquet")
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    run("inspect", "--config", str(config))
    health = json.loads((tmp_path / "work" / "inspection" / "health.json").read_text())
    lines = {each["override"] for finding in health["findings"] for each in finding["advice"] if each["override"]}
    keys = {line.split(" ")[0] for line in lines}
    assert keys >= {
        "--features.all.window_days",
        "--features.user.min_count",
        "--features.user.oov_buckets",
    }
    for line in sorted(lines):
        load_settings(config, shlex.split(line))
    assert "count over windows: --features.all.window_days " in capsys.readouterr().out


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
    found = {(each["check"], each["about"]) for each in health["findings"]}
    assert ("leak", "code") in found
    assert ("constant", "code") not in found
