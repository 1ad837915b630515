"""`ablate` beside a plain loop: columns of encoded rows are exchanged one by one, and scikit-learn measures."""

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import r2_score, roc_auc_score

from mmoe_rec.batches.encoded_rows import EncodedRows
from mmoe_rec.evaluation.ablation import GROUP, Part, Worth, choose_to_leave_out, find_parts, hold_rows
from mmoe_rec.evaluation.intervals import Difference
from mmoe_rec.evaluation.summary import Objective
from mmoe_rec.jobs import variants
from mmoe_rec.jobs.evaluate import score_by
from mmoe_rec.model.score import UNCALIBRATED
from mmoe_rec.report.ablation import AblationReport
from tests.batches import encoded_files
from tests.commands import refuse, run, run_and_read
from tests.inference.small_model import SmallModel
from tests.log.small_logs import BASE, random_log, with_requests, write_log
from tests.pipelines.learnable_log import learnable_log, settings_tree
from tests.pipelines.short_trainings import RATES, SMALL
from tests.report.parsed import Page

REPEATS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A model of random weights with every kind of feature, on requests whose rows lie anywhere."""
    work = tmp_path_factory.mktemp("ablated")
    sections = {"columns": {**BASE["columns"], "request": "request"}, "evaluation": {"resamples": 100}}
    sections |= {"tracking": {"uri": f"sqlite:///{work / 'mlflow.db'}"}}
    sections |= {"split": {"train_end": "2023-11-19", "validation_end": "2023-11-20"}}
    world = SmallModel(work, log=[with_requests(random_log(3, rows=1500))], **sections)
    world.write(world.folder)
    return world


def words_of(world: SmallModel, *words: object) -> tuple[object, ...]:
    return ("ablate", "--config", world.config(), "--model", world.folder, *words)


def exchange(world: SmallModel, part: Part, repeat: int, folder: Path) -> Path:
    """Rows in which each feature's columns come from other ones: a loop over values."""
    layout, schema = world.prepared.layout, world.settings.schema_
    rows = pa.concat_tables([pq.read_table(each) for each in sorted(world.prepared.split("test").glob("*.parquet"))])
    columns, generator = rows.to_pydict(), np.random.default_rng([zlib.crc32(part.name.encode()), repeat])
    requests = list(dict.fromkeys(columns["request"]))
    others = [requests[place] for place in generator.permutation(len(requests))]
    donor_of = dict(zip(requests, others, strict=True))
    of_requests = [columns["request"].index(donor_of[each]) for each in columns["request"]]
    of_rows = generator.permutation(len(rows)).tolist()
    exchanged = dict(columns)
    for name in part.features:
        donors = of_requests if schema.role_of(name) in ("user", "context") else of_rows
        own = [f"id.{each.name}" for each in layout.ids if each.feature == name]
        own += [f"dense.{each.name}" for each in layout.dense if each.feature == name]
        for column in own:
            exchanged[column] = [columns[column][donor] for donor in donors]
    folder.mkdir(parents=True)
    pq.write_table(pa.table(exchanged, rows.schema), folder / "rows.parquet")
    return folder


def measure(world: SmallModel, folder: Path) -> dict[str, float]:
    """AUC, or R2, of each task."""
    model = world.model.eval()
    scored = score_by(world.settings, model, world.model_layout, folder, UNCALIBRATED, shown=False)
    found = {}
    for place, task in enumerate(world.settings.tasks):
        label, predicted = scored.labels[:, place], scored.predictions[:, place]
        known = ~np.isnan(label)
        metric = roc_auc_score if world.settings.tasks[task].kind == "binary" else r2_score
        found[task] = float(metric(label[known], predicted[known]))
    return found


def test_losses_are_those_of_a_plain_loop(world: SmallModel, tmp_path: Path) -> None:
    out = world.folder.parent / "ablation"
    printed = run_and_read(*words_of(world, "--split", "test", "--repeats", REPEATS, "--candidates", 8))
    tree = json.loads((out / "ablation.json").read_text())
    numbers = pq.read_table(out / "ablation.parquet").to_pylist()
    assert numbers == tree["losses"]
    parts = {each.name: each for each in find_parts(world.settings.schema_)}
    assert {each["part"] for each in numbers} - {"what may be left out"} == {*parts}
    judged = {"click", "spent"}  # `liked` has too few labels
    assert {each["of"] for each in numbers} == {"objective", *judged}
    whole = measure(world, world.prepared.split("test"))
    for name in ("item", "clicked", "item_click", "values of candidate", "all of user"):
        part = parts[name]
        folders = [exchange(world, part, repeat, tmp_path / name / str(repeat)) for repeat in range(REPEATS)]
        without = [measure(world, folder) for folder in folders]
        found = {each["of"]: each for each in numbers if each["part"] == name}
        for task in judged:
            loss = whole[task] - np.mean([each[task] for each in without])
            assert found[task]["value"] == pytest.approx(loss, rel=1e-6, abs=1e-9), (name, task)
        assert found["objective"]["value"] == pytest.approx(found["click"]["value"])
        assert found["objective"]["low"] < found["objective"]["value"] < found["objective"]["high"]
        assert found["objective"]["bytes"] >= 0
    costs = {each["part"]: each for each in numbers}
    assert costs["item_click"]["milliseconds"] > 0
    assert costs["all of candidate"]["milliseconds"] > costs["item_click"]["milliseconds"]
    item = world.model.tables.embedding_bags["item"].weight
    assert costs["item"]["bytes"] == 4 * item.numel()
    page = " ".join(Page((out / "report.html").read_text(encoding="utf-8")).words.split())
    assert tree["sentences"][0] in printed
    assert tree["sentences"][0][1:].replace("`", "") in page
    assert "`slot` describes placement" in printed


