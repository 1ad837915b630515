"""A kind of task is added by one file and one line, and then trains, is evaluated, stands beside trees, and serves."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.added_package import AddedPackage
from tests.pipelines.learnable_log import settings_tree, write_files

pytestmark = pytest.mark.thorough

COUNT = '''
"""The kind `count`: how often something happens. A model predicts the mean of a Poisson distribution."""

import numpy as np
from torch import Tensor

from mmoe_rec.task_kinds.task_kind import TaskKind


class Count(TaskKind):
    """Labels are whole numbers, and logits are logarithms of rates."""

    valid_labels = ("0, 1, 2 or so, or null", lambda values: np.isnan(values) | ((values >= 0) & (values % 1 == 0)))
    valid_predictions = ("a rate", lambda values: (values >= 0) & np.isfinite(values))
    label_error = "task '{}' holds {}, which is no count; write a whole number from 0 on"
    loss_name, lightgbm_objective = "Poisson loss", "poisson"

    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        return logits.exp() - labels * logits

    def prediction(self, logits: Tensor) -> Tensor:
        return logits.exp()

    def log_prediction(self, logits: Tensor) -> Tensor:
        return logits

    def logits(self, predictions: Tensor) -> Tensor:
        return predictions.clamp(min=1e-12).log()


KIND = Count("count")
'''

FOCAL = '''
"""The kind `focal`: binary, with a loss that counts rows less if they are predicted well (Lin et al., ICCV 2017)."""

from torch import Tensor

from mmoe_rec.task_kinds.binary import Binary


class Focal(Binary):
    """Binary with a focal loss of gamma 2."""

    loss_name = "focal loss"

    def loss(self, logits: Tensor, labels: Tensor, label_std: float = 1.0) -> Tensor:
        return (labels - logits.sigmoid()).square() * super().loss(logits, labels)


KIND = Focal("focal")
'''

SCRIPT = """
import contextlib, io, json
import pyarrow.parquet as pq
from mmoe_rec.cli.main import main
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.settings.load import describe_settings

def refusal(words):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            main(words)
        except SystemExit:
            return printed.getvalue()

words = ["--config", "settings.yaml"]
found = {"help": describe_settings(), "unknown": refusal(["features", *words, "--tasks.views.kind", "coutn"])}
for command in ("train", "inspect", "baselines"):
    main([command, *words])
main(["evaluate", *words, "--model", "work/model"])
with open("work/model/example_request.json", encoding="utf-8") as file:
    (request,) = json.load(file)["inputs"]
found["ranking"] = Ranker.load("work/model").rank(**request).to_dict()
log = pq.read_table("log/a.parquet")
views = log["views"].to_pylist()
pq.write_table(log.set_column(log.column_names.index("views"), "views", [[-1.0, *views[1:]]]), "log/a.parquet")
found["wrong"] = refusal(["features", *words])
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def actual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found in a package that has two kinds more, with the files it left and what it printed."""
    folder = tmp_path_factory.mktemp("added")
    package = AddedPackage(folder)
    for name, text, before in (("count", COUNT, "regression"), ("focal", FOCAL, "count")):
        line = f'    "{name}",'
        package.add(
            f"task_kinds/{name}.py", text, listed_in="task_kinds/__init__.py", after=f'    "{before}",', line=line
        )
    tree = settings_tree(folder)
    tasks: dict[str, Any] = tree["tasks"]
    tasks["click"]["kind"] = "focal"
    tasks["liked"] = {"label": "liked", "objective": "satisfaction", "conditional_on": "click"}
    tasks["views"] = {"label": "views", "kind": "count", "objective": "engagement"}
    features = tree["features"] | {"item_views": {"kind": "counter", "task": "views", "by": ["item"]}}
    write_files(
        folder,
        tasks=tasks,
        features=features,
        model=tree["model"] | {"trees": {"max_trees": 60}},
        training=tree["training"] | {"task_weighting": "uncertainty", "calibration": "temperature"},
    )
    random = np.random.default_rng(1)
    for file in ("a.parquet", "b.parquet"):
        log = pq.read_table(folder / "log" / file)
        views = random.poisson(rates(log)).astype(float)
        pq.write_table(
            log.append_column("views", pa.array(views, mask=random.random(len(log)) < 0.1)), folder / "log" / file
        )
    printed = package.run(SCRIPT)
    work, last = folder / "work", printed.rpartition("FOUND ")[2]
    files = {
        "metrics": "evaluation/metrics.json",
        "baselines": "baselines/metrics.json",
        "blends": "model/trees/blends.json",
        "calibration": "model/calibration.json",
    }
    parts = {name: json.loads((work / file).read_text(encoding="utf-8")) for name, file in files.items()}
    trees = (work / "model" / "trees" / "views.txt").read_text(encoding="utf-8")
    rows = pq.read_table(work / "evaluation" / "predictions.parquet")
    return json.loads(last) | parts | {"trees": trees, "rows": rows}


def rates(log: pa.Table) -> np.ndarray:
    """(N,) true means of the counts, up to 20 and more."""
    return np.exp(0.7 * log["price"].to_numpy() + np.sin(log["item"].to_numpy()))


def test_settings_know_its_name(actual: dict[str, Any]) -> None:
    assert "<binary | regression | count | focal>" in actual["help"]
    message = (
        "'tasks.views.kind' must be 'binary', 'regression', 'count' or 'focal', found 'coutn'; did you mean 'count'?"
    )
    assert message in actual["unknown"]


def test_wrong_labels_are_refused_in_its_words(actual: dict[str, Any]) -> None:
    assert "'views' holds -1, which is no count; write a whole number from 0" in actual["wrong"]


def test_it_is_learnt_and_measured(actual: dict[str, Any]) -> None:
    """Counts are predicted by the log link, and a focal task is ranked like a binary one."""
    tasks, rows = actual["metrics"]["tasks"], actual["rows"]
    predicted, label = (rows[f"{part}_views"].to_numpy() for part in ("predicted", "label"))
    observed = ~np.isnan(label)
    assert (predicted > 0).all()
    assert predicted[observed].mean() == pytest.approx(label[observed].mean(), rel=0.1)
    expected = 1 - np.mean((predicted - label)[observed] ** 2) / label[observed].var()
    assert tasks["views"]["r2"]["value"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.4
    assert tasks["click"]["auc"]["value"] > 0.7
    assert tasks["views"].keys().isdisjoint({"auc", "positives"})


def test_trees_stand_beside_it(actual: dict[str, Any]) -> None:
    """They grow with the kind's loss, and are weighed; only binary kinds are calibrated."""
    blend = actual["blends"]["views"]
    assert 0.7 < blend["network"] + blend["trees"] < 1.4
    assert min(blend["network"], blend["trees"]) > 0.1
    assert "objective=poisson" in actual["trees"]
    assert "Poisson loss of validation rows" in json.dumps(actual["baselines"]["facts"])
    assert actual["calibration"].keys() == {"click", "liked"}


def test_it_serves(actual: dict[str, Any]) -> None:
    """The score multiplies predictions as they are."""
    ranking = actual["ranking"]
    predictions = np.array([ranking["predictions"][task] for task in ("click", "liked", "views")])
    np.testing.assert_allclose(ranking["scores"], predictions.prod(axis=0), rtol=1e-5)
