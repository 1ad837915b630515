"""The same bytes however rows are scored; a scoring that ends too early leaves the scores that were there."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmoe_rec.inference import batch_scoring as score
from mmoe_rec.inference.artifact_writer import finalize_artifact
from mmoe_rec.inference.batch_scoring import score_log
from mmoe_rec.preprocessing import build_steps as steps
from tests.inference.scoring.scored import write_finely
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
    return {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("way", ["threads", "processes", "ray"])
def test_the_same_bytes_on_any_engine(
    small: SmallModel, source: Path, tmp_path: Path, whole: dict[str, bytes], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray reads its environment variables at import, so the engine must be the first to import it.
    if way == "ray" and not find_spec("ray"):
        pytest.skip("Ray is not installed")
    if way == "processes":
        monkeypatch.setattr(steps, "MAX_THREADS", 1)
        monkeypatch.setattr(score, "MIN_ROWS_FOR_PROCESSES", 0)
    options = ["--data.workers", "2", "--data.engine", "ray" if way == "ray" else "local"]
    score_log(small.folder, source, tmp_path / "out", overrides=options)
    assert files_of(tmp_path / "out") == whole
    assert alone(tmp_path)


@pytest.mark.parametrize("changed", ["input", "model", "option", "setting"])
def test_other_scores_take_the_place_of_those_that_were_there(
    small: SmallModel, source: Path, tmp_path: Path, changed: str, fine: None
) -> None:
    log, model = (shutil.copytree(item, tmp_path / item.name) for item in (source, small.folder))
    out = score_log(model, log, tmp_path / "out").folder
    as_of: Any = "tables" if changed == "option" else "log"
    overrides = ["--serving.matmul_backend", "onednn"] if changed == "setting" else []
    if changed == "input":
        shutil.rmtree(log)
        write_finely(log, with_requests(random_log(9, rows=200), seed=9))
    elif changed == "model":
        (model / "calibration.json").unlink()
        finalize_artifact(model)
    assert not score_log(model, log, out, as_of, overrides=overrides).reused
    score_log(model, log, tmp_path / "expected", as_of, overrides=overrides)
    assert files_of(out) == files_of(tmp_path / "expected")


def test_scores_are_replaced_once_new_ones_are_whole(
    small: SmallModel, source: Path, tmp_path: Path, fine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not score_log(small.folder, source, tmp_path / "out").reused
    assert score_log(small.folder, source, tmp_path / "out").reused
    old = files_of(tmp_path / "out")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in ("scored_table", "write_ranked", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(score, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                score_log(small.folder, source, tmp_path / "out", "tables", overrides=["--data.workers", "1"])
        assert files_of(tmp_path / "out") == old
        assert alone(tmp_path)
    score_log(small.folder, source, tmp_path / "out", "tables")
    assert files_of(tmp_path / "out").keys() == old.keys()
    assert files_of(tmp_path / "out") != old


@pytest.mark.parametrize("left", ["nothing", "fewer rows", "an older manifest"])
def test_incomplete_scores_are_made_again(
    small: SmallModel, source: Path, tmp_path: Path, written: Path, whole: dict[str, bytes], left: str
) -> None:
    out = shutil.copytree(written, tmp_path / "out")
    part, manifest = sorted(out.glob("part-*.parquet"))[1], out / "_manifest.json"
    if left == "nothing":
        part.unlink()
    elif left == "fewer rows":
        pq.write_table(pq.read_table(part).slice(1), part)
    else:
        manifest.write_text(manifest.read_text().replace("seen_in_training", "learnt"))
    assert not score_log(small.folder, source, out, overrides=["--data.workers", "1"]).reused
    assert files_of(out) == whole
    assert score_log(small.folder, source, out, overrides=["--data.workers", "1"]).reused
