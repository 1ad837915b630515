"""The artifact folder: what is in it, and what is said of a damaged one."""

import hashlib
import json
import random
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmoe_rec.errors import UserError
from mmoe_rec.inference import batch_scoring as score
from mmoe_rec.inference import ranker as rankers
from mmoe_rec.inference.artifact import (
    FORMAT,
    TOLERANCE,
    ExampleScores,
    check_files,
    read_artifact,
    read_manifest,
    write_manifest,
)
from mmoe_rec.inference.artifact_writer import finalize_artifact, write_artifact, write_with_weights
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.inference.ranking import Ranking
from mmoe_rec.model.model_layout import ModelTask
from mmoe_rec.model.score import UNCALIBRATED, Calibration, TaskCalibration
from mmoe_rec.settings.load import load_settings
from tests.inference.other_weights import other_weights
from tests.inference.small_model import CONTEXT, ITEMS, USER, SmallModel
from tests.log.small_logs import random_log, times_of


def test_says_what_it_was_made_from(small: SmallModel) -> None:
    info = read_artifact(small.folder)
    assert info.name == "small"
    assert info.fingerprint == small.prepared.manifest["fingerprint"]
    assert info.max_candidates == 50
    last = max(times_of(random_log(1, rows=600)))
    assert datetime.fromisoformat(info.tables_as_of) == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(
        microseconds=int(last)
    )
    assert [(task.name, task.kind, task.objective) for task in info.tasks] == [
        ("click", "binary", "engagement"),
        ("liked", "binary", "satisfaction"),
        ("spent", "regression", "engagement"),
    ]
    assert load_settings(small.folder / "settings.yaml") == small.settings


CROSSING = '{"liked": {"logits": [1, 0], "calibrated": [0, 1], "slope": 1}}'
CALIBRATION = Calibration({"liked": TaskCalibration((-0.1, 0.7), (-1 / 3, 0.4), 0.9)})


def test_diverged_weights_are_not_written(small: SmallModel, tmp_path: Path) -> None:
    state = dict(small.model.state_dict())
    name = next(iter(state))
    state[name] = torch.full_like(state[name], float("nan"))
    with pytest.raises(UserError, match=f"weight '{name}' holds NaN"):
        write_artifact(tmp_path / "m", settings=small.settings, prepared=small.prepared, state_dict=state)
    assert not (tmp_path / "m").exists()


def add_an_expert(folder: Path) -> None:
    tree = json.loads((folder / "model.json").read_text())
    tree["model"]["experts"]["count"] += 1
    (folder / "model.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_an_expert, "does not fit the model's settings"),
        (lambda folder: (folder / "model.json").unlink(), "holds no model"),
        (lambda folder: (folder / "model.json").write_text('{"format": 99}'), "another version"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"\0" * 40), "can't be read"),
        (lambda folder: shutil.rmtree(folder / "features"), "holds no feature state"),
        (lambda folder: (folder / "example_request.json").unlink(), "can't be loaded .*example_request.json"),
        (lambda folder: (folder / "example_request.json").write_text("{}"), "can't be loaded "),
        (lambda folder: (folder / "example_scores.json").write_text('{"scores": []}'), "can't be loaded "),
        (
            lambda folder: (folder / "features" / "latest.user.parquet").unlink(),
            "can't be loaded .*latest.user.parquet",
        ),
        (lambda folder: (folder / "features" / "latest.user.parquet").write_bytes(b"x"), "can't be loaded "),
        (lambda folder: (folder / "features" / "clicked.memory" / "part-00000.parquet").unlink(), "features again"),
        *(
            (lambda folder, text=text: (folder / "calibration.json").write_text(text), r"calibration.json' is damaged")
            for text in ("{", "[1]", '{"liked": {}}', CROSSING)
        ),
    ],
)
def test_a_folder_that_was_written_wrong(small: SmallModel, tmp_path: Path, damage: object, message: str) -> None:
    """What no manifest can tell, as it says the same: each still ends in a sentence."""
    folder = tmp_path / "model"
    shutil.copytree(small.folder, folder)
    damage(folder)  # type: ignore[operator]
    if (folder / "model.json").exists():
        write_manifest(folder)
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=message):
        Ranker.load(folder)


# A modified model, or a model with different predictions, is refused in one sentence.


