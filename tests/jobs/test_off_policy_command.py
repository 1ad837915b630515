"""Estimates of another policy from files: of a part of the log, by columns of any names, and wrong ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.commands import exit_code
from tests.evaluation.test_off_policy import Bandit


def frame(bandit: Bandit, shows: np.ndarray, policy: str, seed: int, rows: int = 6000) -> pd.DataFrame:
    """Rows of a policy, with the probabilities of both."""
    model = bandit.chance * 0.9
    found = bandit.log(shows, bandit.learnt, rows, seed, model)
    return pd.DataFrame(
        {
            "user": [f"visitor {each}" for each in found.users.to_pylist()],
            "propensity": found.propensity,
            "p_new": found.target,
            "label_clicked": found.label.astype(np.int8),
            "q": found.predicted,
            "v": found.expected,
            "policy": policy,
        }
    )


def run(folder: Path, *words: str) -> int:
    places = ("--log", folder / "log", "--out", folder / "out")
    return exit_code("off-policy", *places, "--tasks", "clicked", "--resamples", "100", *words)


def written(folder: Path, *frames: pd.DataFrame) -> None:
    (folder / "log").mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(frames):
        each.to_parquet(folder / "log" / f"{number}.parquet", index=False)


def test_one_log_tells_of_the_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bandit = Bandit()
    random, learnt = frame(bandit, bandit.uniform, "random", 1), frame(bandit, bandit.learnt, "learnt", 2)
    written(tmp_path, pd.concat([random, learnt]).sample(frac=1, random_state=0), learnt.head(0))
    names = ["--columns", "target=p_new", "predicted_clicked=q", "expected_clicked=v"]
    assert run(tmp_path, *names, "--where", "policy=random") == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "off_policy.json").read_text())["tasks"]["clicked"]
    assert found["rows"] == len(random)
    for name in ("snips", "doubly_robust"):
        each = found["estimates"][0][name]
        assert each["low"] <= learnt["label_clicked"].mean() <= each["high"]
        assert not each["low"] <= random["label_clicked"].mean() <= each["high"]
    printed = capsys.readouterr().out
    assert "clicked: mean label of the target policy, 6,000 rows" in printed
    assert "off_policy.json" in printed


def test_without_support_a_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bandit = Bandit()
    rows = frame(bandit, bandit.uniform, "random", 3).assign(propensity=0.1)
    written(tmp_path, rows)
    assert run(tmp_path, "--columns", "target=p_new") == 0
    assert "clicked: no estimate, as target / propensity is 1.6" in capsys.readouterr().out
    assert "estimates" not in json.loads((tmp_path / "out" / "off_policy.json").read_text())["tasks"]["clicked"]


def test_without_users_each_row_is_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bandit = Bandit()
    rows = frame(bandit, bandit.uniform, "random", 5)
    found = []
    for name, each in {"with": rows.assign(user=rows.index), "without": rows.drop(columns="user")}.items():
        written(tmp_path / name, each.head(1000), each.tail(-1000))
        assert run(tmp_path / name, "--columns", "target=p_new") == 0
        found.append(json.loads((tmp_path / name / "out" / "off_policy.json").read_text())["tasks"])
    assert found[0] == found[1]
    assert "each row counts as a user: where users come back, intervals are too narrow" in capsys.readouterr().err


MODELLED = ("target=p_new", "predicted_clicked=q", "expected_clicked=v")


def test_what_contradicts_itself_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What a model expects of another policy than the target; the parts of a log in its path; labels that lack."""
    bandit = Bandit()
    rows = frame(bandit, bandit.uniform, "random", 3)
    rows.loc[::10, "label_clicked"] = np.nan
    rows["v"] = float((bandit.chance * 0.9).mean())
    (tmp_path / "log" / "policy=random").mkdir(parents=True)
    rows.drop(columns="policy").to_parquet(tmp_path / "log" / "policy=random" / "0.parquet", index=False)
    assert run(tmp_path, "--columns", *MODELLED, "--where", "policy=random") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "5,400 rows (600 more have no label)" in printed
    assert "warning: clicked: the doubly robust estimate is 0." in printed
    assert "what the model expects may be of another policy than the target" in printed
    (tmp_path / "named").mkdir()
    written(tmp_path / "named", rows.rename(columns={"q": "predicted_clicked", "v": "expected_clicked"}))
    assert run(tmp_path / "named", "--columns", "target=p_new") == 0
    assert "warning: clicked: the doubly robust estimate is 0." in " ".join(capsys.readouterr().out.split())
    assert run(tmp_path / "named", "--columns", "target=p_new", "--where", "polcy=random") == 2
    assert "has no column 'polcy'; did you mean 'policy'?" in capsys.readouterr().err


def test_users_are_of_one_type(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bandit = Bandit()
    rows = frame(bandit, bandit.uniform, "random", 3)
    written(tmp_path, rows, rows.iloc[:0].astype({"user": object}))  # a file without rows tells no types
    assert run(tmp_path, "--columns", "target=p_new") == 0
    written(tmp_path, rows, rows.assign(user=7))
    assert run(tmp_path, "--columns", "target=p_new") == 2
    assert "column 'user' holds string in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        ({}, [], "has no column 'target'; name another one with --columns target=COLUMN"),
        ({}, ["target=p_new", "user=nobody"], "has no column 'nobody'; name another one with --columns user=COLUMN"),
        ({}, ["target=p_new", "predicted_clicked=q"], "has no column 'expected_clicked'; name another one with"),
        ({"q": 60.0}, [*MODELLED], "column 'q' of "),
        ({}, ["goal=p_new"], "--columns goal=p_new: expected PART=COLUMN, where PART is one of "),
        ({"propensity": 1e-200}, ["target=p_new"], "a probability, 1e-50 to 1, found 1e-200 (the first is row 0"),
        ({"p_new": 1.5}, ["target=p_new"], "column 'p_new' must hold a probability, found 1.5 (the first is row 0"),
        ({"label_clicked": np.inf}, ["target=p_new"], "'label_clicked' must hold a number or null where it is unobs"),
        ({"user": None}, ["target=p_new"], "column 'user' holds null (the first is row 0"),
    ],
)
def test_what_is_wrong_is_named(
    change: dict[str, Any], words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bandit = Bandit()
    written(tmp_path, frame(bandit, bandit.uniform, "random", 4, rows=400).assign(**change))
    assert run(tmp_path, *(["--columns", *words] if words else [])) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "--columns", "target=p_new", "--where", "policy=nobody's") == 2
    assert run(tmp_path, "--where", "policy") == 2
    assert "--where policy: expected COLUMN=VALUE" in capsys.readouterr().err
