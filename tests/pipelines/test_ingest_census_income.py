"""Two small files in the format of Census-Income, and the published ones where they are there."""

import bz2
import gzip
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmoe_rec.errors import UserError
from pipelines.ingest_census_income import COLUMNS, LOG, find_file, ingest, main, read_people

RAW = Path(os.environ.get("MMOE_REC_CENSUS", "../shared/data/census"))
FIRST = (
    "73, Not in universe, 0, 0, High school graduate, 0, Not in universe, Widowed, Not in universe or children, "
    "Not in universe, White, All other, Female, Not in universe, Not in universe, Not in labor force, 0, 0, 0, "
    "Nonfiler, Not in universe, Not in universe, Other Rel 18+ ever marr not in subfamily, Other relative of "
    "householder, 1700.09, ?, ?, ?, Not in universe under 1 year old, ?, 0, Not in universe, United-States, "
    "United-States, United-States, Native- Born in the United States, 0, Not in universe, 2, 0, 95, - 50000."
)


def line(**values: object) -> str:
    """The first person of the published file, with other values."""
    fields = dict(zip((*COLUMNS, "income"), FIRST.split(", "), strict=True))
    assert values.keys() <= fields.keys()
    return ", ".join(str(value) for value in (fields | values).values())


RICH = line(age=44, education="Some college but no degree", marital_status="Never married", income="50000+.")


def write(folder: Path, train: list[str], test: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("data", train), ("test", test)):
        (folder / f"census-income.{name}").write_text("".join(item + "\n" for item in lines), encoding="utf-8")
    return folder


def test_people_and_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [FIRST, RICH], [RICH, FIRST, RICH, FIRST])
    counts = ingest(source, tmp_path / "out", seed=1)
    assert counts == {"train": 2, "validation": 2, "test": 2, "income": 3, "college": 3, "never_married": 3}
    train, test = (pq.read_table(tmp_path / "out" / "log" / f"{name}.parquet") for name in ("train", "test"))
    assert train.schema.equals(LOG)
    first, second = train.to_pylist()
    assert first["age"] == 73
    assert first["instance_weight"] == 1700.09
    assert first["migration_msa"] is None
    assert first["citizenship"] == "Native- Born in the United States"
    assert first["year"] == 95
    labels = [(item["income"], item["college"], item["never_married"]) for item in (first, second)]
    assert labels == [(0, 0, 0), (1, 1, 1)]
    assert train["split"].to_pylist() == ["train"] * 2
    assert sorted(test["split"].to_pylist()) == ["test", "test", "validation", "validation"]


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_files_are_the_same(tmp_path: Path, ending: str, compress) -> None:
    source = write(tmp_path, [FIRST], [RICH])
    plain = source / "census-income.data"
    expected = read_people(plain)
    Path(f"{plain}{ending}").write_bytes(compress(plain.read_bytes()))
    plain.unlink()
    assert read_people(find_file(source, "census-income.data")).equals(expected)


def test_the_seed_decides_on_the_halves(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [FIRST], [FIRST] * 40)
    halves = []
    for number, seed in enumerate((1, 1, 2)):
        ingest(source, tmp_path / str(number), seed)
        halves.append(pq.read_table(tmp_path / str(number) / "log" / "test.parquet")["split"].to_pylist())
    assert halves[0] == halves[1] != halves[2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([FIRST, "1, 2"], "line 2: expected 42 fields, found 2"),
        ([line(age="old")], "line 1: age can't be 'old'"),
        ([line(income="50000")], "line 1: income can't be '50000'"),
        ([line(sex="")], "line 1: sex can't be ''"),
        ([], "has no rows"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    source = write(tmp_path, lines, [FIRST])
    with pytest.raises(UserError, match=rf"census-income\.data'?,? ?{message}"):
        ingest(source, tmp_path / "out", seed=0)
    assert not (tmp_path / "out" / "log").exists()


def test_a_file_that_is_missing_or_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path / "source", [FIRST], [FIRST])
    (source / "census-income.test").unlink()
    with pytest.raises(SystemExit):
        main(["--source", str(source), "--out", str(tmp_path / "out")])
    assert "census-income.test' is missing (also as .gz and .bz2)" in capsys.readouterr().err
    (source / "census-income.test.gz").write_bytes(gzip.compress(FIRST.encode())[:-9])
    with pytest.raises(UserError, match=r"census-income\.test\.gz' can't be read: "):
        ingest(source, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.skipif(not RAW.is_dir(), reason="the published files are not there")
def test_the_published_files(tmp_path: Path) -> None:
    counts = ingest(RAW, tmp_path, seed=17)
    assert counts == {
        "train": 199_523,
        "validation": 49_881,
        "test": 49_881,
        "income": 18_568,
        "college": 100_413,
        "never_married": 129_628,
    }