def test_what_it_refuses(world: SmallModel, capsys: pytest.CaptureFixture) -> None:
    told = refuse(capsys, *words_of(world, "--features", "item_clik"))
    assert "names 'item_clik', which the model does not have; did you mean 'item_click'?" in told
    assert "'slot', which describes placement" in refuse(capsys, *words_of(world, "--features", "item", "slot"))
    assert "names 'item' twice" in refuse(capsys, *words_of(world, "--features", "item", "item"))
    assert "belong to --retrain" in refuse(capsys, *words_of(world, "--seeds", "2"))
    assert "1 is not in the range x>=2" in refuse(capsys, *words_of(world, "--retrain", "--seeds", "1"))
    other = ("--retrain", "--features.price", "null", "--candidates", "4")
    assert "whose features are not those of" in refuse(capsys, *words_of(world, *other))
    assert "which holds other things" in refuse(capsys, *words_of(world, "--out", world.prepared.folder / "x"))


@pytest.mark.thorough
def test_a_copy_is_needed_by_the_model_and_by_no_training(tmp_path: Path) -> None:
    """Permuted, both copies of what decides are needed; trained without, neither; noise is left out either way."""
    log, tree = learnable_log(rows=8_000), settings_tree(tmp_path, training=SMALL | RATES)
    random = np.random.default_rng(0).normal(size=len(log))
    log = log.append_column("same_price", log["price"]).append_column("noise", pa.array(random))
    tree["roles"]["candidate"] += ["same_price", "noise"]
    del tree["features"]["item"], tree["features"]["clicked"]
    tree["features"] |= {name: {"kind": "numeric", "column": name} for name in ("same_price", "noise")}
    write_log(tmp_path / "log", log)
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    run("train", "--config", config)
    words = ["ablate", "--config", config, "--model", tmp_path / "work" / "model", "--margin", 0.02]
    words += ["--features", "noise", "price", "same_price", "--retrain", "--seeds", 2]
    printed = run_and_read(*words)
    assert "leave out `noise`: that " in printed
    assert "this model uses `price` and `same_price`, though" in printed.replace(
        "`same_price` and `price`", "`price` and `same_price`"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "_train", None)  # all have ended
        again = run_and_read(*words)
    # A clock measures this saving in each run, and a saving close to zero is left out.
    cost = re.compile(r", and saves \d+\.\d ms of a request")
    assert cost.sub("", again).splitlines()[:5] == cost.sub("", printed).splitlines()[:5]
    assert "--features.noise null" in printed


def worth(name: str, value: float, reach: float, p: float = 1.0) -> Worth:
    return Worth(Part(name, (name,)), Difference(value, value - reach, value + reach, p=p, p_corrected=p))


def test_what_may_be_left_out_together() -> None:
    """Copies of each other are harmless alone and not together; what others read stays with them."""
    worths = [worth("copy", 0.0004, 0.0001), worth("noise", 0.0001, 0.0001), worth("other_copy", 0.0003, 0.0001)]
    worths += [worth("table", 0.0, 0.0001), worth("reader", 0.02, 0.001, p=0.0), worth("wide", -0.002, 0.0029)]
    worths.append(Worth(Part("all of user", ("noise", "copy"), GROUP), Difference(0.0, 0.0, 0.0, p=1.0)))
    asked = list[tuple[str, ...]]()

    def joint(part: Part) -> Worth:
        asked.append(part.features)
        both = {"copy", "other_copy"} <= {*part.features}
        return replace(worth("joint", 0.01 if both else 0.0, 0.0005, p=0.0 if both else 1.0), part=part)

    found = choose_to_leave_out(worths, lambda each: each.is_harmless(0.001, 0.005), joint, {"table": ["reader"]})
    assert found is not None
    assert asked == [("noise", "other_copy", "copy"), ("noise", "other_copy")]
    assert found.part.features == ("noise", "other_copy")
    assert choose_to_leave_out(worths[4:5], lambda each: each.is_harmless(0.001, 0.005), joint, {}) is None


def test_a_loss_that_trainings_do_not_rule_out_is_no_copy() -> None:
    objective = Objective("auc", ("click",), "higher")
    for reach, says in ((0.0005, "models that never had it lose 0.001 at most"), (0.01, "one of up to 0.0101 is not")):
        used, without = worth("price", 0.02, 0.01, p=0.001), worth("price", 0.0001, reach)
        report = AblationReport("", objective, 0.7, 0.001, [used], None, retrained=[without], seeds=3)
        assert any(says in each for each in report.sentences)
        assert any("this model uses `price`" in each for each in report.sentences) == (reach < 0.001)


def test_whole_users_are_held(tmp_path: Path) -> None:
    layout = encoded_files.LAYOUT
    random, tables = np.random.default_rng(0), []
    for start in range(0, 3000, 500):
        table = encoded_files.table(range(start, start + 500))
        users = pa.array([f"user {each}" for each in random.integers(0, 300, 500)])
        tables.append(table.set_column(table.column_names.index("user"), "user", users))
        pq.write_table(tables[-1], tmp_path / f"{start:05d}.parquet")
    whole = pa.concat_tables(tables).to_pandas()
    empty = EncodedRows(tmp_path, replace(layout, tables=(), ids=(), dense=()))
    for most in (1, 700, 3000):
        held = hold_rows(EncodedRows(tmp_path, layout), empty, most, ("user",), weighted=False)
        users = set(held.beside["user"].to_pylist())
        expected = whole[whole["user"].isin(users)]
        assert held.beside["user"].to_pylist() == expected["user"].tolist()
        np.testing.assert_array_equal(held.read.encoded.dense[:, 0], expected["dense.price"])
        assert held.rows == len(expected)
        assert most - 60 < held.rows <= most or most == 1
    assert held.rows == 3000
