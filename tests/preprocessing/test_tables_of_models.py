"""Tables that go on with new files, and tables made anew of all files, are the same to the last byte."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from mmoe_rec.errors import UserError
from mmoe_rec.features import kinds
from mmoe_rec.features.pipeline import FeaturePipeline
from mmoe_rec.preprocessing.build_inputs import BuildInputs, BuildOptions, IncludedFiles, Logs
from mmoe_rec.preprocessing.extend import WrittenTables, extend_tables, rebuild_tables
from mmoe_rec.preprocessing.prepare import FeatureFolder, prepare
from tests.log.small_logs import remembered, windows_of
from tests.point_in_time.compared_logs import _LACKS, _small_pieces
from tests.point_in_time.drawn_logs import DrawnLog, draw
from tests.preprocessing.growing_log import Growing


class ServedModel:
    """The features of a model, whose tables move on in a folder of their own at each step."""

    def __init__(self, prepared: FeatureFolder, folder: Path, source: str, options: BuildOptions) -> None:
        self.folder, self.source, self.options, self.number = folder, source, options, 0
        self.features = folder / "0"
        shutil.copytree(prepared.serving, self.features)
        shutil.copyfile(prepared.folder / "files.json", self.features / "files.json")
        if (prepared.folder / "requests").is_dir():
            shutil.copytree(prepared.folder / "requests", self.features / "requests")
        self.last = prepared.manifest["request_microseconds"][1]
        self.schema = FeaturePipeline.load(self.features, stores=False).schema

    def logs(self, taken: IncludedFiles | None = None) -> Logs:
        return Logs(
            self.source, self.schema, self.options, None if taken is None else [log.types for log in taken.logs]
        )

    def go_on(self) -> WrittenTables | None:
        taken = IncludedFiles.read(self.features)
        self.number += 1
        out = self.folder / f"{self.number}"
        out.mkdir()
        made = extend_tables(self.features, self.last, self.logs(taken), taken, out)
        if made is not None:
            self.features, self.last = out, made.as_of
        return made

    def rebuilt(self) -> tuple[Path, WrittenTables]:
        out = self.folder / "anew"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out, rebuild_tables(self.folder / "0", self.logs(), out)


def assert_same_tables(first: Path, second: Path, compare_files: bool = True) -> int:
    """All that lies in both folders is the same; gives the rows of memories that were compared.

    How a memory or the requests are divided into files does not matter. compare_files: whether both hold the same files
    of the log, too.
    """
    names = {path.name for path in first.iterdir()} | {path.name for path in second.iterdir()}
    compared = 0
    for name in sorted(names):
        mine, theirs = first / name, second / name
        if mine.suffix == ".json":
            assert mine.read_bytes() == theirs.read_bytes() or name == "files.json", name
            continue
        if name == "requests":
            assert pq.read_table(mine / "rows.parquet") == pq.read_table(theirs / "rows.parquet")
            if not (mine / "requests.parquet").exists():  # requests have no ids
                continue
            mine, theirs = mine / "requests.parquet", theirs / "requests.parquet"
        tables = [remembered(item) if mine.suffix == ".memory" else pq.read_table(item) for item in (mine, theirs)]
        if name == "requests":
            tables = [table.drop_columns(["rows"]) for table in tables]  # rows of the last step
        assert tables[0].schema.equals(tables[1].schema, check_metadata=True), name
        assert tables[0].equals(tables[1]), name
        compared += len(tables[0]) * name.endswith(".memory")
    if compare_files:
        mine, theirs = (
            [{file.uri: file for file in log.files.values()} for log in IncludedFiles.read(item).logs]
            for item in (first, second)
        )
        assert mine == theirs
        assert IncludedFiles.read(first).digest == IncludedFiles.read(second).digest
    return compared


def ids_of(features: Path) -> list:
    pipeline = FeaturePipeline.load(features, stores=False)
    return [vocabulary.ids.to_pylist() for vocabulary in pipeline.vocabularies.values()]


GROWING = [seed for seed in range(4000, 4000 + settings().max_examples) if draw(seed).stages > 1]


@pytest.mark.parametrize("seed", GROWING)
def test_drawn_logs_with_all_that_a_log_may_hold(tmp_path: Path, seed: int) -> None:
    """Among them rows of a request that come with a later stage, regressions, late labels, events of any time."""
    drawn = draw(seed)
    drawn.settings["events"]["bought"]["path"] = str(tmp_path / "events")
    schema, options = kinds.parse_schema(drawn.settings), BuildOptions(**drawn.options)
    with _small_pieces(drawn):
        served = _steps(drawn, tmp_path, schema, options)
        if served is None:
            return
        rebuilt, _ = served.rebuilt()
        assert_same_tables(served.features, rebuilt)


def _steps(drawn: DrawnLog, folder: Path, schema, options: BuildOptions) -> ServedModel | None:
    served = None
    for stage in range(drawn.stages):
        drawn.write(folder, stage)
        try:
            if served is None:
                prepared = prepare(BuildInputs(str(folder / "log"), schema, drawn.windows, folder / "work", options))
                served = ServedModel(prepared, folder / "served", str(folder / "log"), options)
            else:
                served.go_on()
        except UserError as error:
            if served is None and any(lack in str(error) for lack in _LACKS):
                return None
            raise
    return served


def test_tables_of_a_model_whose_vocabulary_lacks_frequent_ids(tmp_path: Path) -> None:
    """Items that have become frequent stay in their buckets; an extension of the features gives them rows."""
    log = Growing.of_eight_days(tmp_path)
    served = ServedModel(FeatureFolder(log.work / "features"), tmp_path / "served", log.source, BuildOptions())
    known = ids_of(served.features)
    log.add(8, 12)
    served.go_on()
    log.extend(windows_of(10, 11))
    assert ids_of(log.work / "features" / "serving") != known == ids_of(served.features)
    mine, theirs = (remembered(item / "bought.memory") for item in (served.features, log.work / "features" / "serving"))
    assert mine.select(["key", "available_at"]).equals(theirs.select(["key", "available_at"]))
    assert not mine.equals(theirs)
    assert_same_tables(served.features, served.rebuilt()[0])


def test_events_alone_move_the_tables_on(tmp_path: Path) -> None:
    log = Growing.of_eight_days(tmp_path)
    served = ServedModel(FeatureFolder(log.work / "features"), tmp_path / "served", log.source, BuildOptions())
    log.add(8, 12)
    late = log.folder / "log" / "99.parquet"
    rows = pq.read_table(late)
    late.unlink()
    before, last = served.features, served.last
    made = served.go_on()
    assert (made.rows, served.last) == (0, last)
    assert made.events > 0
    assert not remembered(before / "n.memory").equals(remembered(served.features / "n.memory"))
    rebuilt = served.rebuilt()[0]
    assert_same_tables(served.features, rebuilt)
    pq.write_table(rows, late)
    served.go_on()
    assert_same_tables(served.features, served.rebuilt()[0])
    assert served.go_on() is None


def test_files_of_a_journal_are_known_by_their_names(tmp_path: Path) -> None:
    log = Growing.of_eight_days(tmp_path)
    served = ServedModel(FeatureFolder(log.work / "features"), tmp_path / "served", log.source, BuildOptions())
    log.add(8, 9)
    made = served.go_on()
    assert made.journal is None
    for number, day in ((7, 9), (12, 10)):
        log.add(day, day + 1)
        newest = log.folder / "log" / f"{100 - log.count + 1}.parquet"
        newest.rename(newest.with_name(f"journal-{'ab' * 16}-{number:08d}.parquet"))
    made = served.go_on()
    assert made.journal == {"id": "ab" * 16, "through": 12}
