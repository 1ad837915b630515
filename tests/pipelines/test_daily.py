"""The line of a scheduler, from new files of a log to the model that holds the alias."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmoe_rec.tracking.registry import find_holder
from pipelines import daily
from tests import commands
from tests.pipelines.learnable_log import START, learnable_log, settings_tree
from tests.pipelines.short_trainings import RATES, SMALL


@pytest.mark.thorough
def test_new_days_are_trained_on_and_the_better_model_holds_the_alias(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    log = learnable_log(rows=6_000)
    is_new = log["time"].to_numpy() >= START + np.timedelta64(7, "D")
    (tmp_path / "log").mkdir()
    pq.write_table(log.filter(pa.array(~is_new)), tmp_path / "log" / "first.parquet")
    config, uri = tmp_path / "settings.yaml", f"sqlite:///{tmp_path / 'mlflow.db'}"
    split = {"train_end": "2024-03-05", "validation_end": "2024-03-06"}
    tree = settings_tree(tmp_path, split=split, training=SMALL | RATES)
    config.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    words = ["--config", str(config), "--split.train_end", "2024-03-09", "--split.validation_end", "2024-03-10"]
    with pytest.raises(SystemExit) as end:
        daily.main(words)
    assert end.value.code == 2
    assert "no version of 'learnable' holds 'champion'" in capsys.readouterr().err

    commands.run("train", "--config", config)
    pq.write_table(log.filter(pa.array(is_new)), tmp_path / "log" / "later.parquet")
    capsys.readouterr()
    daily.main(words)
    printed = capsys.readouterr().out
    said = ("added ", "registered as models:/learnable@", "metrics: ")
    places = [printed.index(each) for each in said]
    assert places == sorted(places)
    last = next(line for line in reversed(printed.splitlines()) if "'champion' of 'learnable'" in line)
    assert printed.rindex(last) > places[-1], "tables are refreshed at the end"
    holder = find_holder("learnable", "champion", uri)
    assert f"version {holder.number}" in last

    with pytest.raises(SystemExit) as end:
        daily.main([*words, "--data.log", str(tmp_path / "nowhere")])
    assert end.value.code == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
