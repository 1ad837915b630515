"""A log that was scored with labels has the metrics of an evaluation."""

from pathlib import Path

import pytest

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.evaluate import score_rows
from mmoe_rec.evaluation.prediction_files import columns_of_settings
from mmoe_rec.inference.batch_scoring import score_log
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.preprocessing.logs import logs_for
from mmoe_rec.preprocessing.prepare import encode_with
from tests.evaluation.test_metrics import intervals, measured
from tests.evaluation.trees import summarise
from tests.inference.scoring.scored import write_finely
from tests.inference.small_model import SmallModel
from tests.log.small_logs import DAY, START, random_log, with_requests


def test_a_scored_log_has_the_metrics_of_an_evaluation(small: SmallModel, tmp_path: Path) -> None:
    """Labels as they had matured at the log's end, and an outcome over all rows of a satisfaction of engaged ones."""
    log = with_requests(random_log(3, rows=1000), seed=3)
    source = write_finely(tmp_path / "log", log.slice(0, 500), log.slice(500))
    settings = small.settings.model_copy(update={"data": small.settings.data.model_copy(update={"log": str(source)})})
    ranker, windows = Ranker.load(small.folder), {"test": (START + 4 * DAY, None)}  # before labels have all matured
    encode_with(small.folder / "features", logs_for(settings, ranker.pipeline), windows, tmp_path / "encoded")
    rows = EncodedRows(tmp_path / "encoded" / "test", ranker.layout)
    offline = score_rows(settings, ranker.model, ranker.layout, rows, ranker.calibration)
    expected = summarise(offline.sum(), 20)
    score_log(small.folder, source, tmp_path / "scores", window=windows["test"], labels=True)
    found = measured(columns_of_settings(settings), tmp_path / "scores", tmp_path / "out")
    assert found["tasks"].keys() == expected["tasks"].keys() == {"click", "liked", "spent", "click_and_liked"}
    assert found["tasks"]["liked"]["rows"] < found["tasks"]["click_and_liked"]["rows"] < found["rows"]
    assert {name: each["rows"] for name, each in found["tasks"].items()} == {
        name: each["rows"] for name, each in expected["tasks"].items()
    }
    for name, value, other in intervals(found, expected):
        assert value == pytest.approx(other, abs=1e-4), name
    with pytest.raises(UserError, match="--labels writes what the log says of its rows"):
        score_log(small.folder, source, tmp_path / "now", "tables", labels=True)
