"""`--skip-bad-files`: what was left out is said, is in the health report, and is kept with the run in MLflow."""

import json
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

from mmoe_rec.tracking import registry
from tests import commands
from tests.pipelines.learnable_log import learnable_log, write_files


def test_bad_files_end_the_command_unless_they_are_to_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One is cut off, and one has text as `price`."""
    config = write_files(tmp_path)
    whole = (tmp_path / "log" / "a.parquet").read_bytes()
    (tmp_path / "log" / "x-cut.parquet").write_bytes(whole[: len(whole) // 2])
    text = learnable_log(rows=40)
    text = text.set_column(text.column_names.index("price"), "price", [["dear"] * text.num_rows])
    pq.write_table(text, tmp_path / "log" / "y-text.parquet")
    message = commands.refuse(capsys, "features", "--config", config)
    assert "x-cut.parquet' is not a readable Parquet file" in message
    assert not (config.parent / "work" / "features").exists()
    options = ["--config", config, "--skip-bad-files"]
    commands.run("features", *options)
    said = capsys.readouterr().out
    assert "skipped: '" in said
    assert "x-cut.parquet" in said
    assert "y-text.parquet': column 'price' must hold numbers, found string" in said

    commands.run("inspect", *options)
    report = config.parent / "work" / "inspection"
    listed = json.loads((report / "health.json").read_text())["overview"]["skipped"]
    assert [Path(item["file"]).name for item in listed] == ["x-cut.parquet", "y-text.parquet"]
    assert "y-text.parquet" in (report / "report.html").read_text()

    commands.run("train", *options, "--training.epochs", "1", "--training.batch_size", "2048")
    uri = f"sqlite:///{config.parent / 'mlflow.db'}"
    run = mlflow.get_run(registry.find_run_id("models:/learnable@champion", uri))
    assert run.data.tags["data.files_left_out"] == "2"
    manifest = json.loads(Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/data.json")).read_text())
    assert manifest["skipped"] == listed
