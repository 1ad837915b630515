"""The same bytes however rows are scored, and after whatever kill; a run goes on only with what is the same."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import StoppedError
from mmoe_rec.inference import batch_scoring as score
from mmoe_rec.inference.batch_scoring import score_log
from mmoe_rec.inference.writing import seal
from mmoe_rec.preprocessing import build_steps as steps
from mmoe_rec.preprocessing import engines
from tests.inference.scoring.scored import killed_run, write_finely
from tests.inference.small_model import SmallModel
from tests.log.small_logs import files_of, random_log, with_requests

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = with_requests(random_log(4, rows=300), seed=4)
    return write_finely(tmp_path_factory.mktemp("source") / "log", log.slice(0, 170), log.slice(170))


@pytest.fixture(scope="module")
def written(small: SmallModel, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on one worker writes that nothing disturbs."""
    out = tmp_path_factory.mktemp("written") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "ROWS_PER_PART", 40)  # as `fine` has it
        score_log(small.folder, source, out, overrides=["--data.workers", "1"])
    return out


@pytest.fixture
def whole(written: Path, fine: None) -> dict[str, bytes]:
    files = files_of(written)
    assert len(files) > 4
    return files


def alone(tmp_path: Path) -> bool:
    """Whether nothing but outputs is left in the folder."""
    return {each.name for each in tmp_path.iterdir()} <= {"out", "killed.py"}


@pytest.mark.parametrize("way", ["threads", "processes", "ray"])
def test_the_same_bytes_on_any_engine(
    small: SmallModel, source: Path, tmp_path: Path, whole: dict[str, bytes], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "ray":
        pytest.importorskip("ray")
    if way == "processes":
        monkeypatch.setattr(engines, "THREADS_AT_MOST", 1)
        monkeypatch.setattr(score, "ROWS_FOR_PROCESSES", 0)
    options = ["--data.workers", "2", "--data.engine", "ray" if way == "ray" else "local"]
    score_log(small.folder, source, tmp_path / "out", overrides=options)
    assert files_of(tmp_path / "out") == whole
    assert alone(tmp_path)


@pytest.mark.parametrize(
    ("place", "calls", "done"),
    [("look_up", 0, 0), ("score", 2, 2), ("rank", 0, None), ("finish", 1, None), ("put", 0, None)],
)
def test_a_killed_run_goes_on(
    small: SmallModel,
    source: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    place: str,
    calls: int,
    done: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed_run(tmp_path, small.folder, source, tmp_path / "out", place, calls)
    assert not (tmp_path / "out").exists()
    scored: list[int] = []

    def counted(job: Any, task: Any) -> Any:
        scored.append(task[0])
        return before(job, task)

    before = score.score_part
    monkeypatch.setattr(score, "score_part", counted)
    # What is the same may be scored with other workers.
    score_log(small.folder, source, tmp_path / "out", overrides=["--data.workers", "2"])
    count = len(whole) - 1
    assert sorted(scored) == list(range(count if done is None else done, count))
    assert files_of(tmp_path / "out") == whole
    assert alone(tmp_path)


def test_ctrl_c_keeps_what_was_scored(
    small: SmallModel, source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "scored_table", interrupted)
        with pytest.raises(StoppedError, match="the same command goes on"):
            score_log(small.folder, source, tmp_path / "out", overrides=["--data.workers", "1"])
    assert not (tmp_path / "out").exists()
    score_log(small.folder, source, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("changed", ["input", "model", "option", "setting"])
def test_with_something_else_a_killed_run_starts_anew(
    small: SmallModel, source: Path, tmp_path: Path, changed: str, fine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    log, model = tmp_path / "log", tmp_path / "model"
    shutil.copytree(source, log)
    shutil.copytree(small.folder, model)
    killed_run(tmp_path, model, log, tmp_path / "out", "score", 2)
    as_of: Any = "log"
    overrides = ["--serving.products", "onednn"] if changed == "setting" else []
    if changed == "input":
        shutil.rmtree(log)
        write_finely(log, with_requests(random_log(9, rows=200), seed=9))
    elif changed == "model":
        (model / "calibration.json").unlink()
        seal(model)
    elif changed == "option":
        as_of = "tables"
    score_log(model, log, tmp_path / "out", as_of, overrides=overrides)
    assert "scoring starts anew" in capsys.readouterr().err.replace("\n", " ")
    score_log(model, log, tmp_path / "expected", as_of, overrides=overrides)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_scores_are_replaced_once_new_ones_are_whole(
    small: SmallModel, source: Path, tmp_path: Path, fine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score_log(small.folder, source, tmp_path / "out")
    assert not first.before
    assert score_log(small.folder, source, tmp_path / "out").before
    old = files_of(tmp_path / "out")

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(score.Output, "end", fails)
        with pytest.raises(OSError, match="no space"):
            score_log(small.folder, source, tmp_path / "out", "tables")
    assert files_of(tmp_path / "out") == old
    score_log(small.folder, source, tmp_path / "out", "tables")
    assert files_of(tmp_path / "out").keys() == old.keys()
    assert files_of(tmp_path / "out") != old


@pytest.mark.parametrize("left", ["nothing", "fewer rows"])
def test_scores_of_which_a_part_is_gone_are_made_again(
    small: SmallModel, source: Path, tmp_path: Path, written: Path, whole: dict[str, bytes], left: str
) -> None:
    out = shutil.copytree(written, tmp_path / "out")
    part = sorted(out.glob("part-*.parquet"))[1]
    rows = pq.read_table(part)
    part.unlink()
    if left == "fewer rows":
        pq.write_table(rows.slice(1), part)
    assert not score_log(small.folder, source, out, overrides=["--data.workers", "1"]).before
    assert files_of(out) == whole
    assert score_log(small.folder, source, out, overrides=["--data.workers", "1"]).before
