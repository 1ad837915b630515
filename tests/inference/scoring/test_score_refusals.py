"""Input that can't be scored ends in one sentence that names file and column, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmoe_rec.errors import UserError
from mmoe_rec.inference.batch_scoring import score_log
from tests.commands import refuse
from tests.inference.scoring.scored import write_finely
from tests.inference.small_model import SmallModel
from tests.log.small_logs import at_times, random_log, times_of, with_column, with_requests


def good() -> pa.Table:
    return with_requests(random_log(6, rows=200), seed=6)


def changed(name: str, values: Callable[[pa.ChunkedArray], pa.Array]) -> pa.Table:
    """A good log with another column."""
    return with_column(good(), name, values(good()[name]))


def with_null(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([*column.to_pylist()[:-1], None], column.type)


def as_text(column: pa.ChunkedArray) -> pa.Array:
    return column.cast(pa.string())


WRONG = {
    "a user of another type": (changed("user", as_text), "column 'user' has the type int64 .* '{file}'"),
    "text as a number": (changed("price", as_text), "'{file}': column 'price' must hold numbers, found string"),
    "lists as an id": (changed("brand", lambda c: pa.array([["a"]] * 200)), "'{file}': column 'brand' must hold"),
    "no feature": (good().drop_columns(["born"]), "'{file}' has no column 'born'"),
    "no request": (good().drop_columns(["request"]), "'{file}' has no column 'request'"),
    "no time": (good().drop_columns(["time"]), "'{file}' has no column 'time'"),
    "a null user": (changed("user", with_null), "'{file}': column 'user' is null, .*199"),
    "two users": (
        changed("user", lambda c: pa.array(np.arange(200))),
        "'{file}' belong to one request .* 'user'",
    ),
    "no rows": (good().slice(0, 0), "has no rows"),
}


@pytest.mark.parametrize("as_of", ["log", "tables"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(small: SmallModel, tmp_path: Path, fine: None, name: str, as_of: str) -> None:
    table, says = WRONG[name]
    source = write_finely(tmp_path / "log", table)
    with pytest.raises(UserError, match=says.replace("{file}", str(source / "0.parquet"))):
        score_log(small.folder, source, tmp_path / "out", as_of)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_log_without_labels_has_nothing_to_count(small: SmallModel, tmp_path: Path) -> None:
    source = write_finely(tmp_path / "log", good().drop_columns(["click", "liked", "spent"]))
    for labels in (False, True):  # which --as-of tables does not take
        with pytest.raises(UserError, match=r"has no column 'click'.* Its columns are: "):
            score_log(small.folder, source, tmp_path / "out", labels=labels)
    assert score_log(small.folder, source, tmp_path / "out", "tables").manifest["rows"] == 200
    # Labels that no counter or history remembers are not needed, and neither is the rest that serving does without.
    source = write_finely(tmp_path / "less", good().drop_columns(["slot"]))
    assert score_log(small.folder, source, tmp_path / "less_out").manifest["rows"] == 200


def test_a_log_of_another_time(small: SmallModel, tmp_path: Path) -> None:
    source = write_finely(tmp_path / "log", good())
    with pytest.raises(UserError, match="--labels needs --as-of log"):
        score_log(small.folder, source, tmp_path / "out", "tables", labels=True)
    for as_of in ("log", "tables"):
        with pytest.raises(UserError, match=r"no row of .* was requested from 2033-05-18T.* to any time"):
            score_log(small.folder, source, tmp_path / "out", as_of, window=(2 * 10**15, None))
    future = write_finely(tmp_path / "future", at_times(good(), times_of(good()) + 10**16))
    with pytest.raises(UserError, match="a request in the future"):
        score_log(small.folder, future, tmp_path / "out")
    assert score_log(small.folder, future, tmp_path / "out", "tables").manifest["rows"] == 200


def test_folders_that_hold_something_else(small: SmallModel, tmp_path: Path) -> None:
    source = write_finely(tmp_path / "log", good())
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains other files than scores, such as 'notes\.txt'"):
        score_log(small.folder, source, out, "tables")
    (out / "notes.txt").unlink()
    score_log(small.folder, source, out, "tables")
    (out / "more.txt").write_text("mine")
    with pytest.raises(UserError, match=r"such as 'more\.txt'"):
        score_log(small.folder, source, out, "tables")
    with pytest.raises(UserError, match="is a file"):
        score_log(small.folder, source, out / "more.txt", "tables")
    with pytest.raises(UserError, match="includes the files of --output"):
        score_log(small.folder, source, source / "scores", "tables")
    with pytest.raises(UserError, match="must be a local or mounted folder"):
        score_log(small.folder, source, "s3://bucket/scores", "tables")


def test_wrong_models(small: SmallModel, tmp_path: Path) -> None:
    source = write_finely(tmp_path / "log", good())
    with pytest.raises(UserError, match="holds no model"):
        score_log(tmp_path, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    with pytest.raises(UserError, match=r"'.*nothing' does not exist. Set --input"):
        score_log(small.folder, tmp_path / "nothing", tmp_path / "out")


def test_columns_of_the_same_name(tmp_path: Path) -> None:
    columns = {"user": "user", "candidate": "score", "time": "time"}
    log = random_log(1, rows=600)
    log = log.append_column("score", log["item"])
    features = {"brand": {"kind": "id", "column": "brand", "min_count": 1}}
    small = SmallModel(tmp_path / "work", log=[log], columns=columns, features=features)
    with pytest.raises(UserError, match="column 'score' of the log has the name of a column that scoring writes"):
        score_log(small.folder, tmp_path / "work" / "log", tmp_path / "out")


def test_the_command_says_one_sentence(small: SmallModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_finely(tmp_path / "log", good())
    for options, says in (
        (["--as-of", "now"], "invalid value for '--as-of': 'now' is not one of 'log', 'tables'"),
        (["--start", "yesterday"], "'yesterday' is not a time. Write it like 2017-09-04"),
        (["--data.worker", "2"], "data.worker"),
        (["--engine", "spark"], "invalid value for '--engine': 'spark' is not one of"),
    ):
        words = ("--model", small.folder, "--input", source, "--output", tmp_path / "out", *options)
        assert says in refuse(capsys, "score", *words)


def test_a_column_that_only_some_files_have_is_not_completed(small: SmallModel, tmp_path: Path) -> None:
    table = good()
    source = write_finely(tmp_path / "log", table.drop_columns(["price"]).slice(0, 100), table.slice(100))
    with pytest.raises(UserError, match=f"'{source / '0.parquet'}' has no column 'price'"):
        score_log(small.folder, source, tmp_path / "out", "tables")


def test_what_needs_no_look_at_the_log_is_refused_at_once(small: SmallModel, tmp_path: Path) -> None:
    for setting in ("--tasks.click.score_weight", "--model.gates.top_k", "--serving.max_candidates"):
        with pytest.raises(UserError, match=f"^{setting} has no effect on scoring"):
            score_log(small.folder, tmp_path / "log", tmp_path / "out", overrides=[setting, "1"])
    with pytest.raises(UserError, match=r"--start 1970-01-01T00:00:00\+00:00 is not before --end"):
        score_log(small.folder, "no/log", tmp_path / "out", window=(2, 2))
    assert not list(tmp_path.iterdir())
