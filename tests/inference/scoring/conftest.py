import pytest

from mmoe_rec.model.score import Calibration, TaskCalibration
from mmoe_rec.preprocessing import build_steps as steps
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, random_log, with_requests

TASKS = {**BASE["tasks"], "liked": {**BASE["tasks"]["liked"], "conditional_on": "click", "score_weight": 0.7}}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A calibrated model with an outcome of two tasks, of requests whose rows lie anywhere and have several times."""
    log = with_requests(random_log(1, rows=600))
    columns = {**BASE["columns"], "request": "request"}
    work = tmp_path_factory.mktemp("scored")
    small = SmallModel(work, log=[log.slice(0, 250), log.slice(250)], columns=columns, tasks=TASKS)
    small.write(small.folder, Calibration({"click": TaskCalibration((-1.0, 0.5), (-2.0, 0.7), 1.5)}))
    return small


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are cut into parts of some 40 rows."""
    monkeypatch.setattr(steps, "ROWS_PER_PART", 40)