@pytest.fixture(scope="module")
def written(small: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model's folder, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("written") / "model"
    small.write(folder, CALIBRATION)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it elsewhere."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        Ranker.load(folder)
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


def test_the_manifest_names_every_file_by_its_checksum(folder: Path) -> None:
    files = files_of(folder)
    del files["manifest.json"]
    actual = read_manifest(folder)
    assert actual == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert {"calibration.json", "example_scores.json", "weights.safetensors", "features/pipeline.json"} < set(actual)


def test_damage_of_every_file_is_named(folder: Path) -> None:
    """Missing, shorter, and with flipped bits, drawn by chance, one of which makes a weight another finite one."""
    draw, aside = random.Random(6), folder.parent / "aside"
    for name, path in files_of(folder).items():
        whole = path.read_bytes()
        path.rename(aside)
        sentence = f"The model in '{folder}' was modified: '{name}' is missing or has changed. Copy the whole"
        assert sentence in refusal(folder)
        aside.rename(path)
        path.write_bytes(whole[:-1])
        assert sentence in refusal(folder)
        for bit in draw.sample(range(8 * len(whole)), 4):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert sentence in refusal(folder), f"bit {bit}"
        path.write_bytes(whole)
    check_files(folder)


@pytest.mark.parametrize(
    "name", ["features/clicked.memory/part-00001.parquet", "features/more.json", "calibration.json"]
)
def test_a_file_that_loading_could_take_for_its_own_is_reported(small: SmallModel, tmp_path: Path, name: str) -> None:
    shutil.copytree(small.folder, tmp_path / "plain")
    (tmp_path / "plain" / name).write_bytes(b"more")
    assert f"'{name}' is not part of it. Remove this file." in refusal(tmp_path / "plain")


def test_what_systems_leave_beside_breaks_no_load(folder: Path) -> None:
    left = ".DS_Store ._model.json ._part-00000.parquet Thumbs.db notes.txt __pycache__/x.cpython-311.pyc"
    for place in (folder, folder / "features", folder / "features" / "clicked.memory"):
        for name in (*left.split(), "registered_model_meta"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(b"left")
    Ranker.load(folder)
    finalize_artifact(folder)
    assert not any("DS_Store" in name or "._" in name or "pycache" in name for name in read_manifest(folder))


def test_all_may_read_who_may_read_one(written: Path) -> None:
    assert len({path.stat().st_mode for path in files_of(written).values()}) == 1


@pytest.mark.parametrize("manifest", [None, "{}", "[]", '{"files": {"model.json": {}}}'])
def test_another_format_is_reported_first(folder: Path, manifest: str | None) -> None:
    """The former one had no manifest, and a later one may have another."""
    tree = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(tree | {"format": FORMAT - 1}))
    if manifest is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(manifest)
    sentence = refusal(folder)
    assert f"The model in '{folder}' was made by another version of mmoe_rec. Train it again." in sentence


def test_a_rewritten_model_is_whole_and_has_scores_of_its_own(small: SmallModel, folder: Path, tmp_path: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"left")
    state = {name: weight * 1.1 if "towers" in name else weight for name, weight in small.model.state_dict().items()}
    write_with_weights(folder, tmp_path / "new", small.settings.model, state)
    assert files_of(tmp_path / "new").keys() == files_of(folder).keys() - {".DS_Store"}
    first, second = ExampleScores.read(folder), ExampleScores.read(tmp_path / "new")
    assert first.predictions != second.predictions
    assert first.computed_with == second.computed_with
    assert Ranker.load(tmp_path / "new").calibration == CALIBRATION


def test_a_damaged_model_is_not_rewritten(small: SmallModel, folder: Path, tmp_path: Path) -> None:
    """It would get a manifest that says it is whole."""
    (folder / "features" / "clicked.memory" / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet' is missing"):
        write_with_weights(folder, tmp_path / "new", small.settings.model, small.model.state_dict())
    assert not (tmp_path / "new").exists()


# The example's scores.


@pytest.mark.parametrize(
    ("task", "place", "what"), [("click", 2, "'click' of candidate 3 is "), ("spent", 0, "'spent' of candidate 1 is ")]
)
def test_other_scores_than_expected_are_reported(folder: Path, task: str, place: int, what: str) -> None:
    def multiply(factor: float) -> None:
        tree = json.loads((folder / "example_scores.json").read_text())
        tree["predictions"][task][place] *= factor
        (folder / "example_scores.json").write_text(json.dumps(tree))
        write_manifest(folder)

    multiply(1 + 1e-6)
    Ranker.load(folder)
    multiply(1.01)
    sentence = refusal(folder)
    assert "gives different predictions here than where it was written: for example_request.json, " + what in sentence
    assert f"It was written with torch {torch.__version__.split('+')[0]}" in sentence


def test_a_process_that_rounds_products_loads_and_writes_as_a_server_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has told torch is so again afterwards; by hand, as not every processor has such products."""
    sentence, before = [], torch.backends.mkldnn.matmul.fp32_precision
    rank = Ranker.load(folder).__class__.rank

    def noting(ranker: Any, *arguments: Any, **options: Any) -> Ranking:
        sentence.append((torch.backends.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return rank(ranker, *arguments, **options)

    monkeypatch.setattr("mmoe_rec.inference.ranker.Ranker.rank", noting)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu"):
            Ranker.load(folder)
            finalize_artifact(folder)
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert sentence == [("ieee", False)] * 2


def test_a_model_whose_predictions_are_not_finite_is_not_written(small: SmallModel, tmp_path: Path) -> None:
    state = {name: weight * 1e38 if "towers" in name else weight for name, weight in small.model.state_dict().items()}
    with pytest.raises(UserError, match=r"can't score its own example: .* not finite .*lower the learning rates"):
        write_with_weights(small.folder, tmp_path / "new", small.settings.model, state)
    assert not (tmp_path / "new").exists()


def task(name: str, kind: str, std: float = 1.0) -> ModelTask:
    return ModelTask(name, kind, std=std, objective="engagement", score_weight=1.0)  # type: ignore[arg-type]


def scores_of(predictions: dict[str, np.ndarray]) -> ExampleScores:
    return ExampleScores({name: tuple(item) for name, item in predictions.items()}, {})


BINARY = np.array([0.02, 0.3, 0.9])
CASES = {
    "probabilities": ([task("a", "binary")], {"a": BINARY}, {"a": 0.9}),
    "rare": ([task("a", "binary")], {"a": BINARY * 1e-6}, {"a": 0.9e-6}),
    "all but impossible": ([task("a", "binary")], {"a": np.array([0.0, 1e-40, 1e-38])}, {"a": 1e-38}),
    "a large amount": ([task("a", "regression", std=3e6)], {"a": np.array([2e6, 4e6, 9e6])}, {"a": 9e6}),
    "around 0": ([task("a", "regression", std=3e6)], {"a": np.array([-1.0, 0.0, 2.0])}, {"a": 3e6}),
    "two tasks": (
        [task("a", "binary"), task("b", "regression")],
        {"a": BINARY, "b": np.array([1.0, 3.0, 2e3])},
        {"a": 0.9, "b": 2e3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_tolerance_goes_with_the_scale(name: str) -> None:
    tasks, predictions, scales = CASES[name]
    expected = scores_of(predictions)
    assert expected.describe_difference(expected, tasks, UNCALIBRATED) is None
    for task_name, scale in scales.items():
        for sign in (-1, 1):
            near, far = (
                scores_of(predictions | {task_name: predictions[task_name] + sign * part * TOLERANCE * scale})
                for part in (0.9, 1.5)
            )
            assert expected.describe_difference(near, tasks, UNCALIBRATED) is None
            sentence = expected.describe_difference(far, tasks, UNCALIBRATED)
            # What is all but 0 is as good as 0.
            assert (
                sentence is None
                if scale < 1e-30
                else sentence is not None and sentence.startswith(f"'{task_name}' of ")
            )


def test_a_steep_calibration_multiplies_what_rounding_does() -> None:
    tasks = [task("a", "binary")]
    steep = Calibration({"a": TaskCalibration((0.0, 0.001, 5.0), (0.0, 0.1, 6.0), 0.5)})
    assert steep.tasks["a"].max_slope == pytest.approx(100)
    assert TaskCalibration.linear(2.5, -1).max_slope == 2.5
    expected, actual = (scores_of({"a": np.array([0.1, item])}) for item in (0.4, 0.4 + 20 * TOLERANCE))
    assert expected.describe_difference(actual, tasks, steep) is None
    assert expected.describe_difference(actual, tasks, UNCALIBRATED) is not None


# Files that are replaced while a model is used, or while it is loaded


@pytest.fixture
def second(folder: Path, tmp_path: Path) -> Path:
    """Another model of the same shapes."""
    return other_weights(folder, tmp_path / "other", 0.5, 0.9)


def scores(ranker: Ranker) -> list[float]:
    return ranker.rank({"user": USER}, CONTEXT, {"item": ITEMS}).scores


def test_a_loaded_model_stays_what_it_is_when_another_is_written_over_it(folder: Path, second: Path) -> None:
    ranker = Ranker.load(folder)
    before = scores(ranker)
    assert scores(Ranker.load(second)) != before
    for file in second.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())  # in place, as `cp` does
    assert scores(ranker) == before
    (folder / "weights.safetensors").write_bytes(b"")
    assert scores(ranker) == before


def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(
    folder: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = rankers.read_calibration

    def replaced(path: Path) -> object:
        shutil.rmtree(folder)
        shutil.copytree(second, folder)
        return read(path)

    monkeypatch.setattr(rankers, "read_calibration", replaced)
    with pytest.raises(UserError, match=f"The model in '{folder}' was replaced while it was loaded"):
        Ranker.load(folder)


def test_rows_are_not_scored_by_a_model_that_came_later(
    small: SmallModel, folder: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version that stands beside each row is that of the model that scored it."""
    score_parts = score._Scoring._score_parts

    def replaced(self: score._Scoring, *arguments: Any) -> Any:
        shutil.rmtree(folder)
        shutil.copytree(second, folder)
        score._load.cache_clear()
        return score_parts(self, *arguments)

    monkeypatch.setattr(score._Scoring, "_score_parts", replaced)
    with pytest.raises(UserError, match="was replaced while rows were scored"):
        score.score_log(folder, small.settings.data.log, tmp_path / "out", "tables")
    assert not (tmp_path / "out").exists()
