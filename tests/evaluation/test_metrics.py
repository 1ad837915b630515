"""Metrics of predictions in files, however these are cut, against the metrics of rows in memory."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation import prediction_files as metrics
from mmoe_rec.evaluation.prediction_files import PredictionColumns, parse_tasks
from mmoe_rec.evaluation.results_report import summary_to_dict
from mmoe_rec.settings.sections import Evaluation
from tests.commands import read_metrics, run
from tests.evaluation.trees import intervals, measure, summarize

TASKS = ["bought", "stars:regression=0.2"]
FEW = Evaluation(resamples=20)


def measured(
    rows: list[str] | PredictionColumns,
    source: str | Path,
    out: Path,
    rules: Evaluation = FEW,
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """The summary of predictions. rows: their columns, or tasks."""
    columns = rows if isinstance(rows, PredictionColumns) else parse_tasks(rows)
    return summary_to_dict(metrics.evaluate_predictions(columns, str(source), out, rules, against).first.summary)


RATE = ["--columns.sampling_rate", "rate"]


def predicted(seed: int, rows: int = 3_000, text: bool = False) -> pd.DataFrame:
    """Rows in random order, so that requests lie in several files, with ties and unobserved labels."""
    generator = np.random.default_rng(seed)
    request = generator.integers(rows // 6, size=rows)
    user = request % 97
    chance = generator.random(rows).round(2)
    item = pd.Series(request).groupby(request).cumcount().to_numpy() + 3 * (request % 40)
    return pd.DataFrame(
        {
            "user": [f"user {entry}" for entry in user] if text else user - 50,
            "request": [f"ç{entry}" for entry in request] if text else request * 10**15,
            "candidate": [f"item {entry}" for entry in item] if text else item,
            "predicted_bought": chance.astype(np.float32),
            "predicted_stars": generator.normal(size=rows),
            "label_bought": pd.array(generator.random(rows) < chance, "boolean"),
            "label_stars": np.where(generator.random(rows) < 0.6, np.nan, generator.integers(1, 6, rows)),
            "score": chance + generator.integers(3, size=rows),
        }
    )


def written(frame: pd.DataFrame, folder: Path, files: int = 3, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        table = pa.Table.from_pandas(frame.iloc[rows], preserve_index=False)
        pq.write_table(table, folder / f"{number}.parquet", **({"row_group_size": 211} | options))
    return folder


@pytest.mark.parametrize("text", [False, True])
def test_metrics_are_those_of_the_rows_however_these_are_cut(text: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mmoe_rec.evaluation.prediction_files.FEATURE_BATCH_ROWS", 100)
    frame = predicted(1, text=text)
    asked, source = parse_tasks(TASKS), written(frame, tmp_path / "in")
    actual = measured(asked, source, tmp_path / "out", Evaluation(resamples=50))
    names = ("bought", "stars")
    sums = measure(
        asked.tasks,
        pa.array(frame["user"]),
        pa.array(frame["request"]),
        {name: frame[f"predicted_{name}"].to_numpy() for name in names},
        {name: frame[f"label_{name}"].to_numpy(float, na_value=np.nan) for name in names},
        score=frame["score"].to_numpy(),
        candidates=pa.array(frame["candidate"]),
    )
    expected = summarize(sums, 50)
    for part in ("rows", "users", "requests"):
        assert actual[part] == expected[part]
    for name, value in intervals(expected).items():
        assert intervals(actual)[name] == pytest.approx(value, rel=1e-9), name
    assert actual["catalog"] == pytest.approx(expected["catalog"], rel=1e-9)
    read = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name: read.pop(name) for name in actual} == actual
    assert sorted(read) == ["against", "facts"]
    assert read["facts"]["predictions"] == str(tmp_path / "in")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["in", "out"]


def test_columns_go_by_other_names_and_requests_by_several(tmp_path: Path) -> None:
    frame = predicted(3)
    frame["at"] = pd.to_datetime(frame["request"] // 10**15, unit="s")
    expected = measured(["bought"], written(frame, tmp_path / "in"), tmp_path / "a")
    renamed = frame.rename(columns={"user": "who", "predicted_bought": "p", "label_bought": "y", "score": "s"})
    source = written(renamed.drop(columns="request"), tmp_path / "other")
    words = ["user=who", "request=who+at", "predicted_bought=p", "label_bought=y", "score=s"]
    actual = measured(parse_tasks(["bought"]).with_columns(words), source, tmp_path / "b")
    assert actual["tasks"] == expected["tasks"]
    assert actual["score"] == expected["score"]


def test_weights_count_rows(tmp_path: Path) -> None:
    frame = predicted(4)
    frame["weight"] = np.random.default_rng(0).uniform(0.1, 9, len(frame))
    chance, label = (frame[name].astype(float) for name in ("predicted_bought", "label_bought"))
    expected = chance @ frame["weight"] / (label @ frame["weight"])
    for name, words in (("weight", []), ("w", ["weight=w"])):
        source = written(frame.rename(columns={"weight": name}), tmp_path / name)
        asked = parse_tasks(["bought"]).with_columns(words)
        actual = measured(asked, source, tmp_path / "out")
        assert actual["tasks"]["bought"]["calibration"]["value"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match="has no column 'rate'; name another one with --columns weight=COLUMN"):
        measured(asked.with_columns(["weight=rate"]), source, tmp_path / "out")


def test_without_candidates_there_is_no_catalog(tmp_path: Path) -> None:
    source = str(written(predicted(4).drop(columns="candidate"), tmp_path / "in"))
    assert "catalog" not in measured(["bought"], source, tmp_path / "out")
    asked = parse_tasks(["bought"]).with_columns(["candidate=item"])
    with pytest.raises(UserError, match="has no column 'item'; name another one with --columns candidate=COLUMN"):
        measured(asked, source, tmp_path / "out")


def test_without_a_score_one_task_ranks_by_its_prediction(tmp_path: Path) -> None:
    frame = predicted(5).drop(columns="score")
    source = str(written(frame, tmp_path / "in"))
    actual = measured(["bought"], source, tmp_path / "out")
    for name in ("ndcg_at_5", "mrr", "map"):
        assert actual["score"][name] == actual["tasks"]["bought"][name]
    fused = np.log(frame["predicted_bought"].clip(1e-12)) + 0.2 * np.log(frame["predicted_stars"].clip(1e-6))
    with_score = written(frame.assign(score=fused), tmp_path / "fused")
    actual, expected = (measured(TASKS, item, tmp_path / "out")["score"] for item in (source, with_score))
    assert actual == expected
    assert actual["ndcg_at_5"] != measured(["bought"], source, tmp_path / "out")["score"]["ndcg_at_5"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("predicted_bought", 1.5, "'predicted_bought' must hold a probability, found 1.5"),
        ("predicted_bought", 1 + 1e-9, "must hold a probability, found 1.000000001 "),
        ("predicted_bought", float("nan"), "must hold a probability, found null or NaN"),
        ("label_bought", 2, "'label_bought' must hold 0, 1 or null .*, found 2"),
        ("label_stars", float("inf"), "'label_stars' must hold a number or null.*found inf"),
        ("score", float("nan"), "column 'score' must hold a number, found null or NaN"),
        ("user", None, "column 'user' holds null"),
        ("request", None, "column 'request' holds null"),
        ("candidate", None, "column 'candidate' holds null"),
    ],
)
def test_a_wrong_value_is_named_by_file_column_and_row(column: str, value: Any, message: str, tmp_path: Path) -> None:
    frame = predicted(6)
    values = frame[column].astype(object)
    values.iloc[2_500] = value  # row 500 of the last file
    frame[column] = values.convert_dtypes() if value is None else values.astype(type(value))
    source = written(frame, tmp_path / "in")
    with pytest.raises(UserError, match=rf"in/2\.parquet'.*{message}.*\(the first is row 500 of the file"):
        measured(TASKS, source, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    rows = predicted(7)
    of_two = rows["user"].mask(np.arange(len(rows)) == 9, 10**9)
    for number, (changed, message) in enumerate(
        [
            (rows.drop(columns="label_stars"), "no column 'label_stars', the labels of task 'stars': .*--labels"),
            (rows.drop(columns="predicted_stars"), "no column 'predicted_stars', .*predicted_stars=COLUMN"),
            (rows.drop(columns="user"), "no column 'user'; name another one with --columns user=COLUMN"),
            (rows.drop(columns="request"), "no column 'request'; .*--columns request=COLUMN"),
            (rows.assign(user=0.5), "column 'user' must hold integers or strings, found double"),
            (rows.assign(score="x"), "column 'score' must hold numbers, found (large_)?string"),
            (rows.assign(user=of_two), "request [0-9]+ by 'request' has rows of more .*1000000000.*=user[+]request"),
            (rows.iloc[:0], "contain no row to evaluate"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            measured(TASKS, written(changed, tmp_path / str(number)), tmp_path / "out")
    source = written(rows, tmp_path / "in")
    for task in ("candidate", "weight"):  # which are parts that files need not have
        with pytest.raises(UserError, match=f"no column 'predicted_{task}', the predictions of task '{task}'"):
            measured(["bought", task], source, tmp_path / "out")
    pq.write_table(pa.Table.from_pandas(predicted(8, text=True)), source / "9.parquet")
    with pytest.raises(UserError, match=r"0\.parquet' hold columns of several types.*user.*int64 vs string"):
        measured(TASKS, source, tmp_path / "out")


@pytest.mark.parametrize("column", ["score", "candidate", "weight"])
def test_what_one_file_has_all_must_have(column: str, tmp_path: Path) -> None:
    """Whichever comes first: else some rows would be ranked by the score, and others by the prediction."""
    source = written(predicted(8).assign(weight=2.0), tmp_path / "in")
    pq.write_table(pq.read_table(source / "0.parquet").drop_columns([column]), source / "0.parquet")
    with pytest.raises(UserError, match=rf"in/0\.parquet' has no column '{column}'"):
        measured(["bought"], source, tmp_path / "out")


def test_times_that_distinguish_requests_are_whole_microseconds(tmp_path: Path) -> None:
    frame = predicted(8).assign(request=pd.to_datetime(predicted(8)["request"] // 10**15, unit="s"))
    asked = parse_tasks(["bought"]).with_columns(["request=user+request"])
    source = written(frame, tmp_path / "in")
    assert measured(asked, source, tmp_path / "out")["requests"] == len(frame[["user", "request"]].drop_duplicates())
    fine = pd.to_datetime(np.arange(9), unit="ns")
    pq.write_table(pa.Table.from_pandas(frame.iloc[:9].assign(request=fine)), source / "9.parquet")
    with pytest.raises(UserError, match=r"9\.parquet': column 'request' .* by less than a microsecond"):
        measured(asked, source, tmp_path / "out")


def test_the_output_of_two_models_in_one_folder_is_refused(tmp_path: Path) -> None:
    source = written(predicted(8), tmp_path / "in", files=1)
    (source / "copy.parquet").write_bytes((source / "0.parquet").read_bytes())
    with pytest.raises(UserError, match=r"has candidate [0-9]+ more than once, perhaps because files of two"):
        measured(["bought"], source, tmp_path / "out")
    words = ["--predictions", str(source), "--tasks", "bought", "--keep-duplicates"]
    run("evaluate", *words, "--out", str(tmp_path / "kept"))
    assert json.loads((tmp_path / "kept" / "metrics.json").read_text())["rows"] == 6_000


def test_files_without_rows_count_nothing(tmp_path: Path) -> None:
    frame = predicted(8)
    source = written(frame, tmp_path / "in")
    expected = measured(TASKS, source, tmp_path / "a")
    for name, empty in (("00", frame.iloc[:0]), ("9", pd.DataFrame({item: [] for item in frame}))):
        empty.to_parquet(source / f"{name}.parquet")
    actual = measured(TASKS, source, tmp_path / "b")
    assert actual == expected | {"files": 5}


def test_predictions_of_single_and_double_precision_have_the_same_logloss(tmp_path: Path) -> None:
    """Also where they are sure, nearly or wholly, and where both lie side by side."""
    logits = 9 * np.random.default_rng(0).normal(size=3_000)
    chance = np.where(np.abs(logits) > 20, logits > 0, 1 / (1 + np.exp(-logits)))
    double = predicted(8).assign(predicted_bought=chance)
    single = double.assign(predicted_bought=chance.astype(np.float32))
    sources = [written(item, tmp_path / name) for name, item in (("double", double), ("single", single))]
    sources.append(written(single, tmp_path / "mixed"))
    shutil.copy(sources[0] / "0.parquet", sources[2])
    eps = float(np.finfo(np.float32).eps)
    clipped = np.clip(chance.astype(np.float32).astype(float), eps, 1 - eps)
    expected = log_loss(double["label_bought"].astype(float), clipped)
    for source in sources:
        bought = measured(["bought"], source, tmp_path / "out")["tasks"]["bought"]
        assert bought["logloss"]["value"] == pytest.approx(expected, rel=1e-9), source.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "bought:ordinal"], "--tasks takes NAME, NAME:regression .* found 'bought:ordinal'"),
        (["--tasks", "bought=much"], "found 'bought=much'"),
        (["--tasks", "a", "a"], "--tasks names 'a' twice"),
        (["--tasks", "a", "--columns", "usr=who"], "--columns usr=who: expected PART=COLUMN, where PART is one"),
        (["--tasks", "a", "--columns", "user"], "--columns user: expected PART=COLUMN"),
        ([], "Name the tasks with either --config C or --tasks"),
        (["--tasks", "a", "--model", "m"], "Give only one of --model and --predictions"),
        (["--tasks", "a", "--split", "test"], "--split requires --model"),
        (["--config", "configs/synthetic.yaml", "--training.sampling_correction", "weights", *RATE], "columns weight="),
    ],
)
def test_wrong_words_are_reported(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run("evaluate", "--predictions", str(tmp_path), *words)
    assert re.search(message, capsys.readouterr().err)


def test_predictions_are_compared_with_others_of_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = predicted(20)
    second = frame.sample(frac=1, random_state=0).reset_index(drop=True)  # in another order, in other files
    second["predicted_bought"] = 0.5 * second["predicted_bought"] + 0.5 * np.random.default_rng(0).random(len(second))
    source, others = written(frame, tmp_path / "ours[a]"), tmp_path / "theirs"
    written(second.rename(columns={"user": "viewer", "predicted_stars": "p"}), others, files=2)
    names = ["user=viewer", "predicted_stars=p"]
    out = tmp_path / "out"
    words = ["--tasks", *TASKS, "--resamples", "200", "--out", str(out)]
    run("evaluate", "--predictions", str(source), "--compare-to", str(others), "--compare-to-columns", *names, *words)
    printed = capsys.readouterr().out
    comparison = read_metrics(out)["comparison"]
    sentence = comparison["against"]["theirs"]
    assert comparison["model"] == "ours[a]"
    areas = [roc_auc_score(item["label_bought"].astype(bool), item["predicted_bought"]) for item in (frame, second)]
    assert sentence["groups"]["bought"]["auc"]["value"] == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert sentence["objective"]["value"] == sentence["groups"]["bought"]["auc"]["value"]
    assert sentence["verdict"]["kind"] == "better"
    assert "'ours[a]' is better than 'theirs': auc of bought is higher by " in " ".join(printed.split())
    assert read_metrics(out)["against"]["theirs"]["predictions"] == str(others)
    words += ["--compare-to-columns", "user=user", "predicted_stars=predicted_stars"]
    run("evaluate", "--predictions", str(others), "--compare-to", str(source), "--columns", *names, *words)
    assert read_metrics(out)["comparison"]["against"]["ours[a]"]["verdict"]["kind"] == "worse"
    run("evaluate", "--predictions", str(source), *words[:-3])
    actual = read_metrics(out)
    assert actual["against"] == {}
    assert "comparison" not in actual


def test_predictions_of_other_rows_are_not_compared(tmp_path: Path) -> None:
    """Labels that belong to other requests, as after a wrong join, and a file that is missing."""
    frame, out = predicted(21), tmp_path / "out"
    source, wrong = str(written(frame, tmp_path / "ours")), np.roll(frame["label_bought"], 1)
    for number, (second, sentence) in enumerate(
        [
            (frame.assign(label_bought=wrong), r"on the same rows \(labels of 'bought' differ"),
            (frame.drop(columns="candidate"), r"on the same rows \(their requests or candidates differ"),
            (frame.rename(columns={"predicted_bought": "p"}), "one with --compare-to-columns predicted_bought=COLUMN"),
            (frame.assign(user=frame["user"].astype(str)), r"users of rows differ\)"),
        ]
    ):
        with pytest.raises(UserError, match=sentence):
            measured(TASKS, source, out, against=[str(written(second, tmp_path / str(number)))])
    with pytest.raises(UserError, match="is given twice, and would be compared with itself; give --compare-to another"):
        measured(TASKS, source, out, against=[source])
    assert not (out / "metrics.json").exists()
    with pytest.raises(UserError, match=r"evaluation\.primary_metric is 'acu'"):  # before anything is read
        measured(TASKS, source, out, rules=Evaluation(primary_metric="acu"))


def test_nothing_of_the_users_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and files of theirs that are called as results are, predictions among results, and links to both."""
    frame = predicted(22, rows=600)
    ours, mine = str(written(frame, tmp_path / "ours")), tmp_path / "out" / "against"
    written(frame, mine)
    with pytest.raises(UserError, match=r"overlaps with the predictions in '.*against'. Give another"):
        measured(TASKS, ours, tmp_path / "out", against=[str(mine)])
    assert (mine / "0.parquet").is_file()
    assert not (tmp_path / "out" / "metrics.json").exists()
    frame.to_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(UserError, match="overlaps with the predictions"):
        measured(TASKS, tmp_path / "metrics.parquet", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    monkeypatch.chdir(ours)
    for out in (".", "", "metrics", f"{ours}/a/b", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match="overlaps with the predictions"):
            measured(TASKS, ours, out)
    assert sorted(path.name for path in Path(ours).iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]
